"""The continuous learner as a process: what it is told by Kafka and the registry, and the versions it registers."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import msgspec
import structlog

from features.contracts import Contract, Invalid
from features.errors import UnavailableError
from features.usecase import UseCase
from pipelines.broker import Broker, Message, Record
from pipelines.control import STATE_KEY
from pipelines.learning import CHUNK, REFRESH_KEY, Champion, Learning, Offsets, Refresh, Row, examples_contract
from pipelines.registry import Registry
from services import wiring
from services.settings import Settings
from services.topic_reader import Newest

if TYPE_CHECKING:
    from pipelines.refresher import Refresher

PATIENCE_S = 60.0
PAUSES_S = (1.0, 60.0)
log = structlog.get_logger()


def make_learner(settings: Settings, use_case: UseCase) -> Callable[[int], Learning]:
    """Partition -> learner; it has all partitions, so there is one."""
    from pipelines.refresher import MEMORY

    registry, models = wiring.registry(settings), settings.home / "models" / use_case.name

    def fetch(version: str) -> Path:
        return registry.download(use_case.name, version, models)

    world = Followed(use_case, wiring.broker(settings), fetch)
    return lambda partition: Learning(use_case, world, round(settings.refresh_every_s * 1000), MEMORY)


class Followed:
    """`pipelines.learning.World` by way of Kafka and the registry. `fetch` : version -> folder with its files."""

    def __init__(self, use_case: UseCase, broker: Broker, fetch: Callable[[str], Path]) -> None:
        self.broker, self.fetch, self.contract = broker, fetch, examples_contract(use_case)
        self.models = Newest(broker, use_case.topic("models"))
        self.newest: Champion | None = None
        self.foreign: set[str] = set()

    def champion(self) -> Champion | None:
        """See `World`; while Kafka or the registry is away the version before goes on."""
        try:
            state = self.models.read().get(STATE_KEY)
            version = state["roles"]["champion"] if state else None
            if state and version and (self.newest is None or version != self.newest.version):
                if (self.fetch(version) / "weights.pt").exists():
                    self.newest = Champion(version, learned_until(state["versions"][version]))
                elif version not in self.foreign:
                    self.foreign.add(version)
                    log.warning("nothing learns on: the champion has no weights of ours", version=version)
        except UnavailableError as error:
            log.warning("a new champion would not be seen now", error=str(error))
        return self.newest

    def learner(self, champion: Champion) -> Refresher:
        from pipelines.refresher import Refresher

        return Refresher(self.fetch(champion.version))

    def starts(self, until: Mapping[int, int], since: int, memory: int) -> dict[int, int]:
        return {p: self._start(p, end, since, 2 * memory) for p, end in until.items()}

    def _start(self, partition: int, end: int, since: int, back: int) -> int:
        """Twice as far back until what is there was before `since`: label times rise along a partition."""
        while start := max(0, end - back):
            rows = next(iter(self.read({partition: (start, end)})), None)
            if rows and rows[0].value.label_time < since:
                return start
            back *= 2
        return 0

    def read(self, offsets: Offsets) -> Iterator[list[Row]]:
        topic, consumer = self.contract.topic, self.broker.consumer([self.contract.topic])
        left = {(topic, partition): end for partition, (start, end) in offsets.items() if start < end}
        consumer.pause(sorted(consumer.assignment() - set(left)))
        for tp in left:
            consumer.seek(tp, offsets[tp[1]][0])
        try:
            rows: list[Row] = []
            seen: set[str] = set()
            give_up = time.monotonic() + PATIENCE_S
            while left:
                records = consumer.poll(0.2, CHUNK)
                give_up = time.monotonic() + PATIENCE_S if records else give_up
                if time.monotonic() > give_up:
                    raise UnavailableError(f"{topic}: no record for {PATIENCE_S:.0f} s before offsets {left}")
                rows += [r for record in records if (r := self._row(record, left, seen)) is not None]
                done = [tp for tp, end in left.items() if consumer.position(tp) >= end]
                consumer.pause(done)
                left = {tp: end for tp, end in left.items() if tp not in done}
                while len(rows) >= CHUNK or (rows and not left):
                    yield sorted(rows[:CHUNK], key=lambda row: (row.value.label_time, row.value.request_id))
                    del rows[:CHUNK]
        finally:
            consumer.close()

    def _row(self, record: Record, left: Mapping[tuple[str, int], int], seen: set[str]) -> Row | None:
        """The example of a record, or None: a clock, one the contract refuses, one behind the end, one seen before."""
        row = row_of(self.contract, record)
        if row is None or row.offset >= left.get((record.topic, record.partition), 0) or row.value.request_id in seen:
            return None
        seen.add(row.value.request_id)
        return row


def row_of(contract: Contract, record: Record) -> Row | None:
    """A record of `<uc>.examples`, or None: a clock, or one that its contract refuses."""
    if record.value is None:
        return None
    try:
        value = contract.decode(record.value)
    except Invalid:
        return None
    return Row(record.partition, record.offset, value, record.value)


def learned_until(facts: Mapping[str, Any]) -> int:
    """The label time (epoch ms) before which a version has learned everything, by the serving state's facts of it."""
    latest = facts.get("latest_label_time")
    return max(facts.get("cut") or 0, 0 if latest is None else latest + 1)


class Registrar:
    """Registers the champion's newest refresh every `register_every_s`, and a former champion's last one, on a thread
    of its own: the learner never waits for MLflow. Called with the messages of a commit."""

    def __init__(self, settings: Settings, use_case: UseCase, registry: Registry | None = None) -> None:
        self._settings, self._name, self._topic = settings, use_case.name, use_case.topic("models")
        self._registry = registry or wiring.registry(settings)
        self._newest: dict[str, Refresh] = {}
        self._registered: dict[str, int] | None = None
        self._last = 0.0
        self._changed = threading.Event()
        threading.Thread(target=self._run, name="registrar", daemon=True).start()

    def __call__(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if message.topic == self._topic and message.value and (message.key or b"").startswith(REFRESH_KEY.encode()):
                refresh = msgspec.json.decode(message.value, type=Refresh)
                self._newest = {v: r for v, r in self._newest.items() if v != refresh.version} | {
                    refresh.version: refresh
                }
                self._changed.set()

    def _run(self) -> None:
        pause = PAUSES_S[0]
        while True:
            self._changed.wait()
            self._changed.clear()
            try:
                self.register_due(time.time())
            except Exception as error:  # whatever MLflow or its client does, learning goes on and this tries again
                log.warning("refresh not registered, trying again", use_case=self._name, error=str(error))
                time.sleep(pause)
                pause = min(2 * pause, PAUSES_S[1])
                self._changed.set()
            else:
                pause = PAUSES_S[0]

    def register_due(self, now: float) -> None:
        """Register what is due at `now` (epoch seconds)."""
        if self._registered is None:
            tags = [v.tags for v in self._registry.versions(self._name) if "refresh_of" in v.tags]
            self._registered = {t["refresh_of"]: int(t["refresh"]) for t in tags}
            self._last = max((float(t["registered"]) for t in tags), default=now)
        *former, _ = versions = list(self._newest)
        due = versions if now - self._last >= self._settings.register_every_s else former
        for version in due:
            refresh = self._newest[version]
            if refresh.number > self._registered.get(version, 0):
                self._register(refresh, now)
                self._registered[version] = refresh.number
                self._last = now if version not in former else self._last
        self._newest = {v: r for v, r in self._newest.items() if v not in former}

    def _register(self, refresh: Refresh, now: float) -> None:
        from pipelines.refresher import write_version

        known = {v.version: v.tags for v in self._registry.versions(self._name)}
        source = self._registry.download(self._name, refresh.version, self._settings.home / "models" / self._name)
        with fsspec.open(f"{self._settings.state_url}/{refresh.file}", "rb") as file:
            graph = file.read()
        tags = {"refresh_of": refresh.version, "refresh": str(refresh.number), "registered": f"{now:.0f}"}
        tags |= {"latest_label_time": str(refresh.latest_label_time), "cut": known[refresh.version].get("cut", "")}
        metrics = {"learned": float(refresh.learned), "skipped": float(refresh.skipped)}
        with tempfile.TemporaryDirectory(prefix="penstock-refresh-") as folder:
            write_version(source, graph, refresh.score, Path(folder, "version"))
            made = self._registry.register(self._name, Path(folder, "version"), metrics, tags)
        log.info("refresh registered", use_case=self._name, version=refresh.version, refresh=refresh.number, as_=made)
