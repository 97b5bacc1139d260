"""One suite for every broker: the one in memory and a real Kafka."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest

from features.errors import FencedError, InputError, StateError, UnavailableError
from pipelines.broker import (
    Broker,
    Consumer,
    Message,
    Position,
    Producer,
    Record,
    TopicPartition,
    clock_message,
    clock_of,
)
from tests.memory_broker import MemoryBroker

PATIENCE_S = 20.0
_numbers = count()


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.integration)])
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    if request.param == "memory":
        yield MemoryBroker()
        return
    from pipelines.kafka import KafkaBroker

    kafka = KafkaBroker(request.getfixturevalue("kafka"))
    yield kafka
    kafka.close()


@pytest.fixture
def topic(broker: Broker) -> str:
    name = f"contract-{time.time_ns()}-{next(_numbers)}"
    assert broker.create_topics({name: {}}, 2) == [name]
    return name


def until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while not reached():
        pause.wait(0.005)
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}"


def read(consumer: Consumer, number: int) -> list[Record]:
    """Exactly `number` records; what comes beyond them fails."""
    found: list[Record] = []
    until(lambda: bool(found.extend(consumer.poll(0.2)) or len(found) >= number), f"{number} records")
    assert len(found) == number
    return found


def read_to_end(consumer: Consumer, partition: TopicPartition) -> list[Record]:
    found: list[Record] = []

    def ended() -> bool:
        found.extend(consumer.poll(0.2))
        return consumer.position(partition) == consumer.end_offsets([partition])[partition]

    until(ended, f"the end of {partition}")
    return found


def owner(broker: Broker, topic: str, group: str) -> Consumer:
    consumer = broker.consumer([topic], group=group)
    until(lambda: bool(consumer.poll(0.1, 1) or consumer.assignment()), "an assignment")
    return consumer


def write(broker: Broker, *messages: Message) -> None:
    producer = broker.producer()
    producer.send(messages)
    producer.flush()
    producer.close()


def test_topics_are_created_once(broker: Broker, topic: str) -> None:
    assert broker.create_topics({topic: {"cleanup.policy": "compact"}}, 2) == []


def test_order_within_a_partition(broker: Broker, topic: str) -> None:
    write(broker, *(Message(topic, b"%d" % i, None, i % 2) for i in range(300)))
    consumer = broker.consumer([topic])
    found = read(consumer, 300)
    for partition in (0, 1):
        mine = [r for r in found if r.partition == partition]
        assert [int(r.value or b"") for r in mine] == list(range(partition, 300, 2))
        assert [r.offset for r in mine] == list(range(150))
    consumer.close()


def test_keys_values_headers_and_timestamps_come_back(broker: Broker, topic: str) -> None:
    headers = (("a", b"1"), ("a", b"\xff"), ("b", b""))
    write(
        broker,
        Message(topic, b"value", b"key", 1, headers, 1_234),
        Message(topic, None, b"gone", 1, (), 0),
        clock_message(topic, 1, 99),
        Message(topic, b"", None, 1),
    )
    consumer = broker.consumer([topic])
    first, deleted, clock, now = read(consumer, 4)
    assert (first.key, first.value, first.headers, first.timestamp) == (b"key", b"value", headers, 1_234)
    assert (deleted.key, deleted.value, deleted.timestamp) == (b"gone", None, 0)
    assert clock_of(clock) == 99 and clock.timestamp == 99
    assert clock_of(first) is None
    assert now.value == b"" and abs(now.timestamp - time.time() * 1000) < 60_000
    consumer.close()


def test_a_record_with_neither_key_nor_value_is_refused(broker: Broker, topic: str) -> None:
    producer = broker.producer()
    with pytest.raises(InputError, match="neither key nor value"):
        producer.send([Message(topic, None, None)])
    producer.close()


def test_a_missing_topic_is_named(broker: Broker) -> None:
    with pytest.raises(UnavailableError, match="no-such-topic"):
        broker.consumer(["no-such-topic"])


def test_poll_returns_at_most_max_records(broker: Broker, topic: str) -> None:
    write(broker, *(Message(topic, b"%d" % i) for i in range(10)))
    consumer = broker.consumer([topic])
    found: list[Record] = []

    def enough() -> bool:
        records = consumer.poll(0.2, 3)
        assert len(records) <= 3
        found.extend(records)
        return len(found) == 10

    until(enough, "10 records")
    assert [r.offset for r in found] == list(range(10))
    consumer.close()


def test_a_follower_reads_all_partitions_from_the_end_when_asked(broker: Broker, topic: str) -> None:
    write(broker, Message(topic, b"old", None, 0), Message(topic, b"old", None, 1))
    late = broker.consumer([topic], from_end=True)
    early = broker.consumer([topic])
    assert late.assignment() == {(topic, 0), (topic, 1)}
    write(broker, Message(topic, b"new", None, 0), Message(topic, b"new", None, 1))
    assert [r.value for r in read(late, 2)] == [b"new", b"new"]
    assert len(read(early, 4)) == 4
    late.close()
    early.close()


def test_an_uncommitted_transaction_is_invisible_and_its_successor_aborts_it(broker: Broker, topic: str) -> None:
    name = f"{topic}.writer"
    consumer = owner(broker, topic, f"{topic}.group")
    first = broker.producer(transactional_id=name)
    first.send([Message(topic, b"kept")])
    first.commit({}, consumer)
    first.send([Message(topic, b"lost") for _ in range(5)])
    second = broker.producer(transactional_id=name)
    second.send([Message(topic, b"after")])
    follower = broker.consumer([topic])
    assert [r.value for r in read(follower, 1)] == [b"kept"]
    assert follower.poll(0.3) == []
    second.commit({}, consumer)
    assert [r.value for r in read(follower, 1)] == [b"after"]
    for thing in (follower, consumer, first, second):
        thing.close()


def test_an_older_producer_is_fenced(broker: Broker, topic: str) -> None:
    consumer = owner(broker, topic, f"{topic}.group")
    older = broker.producer(transactional_id=f"{topic}.writer")
    older.send([Message(topic, b"1")])
    newer = broker.producer(transactional_id=f"{topic}.writer")

    def write_on() -> None:
        older.send([Message(topic, b"2")])
        older.commit({(topic, 0): Position(7)}, consumer)

    with pytest.raises(FencedError):
        write_on()
    assert broker.committed(f"{topic}.group") == {}
    newer.send([Message(topic, b"3")])
    newer.commit({}, consumer)
    follower = broker.consumer([topic])
    assert [r.value for r in read(follower, 1)] == [b"3"]
    for thing in (follower, consumer, older, newer):
        thing.close()


def test_positions_and_metadata_are_committed_with_the_outputs(broker: Broker, topic: str) -> None:
    group = f"{topic}.group"
    assert broker.committed(group) == {}
    consumer = owner(broker, topic, group)
    assert consumer.committed([(topic, 0), (topic, 1)]) == {}
    producer = broker.producer(transactional_id=f"{topic}.writer")
    producer.send([Message(topic, b"out")])
    producer.commit({(topic, 0): Position(0, "snapshot-1:1767225600000"), (topic, 1): Position(3, "é")}, consumer)
    wanted = {(topic, 0): Position(0, "snapshot-1:1767225600000"), (topic, 1): Position(3, "é")}
    assert consumer.committed([(topic, 0), (topic, 1)]) == wanted
    until(lambda: broker.committed(group) == wanted, "the commit, from outside")
    producer.commit({(topic, 0): Position(1, "next")}, consumer)
    assert consumer.committed([(topic, 0)]) == {(topic, 0): Position(1, "next")}
    producer.close()
    consumer.close()


def test_positions_without_their_transaction_do_not_count(broker: Broker, topic: str) -> None:
    group = f"{topic}.group"
    consumer = owner(broker, topic, group)
    producer = broker.producer(transactional_id=f"{topic}.writer")
    producer.send([Message(topic, b"out")])
    broker.producer(transactional_id=f"{topic}.writer").close()
    with pytest.raises(FencedError):
        producer.commit({(topic, 0): Position(9, "x")}, consumer)
    assert consumer.committed([(topic, 0)]) == {}
    producer.close()
    consumer.close()


@contextmanager
def losing_the_end(broker: Broker, producer: Producer, topic: str, group: str) -> Iterator[None]:
    """What `producer` does meanwhile in partition 0 and for the group is never told the end of its transaction."""
    if isinstance(broker, MemoryBroker):
        broker.loses = {(topic, 0), group}
        yield
        broker.loses = set()
        return
    from kafka import KafkaAdminClient, TopicPartition
    from kafka.admin import ConfigResource
    from kafka.producer.transaction_manager import TransactionalRequestResult, TxnOffsetCommitHandler

    admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)  # type: ignore[attr-defined]
    verify = "transaction.partition.verification.enable"
    admin.alter_configs([ConfigResource("BROKER", "1", {verify: "false"})])
    asked = ConfigResource("BROKER", "1", [verify])
    until(lambda: admin.describe_configs([asked], False, "all")["broker"]["1"][verify]["value"] == "false", verify)
    admin.close()
    manager = producer._kafka._transaction_manager  # type: ignore[attr-defined]
    manager._partitions_in_transaction.add(TopicPartition(topic, 0))  # its coordinator isn't told of either

    def send_offsets(offsets: Any, membership: Any) -> Any:
        handler = TxnOffsetCommitHandler(manager, membership, dict(offsets), TransactionalRequestResult())
        manager._pending_txn_offset_commits.update(offsets)
        manager._enqueue_request(handler)
        return handler.result

    manager.send_offsets_to_transaction = send_offsets
    yield
    del manager.send_offsets_to_transaction


@pytest.mark.parametrize("committed", [True, False])
def test_what_a_killed_broker_left_open_ends_as_it_is_settled(broker: Broker, topic: str, committed: bool) -> None:
    group, before, after = f"{topic}.group", {(topic, 0): Position(1, "1")}, {(topic, 0): Position(2, "2")}
    consumer = owner(broker, topic, group)
    first = broker.producer(transactional_id=f"{topic}.writer")
    first.send([Message(topic, b"kept")])
    first.commit(before, consumer)
    with losing_the_end(broker, first, topic, group):
        first.send([Message(topic, b"open"), Message(topic, b"told", None, 1)])
        first.commit(after, consumer)
    follower = broker.consumer([topic])
    assert {r.value for r in read(follower, 2)} == {b"kept", b"told"}
    assert broker.committed(group) == before
    second = broker.producer(transactional_id=f"{topic}.writer")
    second.settle([(topic, 0), (topic, 1)], after if committed else before, consumer, committed=committed)
    second.send([Message(topic, b"next")])
    second.commit({}, consumer)
    assert [r.value for r in read(follower, 1 + committed)] == [b"open", b"next"][not committed :]
    assert consumer.committed([(topic, 0)]) == broker.committed(group) == (after if committed else before)
    for thing in (follower, consumer, first, second):
        thing.close()


def test_what_nobody_settles_ends_with_the_next_transaction(broker: Broker, topic: str) -> None:
    group = f"{topic}.group"
    consumer = owner(broker, topic, group)
    first = broker.producer(transactional_id=f"{topic}.writer")
    with losing_the_end(broker, first, topic, group):
        first.send([Message(topic, b"open"), Message(topic, b"told", None, 1)])
        first.commit({(topic, 0): Position(1)}, consumer)
    second = broker.producer(transactional_id=f"{topic}.writer")
    second.send([Message(topic, b"next")])
    second.commit({(topic, 1): Position(1)}, consumer)
    follower = broker.consumer([topic])
    assert {r.value for r in read(follower, 3)} == {b"open", b"told", b"next"}
    assert set(broker.committed(group)) == {(topic, 0), (topic, 1)}
    for thing in (follower, consumer, first, second):
        thing.close()


def test_many_transactions_in_a_row(broker: Broker, topic: str) -> None:
    consumer = owner(broker, topic, f"{topic}.group")
    producer = broker.producer(transactional_id=f"{topic}.writer")
    for i in range(20):
        producer.send([Message(topic, b"%d" % i, None, p) for p in (0, 1)])
        producer.commit({(topic, 0): Position(i, str(i))}, consumer)
    follower = broker.consumer([topic])
    found = read(follower, 40)
    assert [r.value for r in found if r.partition == 0] == [b"%d" % i for i in range(20)]
    assert consumer.committed([(topic, 0)]) == {(topic, 0): Position(19, "19")}
    for thing in (follower, consumer, producer):
        thing.close()


def test_the_end_is_reached_past_a_transactions_marker(broker: Broker, topic: str) -> None:
    consumer = owner(broker, topic, f"{topic}.group")
    producer = broker.producer(transactional_id=f"{topic}.writer")
    follower = broker.consumer([topic])
    partition = (topic, 0)
    assert follower.end_offsets([partition]) == {partition: 0}
    for round_ in range(1, 4):
        producer.send([Message(topic, b"a"), Message(topic, b"b")])
        producer.commit({}, consumer)
        assert len(read_to_end(follower, partition)) == 2
        assert follower.position(partition) == 3 * round_
        until(lambda: bool(follower.poll(0.1)) or follower.at_end(partition), "at_end")
    for thing in (follower, consumer, producer):
        thing.close()


def test_the_end_is_reached_past_an_aborted_transaction(broker: Broker, topic: str) -> None:
    lost = broker.producer(transactional_id=f"{topic}.writer")
    lost.send([Message(topic, b"lost")])
    lost_follower = broker.consumer([topic])
    broker.producer(transactional_id=f"{topic}.writer").close()
    assert read_to_end(lost_follower, (topic, 0)) == []
    until(lambda: bool(lost_follower.poll(0.1)) or lost_follower.at_end((topic, 0)), "at_end")
    lost_follower.close()
    lost.close()


def test_at_end_of_an_empty_partition_and_after_each_record(broker: Broker, topic: str) -> None:
    follower = broker.consumer([topic])
    partition = (topic, 0)
    until(lambda: bool(follower.poll(0.1)) or follower.at_end(partition), "at_end of an empty partition")
    follower.close()
    write(broker, *(Message(topic, b"%d" % i) for i in range(5)))
    follower = broker.consumer([topic])  # a fetch that waits would see the first record alone
    found: list[Record] = []
    until(lambda: bool(found.extend(follower.poll(0.2, 2)) or found), "the first records")
    assert len(found) < 5 and not follower.at_end(partition)
    until(lambda: bool(found.extend(follower.poll(0.2, 2)) or len(found) == 5), "all records")
    until(lambda: bool(follower.poll(0.1)) or follower.at_end(partition), "at_end")
    assert follower.end_offsets([partition]) == {partition: 5}
    follower.close()


def test_seek_reads_again(broker: Broker, topic: str) -> None:
    write(broker, *(Message(topic, b"%d" % i) for i in range(5)))
    follower = broker.consumer([topic])
    read(follower, 5)
    follower.seek((topic, 0), 3)
    assert follower.position((topic, 0)) == 3
    assert not follower.at_end((topic, 0))
    assert [r.offset for r in read(follower, 2)] == [3, 4]
    follower.close()


def test_a_paused_partition_waits(broker: Broker, topic: str) -> None:
    follower = broker.consumer([topic])
    follower.poll(0.1)
    follower.pause([(topic, 0)])
    write(broker, Message(topic, b"held", None, 0), Message(topic, b"through", None, 1))
    assert [r.value for r in read(follower, 1)] == [b"through"]
    assert follower.poll(0.2) == []
    follower.resume([(topic, 0)])
    assert [r.value for r in read(follower, 1)] == [b"held"]
    follower.close()


def test_what_was_fetched_before_a_pause_comes_after_it(broker: Broker, topic: str) -> None:
    write(broker, *(Message(topic, b"%d" % i, None, p) for p in (0, 1) for i in range(50)))
    follower = broker.consumer([topic])
    found: list[Record] = []
    until(lambda: bool(found.extend(follower.poll(0.2, 5)) or found), "the first records")
    mine = found[0].partition
    follower.pause([(topic, mine)])
    other = {(topic, 1 - mine)}
    until(lambda: bool(found.extend(follower.poll(0.2, 5)) or follower.position(*other) == 50), "the other partition")
    follower.resume([(topic, mine)])
    until(lambda: bool(found.extend(follower.poll(0.2, 5)) or len(found) >= 100), "all records")
    assert sorted((r.partition, r.offset) for r in found) == [(p, i) for p in (0, 1) for i in range(50)]
    follower.close()


def test_a_group_goes_on_where_its_predecessor_committed(broker: Broker, topic: str) -> None:
    group = f"{topic}.group"
    write(broker, *(Message(topic, b"%d" % i) for i in range(5)))
    first = broker.consumer([topic], group=group)
    assert [r.offset for r in read(first, 5)] == [0, 1, 2, 3, 4]
    producer = broker.producer(transactional_id=f"{topic}.writer")
    producer.commit({(topic, 0): Position(3, "s")}, first)
    until(lambda: broker.members(group) == 1, "one member")
    with pytest.raises(StateError, match="can't be removed"):
        broker.forget(group)
    first.close()
    until(lambda: broker.members(group) == 0, "no members")
    second = broker.consumer([topic], group=group)
    assert [r.offset for r in read(second, 2)] == [3, 4]
    second.close()
    producer.close()
    until(lambda: broker.members(group) == 0, "no members")
    for _ in range(2):
        broker.forget(group)
        assert broker.committed(group) == {}


class Member:
    """A member of a group that polls on a thread of its own, as every owner does."""

    def __init__(self, broker: Broker, topics: list[str], group: str, **callbacks: Any) -> None:
        self.consumer = broker.consumer(topics, group=group, **callbacks)
        self.records: list[Record] = []
        self.error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()

    def _poll(self) -> None:
        try:
            while not self._stop.is_set():
                self.records += self.consumer.poll(0.05)
        except FencedError as error:
            self.error = error

    @property
    def share(self) -> set[TopicPartition]:
        return set(self.consumer.assignment())

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.consumer.close()


def test_partitions_move_between_members_and_a_late_commit_is_refused(broker: Broker, topic: str) -> None:
    other, group = f"{topic}-b", f"{topic}.group"
    broker.create_topics({other: {}}, 2)
    told: dict[str, list[tuple[str, set[TopicPartition]]]] = {"a": [], "b": []}

    def join(name: str) -> Member:
        return Member(
            broker,
            [topic, other],
            group,
            on_assigned=lambda p: told[name].append(("assigned", p)),
            on_revoked=lambda p: told[name].append(("revoked", p)),
        )

    everything = {(t, p) for t in (topic, other) for p in (0, 1)}
    a = join("a")
    until(lambda: told["a"] == [("assigned", everything)], "a owns everything")
    b = join("b")
    until(lambda: len(told["a"]) == 3 and len(told["b"]) == 1, "each has been told of its half")
    assert told["a"][1] == ("revoked", everything)
    assert told["a"][2] == ("assigned", a.share) and told["b"] == [("assigned", b.share)]
    assert a.share | b.share == everything and len({p for _, p in a.share}) == len({p for _, p in b.share}) == 1
    assert broker.members(group) == 2
    b.close()
    until(lambda: a.share == everything, "a owns everything again")
    producer = broker.producer(transactional_id=f"{topic}.writer")
    with pytest.raises(FencedError):
        producer.commit({(topic, 0): Position(1, "b")}, b.consumer)
    assert broker.committed(group) == {}
    a.close()
    producer.close()


def test_the_owner_may_commit_while_its_partitions_are_revoked(broker: Broker, topic: str) -> None:
    group = f"{topic}.group"
    write(broker, *(Message(topic, b"%d" % i) for i in range(4)))
    producer = broker.producer(transactional_id=f"{topic}.writer")

    def revoked(partitions: set[TopicPartition]) -> None:
        producer.commit({(topic, 0): Position(a.consumer.position((topic, 0)), "last words")}, a.consumer)

    a = Member(broker, [topic], group, on_revoked=revoked)
    until(lambda: len(a.records) == 4, "4 records")
    b, c = (Member(broker, [topic], group) for _ in range(2))

    def settled() -> bool:
        shares = [len(m.share) for m in (a, b, c)]
        return sum(shares) == 2 and max(shares) == 1

    until(settled, "two of three own a partition")
    assert broker.committed(group)[(topic, 0)] == Position(4, "last words")
    write(broker, Message(topic, b"4"))
    until(lambda: len(a.records + b.records + c.records) == 5, "the next record")
    for thing in (a, b, c, producer):
        thing.close()


def test_an_error_in_a_callback_is_raised_by_poll(broker: Broker, topic: str) -> None:
    def revoked(partitions: set[TopicPartition]) -> None:
        raise FencedError("told on the way out")

    a = Member(broker, [topic], f"{topic}.group", on_revoked=revoked)
    until(lambda: len(a.share) == 2, "an assignment")
    b = Member(broker, [topic], f"{topic}.group")
    until(lambda: a.error is not None, "the error")
    assert "on the way out" in str(a.error)
    a.close()
    b.close()


def test_callbacks_run_in_poll_and_may_ask_and_seek(broker: Broker, topic: str) -> None:
    write(broker, *(Message(topic, b"%d" % i) for i in range(4)))
    seen: list[object] = []

    def assigned(partitions: set[TopicPartition]) -> None:
        seen.append(consumer.committed(sorted(partitions)))
        consumer.seek((topic, 0), 2)

    consumer = broker.consumer([topic], group=f"{topic}.group", on_assigned=assigned)
    assert seen == []
    assert [r.offset for r in read(consumer, 2)] == [2, 3]
    assert seen == [{}]
    consumer.close()


def test_partitions_that_belong_together_have_one_owner_and_then_the_next(broker: Broker, topic: str) -> None:
    group, everything = f"{topic}.group", {(topic, 0), (topic, 1)}
    members = [Member(broker, [topic], group, together=True) for _ in range(2)]
    until(lambda: broker.members(group) == 2, "two members")
    until(lambda: sorted(len(m.share) for m in members) == [0, 2], "one owner of everything")
    (holder,) = (m for m in members if m.share)
    (heir,) = (m for m in members if m is not holder)
    holder.close()
    until(lambda: heir.share == everything, "the heir owns everything")
    heir.close()
