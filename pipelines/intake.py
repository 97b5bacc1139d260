"""From raw records to events in event-time order: validation, watermark, late, future and duplicate. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np

from features.contracts import Contract
from features.kernel import Ints
from features.values import Values, read_values, span_of
from pipelines.broker import Record, TopicPartition, by_partition, clock_of
from pipelines.seen import Seen
from pipelines.step import APPLIED, OFFSET, PARTITION, ROW, TIME, TOPIC, Due, Table

COUNTED = ("counted_late", "unknown_fields")  # events that count all the same


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
    def slack(self) -> int:
        return _ms(self.contract.out_of_orderness)

    @property
    def watermark(self) -> int:
        return max(self.seen, self.clock or 0)


@dataclass(slots=True)
class Taken:
    """Events of one partition as they were read, and the clock record in force at each."""

    records: Sequence[Record]
    values: Values
    clocks: Ints
    times: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    refused: list[Refused] = field(default_factory=list)

    def refuse(self, bad: Mapping[int, tuple[str, str]]) -> None:
        """Leave these out, for a reason and its detail."""
        if not bad:
            return
        self.refused += [Refused(self.records[i], *why) for i, why in bad.items()]
        kept = np.delete(np.arange(len(self.records)), list(bad))
        self.records, self.values = [self.records[i] for i in kept.tolist()], self.values.take(kept)
        self.clocks, self.times = self.clocks[kept], self.times[kept] if len(self.times) else self.times

    def marks(self, partition: Partition) -> Ints:
        """The partition's watermark before each."""
        seen = np.maximum.accumulate(np.append(partition.seen, self.times - partition.slack)[:-1])
        return np.maximum(seen, self.clocks)


class Intake:
    """The input side of one partition of a step.

    The watermark is the minimum over the input partitions of max(newest event time - out-of-orderness, clock record):
    nothing earlier will come. An event is handed over once its time lies behind it. A late event (behind what its own
    partition had already shown) is handed over at the instant at which it was met, so that the result is a function
    of the log, however partitions interleave.

    counts : records refused by reason; and of those that count, COUNTED
    """

    def __init__(self, inputs: Mapping[TopicPartition, Contract]) -> None:
        self.partitions = {tp: Partition(contract) for tp, contract in inputs.items()}
        self.seen = {contract.name: Seen(_ms(contract.dedupe)) for contract in inputs.values()}
        self.topics = {topic: i for i, topic in enumerate(sorted({topic for topic, _ in inputs}))}
        self.contracts = [next(c for (t, _), c in inputs.items() if t == topic) for topic in self.topics]
        self.nothing = [Table([], read_values(contract, []).values) for contract in self.contracts]
        self.pending = Due(self.contracts, self.nothing)
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
        taken = [self._take(tp, own) for tp, own in by_partition(records).items()]
        self._move(idle, quiet_ms)
        self.watermark = max(self.watermark, at_least)
        pending = self.pending.joined([due for due, _ in taken])
        ready = int(np.searchsorted(pending.places[:, APPLIED], self.watermark))
        self.pending = pending[ready:]
        for name, seen in self.seen.items():
            own = [p for p in self.partitions.values() if p.contract.name == name]
            seen.forget(min(p.watermark for p in own) - seen.horizon)
        return pending[:ready], [r for _, refused in taken for r in refused]

    def _take(self, tp: TopicPartition, records: Sequence[Record]) -> tuple[Due, list[Refused]]:
        """Records of one partition, in their order: clocks move it, events wait or are refused."""
        partition = self.partitions[tp]
        taken = self._checked(partition, records)
        marks, times = taken.marks(partition), taken.times
        applied = np.maximum(np.maximum(times, marks), self.watermark)
        partition.seen = max(partition.seen, int(times.max(initial=0)) - partition.slack)
        self.counts.update(r.reason for r in taken.refused)
        self.counts["counted_late"] += int((times < marks).sum())
        return self._due(tp, applied, Table(taken.records, taken.values), times), taken.refused

    def _due(self, tp: TopicPartition, applied: Ints, table: Table, times: Ints) -> Due:
        """Events of one partition."""
        topic = self.topics[tp[0]]
        places = np.empty((len(times), 6), np.int64)
        places[:, APPLIED], places[:, TOPIC], places[:, PARTITION], places[:, TIME] = applied, topic, tp[1], times
        places[:, OFFSET] = np.fromiter(map(attrgetter("offset"), table.records), np.int64, len(times))
        places[:, ROW] = np.arange(len(times))
        return Due(self.contracts, [table if i == topic else none for i, none in enumerate(self.nothing)], places)

    def _checked(self, partition: Partition, records: Sequence[Record]) -> Taken:
        """The events among the records, without those that are refused."""
        contract = partition.contract
        events, clocks = _clocked(partition, records)
        read = read_values(contract, [r.value for r in events])
        taken = Taken(events, read.values, clocks)
        taken.refuse({i: (invalid.reason, invalid.detail) for i, invalid in read.bad.items()})
        self.counts["unknown_fields"] += read.unknown
        taken.times, arrived = _times(contract, taken.records, taken.values)
        ahead = taken.times - arrived
        future = np.flatnonzero(ahead > _ms(contract.max_ahead)).tolist()
        late = "event time is {:.0f} s ahead of the record's timestamp"
        taken.refuse({i: ("future", late.format(ahead[i] / 1000)) for i in future})
        if contract.id:
            ids, known = span_of(taken.values, contract.id), self.seen[contract.name]
            repeated = known.repeated(ids, taken.times, taken.clocks, partition.seen, partition.slack)
            again = zip(repeated.tolist(), taken.values.take(repeated).plain(contract.id), strict=True)
            taken.refuse({i: ("duplicate", f"{contract.id} {id!r} was seen before") for i, id in again})
        taken.refused.sort(key=lambda r: r.record.offset)
        return taken

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
            "seen": {name: seen.snapshot() for name, seen in self.seen.items()},
            "pending": [
                [applied, *msgspec.structs.astuple(record)]
                for applied, record in zip(self.pending.places[:, APPLIED].tolist(), self.pending.records, strict=True)
            ],
            "counts": dict(self.counts),
        }

    def restore(self, data: Any) -> None:
        self.watermark, self.counts = data["watermark"], Counter(data["counts"])
        for topic, p, seen, clock in data["partitions"]:
            if (topic, p) in self.partitions:
                self.partitions[topic, p].seen, self.partitions[topic, p].clock = seen, clock
        for name, order in data["seen"].items():
            self.seen[name].restore(order)
        records = [msgspec.convert(packed, Record) for _, *packed in data["pending"]]
        applied = {(r.topic, r.partition, r.offset): at for (at, *_), r in zip(data["pending"], records, strict=True)}
        self.pending = Due(self.contracts, self.nothing).joined(
            [self._waiting(tp, own, applied) for tp, own in by_partition(records).items()]
        )

    def _waiting(self, tp: TopicPartition, records: list[Record], applied: Mapping[Any, int]) -> Due:
        """Events of one partition that were taken in before."""
        contract = self.contracts[self.topics[tp[0]]]
        values = read_values(contract, [r.value for r in records]).values
        instants = np.array([applied[*tp, r.offset] for r in records], np.int64)
        return self._due(tp, instants, Table(records, values), _times(contract, records, values)[0])


def _clocked(partition: Partition, records: Sequence[Record]) -> tuple[Sequence[Record], Ints]:
    """The events among records, and the clock record in force at each."""
    if all([r.value for r in records]):  # noqa: C419 (a generator takes four times as long)
        return records, np.full(len(records), partition.clock or 0)
    events, clocks = [], []
    for record in records:
        if record.value is None and (clock := clock_of(record)) is not None:
            partition.clock = max(clock, partition.clock or 0)
        else:
            events.append(record)
            clocks.append(partition.clock or 0)
    return events, np.array(clocks, np.int64)


def _times(contract: Contract, records: Sequence[Record], values: Values) -> tuple[Ints, Ints]:
    """Event times, and timestamps (epoch ms)."""
    arrived = np.fromiter(map(attrgetter("timestamp"), records), np.int64, len(records))
    return arrived if contract.by_arrival else values.column(contract.field(contract.time)), arrived


def _ms(duration: timedelta) -> int:
    return round(duration.total_seconds() * 1000)
