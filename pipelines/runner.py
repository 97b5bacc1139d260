"""The runner: gives every step its Kafka input, watermark, commits, dead letters and shutdown.

A commit is, in this order: online rows acknowledged, closed table files written, snapshot written, one Kafka
transaction with the outputs, the input positions and ``<snapshot>:<watermark ms>`` as their metadata. Killed anywhere,
the next owner loads the snapshot that the positions name and goes on: nothing is lost or doubled. The clock record on
the output tells the positions too, so that a broker which was killed and lost one of the two is seen through.
"""

from __future__ import annotations

import base64
import gc
import hashlib
import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from features.errors import StateError
from features.usecase import UseCase
from pipelines.broker import (
    Broker,
    Consumer,
    Message,
    Position,
    Producer,
    Record,
    TopicPartition,
    by_partition,
    clock_message,
    sent_at,
)
from pipelines.checkpoint import (
    Checkpoints,
    Committed,
    Plan,
    Positions,
    commit_header,
    newest_of,
    told_positions,
)
from pipelines.intake import COUNTED, Refused
from pipelines.step import Holds, Refills, Rows, Step
from pipelines.task import Produced, Task, pack_call

RAW_LIMIT, RAW_KEPT = 65_536, 4_096
POLL_RECORDS = 5_000
MOST_WAITING = 10_000
IDLE_POLL_S = 0.5
log = structlog.get_logger()


class OnlineStore(Protocol):
    """Where changed rows become readable."""

    def write(self, rows: Sequence[Rows]) -> None:
        """Returns when every row is acknowledged."""

    def knows(self, mark: str) -> bool:
        """Whether a mark that `note` left is still there; a store that was emptied has lost it with the rows."""

    def note(self, mark: str) -> None: ...


class Adopts(Protocol):
    """Who knows of backfilled views."""

    def ready(self, view: str, partition: int) -> bool:
        """Whether there is a backfill of the view as it is defined now."""

    def adopt(self, owned: Owned, view: str, positions: Mapping[TopicPartition, int]) -> bool:
        """Whether the view's backfill was done, and is now part of the owner's state as of these positions."""


@dataclass(frozen=True)
class CommitPolicy:
    """When the runner commits.

    seconds : at most so long after the last commit, when there is something new
    records, size : or when so many records of a partition, or bytes of them, have been taken in
    patient_seconds : instead of `seconds` in a backlog, and when nothing has happened but that time went on
    """

    seconds: float = 0.5
    records: int = 10_000
    size: int = 16 << 20
    patient_seconds: float = 5.0

    @classmethod
    def every(cls, seconds: float) -> CommitPolicy:
        return cls(seconds)


@dataclass(frozen=True)
class Measured:
    """What a commit has brought, for whoever counts.

    records, late, unknown : read since the last one; of these, counted although late, and with fields of no contract
    messages, rejected, rows : records sent by topic (its own name within the use case), refused by reason, rows written
        by store
    seconds, freshness_s : what the commit took; from a record sent to its rows online
    snapshot_bytes, watermark (epoch ms), held : of the partition, after it
    """

    step: str
    records: int
    late: int
    unknown: int
    messages: Mapping[str, int]
    rejected: Mapping[str, int]
    rows: Mapping[str, int]
    seconds: float
    freshness_s: Sequence[float]
    snapshot_bytes: int
    watermark: int
    held: Mapping[str, int]


@dataclass
class Owned:
    """A partition this instance owns: its task, and what has gathered since the last commit.

    unserved : views that started empty and wait for `penstock backfill`
    online : rows that are not written yet, oldest first
    eventful : whether more than time going on has gathered
    paused : topics that ran ahead of another one
    kept : the last commit's snapshot and positions; None before the first
    noted : what counted although late or with unknown fields, as of the last commit
    sent, freshness_s, online_rows : when the oldest record was sent whose rows are not online (epoch ms); of the rows
        written since the last commit, how long that took, and their number
    """

    task: Task
    checkpoints: Checkpoints
    producer: Producer
    files: list[str]
    unserved: tuple[str, ...] = ()
    newest_read: float = field(default_factory=time.monotonic)
    advanced: float = 0.0
    asked: float = 0.0
    committed: float = field(default_factory=time.monotonic)
    calls: list[object] = field(default_factory=list)
    produced: Produced = field(default_factory=Produced)
    online: list[Rows] = field(default_factory=list)
    records: int = 0
    size: int = 0
    eventful: bool = False
    confirmed: bool = True
    paused: set[TopicPartition] = field(default_factory=set)
    kept: tuple[str, dict[TopicPartition, Position]] | None = None
    noted: Counter[str] = field(default_factory=Counter)
    sent: int | None = None
    freshness_s: list[float] = field(default_factory=list)
    online_rows: int = 0

    @property
    def waiting(self) -> int:
        """Events that were read and whose time has not come."""
        return len(self.task.intake.pending)

    @property
    def clocked(self) -> bool:
        return any(p.clock is not None for p in self.task.intake.partitions.values())

    def ahead(self) -> list[TopicPartition]:
        """The inputs that don't hold the watermark back."""
        partitions = self.task.intake.partitions
        return [tp for tp, p in partitions.items() if p.watermark > self.task.watermark]


class Runner:
    """Runs one step over the partitions that its consumer group gives it.

    Memory is bounded however much there is to read: what one input has ahead of another waits, at most MOST_WAITING
    events of a partition, then that input is paused; what gathers for a commit is bounded by the policy.

    Parameters
    ----------
    make_step : partition -> step
    state_url : root of snapshots and table files
    store : the online store, for steps with online rows
    on_commit : called with the messages of each commit, after it (a mirror of the state, say)
    on_measured : called with what each commit has brought
    idle_timeout : seconds of silence after which a partition at its end holds nothing back
    adoption : knows of backfills of the views that are not served yet
    rejects : whether refused records go to `<uc>.rejected`; not those that another step refuses too
    whole : the step has all partitions together, and its state is stored whole whenever it asks (`Outputs.keep`) and
        only then: what it has read since is read again after a crash. For a step whose work is not to be done twice
    recover : the step's newest state from elsewhere, for one that has lost its snapshots
    """

    def __init__(
        self,
        broker: Broker,
        use_case: UseCase,
        make_step: Callable[[int], Step],
        state_url: str,
        *,
        store: OnlineStore | None = None,
        on_commit: Callable[[Sequence[Message]], None] | None = None,
        policy: CommitPolicy = CommitPolicy(),
        idle_timeout: float = 0.05,
        adoption: Adopts | None = None,
        rejects: bool = True,
        recover: Callable[[], bytes] | None = None,
        on_measured: Callable[[Measured], None] | None = None,
        whole: bool = False,
    ) -> None:
        self.broker, self.use_case, self.make_step, self.state_url = broker, use_case, make_step, state_url
        self.store, self.on_commit, self.policy, self.idle_timeout = store, on_commit, policy, idle_timeout
        self.on_measured = on_measured
        self.adoption, self.rejects, self.whole, self.recover = adoption, rejects, whole, recover
        probe = make_step(0)
        self.name, self.inputs, self.outputs = probe.name, dict(probe.inputs), list(probe.outputs)
        self.group = f"{use_case.name}.{self.name}"
        self.log = log.bind(use_case=use_case.name, step=self.name)
        self.owned: dict[int, Owned] = {}
        self.ends: dict[TopicPartition, int] | None = None
        self.last_read: dict[TopicPartition, float] = {}
        self.reported: Counter[str] = Counter()
        self.consumer: Consumer

    def run(self, stop: threading.Event, *, once: bool = False) -> None:
        """Work until `stop` is set, or with `once` exactly to the ends that the input has now, strictly by watermark:
        records that no watermark has passed wait in the snapshot for the next run."""
        if once and self._others(0):
            return
        self.ends = {} if once else None
        gc.freeze()  # what is loaded by now stays: the collector would visit its million objects again and again
        self.consumer = self.broker.consumer(
            list(self.inputs),
            group=self.group,
            on_assigned=self._assigned,
            on_revoked=self._revoked,
            together=self.whole,
        )
        try:
            if once and not self._own_something(stop):
                return
            while not stop.is_set() and not self._finished():
                self._turn()
            for i in self.owned:
                self._commit(i)
        finally:
            owned, self.owned = self.owned, {}  # closing hands partitions over, and what failed must not commit
            self.consumer.close()
            for one in owned.values():
                one.producer.close()
            gc.unfreeze()

    def _others(self, own: int) -> bool:
        if others := self.broker.members(self.group) > own:
            self.log.info("another instance owns this group and is working on it: nothing to do")
        return others

    def _own_something(self, stop: threading.Event) -> bool:
        """Wait for partitions; False when another instance has them all."""
        while not self.owned and not stop.is_set():
            self._turn()
            if not self.owned and self._others(1):
                return False
        return True

    def _inputs(self, i: int) -> list[TopicPartition]:
        return sorted(self.consumer.assignment()) if self.whole else [(topic, i) for topic in self.inputs]

    def _task_of(self, partition: int) -> int:
        return 0 if self.whole else partition

    def _finished(self) -> bool:
        """Whether all is read up to the ends, or what is left runs ahead of an input that has ended."""
        if self.ends is None:
            return False
        paused = {tp for owned in self.owned.values() for tp in owned.paused}
        left = {
            tp
            for tp, end in self.ends.items()
            if self._task_of(tp[1]) in self.owned and self.consumer.position(tp) < end
        }
        if left and left <= paused:
            self.log.info("the rest waits for events of another topic", topics=sorted({topic for topic, _ in left}))
        return left <= paused

    def _turn(self) -> None:
        """One poll, one call per owned partition, the commits that are due."""
        records = self.consumer.poll(self._patience(), POLL_RECORDS)
        now = time.monotonic()
        mine: dict[int, list[Record]] = {}
        for tp, own in self._within_ends(by_partition(records)).items():
            mine.setdefault(self._task_of(tp[1]), []).extend(own)
            self.last_read[tp] = now
        drained = len(records) < POLL_RECORDS  # else another partition's records may wait in the client
        for i, owned in self.owned.items():
            if i in mine:
                owned.newest_read = now
            idle, quiet_ms = self._idle(i, now) if drained and self.ends is None else ([], 0)
            moved = self._advance(i, mine.get(i, []), idle, quiet_ms, now)
            self._balance(owned, now)
            if self._is_due(i, moved, now):
                self._commit(i)
            if owned.unserved and self.adoption and now - owned.asked >= self.policy.patient_seconds:
                self._adopt(i, owned, self.adoption)
                owned.asked = now

    def _adopt(self, i: int, owned: Owned, adoption: Adopts) -> None:
        """Take over the backfills that are done; their views are served from this commit on."""
        positions = {tp: self.consumer.position(tp) for tp in self._inputs(i)}
        adopted = {view for view in owned.unserved if adoption.adopt(owned, view, positions)}
        if adopted:
            self._leave_unserved(owned, set(owned.unserved) - adopted)
            owned.checkpoints.base = 0  # what was adopted is not in the calls of a delta
            owned.calls.append(pack_call([], [], 0))
            self._commit(i)
            self.log.info("views adopted from their backfills", partition=i, views=sorted(adopted))

    @staticmethod
    def _leave_unserved(owned: Owned, views: set[str]) -> None:
        owned.unserved, owned.task.unserved = tuple(sorted(views)), frozenset(views)

    def _patience(self) -> float:
        """How long a poll may wait: with nothing at hand only a record can change anything soon."""
        busy = self.ends is not None or any(o.waiting or o.eventful for o in self.owned.values())
        return self.idle_timeout if busy else max(self.idle_timeout, IDLE_POLL_S)

    def _within_ends(self, read: dict[TopicPartition, list[Record]]) -> dict[TopicPartition, list[Record]]:
        """Without what lies behind the ends of a bounded run, which stays unread."""
        if self.ends is None:
            return read
        for tp, end in self.ends.items():
            if self._task_of(tp[1]) in self.owned and self.consumer.position(tp) >= end:
                self.consumer.seek(tp, end)
                self.consumer.pause([tp])
                if tp in read:
                    read[tp] = [r for r in read[tp] if r.offset < end]
        return read

    def _idle(self, i: int, now: float) -> tuple[list[TopicPartition], int]:
        """The inputs that have ended and are silent; if all are, for how many ms."""
        tps, owned = self._inputs(i), self.owned[i]
        quiet = [tp for tp in tps if now - self.last_read.get(tp, 0.0) >= self.idle_timeout and tp not in owned.paused]
        silent = list(filter(self.consumer.at_end, quiet))
        return silent, round((now - owned.newest_read) * 1000) if len(silent) == len(tps) else 0

    def _advance(self, i: int, records: list[Record], idle: list[TopicPartition], quiet_ms: int, now: float) -> bool:
        """One call of the task; whether the watermark has moved."""
        owned, task = self.owned[i], self.owned[i].task
        time_is_due = idle and (owned.waiting or now - owned.advanced >= self.policy.seconds)
        if not records and not time_is_due:
            return False
        before, waiting = task.watermark, owned.waiting
        produced = task.advance(records, idle, quiet_ms)
        owned.advanced = now
        if not records and task.watermark == before:
            return False
        owned.calls.append(None if self.whole else pack_call(records, idle, quiet_ms))
        owned.records += len(records)
        if owned.sent is None:
            owned.sent = next((sent_at(r) for r in records if r.value is not None), None)
        owned.size += sum(len(r.value or b"") for r in records)
        owned.eventful |= bool(records or produced.online or produced.messages or owned.waiting != waiting)
        owned.online += produced.online
        if self._has_ended(i):
            self._write_online(owned)
        owned.produced.add(produced)
        return task.watermark > before

    def _has_ended(self, i: int) -> bool:
        return all(map(self.consumer.at_end, self._inputs(i)))

    def _write_online(self, owned: Owned) -> None:
        """At once when nothing is left to read; once per commit in a backlog, where a key changes many times."""
        if owned.online and self.store:
            self.store.write(owned.online[::-1])  # a store passes over the rows that a newer one precedes
            owned.online_rows += sum(len(rows.times) for rows in owned.online)
            if owned.sent is not None:
                owned.freshness_s.append(time.time() - owned.sent / 1000)
            owned.sent = None
        owned.online = []

    def _balance(self, owned: Owned, now: float) -> None:
        """Pause the inputs that run ahead while too many events wait for another one; never one that is waited for."""
        ahead = set(owned.ahead())
        if owned.waiting >= MOST_WAITING:
            self.consumer.pause(sorted(ahead - owned.paused))
            owned.paused |= ahead
        free = owned.paused if owned.waiting <= MOST_WAITING // 2 else owned.paused - ahead
        if free:
            self.consumer.resume(sorted(tp for tp in free if not self._is_read(tp)))
            self.last_read |= dict.fromkeys(free, now)  # what has come since has not been fetched
            owned.paused = owned.paused - free

    def _is_read(self, tp: TopicPartition) -> bool:
        return self.ends is not None and self.consumer.position(tp) >= self.ends[tp]

    def _is_due(self, i: int, moved: bool, now: float) -> bool:
        """At once when a clock has moved the watermark and nothing is left to read, else by the policy."""
        owned, policy, ended = self.owned[i], self.policy, self._has_ended(i)
        full = owned.records >= policy.records or owned.size >= policy.size or owned.produced.keep
        if full or (moved and owned.clocked and ended):
            return True
        return now - owned.committed >= (policy.seconds if owned.eventful and ended else policy.patient_seconds)

    def _is_patient(self, owned: Owned) -> bool:
        return time.monotonic() - owned.committed >= self.policy.patient_seconds

    def _commit(self, i: int) -> None:
        """One transaction of what has gathered; and when nothing has for a while, once more the last one: a killed
        broker may have lost its end, which the next transaction mends, and others wait for it."""
        owned = self.owned[i]
        if not owned.calls and (owned.confirmed or self.whole or not self._is_patient(owned)):
            return
        began = time.monotonic()
        if self.whole and not owned.produced.keep:
            self._pass_time(owned)
            self._committed(owned, began)
            return
        checkpoints, produced = owned.checkpoints, owned.produced
        self._refill(i, owned)
        self._write_online(owned)
        closed = checkpoints.write_tables(produced.closed)
        for path, data in produced.files.items():
            checkpoints.write_file(path, data)
        owned.files = [f for f in (*owned.files, *closed, *produced.files) if f not in produced.forget]
        if self.whole or checkpoints.wants_base:
            name = checkpoints.save_base(Plan.of(owned.task.step), owned.task.snapshot(), owned.files)
        else:
            name = checkpoints.save_delta(owned.calls, closed)
        watermark = owned.task.watermark
        metadata = str(Committed(name, watermark, owned.unserved))
        positions = {tp: Position(self.consumer.position(tp), metadata) for tp in self._inputs(i)}
        messages = produced.messages + [self._rejected(r) for r in produced.refused if self.rejects]
        messages += [clock_message(topic, i, watermark, (commit_header(positions),)) for topic in self.outputs[:1]]
        owned.producer.send(messages)
        owned.producer.commit(positions, self.consumer)
        if self.whole:
            checkpoints.clean_snapshots(checkpoints.number - 1)
        elif checkpoints.number == checkpoints.base + 1:  # the base is sure by now: a commit has followed its own
            checkpoints.clean_snapshots(checkpoints.base)
        checkpoints.remove(produced.forget)
        owned.kept = (name, positions)
        if self.on_commit and messages:
            self.on_commit(messages)
        self._committed(owned, began)

    def _refill(self, i: int, owned: Owned) -> None:
        """Write every row again when the online store has been emptied since an earlier commit."""
        mark, step = f"{self.use_case.name}.{self.name}.{i}", owned.task.step
        if self.store is None or not isinstance(step, Refills) or self.store.knows(mark):
            return
        if owned.kept:
            rows = owned.task.served(step.current())
            self.store.write(rows)
            self.log.warning("online store was empty, filled", partition=i, rows=sum(len(r.times) for r in rows))
        self.store.note(mark)

    def _pass_time(self, owned: Owned) -> None:
        """Tell how far a step is whose state is stored whole, at the positions of its last snapshot."""
        if owned.kept:
            name, positions = owned.kept
            metadata = str(Committed(name, owned.task.watermark))
            owned.producer.commit({tp: Position(p.offset, metadata) for tp, p in positions.items()}, self.consumer)

    def _committed(self, owned: Owned, began: float) -> None:
        if self.on_measured:
            self.on_measured(self._measured(owned, began))
        owned.confirmed = not owned.calls
        owned.calls, owned.produced, owned.records, owned.size, owned.eventful = [], Produced(), 0, 0, False
        owned.committed = time.monotonic()
        self._report()

    def _measured(self, owned: Owned, began: float) -> Measured:
        produced, task, checkpoints = owned.produced, owned.task, owned.checkpoints
        files = sum(table.num_rows for _, table in produced.closed)
        before, owned.noted = owned.noted, Counter({name: task.intake.counts[name] for name in COUNTED})
        late, unknown = (owned.noted[name] - before[name] for name in COUNTED)
        fresh, owned.freshness_s = owned.freshness_s, []
        rows, owned.online_rows = {"online": owned.online_rows, "offline": files}, 0
        return Measured(
            self.name,
            owned.records,
            late,
            unknown,
            Counter(m.topic.removeprefix(f"{self.use_case.name}.") for m in produced.messages),
            Counter(r.reason for r in produced.refused),
            rows,
            time.monotonic() - began,
            fresh,
            checkpoints.base_bytes + checkpoints.delta_bytes,
            task.watermark,
            task.step.held if isinstance(task.step, Holds) else {},
        )

    def _rejected(self, refused: Refused) -> Message:
        record = refused.record
        raw = record.value or b""
        value = {
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "step": self.name,
            "reason": refused.reason,
            "detail": refused.detail,
            "raw": base64.b64encode(raw if len(raw) <= RAW_LIMIT else raw[:RAW_KEPT]).decode(),
            "size": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
        }
        return Message(self.use_case.topic("rejected"), json.dumps(value).encode(), record.key, record.partition)

    def _report(self) -> None:
        counts: Counter[str] = sum((o.task.intake.counts for o in self.owned.values()), Counter())
        refused = Counter({reason: n for reason, n in counts.items() if reason not in COUNTED})
        if refused != self.reported:
            self.log.warning("rejected so far", **refused)
            self.reported = refused

    def _assigned(self, partitions: set[TopicPartition]) -> None:
        for i in sorted({self._task_of(p) for _, p in partitions} - set(self.owned)):
            self.owned[i] = owned = self._own(i)
            self.log.info("partition owned", partition=i, watermark=owned.task.watermark, unserved=owned.unserved)

    def _own(self, i: int) -> Owned:
        """Fence the previous owner, load what it committed, forget what it didn't."""
        producer = self.broker.producer(transactional_id=f"{self.group}.{i}")
        root = f"{self.state_url}/{self.use_case.name}/{self.name}/{i}"
        checkpoints = Checkpoints(root, secrets.token_hex(4))
        task = Task(self.use_case, self.make_step(i), *sorted({p for _, p in self._inputs(i)}))
        committed = self._settled(i, producer, checkpoints)
        files: list[str] = []
        unserved: set[str] = set()
        newest = newest_of(committed)
        if newest and self.recover and not checkpoints.has(newest.snapshot):
            self.log.warning("snapshot lost, state rebuilt", partition=i, snapshot=newest.snapshot)
            task.step.restore(self.recover())
        elif newest:
            loaded, added = checkpoints.load(newest.snapshot, Plan.of(task.step), self._has_backfill(i))
            files, unserved = loaded.files, {*newest.unserved, *added}
            task.unserved = frozenset(unserved)
            task.restore(loaded.state, loaded.deltas)
        elif checkpoints.newest() > 1:
            raise StateError(
                f"{root} holds snapshots, but group {self.group} has no committed positions: "
                "restore the group's offsets, or remove the folder to start over"
            )
        for tp, position in committed.items():
            self.consumer.seek(tp, position.offset)
        checkpoints.clean(files)
        self.consumer.resume(self._inputs(i))
        if self.ends is not None:
            self.ends |= self.consumer.end_offsets(self._inputs(i))
        owned = Owned(task, checkpoints, producer, files, noted=Counter(task.intake.counts))
        self._leave_unserved(owned, unserved)
        owned.kept = (newest.snapshot, dict(committed)) if newest else None
        return owned

    def _settled(self, i: int, producer: Producer, checkpoints: Checkpoints) -> Positions:
        """The positions to go on from, with an end to what a killed broker may have left open.

        Kafka can lose the end of a transaction on some of its partitions. Offsets and output tell of the same commits,
        so the one that is ahead shows that the last was committed; when none is, what is still open was not.
        """
        offsets = self.consumer.committed(self._inputs(i))
        if not self.outputs:
            return offsets  # what is done again leaves the same rows and state
        told = told_positions(self.broker, (self.outputs[0], i))
        by_offsets, by_output = newest_of(offsets), newest_of(told)
        ahead = by_output and (not by_offsets or by_output > by_offsets) and checkpoints.has(by_output.snapshot)
        positions = told if ahead else offsets
        if by_offsets != by_output:
            self.log.warning("a killed broker lost an end", partition=i, offsets=by_offsets, output=by_output)
        written = [*self.outputs, *([self.use_case.topic("rejected")] if self.rejects else [])]
        producer.settle([(topic, i) for topic in written], positions, self.consumer, committed=by_offsets != by_output)
        return positions

    def _has_backfill(self, i: int) -> Callable[[str], bool]:
        adoption = self.adoption
        return lambda view: adoption is not None and adoption.ready(view, i)

    def _revoked(self, partitions: set[TopicPartition]) -> None:
        for i in {self._task_of(p) for _, p in partitions} & set(self.owned):
            self._commit(i)
            self.owned.pop(i).producer.close()
            self.log.info("partition handed over", partition=i)
