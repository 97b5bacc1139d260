"""Reading topics to their end as of now: whole, their tail, or the newest value of each key."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from features.errors import UnavailableError
from pipelines.broker import Broker, Consumer, Record, TopicPartition, clock_of

TAIL = 256  # records of a partition's end that usually hold its last clock record


@dataclass(frozen=True)
class Tail:
    """The end of a partition: the last clock record's time (epoch ms; None without one) and what follows it."""

    clock: int | None
    after: tuple[Record, ...]
    end: int


def read_new(consumer: Consumer, timeout_s: float = 60.0) -> Iterator[Record]:
    """Records up to the topics' ends as they are at this call; raises UnavailableError when they don't come."""
    give_up = time.monotonic() + timeout_s
    ends = consumer.end_offsets(sorted(consumer.assignment()))
    while behind := [tp for tp, end in ends.items() if consumer.position(tp) < end]:
        records = consumer.poll(0.2)
        if records:
            give_up = time.monotonic() + timeout_s
        elif time.monotonic() > give_up:
            raise UnavailableError(f"{behind[0][0]}: no record for {timeout_s:.0f} s, {len(behind)} partitions unread")
        yield from records


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
