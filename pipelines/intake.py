"""From raw records to events in event-time order: validation, watermark, late, future and duplicate. Pure."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from features.contracts import Contract, Invalid
from pipelines.broker import Record, TopicPartition, clock_of
from pipelines.step import Event


@dataclass(slots=True)
class Refused:
    """A record for `<uc>.rejected`, and why."""

    record: Record
    reason: str
    detail: str


@dataclass(slots=True)
class Partition:
    """What one input partition has shown so far; times in epoch ms."""

    contract: Contract
    seen: int = 0
    clock: int | None = None

    @property
    def watermark(self) -> int:
        return max(self.seen, self.clock or 0)


@dataclass(slots=True)
class Seen:
    """Ids of one contract within its dedupe horizon, oldest first."""

    ids: set[Any] = field(default_factory=set)
    order: deque[tuple[int, Any]] = field(default_factory=deque)

    def first(self, id: Any, time: int, forget_before: int) -> bool:
        while self.order and self.order[0][0] < forget_before:
            self.ids.discard(self.order.popleft()[1])
        if id in self.ids:
            return False
        self.ids.add(id)
        self.order.append((time, id))
        return True


class Intake:
    """The input side of one partition of a step.

    The watermark is the minimum over the input partitions of max(newest event time - out-of-orderness, clock record):
    nothing earlier will come. An event is handed over once its time lies behind it. A late event (behind what its own
    partition had already shown) is handed over at the instant at which it was met, so that the result is a function
    of the log, however partitions interleave.
    """

    def __init__(self, inputs: Mapping[TopicPartition, Contract]) -> None:
        self.partitions = {tp: Partition(contract) for tp, contract in inputs.items()}
        self.seen = {contract.name: Seen() for contract in inputs.values()}
        self.topics = {topic: i for i, topic in enumerate(sorted({topic for topic, _ in inputs}))}
        self.pending: list[tuple[int, int, int, int, Record, Any]] = []
        self.watermark = 0
        self.counts: Counter[str] = Counter()

    def advance(
        self, records: Sequence[Record], idle: Collection[TopicPartition] = (), quiet_ms: int = 0
    ) -> tuple[list[Event], list[Refused]]:
        """Take records in; hand out the events whose time has come.

        idle : partitions at their end and silent, which hold nothing back (never those that carry clock records)
        quiet_ms : when all are idle, how long ago the newest record was read: event time goes on at that pace
        """
        refused = [r for record in records if (r := self._take(record))]
        self._move(idle, quiet_ms)
        due = []
        while self.pending and self.pending[0][0] < self.watermark:
            applied, _, _, _, record, value = heapq.heappop(self.pending)
            due.append(self._event(record, value, applied))
        return due, refused

    def _take(self, record: Record) -> Refused | None:
        partition = self.partitions[record.topic, record.partition]
        clock = clock_of(record)
        if clock is not None:
            partition.clock = max(clock, partition.clock or 0)
            return None
        contract = partition.contract
        try:
            value = contract.decode(record.value)
            self._check(record, contract, value, partition)
        except Invalid as invalid:
            self.counts[invalid.reason] += 1
            return Refused(record, invalid.reason, invalid.detail)
        time = contract.time_of(value)
        applied = max(time, self.watermark)
        if time < partition.watermark:
            self.counts["counted_late"] += 1
            applied = max(self.watermark, partition.watermark)
        partition.seen = max(partition.seen, time - _ms(contract.out_of_orderness))
        self._wait(applied, record, value)
        return None

    def _wait(self, applied: int, record: Record, value: Any) -> None:
        """Keep an event until `applied` is behind the watermark; equal instants go by topic, partition and offset."""
        place = (applied, self.topics[record.topic], record.partition, record.offset)
        heapq.heappush(self.pending, (*place, record, value))

    def _check(self, record: Record, contract: Contract, value: Any, partition: Partition) -> None:
        time = contract.time_of(value)
        if time > record.timestamp + _ms(contract.max_ahead):
            ahead = (time - record.timestamp) / 1000
            raise Invalid("future", f"event time is {ahead:.0f} s ahead of the record's timestamp")
        if contract.id is not None:
            id, horizon = contract.id_of(value), partition.watermark - _ms(contract.dedupe)
            if not self.seen[contract.name].first(id, max(time, partition.watermark), horizon):
                raise Invalid("duplicate", f"{contract.id} {id!r} was seen before")

    def _move(self, idle: Collection[TopicPartition], quiet_ms: int) -> None:
        holding = [p.watermark for tp, p in self.partitions.items() if p.clock is not None or tp not in idle]
        if holding:
            self.watermark = max(self.watermark, min(holding))
        elif newest := max(p.watermark for p in self.partitions.values()):
            self.watermark = max(self.watermark, newest + quiet_ms)

    def _event(self, record: Record, value: Any, applied: int) -> Event:
        contract = self.partitions[record.topic, record.partition].contract
        time = contract.time_of(value)
        return Event(contract, value, time, applied, record.partition, record.offset, record.headers, record)

    def snapshot(self) -> Any:
        return {
            "watermark": self.watermark,
            "partitions": [[t, p, s.seen, s.clock] for (t, p), s in self.partitions.items()],
            "seen": {name: list(s.order) for name, s in self.seen.items()},
            "pending": [[applied, *pack_record(record)] for applied, _, _, _, record, _ in self.pending],
            "counts": dict(self.counts),
        }

    def restore(self, data: Any) -> None:
        self.watermark, self.counts = data["watermark"], Counter(data["counts"])
        for topic, p, seen, clock in data["partitions"]:
            if (topic, p) in self.partitions:
                self.partitions[topic, p].seen, self.partitions[topic, p].clock = seen, clock
        for name, order in data["seen"].items():
            self.seen[name] = Seen({id for _, id in order}, deque((time, id) for time, id in order))
        for applied, *packed in data["pending"]:
            record = unpack_record(packed)
            contract = self.partitions[record.topic, record.partition].contract
            self._wait(applied, record, contract.decode(record.value))


def pack_record(record: Record) -> list[Any]:
    """A record as plain values."""
    headers = [[name, value] for name, value in record.headers]
    return [record.topic, record.partition, record.offset, record.timestamp, record.key, record.value, headers]


def unpack_record(data: Sequence[Any]) -> Record:
    topic, partition, offset, timestamp, key, value, headers = data
    return Record(topic, partition, offset, timestamp, key, value, tuple((n, v) for n, v in headers))


def _ms(duration: timedelta) -> int:
    return round(duration.total_seconds() * 1000)
