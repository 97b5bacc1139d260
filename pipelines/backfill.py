"""A new or changed view over history, and then live without a gap.

A backfill is a bounded featurizer of that one view with a consumer group and a state of its own: it reads the topics
from their start, may be killed, and goes on. The live featurizer, which has started the view empty and keeps its rows
to itself, adopts it between two commits: it reads what lies between the backfill's positions and its own, takes over
windows and offline rows, and serves the view from that commit on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

from fsspec.core import url_to_fs

from features.errors import ConfigError
from features.usecase import UseCase
from features.windows import compile_view
from pipelines.broker import Broker, Record, TopicPartition
from pipelines.checkpoint import Checkpoints, Loaded, Plan, parse_metadata
from pipelines.featurizer import Featurizer
from pipelines.runner import Owned
from pipelines.step import Due, Event, Outputs
from pipelines.tables import arrow_table
from pipelines.task import Task

FROM = "from"


def step_name(use_case: UseCase, view: str) -> str:
    """The name of a backfill as a step: another definition of the view is another backfill."""
    found = next((v for v in use_case.views if v.name == view), None)
    if found is None:
        raise ConfigError(f"{use_case.name} has no view {view!r}; it has {', '.join(v.name for v in use_case.views)}")
    return f"backfill-{view}-{hashlib.sha256(repr(compile_view(found)).encode()).hexdigest()[:8]}"


class Backfill(Featurizer):
    """The featurizer of one view; it reads all topics, so that its watermark is what the live one's was.

    from_ms : events before it (epoch ms) don't count
    """

    def __init__(self, use_case: UseCase, view: str, from_ms: int = 0) -> None:
        self.name = step_name(use_case, view)
        views = tuple(v for v in use_case.views if v.name == view)
        timers = {name: rule for name, rule in use_case.timers.items() if name == view}
        super().__init__(replace(use_case, views=views, timers=timers))
        self.from_ms = from_ms

    @property
    def plan(self) -> dict[str, Any]:
        return {**super().plan, FROM: self.from_ms}

    def process(self, events: Sequence[Event], watermark: int) -> Outputs:
        assert isinstance(events, Due)
        return super().process(events.since(self.from_ms), watermark)


def forget(broker: Broker, use_case: UseCase, state_url: str, view: str) -> bool:
    """Remove what the backfill of a view has left, which nobody needs any more; False when it is at work or there is
    none. Killed in the middle, it goes on when it is called again."""
    name = step_name(use_case, view)
    fs, root = url_to_fs(f"{state_url}/{use_case.name}/{name}")
    there = fs.exists(root)
    if not (there or broker.committed(use_case.topic(name))) or broker.members(use_case.topic(name)):
        return False
    if there:
        fs.rm(root, recursive=True)
    broker.forget(use_case.topic(name))
    return True


class _Found(NamedTuple):
    """A backfill's newest commit: its snapshot, where that lies, and the positions it stands at."""

    loaded: Loaded
    checkpoints: Checkpoints
    positions: dict[TopicPartition, int]


class Adoption:
    """What the live featurizer's runner asks, now and then, about views that it doesn't serve yet."""

    def __init__(self, broker: Broker, use_case: UseCase, state_url: str) -> None:
        self.broker, self.use_case, self.state_url = broker, use_case, state_url

    def ready(self, view: str, partition: int) -> bool:
        """Whether there is a backfill of the view as it is defined now."""
        return self._find(view, partition) is not None

    def adopt(self, owned: Owned, view: str, positions: Mapping[TopicPartition, int]) -> bool:
        """Bring a finished backfill of `view` to the owner's positions and watermark, and take it over.

        False when there is none, or it is at work or ahead of the owner. The owner's next snapshot must be a base.
        """
        partition = next(iter(positions))[1]
        found = self._find(view, partition)
        if found is None or any(found.positions.get(tp, 0) > position for tp, position in positions.items()):
            return False
        if self.broker.members(self.use_case.topic(step_name(self.use_case, view))):
            return False
        step = Backfill(self.use_case, view, found.loaded.plan.parts[FROM])
        task = Task(self.use_case, step, partition)
        task.restore(found.loaded.state, found.loaded.deltas)
        calls = (task.advance(records) for records in self._between(found.positions, positions))
        for produced in (*calls, task.advance([], at_least=owned.task.watermark)):
            owned.online += produced.online
            owned.produced.closed += produced.closed
        self._take_over(owned, view, task, found)
        return True

    def _find(self, view: str, partition: int) -> _Found | None:
        step = Backfill(self.use_case, view)
        group = self.broker.committed(self.use_case.topic(step.name))
        mine = {tp: p for tp, p in group.items() if tp[1] == partition}
        if not mine:
            return None
        root = f"{self.state_url}/{self.use_case.name}/{step.name}/{partition}"
        checkpoints = Checkpoints(root, "reader")
        loaded = checkpoints.read(max(parse_metadata(p.metadata) for p in mine.values()).snapshot)
        same = loaded.plan.contracts == Plan.of(step).contracts
        return _Found(loaded, checkpoints, {tp: p.offset for tp, p in mine.items()}) if same else None

    def _between(
        self, start: Mapping[TopicPartition, int], end: Mapping[TopicPartition, int]
    ) -> Iterator[list[Record]]:
        with closing(self.broker.consumer(sorted({topic for topic, _ in end}))) as consumer:
            others = [tp for tp in consumer.assignment() if tp not in end]
            consumer.pause(others)
            for tp in end:
                consumer.seek(tp, start.get(tp, 0))
            while any(consumer.position(tp) < offset for tp, offset in end.items()):
                yield [r for r in consumer.poll(0.2) if r.offset < end.get((r.topic, r.partition), 0)]

    def _take_over(self, owned: Owned, view: str, task: Task, found: _Found) -> None:
        featurizer = owned.task.step
        assert isinstance(featurizer, Featurizer)
        featurizer.engine.adopt(view, task.step.snapshot())
        for file in found.loaded.files:
            owned.checkpoints.copy(found.checkpoints, file)
        owned.files = [f for f in owned.files if not f.startswith(f"{view}/")] + found.loaded.files
        if rows := task.tables.pop(view, []):
            owned.task.tables[view] = [arrow_table(self.use_case, view, rows)]
