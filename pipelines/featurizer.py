"""The featurizer: events in, rows of the stream feature views out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from features.contracts import Contract
from features.engine import Applied, Engine
from features.usecase import UseCase
from features.windows import ViewRows
from pipelines.step import Event, Outputs, Rejection, Rows


class Featurizer:
    """Executes a use case's views. Online: the newest row of each changed key; offline: every row."""

    name = "featurizer"

    def __init__(self, use_case: UseCase) -> None:
        self.engine = Engine(use_case)
        self.inputs: dict[str, Contract] = use_case.event_topics
        self.outputs: tuple[str, ...] = ()

    @property
    def plan(self) -> dict[str, Any]:
        return self.engine.plan

    def process(self, events: Sequence[Event], watermark: int) -> Outputs:
        applied = [Applied(e.contract.name, e.value, e.time, e.applied) for e in events]
        late = [self.engine.too_late(a) for a in applied]
        out = Outputs()
        out.rejected = [
            Rejection(e, "late", "older than every window") for e, gone in zip(events, late, strict=True) if gone
        ]
        kept = [a for a, gone in zip(applied, late, strict=True) if not gone]
        for name, rows in self.engine.advance(kept, watermark).items():
            out.offline.append(Rows(name, rows.keys, rows.times.tolist(), rows.columns))
            out.online.append(newest(name, rows))
        return out

    def snapshot(self) -> bytes:
        return self.engine.snapshot()

    def restore(self, data: bytes) -> None:
        self.engine.restore(data)


def newest(name: str, rows: ViewRows) -> Rows:
    """The newest row of each key."""
    at = rows.last.nonzero()[0].tolist()
    columns = {n: [c[i] for i in at] for n, c in rows.columns.items()}
    return Rows(name, [rows.keys[i] for i in at], rows.times[at].tolist(), columns)
