"""The scorer as a process: the models that serve now, and requests checked as the predictor checks them."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from features.contracts import Invalid
from features.usecase import Row, UseCase
from pipelines.scorer import Scorer
from services import wiring
from services.arms import Arms
from services.predict_request import Refused, RequestDecoder
from services.serving_state import ModelSlot, Prior, Serving, follow
from services.settings import Settings

STARTUP_S = 60.0


def make_scorer(settings: Settings, use_case: UseCase) -> Callable[[int], Scorer]:
    """Partition -> scorer; all share the models, which follow `<uc>.models`."""
    slot = ModelSlot(Serving(Prior(use_case.prior)))
    follow(settings, use_case, wiring.broker(settings), slot).wait_caught_up(STARTUP_S)
    decoder = RequestDecoder(use_case, allow_event_time=True, new_id=lambda: str(time.time_ns()))

    def parse(entities: Row, fields: Row) -> tuple[Row, Row]:
        try:
            (asked,) = decoder.decode(msgspec.json.encode({"entities": entities, "fields": fields}))
        except Refused as refused:
            raise Invalid("invalid", str(refused)) from None
        return asked.entities, asked.fields

    arms = Arms(use_case, slot)
    return lambda partition: Scorer(use_case, parse, arms.answers)
