"""Apache Kafka behind the broker's protocols, with kafka-python. The only file that knows it."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from features.errors import ConfigError, FencedError, InputError, PenstockError, StateError, UnavailableError
from features.kernel import Ints, compiled, inlined
from pipelines.broker import Consumer, Headers, Message, Position, Producer, Record
from pipelines.broker import TopicPartition as Partition

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".*_text is deprecated", DeprecationWarning)  # how kafka-python reads its schemas
    from kafka import AsyncConsumerRebalanceListener, KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
    from kafka import errors as kafka_errors
    from kafka.consumer.fetcher import Fetcher
    from kafka.coordinator.assignors.abstract import ConsumerProtocolAssignment
    from kafka.coordinator.assignors.range import RangePartitionAssignor
    from kafka.future import Future
    from kafka.record.util import decode_varint
    from kafka.structs import OffsetAndMetadata

BOOTSTRAP_S = 10.0
ANSWER_S = 30.0
SESSION_MS, HEARTBEAT_MS, POLL_INTERVAL_MS = 6_000, 1_500, 3_600_000
JOIN_MS = 3_000  # how long a poll waits for a rebalance; the client forgets one that ends between two polls
FETCH_WAIT_MS = 250  # a resumed partition joins the next fetch, so it waits this long at most; records end the wait
TRANSACTION_MS = 10_000
SETTLE_S = 1.5 * TRANSACTION_MS / 1000  # past it a transaction that a fenced owner left open never ends by itself
RETRY_BACKOFF_MS = 20
MAX_METADATA_BYTES = 4_096  # the broker's offset.metadata.max.bytes; more is fatal to a producer
MAX_RECORD_BYTES = 1_048_576

FENCED = (
    kafka_errors.ProducerFencedError,
    kafka_errors.InvalidProducerEpochError,
    kafka_errors.CommitFailedError,
    kafka_errors.IllegalGenerationError,
    kafka_errors.UnknownMemberIdError,
    kafka_errors.FencedInstanceIdError,
)
log = structlog.get_logger()
RebalanceCallback = Callable[[set[Partition]], None]


class KafkaBroker:
    """A Kafka cluster.

    Parameters
    ----------
    bootstrap : `host:port`, several separated by commas
    security : PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL; with SASL the mechanism is PLAIN
    cafile : the authority that signed the broker's certificate; empty for the system's
    """

    def __init__(
        self, bootstrap: str, *, security: str = "PLAINTEXT", username: str = "", password: str = "", cafile: str = ""
    ) -> None:
        self.bootstrap = bootstrap
        self._common: dict[str, Any] = {
            "bootstrap_servers": [server.strip() for server in bootstrap.split(",")],
            "bootstrap_timeout_ms": int(BOOTSTRAP_S * 1000),
            "reconnect_backoff_max_ms": 1_000,
            "retry_backoff_ms": RETRY_BACKOFF_MS,
            "security_protocol": security,
        }
        if security.startswith("SASL"):
            self._common |= {
                "sasl_mechanism": "PLAIN",
                "sasl_plain_username": username,
                "sasl_plain_password": password,
            }
        if cafile:
            self._common["ssl_cafile"] = cafile
        self._lock = threading.Lock()
        self._cached_admin: Any = None

    def _connect(self, client: Callable[..., Any], **config: Any) -> Any:
        try:
            return client(**self._common, **config)
        except (kafka_errors.RetriableError, kafka_errors.KafkaConnectionError, OSError) as error:
            raise UnavailableError(
                f"Kafka does not answer at {self.bootstrap}: start it with `penstock up`, or set kafka_bootstrap"
                f" ({type(error).__name__})"
            ) from error
        except kafka_errors.KafkaError as error:
            raise ConfigError(f"Kafka at {self.bootstrap} refuses these settings: {error}") from error

    def _admin(self) -> Any:
        with self._lock:
            if self._cached_admin is None:
                self._cached_admin = self._connect(KafkaAdminClient)
            return self._cached_admin

    def _ask(self, what: str, question: Callable[[Any], Any]) -> Any:
        """Ask the admin client, again while the cluster is still finding its coordinators."""
        deadline = time.monotonic() + ANSWER_S
        while True:
            try:
                return question(self._admin())
            except kafka_errors.NotCoordinatorError:
                self._drop_admin()
            except (kafka_errors.RetriableError, OSError) as error:
                if time.monotonic() > deadline:
                    raise UnavailableError(f"Kafka at {self.bootstrap} does not answer: {what} ({error})") from error
            time.sleep(0.02)

    def _drop_admin(self) -> None:
        with self._lock:
            admin, self._cached_admin = self._cached_admin, None
        if admin is not None:
            admin.close()

    def close(self) -> None:
        """Close the connection that `create_topics`, `committed` and `members` share."""
        self._drop_admin()

    def create_topics(self, topics: Mapping[str, Mapping[str, str]], partitions: int) -> list[str]:
        """Create the missing ones (name -> topic settings), by default without time retention; returns their names.

        A replay's records carry old timestamps: with time retention the broker would delete them at once.
        """
        existing = set(self._ask("list of topics", lambda admin: admin.list_topics()))
        defaults = {"retention.ms": "-1", "message.timestamp.type": "CreateTime"}
        missing = {
            name: {"num_partitions": partitions, "replication_factor": -1, "configs": {**defaults, **settings}}
            for name, settings in topics.items()
            if name not in existing
        }
        if missing:
            self._ask("create topics", lambda admin: self._create(admin, missing))
        return sorted(missing)

    def _create(self, admin: Any, topics: dict[str, Any]) -> None:
        try:
            admin.create_topics(topics, raise_errors=True)
        except kafka_errors.TopicAlreadyExistsError:
            pass  # another process was quicker, which is what was asked for
        except kafka_errors.InvalidConfigurationError as error:
            raise ConfigError(f"Kafka refuses a topic's settings: {error}") from error
        admin.wait_for_topics(list(topics))

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
        compile_kernels()  # before it joins a group, which it could not answer meanwhile
        kafka = self._connect(
            KafkaConsumer,
            group_id=group,
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="latest" if from_end else "earliest",
            partition_assignment_strategy=[Together if together else RangePartitionAssignor],
            session_timeout_ms=SESSION_MS,
            heartbeat_interval_ms=HEARTBEAT_MS,
            max_poll_interval_ms=POLL_INTERVAL_MS,
            fetch_min_bytes=1,
            fetch_max_wait_ms=FETCH_WAIT_MS,
            max_partition_fetch_bytes=4 * MAX_RECORD_BYTES,
            allow_auto_create_topics=False,
            metrics_enabled=False,
        )
        consumer = _Consumer(kafka, on_assigned, on_revoked, lambda: self.committed(group or ""))
        try:
            consumer.open(topics)
        except PenstockError:
            kafka.close()
            raise
        return consumer

    def producer(self, *, transactional_id: str | None = None) -> Producer:
        config: dict[str, Any] = {
            "acks": "all",
            "enable_idempotence": True,
            "linger_ms": 0,
            "batch_size": 131_072,
            "max_request_size": MAX_RECORD_BYTES,
            "max_block_ms": int(ANSWER_S * 1000),
            "delivery_timeout_ms": int(ANSWER_S * 1000),
            "request_timeout_ms": 10_000,
            "allow_auto_create_topics": False,
            "metrics_enabled": False,
        }
        if transactional_id is None:
            return _Producer(self._connect(KafkaProducer, **config))
        kafka = self._connect(
            KafkaProducer, transactional_id=transactional_id, transaction_timeout_ms=TRANSACTION_MS, **config
        )
        try:
            with _translated(f"take over {transactional_id}"):
                kafka.init_transactions()
        except PenstockError:
            kafka.close(timeout=0)
            raise
        return _Producer(kafka, transactional_id)

    def committed(self, group: str) -> dict[Partition, Position]:
        """What a group has committed; a group nobody knows has committed nothing."""
        offsets = self._ask(f"positions of {group}", lambda admin: admin.list_group_offsets(group))[group]
        return {tuple(p): Position(o.offset, o.metadata or "") for p, o in offsets.items() if o.offset >= 0}

    def members(self, group: str) -> int:
        """How many live members a group has; 0 for a group nobody knows."""
        found = self._ask(f"members of {group}", lambda admin: admin.describe_groups([group]))
        return len(found[group]["members"] or ())

    def forget(self, group: str) -> None:
        """Remove what a group has committed; a group nobody knows has committed nothing."""
        said = self._ask(f"removal of {group}", lambda admin: admin.delete_groups([group]))[group]
        if said not in ("OK", "GroupIdNotFoundError"):
            raise StateError(f"the positions of {group} can't be removed: {said}")


class Together(RangePartitionAssignor):  # type: ignore[misc]  # kafka-python has no types
    """All partitions to one member."""

    name = "together"

    @classmethod
    def assign(cls, cluster: Any, members: Any) -> Any:
        first, *others = sorted(members, key=lambda member: member.member_id)
        nothing = ConsumerProtocolAssignment(cls.version, [], b"")
        return super().assign(cluster, [first]) | {member.member_id: nothing for member in others}


@inlined
def _varint(data: NDArray[np.uint8], at: int) -> tuple[int, int]:
    """A number in zigzag, and where it ends."""
    number, shift = 0, 0
    while at < len(data) and shift < 64:
        byte = data[at]
        number |= np.int64(byte & 127) << shift  # type: ignore[assignment]  # an int to numba
        at, shift = at + 1, shift + 7
        if byte < 128:
            break
    return (number >> 1) ^ -(number & 1), at


@compiled
def _find_records(data: NDArray[np.uint8], at: int, found: Ints) -> int:
    """Where the records of a batch are, which begin at `at`; returns where they end, -1 when they are malformed.

    found : [8, n] for each its timestamp and offset less the batch's, where its key begins and its length, the same of
        its value (length below 0: null), the number of its headers and where they begin
    """
    for i in range(found.shape[1]):
        length, at = _varint(data, at)
        end = at + length
        if length < 0 or end > len(data):
            return -1
        found[0, i], at = _varint(data, at + 1)
        found[1, i], at = _varint(data, at)
        for j in (2, 4):
            found[j + 1, i], found[j, i] = _varint(data, at)
            at = found[j, i] + max(0, found[j + 1, i])
            if at > end:
                return -1
        found[6, i], at = _varint(data, at)
        found[7, i] = at
        for _ in range(2 * found[6, i]):
            size, at = _varint(data, at)
            at += max(0, size)
            if at > end:
                return -1
        if at != end:
            return -1
    return at


def compile_kernels() -> None:
    """Compile what consumers run, once per machine."""
    _find_records(np.frombuffer(b"", np.uint8), 0, np.empty((8, 0), np.int64))


def _records(tp: TopicPartition, batch: Any) -> list[Record]:
    """A batch's records, found in one go: the client's own reader takes 8 to 15 us for each."""
    data, found = bytes(iter(batch)._buffer), np.empty((8, batch.records_count), np.int64)
    if _find_records(np.frombuffer(data, np.uint8), batch._pos, found) != len(data):
        raise kafka_errors.CorruptRecordError(f"malformed record batch at offset {batch.base_offset} of {tp}")
    timestamps, offsets, key_at, key_size, value_at, value_size, headers, headers_at = found
    timestamps = (
        np.full_like(timestamps, batch.max_timestamp) if batch.timestamp_type else timestamps + batch.first_timestamp
    )
    return list(
        map(
            Record,
            repeat(tp.topic),
            repeat(tp.partition),
            (offsets + batch.base_offset).tolist(),
            timestamps.tolist(),
            _parts(data, key_at, key_size),
            _parts(data, value_at, value_size),
            [_headers(data, at, n) if n else () for at, n in zip(headers_at.tolist(), headers.tolist(), strict=True)],
        )
    )


def _parts(data: bytes, starts: Ints, sizes: Ints) -> Iterable[bytes | None]:
    """Keys or values; null where the size is below 0."""
    if (sizes < 0).all():
        return repeat(None, len(sizes))
    cut = [data[a:b] for a, b in zip(starts.tolist(), (starts + sizes).tolist(), strict=True)]
    return cut if sizes.min() >= 0 else [None if size < 0 else part for part, size in zip(cut, sizes, strict=True)]


def _headers(data: bytes, at: int, count: int) -> Headers:
    headers = []
    for _ in range(count):
        size, at = decode_varint(data, at)
        name, at = data[at : at + size].decode(errors="replace"), at + size
        size, at = decode_varint(data, at)
        headers.append((name, data[at : at + max(0, size)]))
        at += max(0, size)
    return tuple(headers)


class _Fetched(Fetcher.PartitionRecords):  # type: ignore[misc]  # kafka-python has no types
    """What was fetched of a partition, as our records."""

    def _unpack_records(self, tp: TopicPartition, records: Any, *_: Any) -> Iterator[Record]:
        while (batch := records.next_batch()) is not None:
            if batch.magic != 2 or not batch.validate_crc():
                raise kafka_errors.CorruptRecordError(f"batch of {tp} fails its checksum, or is older than Kafka 0.11")
            self.leader_epoch = batch.leader_epoch
            if batch.has_producer_id():
                self._consume_aborted_transactions_up_to(batch.last_offset)
                if self._contains_abort_marker(batch):
                    self.aborted_producer_ids.discard(batch.producer_id)
            if not batch.is_control_batch and not self._is_batch_aborted(batch):
                for record in _records(tp, batch):
                    self.next_fetch_offset = record.offset + 1
                    yield record
            self.next_fetch_offset = batch.next_offset
        self.drain()


class _Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no types
    """Passes rebalances on to the consumer.

    kafka-python calls this on its I/O thread, where no call of it may block. Revocation runs on a thread of its own
    while `poll` waits for it, so that the owner can still commit; assignment is told at the end of `poll`.
    """

    def __init__(self, consumer: _Consumer) -> None:
        self._consumer = consumer

    async def on_partitions_assigned(self, assigned: Any) -> None:
        self._consumer.assigned.append({tuple(p) for p in assigned})

    async def on_partitions_revoked(self, revoked: Any) -> None:
        partitions = {tuple(p) for p in revoked}
        if not partitions:
            return
        done = Future()
        threading.Thread(target=self._consumer.revoke, args=(partitions, done), name="revoke").start()
        await done


class _Consumer:
    """A consumer of one thread. Both callbacks run inside `poll`; a commit in `on_revoked` still counts."""

    def __init__(
        self,
        kafka: Any,
        on_assigned: RebalanceCallback | None,
        on_revoked: RebalanceCallback | None,
        all_committed: Callable[[], dict[Partition, Position]],
    ) -> None:
        self._kafka, self._all_committed = kafka, all_committed
        kafka._fetcher.PartitionRecords = _Fetched
        self._on_assigned, self._on_revoked = on_assigned, on_revoked
        self._closing = False
        self._error: BaseException | None = None
        self.assigned: list[set[Partition]] = []
        self.membership: Any = None

    def open(self, topics: Sequence[str]) -> None:
        """Join the group, or take all partitions; the topics are known by then, so that no rebalance follows."""
        kafka = self._kafka
        with _translated(f"open {', '.join(topics)}"):
            if kafka.config["group_id"]:
                kafka.subscribe(list(topics), listener=_Listener(self))
            else:
                kafka._cluster.set_topics(topics)
            kafka._net.run(kafka._manager.wait_for, kafka._cluster.request_update(), int(ANSWER_S * 1000))
            known = {topic: kafka._cluster.partitions_for_topic(topic) for topic in topics}
        if missing := sorted(topic for topic, partitions in known.items() if not partitions):
            raise UnavailableError(f"Kafka has no topic {', '.join(missing)}: run `penstock up`")
        if not kafka.config["group_id"]:
            kafka.assign([TopicPartition(topic, p) for topic, partitions in known.items() for p in sorted(partitions)])
            for partition in self.assignment():
                self.position(partition)  # from_end: the end is now, not at the first poll

    def revoke(self, partitions: set[Partition], done: Any) -> None:
        """Tell the owner, then let the rebalance go on; `poll` raises what the owner raised."""
        try:
            if self._on_revoked is not None and not self._closing:
                self._on_revoked(partitions)
        except BaseException as error:
            self._error = error
        finally:
            self._kafka._manager.call_soon(done.success, None)

    def poll(self, timeout: float, max_records: int = 2000) -> list[Record]:
        with _translated("poll"):
            if self._kafka.config["group_id"] and self._kafka._coordinator.need_rejoin():
                self._kafka._coordinator.poll(timeout_ms=JOIN_MS)
            self._free_slot()
            batches = self._kafka.poll(timeout_ms=max(0, round(timeout * 1000)), max_records=max_records)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self.assigned:
            self._put_back(batches)
            self._tell_assigned()
            return []
        return list(chain.from_iterable(batches.values()))

    def _free_slot(self) -> None:
        """kafka-python gives back what it has put aside for a partition that was paused only when its slot for records
        is None, and leaves a drained object there: a resumed partition would never be read again."""
        fetcher = self._kafka._fetcher
        if not fetcher._next_partition_records:
            fetcher._next_partition_records = None

    def _put_back(self, batches: Mapping[Any, Any]) -> None:
        """What came with a rebalance is read again, from where the callback leaves the position."""
        assigned = self._kafka.assignment()
        for partition, batch in batches.items():
            if partition in assigned:
                self._kafka.seek(partition, batch[0].offset)

    def _tell_assigned(self) -> None:
        while self.assigned:
            partitions = self.assigned.pop(0)
            # Commits carry the generation that the owner has been told of: one made for an older one is refused.
            self.membership = self._kafka.group_metadata()
            if self._on_assigned is not None and partitions:
                self._on_assigned(partitions)

    def assignment(self) -> set[Partition]:
        return {tuple(p) for p in self._kafka.assignment()}

    def seek(self, partition: Partition, offset: int) -> None:
        self._kafka.seek(TopicPartition(*partition), offset)

    def pause(self, partitions: Sequence[Partition]) -> None:
        self._kafka.pause(*(TopicPartition(*p) for p in partitions))

    def resume(self, partitions: Sequence[Partition]) -> None:
        self._kafka.resume(*(TopicPartition(*p) for p in partitions))

    def position(self, partition: Partition) -> int:
        with _translated(f"position of {partition[0]}"):
            found = self._kafka.position(TopicPartition(*partition), timeout_ms=int(ANSWER_S * 1000))
        if found is None:
            raise UnavailableError(f"Kafka tells no position of {partition[0]}/{partition[1]} in {ANSWER_S:.0f} s")
        return int(found)

    def end_offsets(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        with _translated("end offsets"):
            ends = self._kafka.end_offsets([TopicPartition(*p) for p in partitions], timeout_ms=int(ANSWER_S * 1000))
        return {tuple(p): offset for p, offset in ends.items()}

    def at_end(self, partition: Partition) -> bool:
        state = self._kafka._subscription.assignment.get(TopicPartition(*partition))
        if state is None or state.position is None or state.highwater is None:
            return False
        return bool(state.position.offset >= state.highwater)

    def committed(self, partitions: Sequence[Partition]) -> dict[Partition, Position]:
        deadline = time.monotonic() + SETTLE_S
        try:
            with _translated("committed positions"):
                found = {p: self._stable(p, deadline) for p in partitions}
        except UnavailableError:
            # A broker that is killed can lose a transaction's end on some of its partitions. Where it lost it on the
            # offsets, they are undecided until `settle`; what is decided can be read all the same.
            log.warning("a killed broker left offsets undecided", topics=sorted({t for t, _ in partitions}))
            committed = self._all_committed()
            return {p: committed[p] for p in partitions if p in committed}
        return {p: Position(o.offset, o.metadata or "") for p, o in found.items() if o is not None and o.offset >= 0}

    def _stable(self, partition: Partition, deadline: float) -> Any:
        left = max(1, round((deadline - time.monotonic()) * 1000))
        return self._kafka.committed(TopicPartition(*partition), metadata=True, timeout_ms=left)

    def close(self) -> None:
        self._closing = True
        self._kafka.close(timeout_ms=2_000)


class _Producer:
    """A producer; with a transactional id everything sent waits for `commit`."""

    def __init__(self, kafka: Any, transactional_id: str | None = None) -> None:
        self._kafka = kafka
        self._transactional_id = transactional_id
        self._open = False
        self._sent: list[Any] = []

    def send(self, messages: Sequence[Message]) -> None:
        with _translated("send", self._kafka):
            for message in messages:
                self._begin()
                future = self._send(message)
                if self._transactional_id is None:
                    self._sent.append(future)

    def _begin(self) -> None:
        if self._transactional_id is not None and not self._open:
            self._kafka.begin_transaction()
            self._open = True

    def _send(self, message: Message) -> Any:
        if message.key is None and message.value is None:
            raise InputError(f"a record for {message.topic} has neither key nor value: a deletion needs a key")
        return self._kafka.send(
            message.topic,
            message.value,
            message.key,
            list(message.headers),
            message.partition,
            message.timestamp,
        )

    def flush(self, timeout: float = 30.0) -> None:
        with _translated("flush", self._kafka):
            self._kafka.flush(timeout=timeout)
            sent, self._sent = self._sent, []
            for future in sent:
                future.get(timeout=timeout)

    def commit(self, positions: Mapping[Partition, Position], consumer: Consumer) -> None:
        if self._transactional_id is None:
            raise ConfigError("a commit needs a producer with a transactional id")
        if any(len(o.metadata.encode()) > MAX_METADATA_BYTES for o in positions.values()):
            raise InputError(f"a position's metadata is over {MAX_METADATA_BYTES} bytes")
        with _translated("commit", self._kafka):
            self._send_positions(positions, consumer)
            if self._open:
                self._wait(lambda manager: manager.begin_commit())
        self._open = False

    def _send_positions(self, positions: Mapping[Partition, Position], consumer: Consumer) -> None:
        offsets = {TopicPartition(*p): OffsetAndMetadata(o.offset, o.metadata, -1) for p, o in positions.items()}
        if offsets:
            self._begin()
            self._wait(lambda manager: manager.send_offsets_to_transaction(offsets, _membership(consumer)))

    def settle(
        self,
        partitions: Sequence[Partition],
        positions: Mapping[Partition, Position],
        consumer: Consumer,
        *,
        committed: bool,
    ) -> None:
        with _translated("settle", self._kafka):
            self._begin()
            self._wait(lambda manager: _joined(manager, partitions))
            self._send_positions(positions, consumer)
            self._wait(lambda manager: manager.begin_commit() if committed else manager.begin_abort())
        self._open = False

    def _wait(self, request: Callable[[Any], Any]) -> None:
        """The client's own methods wait without a deadline; this is what they do, with one."""
        result = request(self._kafka._transaction_manager)
        self._kafka._sender.wakeup()
        if not result.wait(timeout_ms=int(ANSWER_S * 1000)):
            raise UnavailableError(f"Kafka does not answer a transaction of {self._transactional_id} in {ANSWER_S} s")

    def close(self) -> None:
        self._kafka.close(timeout=2)


def _joined(manager: Any, partitions: Sequence[Partition]) -> Any:
    """Partitions become part of a transaction without a record: its end is written to them all the same."""
    with manager._lock:
        for partition in partitions:
            manager.maybe_add_partition_to_transaction(TopicPartition(*partition))
        request = manager._add_partitions_to_transaction_handler()
        manager._enqueue_request(request)
    return request.result


def _membership(consumer: Consumer) -> Any:
    if not isinstance(consumer, _Consumer) or consumer.membership is None:
        raise FencedError("this consumer owns no partitions: nothing of it can be committed")
    return consumer.membership


@contextmanager
def _translated(doing: str, producer: Any = None) -> Iterator[None]:
    """kafka-python's errors as Penstock's."""
    try:
        yield
    except (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError) as error:
        raise InputError(f"Kafka refuses a record over {MAX_RECORD_BYTES} bytes: {error}") from error
    except (kafka_errors.KafkaError, AssertionError, OSError) as error:
        manager = getattr(producer, "_transaction_manager", None)
        causes = (error, error.__cause__, getattr(manager, "last_error", None))
        if any(isinstance(cause, FENCED) for cause in causes):
            raise FencedError(f"Kafka {doing}: a newer instance has taken over ({error})") from error
        raise UnavailableError(f"Kafka {doing}: {type(error).__name__}: {error}") from error
