"""What the runner and the services need of a message broker, and nothing more.

Two implementations keep it honest: `pipelines.kafka` on a real broker, and the in-memory one of the tests;
both pass the same contract suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Protocol

import msgspec

CLOCK_KEY = b"clock"
CLOCK_HEADER = "clock"
SENT_HEADER = "sent"  # wall clock of the sending, epoch ms, of records whose timestamp is simulated

Headers = tuple[tuple[str, bytes], ...]
TopicPartition = tuple[str, int]


class Record(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One record as read: `timestamp` is the broker record's, in epoch ms."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Message:
    """One record to send; `timestamp` None means the wall clock at the producer."""

    topic: str
    value: bytes | None
    key: bytes | None = None
    partition: int = 0
    headers: Headers = ()
    timestamp: int | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """A committed position: the next offset to read, and the metadata committed with it."""

    offset: int
    metadata: str = ""


def clock_message(topic: str, partition: int, time: int, headers: Headers = ()) -> Message:
    """The record that says: nothing earlier than `time` (epoch ms) follows on this partition."""
    return Message(topic, None, CLOCK_KEY, partition, ((CLOCK_HEADER, str(time).encode()), *headers), time)


def clock_of(record: Record) -> int | None:
    """The time a clock record carries, or None for any other record."""
    if record.key != CLOCK_KEY or record.value is not None:
        return None
    return next((int(value) for name, value in record.headers if name == CLOCK_HEADER and value.isdigit()), None)


def sent_at(record: Record) -> int:
    """When a record was sent, by the wall clock (epoch ms)."""
    return next((int(v) for name, v in record.headers if name == SENT_HEADER and v.isdigit()), record.timestamp)


def by_partition(records: Iterable[Record]) -> dict[TopicPartition, list[Record]]:
    """The records of each partition, in their order."""
    found: dict[TopicPartition, list[Record]] = {}
    for tp, run in groupby(records, attrgetter("topic", "partition")):
        found.setdefault(tp, []).extend(run)
    return found


class Consumer(Protocol):
    """Reads records, only committed ones. With a group, partitions are assigned; without, all are read."""

    def poll(self, timeout: float, max_records: int = 2000) -> list[Record]:
        """Records that are there, waiting up to `timeout` seconds for the first."""

    def assignment(self) -> set[TopicPartition]: ...

    def seek(self, partition: TopicPartition, offset: int) -> None: ...

    def pause(self, partitions: Sequence[TopicPartition]) -> None: ...

    def resume(self, partitions: Sequence[TopicPartition]) -> None: ...

    def position(self, partition: TopicPartition) -> int:
        """The next offset that `poll` would return."""

    def end_offsets(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        """One past the last committed record of each partition, asked of the broker now."""

    def at_end(self, partition: TopicPartition) -> bool:
        """Whether everything the broker was known to hold at the last fetch has been returned."""

    def committed(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Position]:
        """The group's committed positions; a partition without one is absent."""

    def close(self) -> None: ...


class Producer(Protocol):
    """Sends records; with a transactional id, in transactions that carry input positions."""

    def send(self, messages: Sequence[Message]) -> None:
        """Queue messages, in order within a partition. `flush` or `commit` waits for them."""

    def flush(self, timeout: float = 30.0) -> None:
        """Wait until everything sent is acknowledged; raises UnavailableError past the deadline."""

    def commit(self, positions: Mapping[TopicPartition, Position], consumer: Consumer) -> None:
        """One transaction with every message sent since the last commit and these positions of `consumer`'s group.

        Raises FencedError when another producer with this transactional id has taken over.
        """

    def settle(
        self,
        partitions: Sequence[TopicPartition],
        positions: Mapping[TopicPartition, Position],
        consumer: Consumer,
        *,
        committed: bool,
    ) -> None:
        """End what a predecessor's transaction may have left open on these partitions and positions, as `committed`
        or as aborted, with a transaction of nothing but the positions: a broker that was killed can have lost its end.
        """

    def close(self) -> None: ...


class Broker(Protocol):
    """A broker one can connect to."""

    def create_topics(self, topics: Mapping[str, Mapping[str, str]], partitions: int) -> list[str]:
        """Create the missing ones (name -> topic settings); returns the names created."""

    def consumer(
        self,
        topics: Sequence[str],
        *,
        group: str | None = None,
        on_assigned: Callable[[set[TopicPartition]], None] | None = None,
        on_revoked: Callable[[set[TopicPartition]], None] | None = None,
        from_end: bool = False,
        together: bool = False,
    ) -> Consumer:
        """together : one member of the group has all partitions, the others stand by"""

    def producer(self, *, transactional_id: str | None = None) -> Producer:
        """A transactional producer has fenced its predecessors when this returns."""

    def committed(self, group: str) -> dict[TopicPartition, Position]:
        """What a group has committed, seen from outside."""

    def members(self, group: str) -> int:
        """How many live members a group has."""

    def forget(self, group: str) -> None:
        """Remove what a group has committed; StateError while it has members."""
