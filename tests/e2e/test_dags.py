"""Airflow's runs under trouble, and what many of them leave behind: on a stack of clicks, whose cuts come daily.

PENSTOCK_SOAK_RUNS (default 50) runs in a row.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from features.clicks import use_case
from pipelines.broker import clock_message
from pipelines.checkpoint import watermark_of
from services import rollout, stack, wiring
from services.progress import iso
from services.replay import replay
from services.settings import Settings
from services.source import source_of
from services.topic_reader import read_all
from tests.airflow_api import Airflow
from tests.conftest import free_ports

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]
RUNS = int(os.environ.get("PENSTOCK_SOAK_RUNS", "50"))
FIRST, HOUR = datetime(2026, 1, 1, tzinfo=UTC), timedelta(hours=1)
RETRAIN = "clicks_retrain"
Stack = tuple[Settings, Airflow]


def play(settings: Settings, start: datetime, until: datetime) -> int:
    """Clicks over a midnight; the cut that it is (epoch ms)."""
    replay(settings, use_case, source_of("clicks"), start, until, tick=HOUR, progress=False)
    return round(until.replace(hour=0).timestamp() * 1000)


def next_cut(settings: Settings, day: int) -> int:
    midnight = FIRST + timedelta(days=day)
    return play(settings, midnight - 2 * HOUR, midnight + 2 * HOUR)


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose first version was trained and serves."""
    place = {"PENSTOCK_HOME": str(tmp_path_factory.mktemp("dags")), "PENSTOCK_ALLOW_EVENT_TIME": "true"}
    place["PENSTOCK_PORT_BASE"] = str(free_ports())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.items():
            patch.setenv(name, value)
        with stack.running(Settings.load(), ("clicks",)) as settings:
            play(settings, FIRST, FIRST + timedelta(days=1, hours=2))
            airflow = Airflow(settings)
            airflow.until(lambda: champion(settings), "champion", 600)
            quiet(airflow)
            yield settings, airflow


def champion(settings: Settings) -> str | None:
    """The version that serves, by the controller's state and by the predictor."""
    role = rollout.status(settings, "clicks")["roles"]["champion"]
    served = httpx.get(f"{settings.predictor_url}/readyz").json()["champion"]
    return role if role == served else None


def decision(settings: Settings, version: str) -> dict[str, Any]:
    """The first one on a version; empty before."""
    decisions = rollout.status(settings, "clicks")["decisions"]
    return next((dict(d) for d in decisions if d["version"] == version), {})


def cuts_of(settings: Settings) -> list[str]:
    """The cut of each version."""
    return [v.tags["cut"] for v in wiring.registry(settings).versions("clicks")]


def quiet(airflow: Airflow) -> None:
    """Wait until nothing runs: a cut of several partitions wakes several runs."""
    going = {"state": ["running", "queued"]}
    airflow.until(lambda: not airflow.get("/dags/~/dagRuns", **going)["dag_runs"], "quiet Airflow", 900)


def trainings(settings: Settings) -> list[psutil.Process]:
    """The processes of `penstock train` that tasks have started; they leave the scheduler's session, not its family."""
    supervisor = psutil.Process(stack.status(settings)["services"]["kafka"]["pid"]).parent()
    assert supervisor
    found = []
    for process in supervisor.children(recursive=True):
        with suppress(psutil.Error):
            if {"train", "clicks"} <= set(process.cmdline()):
                found.append(process)
    return found


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def test_the_way_of_a_cut_to_serving(clicks: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    settings, airflow = clicks
    cut = next_cut(settings, 2)
    airflow.until(lambda: str(cut) in cuts_of(settings), "version", 600)
    (version,) = [v for v in wiring.registry(settings).versions("clicks") if v.tags["cut"] == str(cut)]
    airflow.until(lambda: decision(settings, version.version) and champion(settings), "decision that is served")
    served = time.time()
    quiet(airflow)
    told = [
        r.timestamp / 1000
        for r in read_all(wiring.broker(settings), "clicks.cuts")
        if f"{cut}".encode() in (r.value or b"")
    ]
    decided = decision(settings, version.version)["time"] / 1000
    tasks = [task for run in airflow.runs(RETRAIN) for task in airflow.tasks(RETRAIN, run) if task["start_date"]]
    first = min((t for t in tasks if at(t["start_date"]) > min(told)), key=lambda t: t["start_date"])
    consider = min(
        (t for t in tasks if t["task_id"] == "consider" and at(t["start_date"]) > version.created / 1000),
        key=lambda t: t["start_date"],
    )
    moments = {
        "first partition's cut on Kafka": min(told),
        "last partition's cut on Kafka": max(told),
        "first task started": at(first["start_date"]),
        "version registered": version.created / 1000,
        "consider started": at(consider["start_date"]),
        "decided": decided,
        "served": served,
        "consider ended": at(consider["end_date"]),
    }
    with capsys.disabled():
        print()
        for name, moment in moments.items():
            print(f"  {moment - min(told):6.1f} s  {name}")
        training = version.metrics["training_s"]
        print(f"  of it {training:.1f} s in the ranks; {decision(settings, version.version)['sentence']}")
    assert min(told) <= moments["first task started"] < moments["version registered"] < decided


def test_a_search_runs_and_a_repeated_one_has_nothing_to_do(clicks: Stack) -> None:
    settings, airflow = clicks
    before = cuts_of(settings)
    run = airflow.start("clicks_tune", trials=1, jobs=1)
    assert airflow.ended("clicks_tune", run, 1200)["train"] == "success"
    made = cuts_of(settings)
    airflow.clear("clicks_tune", run)
    assert airflow.ended("clicks_tune", run, 1200)["train"] == "success"
    assert cuts_of(settings) == made and len(made) <= len(before) + 1


def test_a_training_that_is_killed_leaves_serving_as_it_is(clicks: Stack) -> None:
    settings, airflow = clicks
    serves, before = champion(settings), cuts_of(settings)
    over = threading.Event()

    def kill_all() -> None:
        while not over.wait(0.2):
            for process in trainings(settings):
                with suppress(psutil.Error):
                    process.kill()

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        cut = next_cut(settings, 3)
        run = airflow.start(RETRAIN)
        quiet(airflow)
    finally:
        over.set()
        killer.join()
    assert airflow.ended(RETRAIN, run) == {"train": "failed", "consider": "upstream_failed"}
    assert champion(settings) == serves and cuts_of(settings) == before
    airflow.clear(RETRAIN, run)
    assert airflow.ended(RETRAIN, run)["train"] == "success"
    assert cuts_of(settings) == [*before, str(cut)]


def test_a_scheduler_that_is_killed_ends_the_run_after_all(clicks: Stack) -> None:
    settings, airflow = clicks
    before, known = cuts_of(settings), airflow.runs(RETRAIN)
    cut = next_cut(settings, 4)
    airflow.until(lambda: trainings(settings), "training")
    scheduler = stack.status(settings)["services"]["airflow-scheduler"]
    os.kill(scheduler["pid"], signal.SIGKILL)
    back = airflow.until(lambda: restarted(settings, scheduler["pid"]), "scheduler")
    assert back["restarts"] == scheduler["restarts"] + 1
    quiet(airflow)
    assert cuts_of(settings) == [*before, str(cut)]
    new = [run for run in airflow.runs(RETRAIN) if run not in known]
    assert new and {s for run in new for s in airflow.ended(RETRAIN, run).values()} <= {"success", "skipped"}
    assert decision(settings, wiring.registry(settings).versions("clicks")[-1].version)


def test_features_catch_up_where_no_process_runs(clicks: Stack) -> None:
    """The one that does is stopped until the broker gives it up; woken, it finds that another one took its place."""
    settings, airflow = clicks
    broker, pid = wiring.broker(settings), stack.status(settings)["services"]["featurizer+joiner-clicks"]["pid"]
    reached = watermark_of(broker, "clicks.featurizer", use_case.partitions)
    assert reached
    later = reached + HOUR // timedelta(milliseconds=1)
    os.kill(pid, signal.SIGSTOP)
    try:
        airflow.until(lambda: not broker.members("clicks.featurizer"), "end of the membership")
        producer = broker.producer()
        topics, partitions = use_case.event_topics, range(use_case.partitions)
        producer.send([clock_message(topic, i, later) for topic in topics for i in partitions])
        producer.flush()
        airflow.unpause("clicks_features")
        run = airflow.start("clicks_features")
        end, mark = (
            airflow.ended("clicks_features", run),
            watermark_of(broker, "clicks.featurizer", use_case.partitions),
        )
        airflow.clear("clicks_features", run)
        assert airflow.ended("clicks_features", run) == end == {"catch_up": "success"}
        assert watermark_of(broker, "clicks.featurizer", use_case.partitions) == mark == later
        assert f"clicks.featurizer is at {iso(later)}" in airflow.log("clicks_features", run, "catch_up")
    finally:
        os.kill(pid, signal.SIGCONT)
    quiet(airflow)
    airflow.until(lambda: broker.members("clicks.featurizer"), "featurizer")


def restarted(settings: Settings, pid: int) -> dict[str, Any] | None:
    now = stack.status(settings)["services"]["airflow-scheduler"]
    return dict(now) if now["state"] == "ready" and now["pid"] != pid else None


def facts(process: psutil.Process) -> tuple[int, int] | None:
    """Bytes of memory and open TCP sockets; None of a process that has ended."""
    try:
        return process.memory_info().rss, len(process.net_connections("tcp"))
    except psutil.NoSuchProcess:
        return None


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def at_rest(settings: Settings) -> dict[str, float]:
    """The least of some looks: Airflow parses DAG files now and then, in a process that comes and goes."""
    looks = [look(settings) for _ in range(8)]
    return {name: min(one.get(name, 0.0) for one in looks) for name in looks[0]}


def look(settings: Settings) -> dict[str, float]:
    """What the stack holds: MB of memory by service, MB on disk by folder, connections by whom."""
    held: dict[str, float] = {}
    for name, service in stack.status(settings)["services"].items():
        if service["pid"]:
            found = [f for p in family(psutil.Process(service["pid"])) if (f := facts(p))]
            held[f"MB {name}"] = sum(rss for rss, _ in found) / 1e6
            held[f"processes {name}"] = len(found)
            held[f"sockets {name}"] = sum(sockets for _, sockets in found)
    for folder in settings.home.iterdir():
        files = [f for f in ([folder] if folder.is_file() else folder.rglob("*")) if f.is_file()]
        held[f"disk MB {folder.name}"] = sum(f.stat().st_blocks * 512 for f in files if f.exists()) / 1e6
    dsn = settings.postgres.replace("+psycopg", "", 1)
    with psycopg.connect(f"{dsn}/postgres") as connection:
        rows = connection.execute(
            "SELECT datname, count(*) FROM pg_stat_activity WHERE datname <> 'postgres' GROUP BY 1"
        )
        held |= {f"postgres {name}": count for name, count in rows}
    broker = wiring.broker(settings)
    held |= {
        f"members {g}": broker.members(g) for g in ("airflow", "clicks.featurizer", "clicks.joiner", "clicks.control")
    }
    broker.close()
    return held


def test_many_runs_leave_nothing_open(clicks: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    """At rest after five runs and after many more. Memory may grow by what processes keep of their first hundred
    queries and parses; disk by each run's log and rows, and by a WAL segment."""
    settings, airflow = clicks
    row(airflow, 5)
    before, began = at_rest(settings), time.monotonic()
    row(airflow, RUNS)
    spent, after = time.monotonic() - began, at_rest(settings)
    with capsys.disabled():
        print(f"\n  {RUNS} runs in {spent:.0f} s; before, after")
        for name in sorted(before.keys() | after.keys()):
            print(f"  {before.get(name, 0):10.1f} {after.get(name, 0):10.1f}  {name}")
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert max(v for name, v in grown.items() if name.startswith(("members", "processes"))) <= 0
    assert max(v for name, v in grown.items() if name.startswith(("sockets", "postgres"))) <= 5
    assert sum(v for name, v in grown.items() if name.startswith("MB")) < 100
    assert sum(v for name, v in grown.items() if name.startswith("disk")) < 16 + 16 + 0.1 * RUNS


def row(airflow: Airflow, runs: int) -> None:
    """So many runs of a cheap DAG, one after the other."""
    made = [airflow.start("clicks_housekeeping") for _ in range(runs)]
    assert [airflow.ended("clicks_housekeeping", run, 60 * runs) for run in made] == [
        {"housekeeping": "success"}
    ] * runs
    quiet(airflow)
