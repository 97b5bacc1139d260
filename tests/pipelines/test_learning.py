"""The continuous learner as a step: each label learned or skipped once, whatever is killed, poisoned or promoted."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from features.inputs import Floats, Inputs
from features.usecase import ModelInputs
from pipelines.archive import Examples
from pipelines.broker import Message, Record, clock_message
from pipelines.learning import Champion, Guard, Learning, Offsets, Refresh, Row, Span, examples_contract
from pipelines.runner import CommitPolicy, Runner
from pipelines.step import Event
from services import ledger
from services.learning import Followed
from tests.memory_broker import MemoryBroker
from tests.toy import use_case

CONTRACT = examples_contract(use_case)
START = 1_700_000_000_000
SECOND = 1_000


class Counter:
    """A model whose only weight is a logit: it moves towards the labels it sees, and counts them.

    A batch of labels 7 breaks it: learning from it gives a weight that is no number."""

    inputs, targets_named = ModelInputs(("price",)), ()
    example = Inputs(np.zeros((1, 1), np.float32), np.zeros((1, 0), np.int64))

    def __init__(self) -> None:
        self.logit, self.seen = 0.0, 0
        self.memory: list[Examples] = []

    def score(self, inputs: Inputs) -> Floats:
        return np.full(len(inputs), 1 / (1 + np.exp(-self.logit)), np.float32)

    def remember(self, examples: Examples) -> None:
        self.memory.append(examples)

    def recent(self, rows: int) -> tuple[Inputs, Floats] | None:
        if not self.memory:
            return None
        whole = Examples.join(self.memory)
        newest = whole.take(slice(max(0, len(whole) - rows), None))
        return newest.inputs, newest.label

    def attempt(self, examples: Examples) -> Callable[[], None]:
        logit, seen, memory = self.logit, self.seen, list(self.memory)
        self.remember(examples)
        self.seen += len(examples)
        self.logit += 0.02 * float((examples.label - 0.5).sum())
        self.logit = float("nan") if (examples.label == 7).any() else self.logit

        def undo() -> None:
            self.logit, self.seen, self.memory = logit, seen, memory

        return undo

    def is_finite(self) -> bool:
        return bool(np.isfinite(self.logit))

    def graph(self) -> bytes:
        return json.dumps([self.logit, self.seen]).encode()

    def snapshot(self) -> bytes:
        return self.graph()

    def restore(self, data: bytes) -> None:
        self.logit, self.seen = json.loads(data)


def value(number: int, label: float, time: int) -> bytes:
    about = {"request_id": f"r{number}", "event_time": time - 5, "features": {"price": 1.0}, "version": "1"}
    return json.dumps(about | {"score": 0.5, "label": label, "label_time": time}).encode()


class World:
    """The champion is what the test says; the log is the broker's."""

    def __init__(self, broker: MemoryBroker | None = None) -> None:
        self.now: Champion | None = None
        self.log = Followed(use_case, broker, lambda version: Path(version)) if broker else None
        self.made: list[Counter] = []

    def champion(self) -> Champion | None:
        return self.now

    def learner(self, champion: Champion) -> Counter:
        self.made.append(Counter())
        return self.made[-1]

    def starts(self, until: Mapping[int, int], since: int, memory: int) -> dict[int, int]:
        return self.log.starts(until, since, memory) if self.log else dict.fromkeys(until, 0)

    def read(self, offsets: Offsets) -> Iterator[list[Row]]:
        return self.log.read(offsets) if self.log else iter(())


class Feed:
    """Calls a step with examples, one a second from START, and two seconds of silence after each call."""

    def __init__(self, world: World, **options: Any) -> None:
        self.step, self.offset = Learning(use_case, world, 2 * SECOND, **{"memory": 100, **options}), 0
        self.time = START

    def __call__(self, labels: list[float]) -> list[Refresh]:
        """The records that come of these labels."""
        events = []
        for label in labels:
            raw = value(self.offset, label, self.time)
            record = Record("toy.examples", 0, self.offset, START, None, raw)
            events.append(Event(CONTRACT, CONTRACT.decode(raw), self.time, self.time, 0, record))
            self.offset, self.time = self.offset + 1, self.time + SECOND
        self.time += 2 * SECOND
        out = self.step.process(events, self.time)
        self.files, self.forgotten, self.kept = out.files, out.forget, out.keep
        return [msgspec.json.decode(m.value or b"", type=Refresh) for m in out.messages]


def test_nothing_is_learned_before_the_first_version_and_what_it_knows_is_not_learned_again() -> None:
    world = World()
    feed = Feed(world)
    assert feed([1, 0]) == [] and feed.kept
    world.now = Champion("1", START + 6 * SECOND)
    (refresh,) = feed([1, 1, 1, 1])
    assert (refresh.learned, refresh.skipped, refresh.number) == (2, 0, 1)
    assert refresh.spans == [Span(2, {0: (4, 6)}, START + 7 * SECOND)]
    assert world.made[0].seen == 2 and len(world.made[0].memory) == 2


def test_a_refresh_is_a_file_and_a_record_that_vouches_for_it() -> None:
    world = World()
    world.now = Champion("3", START)
    feed = Feed(world)
    (refresh,) = feed([1, 1, 0])
    ((path, graph),) = feed.files.items()
    assert refresh.file == f"toy/learner/0/{path}" and refresh.sha256 == hashlib.sha256(graph).hexdigest()
    assert refresh.latest_label_time == START + 2 * SECOND
    assert refresh.score == world.made[0].score(Counter.example).tolist()
    assert feed([]) == [] and not feed.files and not feed.kept
    numbers = [feed([1])[0].number for _ in range(25)]
    assert numbers == list(range(2, 27))
    assert len(feed.step.state.files["3"]) == 20 and len(feed.forgotten) == 1


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        ([7.0], "a weight is not finite"),
        ([0.0] * 50, "significantly worse on the 80 newest"),
    ],
)
def test_a_refresh_that_makes_it_worse_is_dropped_and_learning_goes_on(poison: list[float], reason: str) -> None:
    world = World()
    world.now = Champion("1", START)
    feed = Feed(world, memory=2_000)
    feed([1.0] * 80)
    good = world.made[0].snapshot()
    (dropped,) = feed(poison)
    assert world.made[0].snapshot() == good and not feed.files
    assert (dropped.number, dropped.learned, dropped.skipped) == (1, 80, len(poison))
    assert reason in dropped.spans[1].reason and dropped.spans[1].offsets == {0: (80, 80 + len(poison))}
    (refresh,) = feed([1.0])
    assert (refresh.number, refresh.learned, refresh.skipped, len(refresh.spans)) == (2, 81, len(poison), 3)
    held = feed.step.state.memory
    assert [s.offsets[0] for s in held] == [(0, 80), (80 + len(poison), 81 + len(poison))]


def test_worse_within_chance_is_no_objection() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(1000)
    assert Guard().objection(before, before + rng.normal(0.02, 1, 1000) * (np.arange(1000) < 900), 100) == ""
    assert "worse" in Guard().objection(before, before + 0.02 + rng.normal(0, 0.1, 1000), 100)
    assert Guard().objection(before[:1], before[:1] + 0.5, 1) == ""
    assert "explodes: 3.0" in Guard().objection(np.full(100, 0.4), np.repeat([0.4, 3.5], [15, 85]), 85)
    assert "not finite" in Guard().objection(before, np.where(before > 0.5, before, np.nan), 10)


class Rig:
    """A log of examples in two partitions, and learners that come and go."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.broker, self.sent = folder, MemoryBroker(), 0
        self.broker.create_topics({"toy.examples": {}}, 2)
        self.broker.create_topics({"toy.models": {}, "toy.rejected": {}}, 1)
        self.champion: Champion | None = None
        self.world = World()

    def send(self, count: int, label: float = 1.0) -> None:
        """Examples, the clocks that pass them; every tenth is there twice."""
        producer = self.broker.producer()
        for _ in range(count):
            message = Message("toy.examples", value(self.sent, label, START + self.sent * SECOND), b"k", self.sent % 2)
            producer.send([message] * (2 if self.sent % 10 == 0 else 1))
            self.sent += 1
        producer.send([clock_message("toy.examples", p, START + self.sent * SECOND) for p in (0, 1)])

    def state(self, version: str, cut: int) -> None:
        self.champion = Champion(version, cut)
        state = {"generation": 1, "roles": {"champion": version}, "versions": {version: {"cut": cut}}}
        self.broker.producer().send([Message("toy.models", json.dumps(state).encode(), b"state")])

    def run(self, reached: Callable[[], bool], die: Callable[[], bool] = lambda: False) -> None:
        """A learner until something is true; `die`: it is killed in its next commit."""
        self.world = World(self.broker)
        self.world.now = self.champion
        stop = threading.Event()
        runner = Runner(
            self.broker,
            use_case,
            lambda partition: Learning(use_case, self.world, 2 * SECOND, memory=50),
            str(self.folder),
            policy=CommitPolicy.every(0.01),
            idle_timeout=0.01,
            rejects=False,
            whole=True,
        )
        if die():
            commit = runner._committed
            runner._committed = lambda *args: (_ for _ in ()).throw(SystemExit) if die() else commit(*args)  # type: ignore[method-assign]
        thread = threading.Thread(target=lambda: _until_exit(runner, stop))
        thread.start()
        deadline = time.monotonic() + 20
        while not reached() and thread.is_alive():
            assert time.monotonic() < deadline, self.newest()
            threading.Event().wait(0.01)
        stop.set()
        thread.join(10)

    def newest(self) -> Refresh | None:
        from services.topic_reader import Newest

        found = Newest(self.broker, "toy.models").read()
        versions = [key for key in found if key != b"state"]
        key = f"refresh:{self.champion.version}".encode() if self.champion else b""
        return msgspec.convert(found[key], Refresh, strict=False) if key in versions else None

    def learned(self, count: int) -> Callable[[], bool]:
        return lambda: (found := self.newest()) is not None and found.learned + found.skipped >= count


def _until_exit(runner: Runner, stop: threading.Event) -> None:
    try:
        runner.run(stop)
    except SystemExit:
        for owned in runner.owned.values():
            owned.producer.close()


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_a_learner_that_comes_and_goes_learns_every_example_of_every_partition_once(rig: Rig) -> None:
    rig.state("1", START)
    for round_ in range(1, 6):
        rig.send(30)
        rig.run(rig.learned(30 * round_))
    checked = ledger.check(rig.broker, use_case)
    assert checked and checked["ok"] and "of 150 examples, 0 in none or two" in checked["detail"], checked
    found = rig.newest()
    assert found and found.learned == 150 and found.skipped == 0
    assert rig.world.made[-1].seen == 150
    files = sorted(rig.folder.glob("toy/learner/0/refreshes/*"))
    assert f"{rig.folder}/{found.file}" in map(str, files) and len(files) <= 20


def test_a_new_champion_starts_from_what_it_has_not_seen(rig: Rig) -> None:
    rig.state("1", START)
    rig.send(60)
    rig.run(rig.learned(60))
    rig.state("2", START + 40 * SECOND)
    rig.send(10)
    rig.run(rig.learned(30))
    found = rig.newest()
    assert found and (found.version, found.learned, found.number) == ("2", 30, 1)
    assert rig.world.made[-1].seen == 30
    assert (ledger.check(rig.broker, use_case) or {})["ok"]


def test_the_ledger_check_finds_what_is_missing_or_double() -> None:
    def row(offset: int) -> Row:
        return Row(0, offset, CONTRACT.decode(value(offset, 1.0, START + offset)), b"")

    rows = [row(i) for i in range(10)]
    fine = Refresh("1", 1, learned=8, skipped=2, spans=[Span(8, {0: (0, 8)}, 0), Span(2, {0: (8, 10)}, 0, "bad")])
    assert ledger.compare(fine, rows)[0]
    gap = Refresh("1", 1, learned=7, skipped=2, spans=[Span(7, {0: (0, 7)}, 0), Span(2, {0: (8, 10)}, 0, "bad")])
    double = Refresh("1", 1, learned=9, skipped=2, spans=[Span(9, {0: (0, 9)}, 0), Span(2, {0: (8, 10)}, 0, "bad")])
    miscounted = Refresh("1", 1, learned=9, skipped=2, spans=fine.spans)
    assert not any(ledger.compare(wrong, rows)[0] for wrong in (gap, double, miscounted))
