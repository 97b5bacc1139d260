"""The containers, from the unchanged docker-compose.yml, on the engine of DOCKER_HOST or the one that the script
PENSTOCK_TEST_ENGINE starts (it prints `export` lines): flights over one cut, then random kills.

PENSTOCK_CHAOS_S (default 600) seconds of kills at most, drawn from PENSTOCK_CHAOS_SEED (default 1).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx
import pytest

from services.settings import ROOT, write_env
from tests.conftest import free_ports

pytestmark = [pytest.mark.stack, pytest.mark.filterwarnings("ignore")]
BUILD_S, UP_S, REPLAY_S, KILL_EVERY_S = 3600, 900, 1800, 20.0
CHAOS_S = float(os.environ.get("PENSTOCK_CHAOS_S", "600"))
SEED = int(os.environ.get("PENSTOCK_CHAOS_SEED", "1"))
STORES = ("kafka", "redis", "postgres")
OURS = ("featurizer", "joiner", "learner", "control", "predictor-1", "predictor-2", "mlflow", "airflow-scheduler")
ENTITIES = {"carrier": "UA", "flight": "UA1545", "origin": "EWR", "dest": "IAH", "tailnum": "N14228"}
FIELDS = {"sched_dep": "2013-01-10T15:00:00Z", "sched_arr": "2013-01-10T19:00:00Z", "distance": 1400}
CALM = """
from datetime import datetime, UTC
from services.demo import demo
from services.settings import Settings
start, end = datetime(2013, 1, 7, tzinfo=UTC), datetime(2013, 1, 10, 12, tzinfo=UTC)
demo(Settings.load(), attach=True, as_json=True, from_=start, until=end)
"""
# Whatever is away, the replay goes on from where it was.
STORMY = """
import contextlib, json, sys, time
from datetime import datetime, timedelta, UTC
from features.errors import PenstockError
from features.flights import use_case
from services import audit
from services.replay import replay
from services.settings import Settings
from services.source import source_of
settings, start, end = Settings.load(), datetime(2013, 1, 7, tzinfo=UTC), datetime(2013, 1, 10, 12, tzinfo=UTC)
calm = time.monotonic() + SECONDS
with contextlib.redirect_stdout(sys.stderr):
    while True:
        try:
            replay(settings, use_case, source_of("flights"), start, end + timedelta(hours=12), progress=False)
            end += timedelta(hours=12)
            if time.monotonic() > calm:
                break
        except PenstockError as error:
            print("the replay starts again:", error, flush=True)
            time.sleep(1)
    checks = audit.audit(settings, use_case)
print(json.dumps({"until": str(end), "checks": checks}))
"""


@dataclass
class Stack:
    """A compose project of the test's own; `times` are seconds."""

    env: dict[str, str]
    port: int
    token: str
    airflow_password: str
    times: dict[str, float] = field(default_factory=dict)

    def compose(self, *words: str, timeout: float = 120, check: bool = True) -> str:
        """What `docker compose` says on its standard output."""
        done = subprocess.run(
            ["docker", "compose", *words],
            cwd=ROOT,
            env=self.env,
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, (
            f"docker compose {' '.join(words[:4])} ... failed\n{done.stdout[-3000:]}"
        )
        return done.stdout

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.times[what] = round(time.monotonic() - began, 1)
        print(f"{what}: {self.times[what]} s", flush=True)

    def url(self, digit: int) -> str:
        return f"http://127.0.0.1:{self.port + digit}"

    def python(self, program: str, timeout: float) -> dict[str, Any]:
        """What a program prints that runs beside the stack; its last line is JSON."""
        name = f"{self.env['COMPOSE_PROJECT_NAME']}-program"
        words = ("run", "--name", name, "--rm", "-T", "--no-deps", "demo", "python", "-c", program)
        try:
            return dict(json.loads(self.compose(*words, timeout=timeout).splitlines()[-1]))
        finally:  # past the timeout it would go on, and `down` leaves it
            subprocess.run(["docker", "rm", "-f", name], env=self.env, stderr=subprocess.DEVNULL, check=False)

    def unhealthy(self) -> list[str]:
        """Services that don't run or fail their health check; the jobs that ended well are fine."""
        rows = [json.loads(line) for line in self.compose("ps", "-a", "--format", "json").splitlines()]
        return [
            r["Service"]
            for r in rows
            if r["Health"] not in ("healthy", "") or (r["State"], r["ExitCode"]) not in (("running", 0), ("exited", 0))
        ]


def engine() -> dict[str, str]:
    """The environment in which `docker` reaches an engine; skips where there is none."""
    if "DOCKER_HOST" in os.environ:
        return dict(os.environ)
    script = os.environ.get("PENSTOCK_TEST_ENGINE")
    if not script:
        pytest.skip("no container engine: set DOCKER_HOST, or PENSTOCK_TEST_ENGINE to a script that starts one")
    said = subprocess.run(
        ["bash", "-c", 'eval "$("$0")" && env -0', script],
        stdout=subprocess.PIPE,
        text=True,
        timeout=BUILD_S,
        check=True,
    )
    return dict(line.split("=", 1) for line in said.stdout.split("\0") if line)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The containers, healthy; removed with their volumes at the end."""
    env, folder, base = engine(), tmp_path_factory.mktemp("containers"), free_ports()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENSTOCK_HOME", str(folder / "home"))
        write_env(folder / ".env")
    secrets = dict(line.split("=", 1) for line in (folder / ".env").read_text().splitlines())
    place = {"COMPOSE_PROJECT_NAME": f"penstock-test-{os.getpid()}", "COMPOSE_ENV_FILES": str(folder / ".env")}
    place |= {"PENSTOCK_PORTS": str(base // 10), "PENSTOCK_ALLOW_EVENT_TIME": "true"}
    made = Stack({**env, **place}, base, secrets["PENSTOCK_PREDICTOR_TOKEN"], secrets["PENSTOCK_AIRFLOW_PASSWORD"])
    try:
        with made.timed("build"):
            made.compose("build", timeout=BUILD_S)
        with made.timed("up and healthy"):
            made.compose("up", "-d", "--wait", "--wait-timeout", str(UP_S), timeout=UP_S)
        yield made
    finally:
        made.compose("down", "-v", "--remove-orphans", timeout=300)


def poll(what: str, check: Callable[[], Any], deadline_s: float = 180.0) -> Any:
    """The first true value of `check`."""
    give_up = time.monotonic() + deadline_s
    while not (value := check()):
        assert time.monotonic() < give_up, f"no {what} within {deadline_s:.0f} s"
        threading.Event().wait(0.5)
    return value


def failed(checks: Sequence[dict[str, Any]], *but: str) -> list[dict[str, Any]]:
    return [c for c in checks if not c["ok"] and not any(name in c["check"] for name in but)]


def ask(stack: Stack, token: str) -> httpx.Response:
    body = {"entities": ENTITIES, "fields": FIELDS, "event_time": "2013-01-10T12:00:00Z"}
    return httpx.post(f"{stack.url(6)}/predict", json=body, headers={"authorization": f"Bearer {token}"}, timeout=10)


def retrain(stack: Stack) -> dict[str, float]:
    """Seconds from Airflow's trigger of the run that trained to its first task, and to the version."""
    login = {"username": "admin", "password": stack.airflow_password}
    token = httpx.post(f"{stack.url(5)}/auth/token", json=login, timeout=10).json()["access_token"]
    with httpx.Client(
        base_url=f"{stack.url(5)}/api/v2/dags/flights_retrain", headers={"authorization": f"Bearer {token}"}
    ) as api:
        tasks = api.get("/dagRuns/~/taskInstances", params={"task_ids": "train"}).json()["task_instances"]
        trained = max((t for t in tasks if t["state"] == "success"), key=lambda t: t["duration"])
        run = api.get(f"/dagRuns/{trained['dag_run_id']}").json()
    triggered, began, ended = (
        datetime.fromisoformat(t) for t in (run["queued_at"], trained["start_date"], trained["end_date"])
    )
    return {
        "trigger to first task": (began - triggered).total_seconds(),
        "trigger to registered": (ended - triggered).total_seconds(),
    }


def test_airflow_retrains_and_callers_get_the_version(stack: Stack) -> None:
    report = stack.python(CALM, REPLAY_S)
    assert not failed(report["checks"], "permuted", "AUC above")  # too few labels for those
    (decision,) = [v for v in report["versions"] if v["action"] == "promoted"]
    answers = [ask(stack, stack.token).json()["rows"][0]["version"] for _ in range(20)]
    assert set(answers) == {decision["version"]}
    assert ask(stack, "wrong").status_code == 401
    times = retrain(stack) | {"label known to served": report["label_to_serving_s"]["p50"]}
    images = json.loads(stack.compose("images", "--format", "json"))
    sizes = {f"{i['Repository']}:{i['Tag']}": round(i["Size"] / 1e6) for i in images}
    print(json.dumps({"seconds": stack.times | times, "image_mb": sizes}, indent=1))


def test_prometheus_reaches_the_predictors(stack: Stack) -> None:
    def up() -> bool:
        said = httpx.get(f"{stack.url(3)}/api/v1/query", params={"query": 'up{job="predictor"}'}, timeout=10).json()
        return [r["value"][1] for r in said["data"]["result"]] == ["1", "1"]

    poll("sample of both predictors", up)


class Chaos(threading.Thread):
    """Kills everything in a random container, again and again, until it is stopped or its time is over."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack, self.stopping, self.killed = stack, threading.Event(), Counter[str]()

    def run(self) -> None:
        rng, began = random.Random(SEED), time.monotonic()
        while not self.stopping.wait(KILL_EVERY_S) and time.monotonic() - began < CHAOS_S:
            victim = rng.choice(STORES + OURS)
            self.stack.compose("exec", "-T", "-u", "0", victim, "sh", "-c", "kill -9 -1", check=False)
            self.killed[victim] += 1
            print(f"{time.monotonic() - began:5.0f} s  killed {victim}", flush=True)


class Onlooker(threading.Thread):
    """Watches the dashboard: how many seconds it has called something broken, and did not answer itself."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.url, self.stopping, self.shown = f"{stack.url(8)}/api/live", threading.Event(), Counter[str]()

    def broken(self) -> list[str]:
        try:
            return [trouble["what"] for trouble in httpx.get(self.url, timeout=5).raise_for_status().json()["broken"]]
        except httpx.HTTPError:
            return ["no dashboard"]

    def run(self) -> None:
        while not self.stopping.wait(1):
            self.shown.update(self.broken())


def test_nothing_is_lost_or_doubled_whatever_is_killed(stack: Stack) -> None:
    chaos, onlooker = Chaos(stack), Onlooker(stack)
    for thread in (chaos, onlooker):
        thread.start()
    try:
        found = stack.python(STORMY.replace("SECONDS", str(CHAOS_S)), CHAOS_S + REPLAY_S)
    finally:
        for thread in (chaos, onlooker):
            thread.stopping.set()
            thread.join()
    print(json.dumps({"killed": chaos.killed, "dashboard": onlooker.shown, **found}, indent=1))
    assert chaos.killed.total() >= CHAOS_S / KILL_EVERY_S / 2
    exact = [c for c in found["checks"] if "made one example" in c["check"] or "learned" in c["check"]]
    assert len(exact) >= 2 and not failed(exact)
    assert onlooker.shown.keys() - {"no dashboard"}
    poll("healthy stack", lambda: not stack.unhealthy() and not onlooker.broken())
