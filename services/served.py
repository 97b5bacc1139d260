"""What was served and what came of it, read back from Kafka as columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from features.inputs import Inputs, encode
from features.usecase import ModelInputs, UseCase
from pipelines.broker import Broker, clock_of
from services.topic_reader import read_all

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
CHUNK = 2000  # vectors decoded at a time


class Prediction(msgspec.Struct):
    """A record of `<uc>.predictions` or `.examples`; the vector stays JSON until it is asked for.

    schema : of the vector; another one when the use case's features were others then
    """

    request_id: str
    event_time: int
    version: str
    arm: str
    score: float
    entities: msgspec.Raw
    fields: msgspec.Raw
    features: msgspec.Raw
    label: float | None = None
    label_time: int | None = None
    schema: str = ""

    def vector(self) -> dict[str, Any]:
        """The features by name."""
        vector: dict[str, Any] = msgspec.json.decode(self.features)
        return vector


@dataclass(frozen=True)
class Examples:
    """Labelled predictions in columns, by (event time, request id); times in epoch ms."""

    event_time: Ints
    label: Floats
    label_time: Ints
    score: Floats
    version: npt.NDArray[Any]
    records: list[Prediction]

    @classmethod
    def of(cls, records: Sequence[Prediction]) -> Examples:
        rows = sorted(records, key=lambda r: (r.event_time, r.request_id))
        times = np.array([[r.event_time, r.label_time] for r in rows], np.int64).reshape(len(rows), 2)
        values = np.array([[r.label, r.score] for r in rows], np.float64).reshape(len(rows), 2)
        version = np.array([r.version for r in rows], object)
        return cls(times[:, 0], values[:, 0], times[:, 1], values[:, 1], version, rows)

    def __len__(self) -> int:
        return len(self.records)

    def inputs(self, declared: ModelInputs, rows: Ints) -> Inputs:
        """What a model reads of these rows."""
        starts = range(0, max(1, len(rows)), CHUNK)
        return Inputs.join([encode(declared, [self.records[i].vector() for i in rows[s : s + CHUNK]]) for s in starts])


def read_predictions(broker: Broker, use_case: UseCase) -> list[Prediction]:
    """Every prediction once: of records with one request id the first counts."""
    first: dict[bytes, Prediction] = {}
    decoder = msgspec.json.Decoder(Prediction)
    for record in read_all(broker, use_case.topic("predictions")):
        if record.value is not None and record.key is not None and record.key not in first:
            first[record.key] = decoder.decode(record.value)
    return list(first.values())


def read_examples(broker: Broker, use_case: UseCase) -> Examples:
    """Every example."""
    decoder = msgspec.json.Decoder(Prediction)
    records = read_all(broker, use_case.topic("examples"))
    return Examples.of([decoder.decode(r.value) for r in records if r.value is not None])


def count_events(broker: Broker, use_case: UseCase) -> dict[str, int]:
    """Events on each event topic, clock records left out."""
    topics = use_case.event_topics.items()
    return {c.name: sum(clock_of(record) is None for record in read_all(broker, topic)) for topic, c in topics}
