"""The whole system on real flights: three days and a half, one retrain, every process of ours killed on the way.

The retrain, the promotion and the set of examples must come out as if nothing had happened.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from features.flights import use_case
from pipelines.broker import Message
from services import audit, rollout, stack, timetable, wiring
from services.replay import replay
from services.replay_session import to_ms
from services.retrain_wait import RetrainWait
from services.served import read_examples, read_predictions
from services.settings import ROOT, Settings
from services.source import source_of
from services.topic_reader import read_all
from tests.airflow_api import Airflow
from tests.conftest import free_ports

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]
FROM, UNTIL = datetime(2013, 1, 7, tzinfo=UTC), datetime(2013, 1, 10, 12, tzinfo=UTC)
CUT = to_ms(datetime(2013, 1, 10, tzinfo=UTC))
HOUR = 3_600_000
DEADLINE_S = 120.0


def poll(what: str, check: Callable[[], Any]) -> Any:
    """The first true value of `check`."""
    give_up = time.monotonic() + DEADLINE_S
    while time.monotonic() < give_up:
        if value := check():
            return value
        threading.Event().wait(0.2)
    raise AssertionError(f"no {what} within {DEADLINE_S:.0f} s")


class Killer:
    """Kills our processes at chosen ticks of the replay, and a Horovod rank in the middle of the training."""

    def __init__(self, settings: Settings, waits: RetrainWait) -> None:
        self.settings, self.waits = settings, waits
        self.at = {
            to_ms(FROM) + 20 * HOUR: "featurizer+joiner-flights",
            to_ms(FROM) + 40 * HOUR: "predictor-flights",
            to_ms(FROM) + 60 * HOUR: "control-flights",
            CUT + 6 * HOUR: "featurizer+joiner-flights",
        }
        self.killed: list[str] = []

    def __call__(self, tick: int, marked: float) -> None:
        if name := self.at.pop(tick, ""):
            pid = stack.status(self.settings)["services"][name]["pid"]
            os.kill(pid, signal.SIGKILL)
            self.killed.append(name)
        if tick == CUT:
            threading.Thread(target=self._kill_rank, daemon=True).start()
        self.waits(tick, marked)

    def _kill_rank(self) -> None:
        supervisor = psutil.Process(stack.status(self.settings)["services"]["kafka"]["pid"]).parent()
        assert supervisor

        def ranks() -> list[psutil.Process]:
            found = []
            for process in supervisor.children(recursive=True):
                try:
                    command = process.cmdline()
                except psutil.Error:
                    continue
                if (
                    "pipelines.training" in command
                    and "horovod.runner.launch" not in command
                    and "python" in command[0]
                ):
                    found.append(process)
            return found if len(found) >= 2 else []

        victims = poll("two Horovod ranks", ranks)
        victims[-1].kill()
        self.killed.append("rank")


def at(patch: pytest.MonkeyPatch, place: dict[str, str]) -> Settings:
    """Settings of a place, for this process and its children."""
    for name, value in place.items():
        patch.setenv(name, value)
    return Settings.load()


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Settings, Killer]]:
    """The stack after the replay, still running."""
    home, base = tmp_path_factory.mktemp("loop"), free_ports()
    place = {"PENSTOCK_HOME": str(home), "PENSTOCK_PORT_BASE": str(base), "PENSTOCK_ALLOW_EVENT_TIME": "true"}
    with pytest.MonkeyPatch.context() as patch, stack.running(at(patch, place), ("flights",)) as settings:
        waits = RetrainWait(settings, use_case, wiring.broker(settings), to_ms(FROM))
        killer = Killer(settings, waits)
        replay(settings, use_case, source_of("flights"), FROM, UNTIL, at_tick=killer, progress=False)
        waits.close()
        yield settings, killer
        processes = [psutil.Process(s["pid"]) for s in stack.status(settings)["services"].values() if s["pid"]]
        processes += [child for p in processes for child in p.children(recursive=True)]
    left = [p for p in processes if p.is_running()]
    assert not left, f"left behind: {left}"


def test_everything_was_killed_and_the_same_examples_came_out(loop: tuple[Settings, Killer]) -> None:
    settings, killer = loop
    assert sorted(killer.killed) == sorted(
        [*["featurizer+joiner-flights"] * 2, "predictor-flights", "control-flights", "rank"]
    )
    asked = {r.id: r.time for r in timetable.requests(to_ms(FROM), to_ms(UNTIL))}
    arrived = [json.loads(e.value) for e in timetable.events(to_ms(FROM), to_ms(UNTIL)) if e.event == "arrived"]
    expected = sorted(a["flight_id"] for a in arrived if a["flight_id"] in asked)
    examples = read_examples(wiring.broker(settings), use_case)
    assert sorted(e.request_id for e in examples.records) == expected
    assert len(expected) > 2500
    predictions = read_predictions(wiring.broker(settings), use_case)
    assert {p.request_id for p in predictions} == set(asked)


def test_the_version_was_trained_by_airflow_promoted_and_serves(loop: tuple[Settings, Killer]) -> None:
    settings, _ = loop
    (version,) = wiring.registry(settings).versions("flights")
    state = rollout.status(settings, "flights")
    assert state["roles"]["champion"] == version.version
    assert version.tags["cut"] == str(CUT)
    assert int(version.tags["latest_label_time"]) < CUT
    assert httpx.get(f"{settings.predictor_url}/readyz").json()["champion"] == version.version
    late = [p for p in read_predictions(wiring.broker(settings), use_case) if p.event_time >= CUT + HOUR]
    assert late
    assert {p.version for p in late} == {version.version}


def test_what_was_served_passes_the_audit(loop: tuple[Settings, Killer]) -> None:
    settings, _ = loop
    checks = {c["check"]: c for c in audit.audit(settings, use_case, sample=100)}
    failed = [c for c in checks.values() if not c["ok"] and "permuted" not in c["check"]]  # too few labels for +-.02
    assert not failed


def serving(settings: Settings) -> tuple[Any, ...]:
    """What there is to serve, and what serves."""
    versions = [(v.version, dict(v.tags)) for v in wiring.registry(settings).versions("flights")]
    return versions, rollout.status(settings, "flights"), httpx.get(f"{settings.predictor_url}/readyz").json()


def considered(airflow: Airflow, run: str) -> list[str]:
    return [task["state"] for task in airflow.tasks("flights_retrain", run) if task["task_id"] == "consider"]


def test_every_dag_runs_and_a_run_that_is_cleared_changes_nothing(loop: tuple[Settings, Killer]) -> None:
    settings, _ = loop
    airflow, before = Airflow(settings), serving(settings)
    airflow.unpause("flights_features")
    forms: dict[str, dict[str, str]] = {"features": {}, "housekeeping": {}, "backfill": {"view": "dep_origin"}}
    runs = {f"flights_{dag}": airflow.start(f"flights_{dag}", **form) for dag, form in forms.items()}
    ends = {dag: airflow.ended(dag, run) for dag, run in runs.items()}
    assert {state for end in ends.values() for state in end.values()} == {"success"}
    said = airflow.log("flights_features", runs["flights_features"], "catch_up")
    assert "another instance owns this group" in said and "flights.joiner is at 2013-01-1" in said
    pools = {pool["name"]: pool["slots"] for pool in airflow.get("/pools")["pools"]}
    assert pools.items() >= {"training": 1, "upkeep": 3}.items()
    made = [run for run in airflow.runs("flights_retrain") if "success" in considered(airflow, run)]
    again = {**runs, "flights_retrain": made[0]}
    for dag, run in again.items():
        airflow.clear(dag, run)
    for dag, run in again.items():
        assert set(airflow.ended(dag, run).values()) <= {"success", "skipped"}, dag
    assert "no new cut" in airflow.log("flights_retrain", made[0], "train")
    assert serving(settings) == before
    assert airflow.refused("flights_backfill", view="dep_origin; touch owned")


def test_bad_events_are_on_the_rejected_topic(loop: tuple[Settings, Killer]) -> None:
    settings, _ = loop
    broker = wiring.broker(settings)
    now = to_ms(UNTIL)
    event = {
        "id": "x", "time": now, "flight_id": "x", "carrier": "UA", "flight": "UA1", "origin": "EWR", "dest": "IAH",
        "tailnum": None, "sched_dep": now, "dep_delay": 1,
    }  # fmt: skip
    bad = {
        "malformed": b'{"id": ',
        "invalid": json.dumps({**event, "id": "w", "dep_delay": "soon"}).encode(),
        "oversized": json.dumps({**event, "id": "o", "note": "x" * 70_000}).encode(),
        "future": json.dumps({**event, "id": "f", "time": now + HOUR}).encode(),
        "late": json.dumps({**event, "id": "l", "time": now - 90 * 24 * HOUR}).encode(),
    }
    producer = broker.producer()
    producer.send([Message("flights.departed", value, reason.encode(), 0, (), now) for reason, value in bad.items()])
    producer.flush()
    producer.close()

    end = UNTIL + timedelta(hours=1)
    replay(settings, use_case, source_of("flights"), FROM, end, progress=False)  # what is late is known when time moves

    def found() -> dict[str, str] | None:
        records = [json.loads(r.value or b"{}") for r in read_all(broker, "flights.rejected")]
        reasons = {r["reason"]: r["topic"] for r in records if r["step"] == "featurizer"}
        return reasons if len(reasons) >= len(bad) else None

    assert poll("rejected events", found) == dict.fromkeys(bad, "flights.departed")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "flights"], 0, "no new cut"),
        (["rollout", "flights", "promote", "99"], 1, "99"),
        (["rollout", "flights", "consider"], 2, "version"),
        (["rollout", "nothing"], 1, "no use case"),
        (["run", "sorter", "flights"], 1, "no step sorter"),
        (["run", "featurizer", "flights", "--once"], 0, "another instance"),
        (["replay", "flights", "--from", "soon", "--until", "2013-01-02"], 2, "no date"),
        (["replay", "flights", "--from", "2013-01-02", "--until", "2013-01-01"], 1, ""),
        (["up"], 0, "already running"),
        (["status"], 0, "watermark"),
    ],
)
def test_commands_answer_in_words(loop: tuple[Settings, Killer], arguments: list[str], code: int, words: str) -> None:
    penstock = [str(Path(sys.executable).parent / "penstock"), *arguments]
    done = subprocess.run(penstock, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    said = done.stdout + done.stderr
    assert (done.returncode, "Traceback" in said) == (code, False), said
    assert words in said
