"""From raw records to events in event-time order: validation, watermark, late, future and duplicate. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from operator import attrgetter
from typing import Any

from features.contracts import Contract, Invalid
from pipelines.broker import Record, TopicPartition, clock_of
from pipelines.step import Due, Waiting


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
        self.contracts = [next(c for (t, _), c in inputs.items() if t == topic) for topic in self.topics]
        self.pending: list[Waiting] = []
        self.watermark = 0
        self.counts: Counter[str] = Counter()

    def advance(
        self, records: Sequence[Record], idle: Collection[TopicPartition] = (), quiet_ms: int = 0, at_least: int = 0
    ) -> tuple[Due, list[Refused]]:
        """Take records in; hand out the events whose time has come.

        idle : partitions at their end and silent, which hold nothing back (never those that carry clock records)
        quiet_ms : when all are idle, how long ago the newest record was read: event time goes on at that pace
        at_least : a watermark that another reader of the same records has reached
        """
        by_partition: dict[TopicPartition, list[Record]] = {}
        for record in records:
            by_partition.setdefault((record.topic, record.partition), []).append(record)
        refused = [r for tp, own in by_partition.items() for r in self._take(tp, own)]
        self._move(idle, quiet_ms)
        self.watermark = max(self.watermark, at_least)
        self.pending.sort()
        ready = bisect_left(self.pending, (self.watermark,))
        due, self.pending = self.pending[:ready], self.pending[ready:]
        return Due(self.contracts, due), refused

    def _take(self, tp: TopicPartition, records: Sequence[Record]) -> list[Refused]:
        """Records of one partition, in their order: clocks move it, events wait or are refused."""
        partition = self.partitions[tp]
        contract, topic, refused = partition.contract, self.topics[tp[0]], []
        clocks = [clock_of(r) if r.value is None else None for r in records]
        events = [r for r, clock in zip(records, clocks, strict=True) if clock is None]
        decoded = iter(contract.decode_many([r.value for r in events]))
        horizon, slack, seen = _ms(contract.dedupe), _ms(contract.out_of_orderness), self.seen[contract.name]
        time_of, id_of, ahead = attrgetter(contract.time), contract.id, _ms(contract.max_ahead)
        for record, clock in zip(records, clocks, strict=True):
            mark = partition.watermark
            if clock is not None:
                partition.clock = max(clock, partition.clock or 0)
                continue
            value = next(decoded)
            if isinstance(value, Invalid):
                refused.append(Refused(record, value.reason, value.detail))
                continue
            time = record.timestamp if contract.by_arrival else time_of(value)
            if time > record.timestamp + ahead:
                late = f"event time is {(time - record.timestamp) / 1000:.0f} s ahead of the record's timestamp"
                refused.append(Refused(record, "future", late))
                continue
            if id_of and not seen.first(id := getattr(value, id_of), max(time, mark), mark - horizon):
                refused.append(Refused(record, "duplicate", f"{id_of} {id!r} was seen before"))
                continue
            if time < mark:
                self.counts["counted_late"] += 1
            applied = max(time, mark, self.watermark) if time < mark else max(time, self.watermark)
            partition.seen = max(partition.seen, time - slack)
            self.pending.append(Waiting(applied, topic, record.partition, record.offset, time, record, value))
        self.counts.update(r.reason for r in refused)
        return refused

    def _move(self, idle: Collection[TopicPartition], quiet_ms: int) -> None:
        holding = [p.watermark for tp, p in self.partitions.items() if p.clock is not None or tp not in idle]
        if holding:
            self.watermark = max(self.watermark, min(holding))
        elif newest := max(p.watermark for p in self.partitions.values()):
            self.watermark = max(self.watermark, newest + quiet_ms)

    def snapshot(self) -> Any:
        return {
            "watermark": self.watermark,
            "partitions": [[t, p, s.seen, s.clock] for (t, p), s in self.partitions.items()],
            "seen": {name: list(s.order) for name, s in self.seen.items()},
            "pending": [[w.applied, *pack_record(w.record)] for w in self.pending],
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
            value = (contract := self.contracts[self.topics[record.topic]]).decode(record.value)
            place = (self.topics[record.topic], record.partition, record.offset)
            time = record.timestamp if contract.by_arrival else contract.time_of(value)
            self.pending.append(Waiting(applied, *place, time, record, value))


def pack_record(record: Record) -> list[Any]:
    """A record as plain values."""
    headers = [[name, value] for name, value in record.headers]
    return [record.topic, record.partition, record.offset, record.timestamp, record.key, record.value, headers]


def unpack_record(data: Sequence[Any]) -> Record:
    topic, partition, offset, timestamp, key, value, headers = data
    return Record(topic, partition, offset, timestamp, key, value, tuple((n, v) for n, v in headers))


def _ms(duration: timedelta) -> int:
    return round(duration.total_seconds() * 1000)
