"""Kill -9 of a step or the broker at random moments of a replay of flights: what is left equals a calm run.

One kill of each, then PENSTOCK_SOAK_KILLS (default 50), drawn from PENSTOCK_SOAK_SEED (default 1): one in six ticks.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from features.errors import PenstockError, UnavailableError
from features.flights import use_case
from features.vectors import Vectorizer
from pipelines.broker import clock_of
from pipelines.checkpoint import listed_files
from services import stack, timetable, topics, wiring
from services.embedded import services
from services.processes import Service
from services.replay import replay
from services.replay_session import to_ms
from services.settings import Settings
from services.source import source_of
from services.topic_reader import read_all
from tests.conftest import free_ports

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]
KILLS = int(os.environ.get("PENSTOCK_SOAK_KILLS", "50"))
SEED = int(os.environ.get("PENSTOCK_SOAK_SEED", "1"))
TICK = timedelta(minutes=15)
FROM = datetime(2013, 1, 7, tzinfo=UTC)
VICTIMS = ("featurizer", "joiner", "kafka")
LONGEST_MOMENT_S = 0.3  # after a tick's beginning: about as long as a tick takes
READY_S, KILL_S = 120.0, 60.0  # patience at the start, and on average for each kill
Say = Callable[[str], None]


class Keeper:
    """A service's process, started again whenever it ends."""

    def __init__(self, service: Service, logs: Path) -> None:
        self.service, self.log = service, logs / f"{service.name}.log"
        self.stopping = False
        self.process = self._start()
        self.thread = threading.Thread(target=self._keep)
        self.thread.start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as out:
            return subprocess.Popen(
                self.service.command, env=dict(self.service.env), cwd=self.service.cwd, stdout=out, stderr=out
            )

    def _keep(self) -> None:
        while True:
            self.process.wait()
            if self.stopping:
                return
            self.process = self._start()

    def kill(self) -> None:
        self.process.kill()

    def stop(self) -> None:
        self.stopping = True
        self.process.send_signal(self.service.stop)
        self.thread.join(30)
        self.process.kill()
        self.thread.join()


def wait_until(reached: Callable[[], bool], what: str) -> None:
    deadline, pause = time.monotonic() + READY_S, threading.Event()
    while True:
        try:
            if reached():
                return
            why = "no"
        except (OSError, PenstockError) as error:
            why = str(error)
        assert time.monotonic() < deadline, f"{what} is not there after {READY_S:.0f} s: {why}"
        pause.wait(0.1)


@contextmanager
def system(home: Path) -> Iterator[tuple[Settings, dict[str, Keeper]]]:
    """Kafka, Redis, the predictor, and featurizer and joiner in processes of their own."""
    place = {"PENSTOCK_HOME": str(home), "PENSTOCK_PORT_BASE": str(free_ports()), "PENSTOCK_ALLOW_EVENT_TIME": "true"}
    kept: dict[str, Keeper] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.items():
            patch.setenv(name, value)
        settings = stack.prepared(Settings.load())
        (home / "logs").mkdir()
        by_name = {s.name: s for s in services(settings, ["flights"])}

        def keep(service: Service, name: str) -> None:
            if service.prepare:
                service.prepare()
            kept[name] = Keeper(replace(service, name=name), home / "logs")

        try:
            for name in ("kafka", "redis"):
                keep(by_name[name], name)
                wait_until(by_name[name].ready, name)
            topics.create(settings, "flights")
            keep(by_name["predictor-flights"], "predictor")
            both = by_name["featurizer+joiner-flights"]
            env = {**both.env, "PENSTOCK_METRICS_PORT": "0"}  # the two would share one
            for step in ("featurizer", "joiner"):
                keep(replace(both, command=[*both.command[:-2], step, "flights"], env=env), step)
            for name in ("predictor-flights", "featurizer+joiner-flights"):
                wait_until(by_name[name].ready, name)
            yield settings, kept
        finally:
            for keeper in reversed(kept.values()):
                keeper.stop()


class Killer:
    """Kills at a random moment of each of some random ticks; the first ones kill one of each."""

    def __init__(self, kept: dict[str, Keeper], kills: int, until: datetime, say: Say) -> None:
        rng = random.Random(SEED)
        ticks = sorted(rng.sample(range(to_ms(FROM), to_ms(until), TICK // timedelta(milliseconds=1)), kills))
        victims = [*VICTIMS, *rng.choices(VICTIMS, k=kills)]
        self.plan = {tick: (name, rng.uniform(0, LONGEST_MOMENT_S)) for tick, name in zip(ticks, victims, strict=False)}
        self.kept, self.say, self.kills, self.began = kept, say, kills, time.monotonic()

    def __call__(self, tick: int, marked: float) -> None:
        if tick not in self.plan:
            return
        name, moment = self.plan.pop(tick)
        threading.Timer(moment, self.kept[name].kill).start()
        done = self.kills - len(self.plan)
        at = f"{datetime.fromtimestamp(tick / 1000, UTC):%d %b %H:%M}"
        self.say(f"{time.monotonic() - self.began:5.0f} s  kill {done} of {self.kills}: {name} at {at}")


def run(home: Path, kills: int, until: datetime, say: Say) -> dict[str, Any]:
    """Replay, killing on the way; what is left in topics, archive and stores."""
    with system(home) as (settings, kept):
        killer = Killer(kept, kills, until, say)
        deadline = time.monotonic() + READY_S + KILL_S * max(1, kills)
        while True:
            try:
                replay(settings, use_case, source_of("flights"), FROM, until, tick=TICK, at_tick=killer, progress=False)
                break
            except UnavailableError as error:  # the broker was away; the replay goes on where it stopped
                if time.monotonic() > deadline:
                    raise
                say(f"the replay starts again: {error}")
        assert not killer.plan
        return left(settings, until)


def left(settings: Settings, until: datetime) -> dict[str, Any]:
    """Every record, row and stored vector, in an order of their own."""
    broker = wiring.broker(settings)
    found: dict[str, Any] = {}
    for name in ("scheduled", "departed", "arrived", "weather", "examples", "cuts"):
        records = read_all(broker, use_case.topic(name))
        found[name] = [r.value for r in records if clock_of(r) is None]
        if name in {c.name for c in use_case.contracts}:  # a producer may send twice what a killed broker has taken
            found[name] = list(dict.fromkeys(found[name]))
    first: dict[bytes | None, bytes | None] = {}
    for record in read_all(broker, use_case.topic("predictions")):
        first.setdefault(record.key, record.value)
    found["predictions"] = sorted((str(key), untimed(value)) for key, value in first.items() if value)
    found["examples"] = sorted(found["examples"])
    rejected = (json.loads(r.value) for r in read_all(broker, use_case.topic("rejected")) if r.value)
    found["rejected"] = [r for r in rejected if r["reason"] != "duplicate"]  # at least once, as events
    tables = [("featurizer", view.name) for view in use_case.views] + [("joiner", "examples")]
    for step, table in tables:
        files = listed_files(settings.state_url, "flights", step, table, broker)
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
        found[f"{step} {table}"] = sorted(rows, key=repr)
    found["online"] = online(settings, until)
    broker.close()
    return found


def untimed(prediction: bytes) -> bytes:
    """A record without the milliseconds that its score took."""
    value = json.loads(prediction)
    assert min(value.pop("score_ms").values()) >= 0
    return json.dumps(value).encode()


def online(settings: Settings, until: datetime) -> list[Any]:
    """What the predictor would read now for every request of the replay."""
    store, vectorizer = wiring.feature_store(settings, use_case), Vectorizer(use_case)
    rows = []
    for request in timetable.requests(to_ms(FROM), to_ms(until)):
        due = {"sched_dep": request.time, "sched_arr": request.time}
        rows += store.read([vectorizer.entity_keys(request.row["entities"], due)])
    store.close()
    return rows


@pytest.mark.parametrize("kills", [len(VICTIMS), KILLS])
def test_kills_leave_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str], kills: int) -> None:
    def say(line: str) -> None:
        with capsys.disabled():
            print(line, flush=True)

    until = FROM + 6 * max(8, kills) * TICK
    say(f"\na calm run of {(until - FROM) / TICK:.0f} ticks, then one with {kills} kills (seed {SEED})")
    calm = run(tmp_path / "calm", 0, until, say)
    assert len(calm["examples"]) > 0 and len(calm["joiner examples"]) > 0
    killed = run(tmp_path / "killed", kills, until, say)
    for what, expected in calm.items():
        assert killed[what] == expected, f"{what}: {len(killed[what])} after kills, {len(expected)} in the calm run"
