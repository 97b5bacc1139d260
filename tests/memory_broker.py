"""A broker in memory with Kafka's semantics, for fast tests; the contract suite keeps it honest.

Records of an open transaction take offsets at once and are invisible until its marker, which takes an offset too;
an older producer with the same transactional id is fenced; a group's commits carry its generation. A transaction whose
end is lost on a partition stays open there until the next end that its transactional id writes to that partition.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from features.errors import FencedError, InputError, StateError, UnavailableError
from pipelines.broker import Consumer, Message, Position, Producer, Record, TopicPartition

RebalanceCallback = Callable[[set[TopicPartition]], None]


@dataclass
class _Transaction:
    """What one transactional id has open on one partition."""

    state: str = "open"


@dataclass(frozen=True)
class _Entry:
    record: Record | None  # None: a transaction's marker
    transaction: _Transaction | None = None


class _Group:
    """Members agree on a generation: when one joins or leaves, all give up their partitions, then share them anew.

    A member that has not polled for `session_s` while others wait for it is out.
    """

    def __init__(self, session_s: float) -> None:
        self.session_s = session_s
        self.generation = 0
        self.waiting: set[MemoryConsumer] | None = None  # those that have given up their partitions
        self.members: list[MemoryConsumer] = []
        self.committed: dict[TopicPartition, Position] = {}

    def begin(self) -> None:
        self.waiting = self.waiting or set()

    def wait(self, member: MemoryConsumer) -> None:
        """`member` is ready for the next generation, which starts when all are."""
        assert self.waiting is not None
        self.waiting.add(member)
        now = time.monotonic()
        late = {m for m in self.members if m not in self.waiting and now - m.last_poll > self.session_s}
        self.members = [m for m in self.members if m not in late]
        if self.waiting >= set(self.members):
            self.generation, self.waiting = self.generation + 1, None


class MemoryBroker:
    """`clock` gives the wall clock in epoch ms for records without a timestamp; `session_s` as a group's."""

    def __init__(self, clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000, session_s: float = 0.5) -> None:
        self.clock = clock
        self.changed = threading.Condition(threading.RLock())
        self.topics: dict[str, int] = {}
        self.logs: dict[TopicPartition, list[_Entry]] = {}
        self.groups: dict[str, _Group] = defaultdict(lambda: _Group(session_s))
        self.owners: dict[str, MemoryProducer] = {}
        self.open: dict[tuple[str, TopicPartition], _Transaction] = {}
        self.undecided: dict[tuple[str, str], dict[TopicPartition, Position]] = {}  # of a transactional id and a group
        self.loses: set[TopicPartition | str] = set()  # partitions, and groups, on which a transaction's end is lost

    def create_topics(self, topics: Mapping[str, Mapping[str, str]], partitions: int) -> list[str]:
        created = sorted(set(topics) - set(self.topics))
        for name in created:
            self.topics[name] = partitions
            self.logs |= {(name, p): [] for p in range(partitions)}
        return created

    def partitions(self, topics: Sequence[str]) -> list[TopicPartition]:
        if missing := sorted(set(topics) - set(self.topics)):
            raise UnavailableError(f"no topic {', '.join(missing)}")
        return [(topic, p) for topic in topics for p in range(self.topics[topic])]

    def consumer(
        self,
        topics: Sequence[str],
        *,
        group: str | None = None,
        on_assigned: RebalanceCallback | None = None,
        on_revoked: RebalanceCallback | None = None,
        from_end: bool = False,
        together: bool = False,
    ) -> Consumer:
        self.partitions(topics)
        return MemoryConsumer(self, list(topics), group, on_assigned, on_revoked, from_end, together)

    def producer(self, *, transactional_id: str | None = None) -> Producer:
        with self.changed:
            producer = MemoryProducer(self, transactional_id)
            if transactional_id is not None:
                if transactional_id in self.owners:
                    self.owners[transactional_id].end("aborted")
                self.owners[transactional_id] = producer
            return producer

    def committed(self, group: str) -> dict[TopicPartition, Position]:
        with self.changed:
            return dict(self.groups[group].committed) if group in self.groups else {}

    def members(self, group: str) -> int:
        return len(self.groups[group].members) if group in self.groups else 0

    def forget(self, group: str) -> None:
        with self.changed:
            if self.members(group):
                raise StateError(f"the positions of {group} can't be removed: it has members")
            self.groups.pop(group, None)

    def append(self, partition: TopicPartition, entry: _Entry) -> None:
        with self.changed:
            log = self.logs[partition]
            if entry.record is not None:
                entry = replace(entry, record=msgspec.structs.replace(entry.record, offset=len(log)))
            log.append(entry)
            self.changed.notify_all()

    def stable_end(self, partition: TopicPartition) -> int:
        """The last stable offset: nothing from the first open transaction on is readable."""
        log = self.logs[partition]
        unstable = (i for i, e in enumerate(log) if e.transaction is not None and e.transaction.state == "open")
        return next(unstable, len(log))


class MemoryConsumer:
    """See `pipelines.broker.Consumer`."""

    def __init__(
        self,
        broker: MemoryBroker,
        topics: list[str],
        group: str | None,
        on_assigned: RebalanceCallback | None,
        on_revoked: RebalanceCallback | None,
        from_end: bool,
        together: bool = False,
    ) -> None:
        self._broker, self._topics, self._group_name = broker, topics, group
        self._together = together
        self._on_assigned, self._on_revoked, self._from_end = on_assigned, on_revoked, from_end
        self._positions: dict[TopicPartition, int] = {}
        self._paused: set[TopicPartition] = set()
        self._known_end: dict[TopicPartition, int] = {}
        self.generation = -1
        self.last_poll = time.monotonic()
        if group is None:
            self._positions = {p: self._start(p) for p in broker.partitions(topics)}

    @property
    def group_name(self) -> str:
        if self._group_name is None:
            raise InputError("a consumer without a group commits nothing")
        return self._group_name

    @property
    def group(self) -> _Group:
        return self._broker.groups[self.group_name]

    def _start(self, partition: TopicPartition) -> int:
        return self._broker.stable_end(partition) if self._from_end else 0

    def _rebalance(self) -> bool:
        """Take part in the group; True while there is nothing to read for this poll."""
        if self._group_name is None:
            return False
        group, self.last_poll = self.group, time.monotonic()
        if self not in group.members:
            self._revoke()
            group.members.append(self)
            group.begin()
        if group.waiting is not None:
            self._revoke()
            group.wait(self)
            self._broker.changed.notify_all()
        if group.waiting is not None or self.generation == group.generation:
            return group.waiting is not None
        self.generation = group.generation
        self._assign()
        return True

    def _revoke(self) -> None:
        if self._positions and self._on_revoked:
            self._on_revoked(set(self._positions))
        self._positions, self._paused, self._known_end = {}, set(), {}

    def _assign(self) -> None:
        for partition in self._share():
            at = self.group.committed.get(partition)
            self._positions[partition] = at.offset if at else self._start(partition)
        if self._positions and self._on_assigned:
            self._on_assigned(set(self._positions))

    def _share(self) -> list[TopicPartition]:
        """A range of partition numbers, the same for every topic."""
        members = self.group.members
        mine, count = members.index(self), 1 if self._together else len(members)
        if self._together and mine:
            return []

        def owner(partition: TopicPartition) -> int:
            size, extra = divmod(self._broker.topics[partition[0]], count)
            bounds = [size * (m + 1) + min(m + 1, extra) for m in range(count)]
            return next(m for m, bound in enumerate(bounds) if partition[1] < bound)

        return [p for p in self._broker.partitions(self._topics) if owner(p) == mine]

    def poll(self, timeout: float, max_records: int = 2000) -> list[Record]:
        deadline = time.monotonic() + timeout
        with self._broker.changed:
            while True:
                records = [] if self._rebalance() else self._read(max_records)
                left = deadline - time.monotonic()
                if records or left <= 0:
                    return records
                self._broker.changed.wait(min(left, 0.05))

    def _read(self, most: int) -> list[Record]:
        found: list[Record] = []
        for partition in self._positions:
            if partition in self._paused:
                continue
            self._known_end[partition] = len(self._broker.logs[partition])
            end = self._broker.stable_end(partition)
            while self._positions[partition] < end and len(found) < most:
                entry = self._broker.logs[partition][self._positions[partition]]
                self._positions[partition] += 1
                aborted = entry.transaction is not None and entry.transaction.state == "aborted"
                if entry.record is not None and not aborted:
                    found.append(entry.record)
        return found

    def assignment(self) -> set[TopicPartition]:
        return set(self._positions)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self._positions[partition] = offset

    def pause(self, partitions: Sequence[TopicPartition]) -> None:
        self._paused |= set(partitions)

    def resume(self, partitions: Sequence[TopicPartition]) -> None:
        self._paused -= set(partitions)

    def position(self, partition: TopicPartition) -> int:
        return self._positions[partition]

    def end_offsets(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        with self._broker.changed:
            return {p: self._broker.stable_end(p) for p in partitions}

    def at_end(self, partition: TopicPartition) -> bool:
        known = self._known_end.get(partition)
        return known is not None and self._positions.get(partition, -1) >= known

    def committed(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Position]:
        return {p: self.group.committed[p] for p in partitions if p in self.group.committed}

    def close(self) -> None:
        with self._broker.changed:
            if self._group_name is not None and self in self.group.members:
                self.group.members.remove(self)
                self.group.begin()
                self._broker.changed.notify_all()
            self._positions = {}


class MemoryProducer:
    """See `pipelines.broker.Producer`."""

    def __init__(self, broker: MemoryBroker, transactional_id: str | None) -> None:
        self._broker, self._id = broker, transactional_id
        self._partitions: set[TopicPartition] = set()
        self._groups: set[str] = set()

    def _check_owner(self) -> None:
        if self._id is not None and self._broker.owners.get(self._id) is not self:
            raise FencedError(f"a newer producer has taken over {self._id}")

    def send(self, messages: Sequence[Message]) -> None:
        with self._broker.changed:
            for m in messages:
                if m.key is None and m.value is None:
                    raise InputError(f"a record for {m.topic} has neither key nor value")
                self._check_owner()
                timestamp = m.timestamp if m.timestamp is not None else self._broker.clock()
                record = Record(m.topic, m.partition, -1, timestamp, m.key, m.value, m.headers)
                self._broker.append((m.topic, m.partition), _Entry(record, self._joined((m.topic, m.partition))))

    def _joined(self, partition: TopicPartition) -> _Transaction | None:
        if self._id is None:
            return None
        self._partitions.add(partition)
        return self._broker.open.setdefault((self._id, partition), _Transaction())

    def flush(self, timeout: float = 30.0) -> None:
        self._check_owner()

    def commit(self, positions: Mapping[TopicPartition, Position], consumer: Consumer) -> None:
        with self._broker.changed:
            self._send_positions(positions, consumer)
            self.end("committed")

    def settle(
        self,
        partitions: Sequence[TopicPartition],
        positions: Mapping[TopicPartition, Position],
        consumer: Consumer,
        *,
        committed: bool,
    ) -> None:
        with self._broker.changed:
            self._send_positions(positions, consumer)
            self._partitions.update(partitions)
            self.end("committed" if committed else "aborted")

    def _send_positions(self, positions: Mapping[TopicPartition, Position], consumer: Consumer) -> None:
        if not isinstance(consumer, MemoryConsumer):
            raise InputError("the consumer is of another broker")
        self._check_owner()
        if positions:
            if consumer not in consumer.group.members or consumer.generation != consumer.group.generation:
                raise FencedError("the group has moved on without this consumer")
            self._groups.add(consumer.group_name)
            self._broker.undecided.setdefault((self._id or "", consumer.group_name), {}).update(positions)

    def end(self, state: str) -> None:
        """End the transaction: a marker in each of its partitions, and on the positions, where it isn't lost."""
        broker, id = self._broker, self._id or ""
        with broker.changed:
            partitions, self._partitions = self._partitions, set()
            groups, self._groups = self._groups, set()
            for partition in partitions:
                if partition not in broker.loses:
                    broker.open.pop((id, partition), _Transaction()).state = state
                    broker.append(partition, _Entry(None))
            for group in groups.difference(broker.loses):
                positions = broker.undecided.pop((id, group), {})
                broker.groups[group].committed.update(positions if state == "committed" else {})

    def close(self) -> None:
        """An open transaction stays open, as after a crash: the successor aborts it."""
