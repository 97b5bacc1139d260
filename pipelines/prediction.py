"""The record of a prediction: what was served, and therefore what will be trained on."""

from __future__ import annotations

from typing import Any

import msgspec

from features.usecase import Row, UseCase
from features.vectors import Vector
from pipelines.broker import Message

SENT_HEADER = "sent"


def prediction_message(
    use_case: UseCase,
    *,
    request_id: str,
    event_time: int,
    keys: Row,
    fields: Row,
    vector: Vector,
    schema: str,
    version: str,
    arm: str,
    score: float,
    timestamp: int,
    sent: int,
    shadow: dict[str, Any] | None = None,
    refresh: int = 0,
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
        "version": version,
        "refresh": refresh,
        "arm": arm,
        "score": score,
        "shadow": shadow or {},
    }
    return Message(
        use_case.topic("predictions"),
        msgspec.json.encode(value),
        request_id.encode(),
        use_case.partition_of({**keys, **fields}),  # where the label's event will be
        ((SENT_HEADER, str(sent).encode()),),
        timestamp,
    )
