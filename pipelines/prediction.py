"""The record of a prediction: what was served, and therefore what will be trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple

import msgspec

from features.usecase import Row, UseCase
from features.vectors import Vector
from pipelines.broker import SENT_HEADER, Message


def in_share(keys: Sequence[object], version: str, share: float) -> bool:
    """Whether a challenger answers for these entity keys; another version's share takes others."""
    text = "\x1f".join([version, *map(str, keys)])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) < share * 2**64


class Choice(NamedTuple):
    """The answer to a row: which version gave it, with which refresh of its weights, in which arm.

    shadow : version that did not answer -> its score, None when it failed or was no number
    score_ms : version -> ms a row that its run took
    """

    version: str
    refresh: int
    arm: Literal["champion", "canary"]
    score: float
    shadow: Mapping[str, float | None]
    score_ms: Mapping[str, float]


def prediction_message(
    use_case: UseCase,
    choice: Choice,
    *,
    request_id: str,
    event_time: int,
    keys: Row,
    fields: Row,
    vector: Vector,
    schema: str,
    timestamp: int,
    sent: int,
) -> Message:
    """One record of `<uc>.predictions`; `event_time`, `timestamp` (the record's) and `sent` (wall clock): epoch ms."""
    value = {
        "request_id": request_id,
        "event_time": event_time,
        "entities": keys,
        "fields": fields,
        "features": vector.features,
        "schema": schema,
        "feature_times": vector.feature_times,
        **choice._asdict(),
    }
    return Message(
        use_case.topic("predictions"),
        msgspec.json.encode(value),
        request_id.encode(),
        use_case.partition_of({**keys, **fields}),  # where the label's event will be
        ((SENT_HEADER, str(sent).encode()),),
        timestamp,
    )
