"""Reading topics to their end as of now: whole, their tail, or the newest value of each key."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from features.errors import UnavailableError
from pipelines.broker import Broker, Consumer, Record, TopicPartition, clock_of

SAVE_S, READ_S = 30.0, 60.0
TAIL = 256  # records of a partition's end that usually hold its last clock record


@dataclass(frozen=True)
class Tail:
    """The end of a partition: the last clock record's time (epoch ms; None without one) and what follows it."""

    clock: int | None
    after: tuple[Record, ...]
    end: int


def read_new(consumer: Consumer, timeout_s: float = 60.0) -> Iterator[Record]:
    """Records up to the topics' ends as they are at this call; raises UnavailableError when they don't come."""
    for records in _batches(consumer, timeout_s):
        yield from records


def _batches(consumer: Consumer, timeout_s: float) -> Iterator[list[Record]]:
    give_up = time.monotonic() + timeout_s
    ends = consumer.end_offsets(sorted(consumer.assignment()))
    while behind := [tp for tp, end in ends.items() if consumer.position(tp) < end]:
        records = consumer.poll(0.2)
        if records:
            give_up = time.monotonic() + timeout_s
        elif time.monotonic() > give_up:
            raise UnavailableError(f"{behind[0][0]}: no record for {timeout_s:.0f} s, {len(behind)} partitions unread")
        yield records


def read_all(broker: Broker, topic: str) -> Iterator[Record]:
    """Every record of a topic as it is now."""
    consumer = broker.consumer([topic])
    try:
        yield from read_new(consumer)
    finally:
        consumer.close()


def tails(broker: Broker, topics: Sequence[str]) -> dict[TopicPartition, Tail]:
    """The tail of every partition of the topics."""
    consumer = broker.consumer(topics)
    try:
        return _tails(consumer)
    finally:
        consumer.close()


def _tails(consumer: Consumer) -> dict[TopicPartition, Tail]:
    found: dict[TopicPartition, Tail] = {}
    ends = consumer.end_offsets(sorted(consumer.assignment()))
    length = TAIL
    while missing := [tp for tp in ends if tp not in found]:
        records: dict[TopicPartition, list[Record]] = {tp: [] for tp in missing}
        for tp, end in ends.items():
            consumer.seek(tp, max(0, end - length) if tp in records else end)
        for record in read_new(consumer):
            if (tp := (record.topic, record.partition)) in records:
                records[tp].append(record)
        for tp in missing:
            tail = _tail(records[tp], ends[tp])
            if tail.clock is not None or length >= ends[tp]:
                found[tp] = tail
        length *= 8
    return found


def _tail(records: Sequence[Record], end: int) -> Tail:
    after: list[Record] = []
    for record in reversed(records):
        if (clock := clock_of(record)) is not None:
            return Tail(clock, tuple(reversed(after)), end)
        after.append(record)
    return Tail(None, tuple(reversed(after)), end)


class Newest:
    """The newest value of each key of a topic with JSON values."""

    def __init__(self, broker: Broker, topic: str) -> None:
        self._consumer = broker.consumer([topic])
        self._values: dict[bytes, Any] = {}

    def read(self) -> Mapping[bytes, Any]:
        """Key -> newest value as of now."""
        for record in read_new(self._consumer):
            if record.key is not None and record.value is not None:
                self._values[record.key] = msgspec.json.decode(record.value)
        return self._values

    def close(self) -> None:
        self._consumer.close()


class Fold:
    """What has been made of a topic's records, kept in a file with the positions: each record is read once, by whom.

    fold : takes the state, JSON that begins as {}, and a record, and changes the state
    """

    def __init__(self, broker: Broker, topic: str, file: Path, fold: Callable[[dict[str, Any], Record], None]) -> None:
        self._consumer, self._file, self._fold = broker.consumer([topic]), file, fold
        self.state: dict[str, Any] = {}
        self._saved = time.monotonic()
        kept = msgspec.json.decode(file.read_bytes()) if file.exists() else {"positions": {}}
        positions = {(topic, int(p)): offset for p, offset in kept["positions"].items()}
        ends = self._consumer.end_offsets(sorted(self._consumer.assignment()))
        if positions and all(offset <= ends.get(tp, 0) for tp, offset in positions.items()):
            self.state = kept["state"]
            for tp, offset in positions.items():
                self._consumer.seek(tp, offset)

    def read(self, most: int | None = None) -> int:
        """Take in what is new, in batches until there are `most` records; returns their number."""
        seen = 0
        for records in _batches(self._consumer, READ_S):
            for record in records:
                self._fold(self.state, record)
            seen += len(records)
            if most is not None and seen >= most:
                break
        if seen and time.monotonic() - self._saved > SAVE_S:
            self.save()
        return seen

    def save(self) -> None:
        """Keep the state and the positions it is of."""
        positions = {str(p): self._consumer.position((t, p)) for t, p in self._consumer.assignment()}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(msgspec.json.encode({"positions": positions, "state": self.state}))
        temporary.rename(self._file)
        self._saved = time.monotonic()

    def close(self) -> None:
        """Save and disconnect."""
        self.save()
        self._consumer.close()
