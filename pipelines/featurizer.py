"""The featurizer: events in, rows of the stream feature views out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from features.contracts import Contract
from features.engine import Engine
from features.usecase import UseCase
from features.windows import ViewRows
from pipelines.step import Due, Event, Outputs, Rejection, Rows


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
        assert isinstance(events, Due)
        changed, refused = self.engine.advance(events.columns(), watermark)
        out = Outputs(rejected=[Rejection(events[r.position], r.reason, r.detail) for r in refused])
        for name, rows in changed.items():
            out.offline.append(_rows(name, rows))
            out.online.append(out.offline[-1] if rows.newest.all() else out.offline[-1].take(rows.newest))
        return out

    def current(self) -> list[Rows]:
        """The row of every key, as of the watermark."""
        return [_rows(name, rows) for name, rows in self.engine.current().items()]

    def snapshot(self) -> bytes:
        return self.engine.snapshot()

    def restore(self, data: bytes) -> None:
        self.engine.restore(data)


def _rows(name: str, rows: ViewRows) -> Rows:
    return Rows(name, rows.keys, rows.times, dict(rows.columns))
