"""The runner: gives every step its Kafka input, watermark, commits, dead letters and shutdown.

A commit is, in this order: online rows acknowledged, closed table files written, snapshot written, one Kafka
transaction with the outputs, the input positions and ``<snapshot>:<watermark ms>`` as their metadata. Killed anywhere,
the next owner loads the snapshot that the positions name and goes on: nothing is lost or doubled.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from features.errors import StateError
from features.usecase import UseCase
from pipelines.broker import Broker, Consumer, Message, Position, Producer, Record, TopicPartition, clock_message
from pipelines.checkpoint import Checkpoints, parse_metadata
from pipelines.intake import Refused
from pipelines.step import Rows, Step
from pipelines.task import Produced, Task, pack_call

RAW_LIMIT, RAW_KEPT = 65_536, 4_096
log = structlog.get_logger()


class OnlineStore(Protocol):
    """Where changed rows become readable."""

    def write(self, rows: Sequence[Rows]) -> None:
        """Returns when every row is acknowledged."""


@dataclass(frozen=True)
class CommitPolicy:
    """When the runner commits: after so many seconds or records with something to commit."""

    seconds: float = 0.5
    records: int = 10_000

    @classmethod
    def every(cls, seconds: float) -> CommitPolicy:
        return cls(seconds)


@dataclass
class Owned:
    """A partition this instance owns: its task, and what has gathered since the last commit."""

    task: Task
    checkpoints: Checkpoints
    producer: Producer
    files: list[str]
    calls: list[object] = field(default_factory=list)
    produced: Produced = field(default_factory=Produced)
    committed_watermark: int = 0
    records: int = 0


class Runner:
    """Runs one step over the partitions that its consumer group gives it.

    Parameters
    ----------
    make_step : partition -> step
    state_url : root of snapshots and table files
    store : the online store, for steps with online rows
    on_commit : called with the messages of each commit, after it (a mirror of the state, say)
    idle_timeout : seconds of silence after which a partition at its end holds nothing back
    """

    def __init__(
        self,
        broker: Broker,
        use_case: UseCase,
        make_step: Callable[[int], Step],
        state_url: str,
        *,
        store: OnlineStore | None = None,
        on_commit: Callable[[Sequence[Message]], None] | None = None,
        policy: CommitPolicy = CommitPolicy(),
        idle_timeout: float = 0.05,
    ) -> None:
        self.broker, self.use_case, self.make_step, self.state_url = broker, use_case, make_step, state_url
        self.store, self.on_commit, self.policy, self.idle_timeout = store, on_commit, policy, idle_timeout
        probe = make_step(0)
        self.name, self.inputs, self.outputs = probe.name, dict(probe.inputs), list(probe.outputs)
        self.group = f"{use_case.name}.{self.name}"
        self.log = log.bind(use_case=use_case.name, step=self.name)
        self.owned: dict[int, Owned] = {}
        self.last_read: dict[TopicPartition, float] = {}
        self.newest_read = self.last_commit = time.monotonic()
        self.reported: Counter[str] = Counter()
        self.consumer: Consumer

    def run(self, stop: threading.Event, *, once: bool = False) -> None:
        """Work until `stop` is set, or with `once` up to the end that the input has now (strictly by watermark)."""
        if once and self.broker.members(self.group):
            self.log.info("another instance owns this group and is working on it: nothing to do")
            return
        self.consumer = self.broker.consumer(
            list(self.inputs), group=self.group, on_assigned=self._assigned, on_revoked=self._revoked
        )
        try:
            while not self.owned and once and not stop.is_set():
                self._turn(strict=True)
            ends = self.consumer.end_offsets(self._partitions()) if once else {}
            while not stop.is_set() and not (once and self._reached(ends)):
                self._turn(strict=once)
            self._commit_all()
        finally:
            owned, self.owned = self.owned, {}  # closing hands partitions over, and what failed must not commit
            self.consumer.close()
            for one in owned.values():
                one.producer.close()

    def _partitions(self) -> list[TopicPartition]:
        return [(topic, i) for i in self.owned for topic in self.inputs]

    def _reached(self, ends: Mapping[TopicPartition, int]) -> bool:
        return all(self.consumer.position(tp) >= end for tp, end in ends.items())

    def _turn(self, strict: bool) -> None:
        """One poll, one call per owned partition, one commit if it is due."""
        records = self.consumer.poll(self.idle_timeout)
        now = time.monotonic()
        by_partition: dict[int, list[Record]] = {}
        for record in records:
            by_partition.setdefault(record.partition, []).append(record)
            self.last_read[record.topic, record.partition] = now
        if records:
            self.newest_read = now
        urgent = False
        for i, owned in self.owned.items():
            urgent |= self._advance(i, owned, by_partition.get(i, []), now, strict)
        if urgent or now - self.last_commit >= self.policy.seconds or self._gathered() >= self.policy.records:
            self._commit_all()

    def _gathered(self) -> int:
        return sum(owned.records for owned in self.owned.values())

    def _advance(self, i: int, owned: Owned, records: list[Record], now: float, strict: bool) -> bool:
        """Whether the commit should follow at once: a clock moved the watermark and nothing is left to read."""
        task = owned.task
        idle, quiet_ms = ([], 0) if strict else self._idle(i, now)
        if not records and not idle:
            return False
        before = task.watermark
        produced = task.advance(records, idle, quiet_ms)
        if not records and task.watermark == before:
            return False
        owned.calls.append(pack_call(records, idle, quiet_ms))
        owned.records += len(records)
        if produced.online and self.store:
            self.store.write(produced.online)
        gathered = owned.produced
        gathered.messages += produced.messages
        gathered.refused += produced.refused
        gathered.closed += produced.closed
        clocked = any(p.clock is not None for p in task.intake.partitions.values())
        ended = all(self.consumer.at_end((topic, i)) for topic in self.inputs)
        return clocked and ended and task.watermark > before

    def _idle(self, i: int, now: float) -> tuple[list[TopicPartition], int]:
        tps = [(topic, i) for topic in self.inputs]
        silent = [
            tp for tp in tps if now - self.last_read.get(tp, 0.0) >= self.idle_timeout and self.consumer.at_end(tp)
        ]
        return silent, round((now - self.newest_read) * 1000) if len(silent) == len(tps) else 0

    def _commit_all(self) -> None:
        for i, owned in self.owned.items():
            if owned.calls:
                self._commit(i, owned)
        self.last_commit = time.monotonic()
        self._report()

    def _commit(self, i: int, owned: Owned) -> None:
        checkpoints, produced = owned.checkpoints, owned.produced
        closed: list[str] = []
        for table, rows in produced.closed:
            closed.append(checkpoints.write_table(table, rows, checkpoints.number * 1000 + len(closed)))
        owned.files += closed
        rebased = checkpoints.wants_base
        if rebased:
            name = checkpoints.save_base(owned.task.plan, owned.task.snapshot(), owned.files)
        else:
            name = checkpoints.save_delta(owned.calls, closed)
        watermark = owned.task.watermark
        messages = produced.messages + [self._rejected(r) for r in produced.refused]
        if watermark > owned.committed_watermark:
            messages += [clock_message(topic, i, watermark) for topic in self.outputs]
        owned.producer.send(messages)
        positions = {(t, i): Position(self.consumer.position((t, i)), f"{name}:{watermark}") for t in self.inputs}
        owned.producer.commit(positions, self.consumer)
        if rebased:
            checkpoints.clean_snapshots(checkpoints.number)
        if self.on_commit and messages:
            self.on_commit(messages)
        owned.calls, owned.produced, owned.records = [], Produced(), 0
        owned.committed_watermark = watermark

    def _rejected(self, refused: Refused) -> Message:
        record = refused.record
        raw = record.value or b""
        value = {
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "step": self.name,
            "reason": refused.reason,
            "detail": refused.detail,
            "raw": base64.b64encode(raw if len(raw) <= RAW_LIMIT else raw[:RAW_KEPT]).decode(),
            "size": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
        }
        return Message(self.use_case.topic("rejected"), json.dumps(value).encode(), record.key, record.partition)

    def _report(self) -> None:
        counts: Counter[str] = sum((o.task.intake.counts for o in self.owned.values()), Counter())
        del counts["counted_late"]  # they count, only later; predictions of concurrent requests often are
        if counts != self.reported:
            self.log.warning("rejected so far", **counts)
            self.reported = counts

    def _assigned(self, partitions: set[TopicPartition]) -> None:
        for i in sorted({p for _, p in partitions} - set(self.owned)):
            self.owned[i] = self._own(i)
            self.log.info("partition owned", partition=i, watermark=self.owned[i].task.watermark)

    def _own(self, i: int) -> Owned:
        """Fence the previous owner, load what it committed, forget what it didn't."""
        producer = self.broker.producer(transactional_id=f"{self.group}.{i}")
        root = f"{self.state_url}/{self.use_case.name}/{self.name}/{i}"
        checkpoints = Checkpoints(root, secrets.token_hex(4))
        task = Task(self.use_case, self.make_step(i), i)
        committed = self.consumer.committed([(topic, i) for topic in self.inputs])
        files: list[str] = []
        if committed:
            name = max(parse_metadata(p.metadata)[0] for p in committed.values())
            loaded = checkpoints.load(name, task.plan)
            task.restore(loaded.state, loaded.deltas)
            files = loaded.files
            for tp, position in committed.items():
                self.consumer.seek(tp, position.offset)
        elif checkpoints.newest() > 1:
            raise StateError(
                f"{root} holds snapshots, but group {self.group} has no committed positions: "
                "restore the group's offsets, or remove the folder to start over"
            )
        checkpoints.clean(files)
        return Owned(task, checkpoints, producer, files, committed_watermark=task.watermark if committed else 0)

    def _revoked(self, partitions: set[TopicPartition]) -> None:
        for i in {p for _, p in partitions} & set(self.owned):
            owned = self.owned.pop(i)
            if owned.calls:
                self._commit(i, owned)
            owned.producer.close()
            self.log.info("partition handed over", partition=i)
