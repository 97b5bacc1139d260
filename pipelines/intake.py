"""From raw records to events in event-time order: validation, watermark, late, future and duplicate. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import takewhile
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np

from features.contracts import Contract, Invalid
from features.kernel import Ints
from pipelines.broker import Record, TopicPartition, by_partition, clock_of
from pipelines.step import Due

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


class Seen(dict[Any, int]):
    """Ids of one contract, and the instant at which each was first met; those within the dedupe horizon count."""

    def repeated(self, ids: list[Any], taken: Taken, partition: Partition) -> list[int]:
        """Which of a partition's next events were met before; the others are noted."""
        if len(set(ids)) == len(ids) and self.keys().isdisjoint(ids):
            self.update(zip(ids, np.maximum(taken.times, taken.marks(partition)).tolist(), strict=True))
            return []
        repeated, seen, horizon, slack = [], partition.seen, _ms(partition.contract.dedupe), partition.slack
        for i, (id, time, clock) in enumerate(zip(ids, taken.times.tolist(), taken.clocks.tolist(), strict=True)):
            mark = max(seen, clock)
            if self.get(id, -1) >= max(0, mark - horizon):
                repeated.append(i)
                continue
            self.pop(id, None)
            self[id], seen = max(time, mark), max(seen, time - slack)
        return repeated

    def forget(self, before: int) -> None:
        """Drop the oldest."""
        for id in list(takewhile(lambda id: self[id] < before, self)):
            del self[id]


@dataclass(slots=True)
class Taken:
    """Events of one partition as they were read: their structs, and the clock record in force at each."""

    records: list[Record]
    values: list[Any]
    clocks: Ints
    times: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    refused: list[Refused] = field(default_factory=list)

    def refuse(self, bad: Mapping[int, tuple[str, str]]) -> None:
        """Leave these out, for a reason and its detail."""
        if not bad:
            return
        self.refused += [Refused(self.records[i], *why) for i, why in bad.items()]
        self.records, self.values = (
            [x for i, x in enumerate(xs) if i not in bad] for xs in (self.records, self.values)
        )
        self.clocks = np.delete(self.clocks, list(bad))
        self.times = np.delete(self.times, list(bad) if len(self.times) else [])

    def column(self, of: Iterable[int]) -> Ints:
        return np.fromiter(of, np.int64, len(self.records))

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
        self.seen = {contract.name: Seen() for contract in inputs.values()}
        self.topics = {topic: i for i, topic in enumerate(sorted({topic for topic, _ in inputs}))}
        self.contracts = [next(c for (t, _), c in inputs.items() if t == topic) for topic in self.topics]
        self.pending = Due(self.contracts)
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
        ready = int(np.searchsorted(pending.places[:, 0], self.watermark))
        self.pending = pending[ready:]
        for name, seen in self.seen.items():
            own = [p for p in self.partitions.values() if p.contract.name == name]
            seen.forget(min(p.watermark for p in own) - _ms(own[0].contract.dedupe))
        return pending[:ready], [r for _, refused in taken for r in refused]

    def _take(self, tp: TopicPartition, records: Sequence[Record]) -> tuple[Due, list[Refused]]:
        """Records of one partition, in their order: clocks move it, events wait or are refused."""
        partition = self.partitions[tp]
        taken = self._checked(partition, records)
        marks, times = taken.marks(partition), taken.times
        places = np.empty((len(times), 5), np.int64)
        places[:, 0] = np.maximum(np.maximum(times, marks), self.watermark)
        places[:, 1:3] = self.topics[tp[0]], tp[1]
        places[:, 3] = taken.column(r.offset for r in taken.records)
        places[:, 4] = times
        partition.seen = max(partition.seen, int(times.max(initial=0)) - partition.slack)
        self.counts.update(r.reason for r in taken.refused)
        self.counts["counted_late"] += int((times < marks).sum())
        return Due(self.contracts, places, taken.records, taken.values), taken.refused

    def _checked(self, partition: Partition, records: Sequence[Record]) -> Taken:
        """The events among the records, without those that are refused."""
        contract, events, clocks = partition.contract, [], []
        for record in records:
            if record.value is None and (clock := clock_of(record)) is not None:
                partition.clock = max(clock, partition.clock or 0)
            else:
                events.append(record)
                clocks.append(partition.clock or 0)
        taken = Taken(events, contract.decode_many([r.value for r in events]), np.array(clocks, np.int64))
        taken.refuse({i: (v.reason, v.detail) for i, v in enumerate(taken.values) if isinstance(v, Invalid)})
        self.counts["unknown_fields"] += contract.unknown(r.value for r in taken.records if r.value)
        taken.times = taken.column(
            (r.timestamp for r in taken.records)
            if contract.by_arrival
            else map(attrgetter(contract.time), taken.values)
        )
        ahead = taken.times - taken.column(r.timestamp for r in taken.records)
        future = np.flatnonzero(ahead > _ms(contract.max_ahead)).tolist()
        late = "event time is {:.0f} s ahead of the record's timestamp"
        taken.refuse({i: ("future", late.format(ahead[i] / 1000)) for i in future})
        if contract.id:
            ids, seen = list(map(attrgetter(contract.id), taken.values)), self.seen[contract.name]
            repeated = seen.repeated(ids, taken, partition)
            taken.refuse({i: ("duplicate", f"{contract.id} {ids[i]!r} was seen before") for i in repeated})
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
            "seen": {name: [(time, id) for id, time in s.items()] for name, s in self.seen.items()},
            "pending": [[e.applied, *msgspec.structs.astuple(e.record)] for e in self.pending if e.record],
            "counts": dict(self.counts),
        }

    def restore(self, data: Any) -> None:
        self.watermark, self.counts = data["watermark"], Counter(data["counts"])
        for topic, p, seen, clock in data["partitions"]:
            if (topic, p) in self.partitions:
                self.partitions[topic, p].seen, self.partitions[topic, p].clock = seen, clock
        for name, order in data["seen"].items():
            self.seen[name] = Seen({id: time for time, id in order})
        records = [msgspec.convert(packed, Record) for _, *packed in data["pending"]]
        topics = [self.topics[r.topic] for r in records]
        values = [self.contracts[t].decode(r.value) for t, r in zip(topics, records, strict=True)]
        places = [
            (applied, t, r.partition, r.offset, _time(self.contracts[t], r, value))
            for (applied, *_), t, r, value in zip(data["pending"], topics, records, values, strict=True)
        ]
        self.pending = Due(self.contracts, np.array(places, np.int64).reshape(-1, 5), records, values)


def _time(contract: Contract, record: Record, value: Any) -> int:
    return record.timestamp if contract.by_arrival else contract.time_of(value)


def _ms(duration: timedelta) -> int:
    return round(duration.total_seconds() * 1000)
