"""`penstock tune` from the command line: real processes, killed and resumed; what it logs and what it trains."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from services import tune as service
from services.backtest import Plan
from services.backtest_data import DAY_MS, Range
from services.settings import ROOT, Settings
from services.tune import Task

SPRING = 1_767_225_600_000  # 2026-01-01, when the clicks begin
SPAN = ["--from", "2026-01-01", "--until", "2026-01-04", "--score-from", "2026-01-02", "--held-from", "2026-01-03"]
COMMAND = ["tune", "clicks", *SPAN, "--learner", "lightgbm:every_days=1", "--no-challenger", "--json"]


def started(home: Path, *more: str) -> subprocess.Popen[str]:
    code = "from services.cli import main; main()"
    env = {**os.environ, "PENSTOCK_HOME": str(home), "PENSTOCK_MLFLOW_URL": "http://127.0.0.1:9"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *COMMAND, *more],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def until(condition: Callable[[], Any], what: str, deadline_s: float = 300.0) -> Any:
    ends = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < ends, what
        threading.Event().wait(0.05)
    return found


def children(pid: int) -> list[int]:
    """Processes of trials that a search has started."""
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            found += [child.pid] if any("spawn_main" in part for part in child.cmdline()) else []
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def journal(home: Path) -> str:
    files = list((home / "tune" / "clicks").glob("*.journal"))
    return files[0].read_text() if files else ""


@pytest.fixture
def search(home: Path) -> Iterator[subprocess.Popen[str]]:
    process = started(home, "--trials", "5")
    yield process
    process.kill()
    process.communicate()


@pytest.mark.integration
def test_kills_lose_no_trial_and_double_none(home: Path, search: subprocess.Popen[str]) -> None:
    until(lambda: len(children(search.pid)) == 2, "two processes of trials")
    until(lambda: '"value' in journal(home) or journal(home).count('"op_code":4') > 1, "trials that run")
    killed = children(search.pid)[0]
    os.kill(killed, signal.SIGKILL)
    until(lambda: len(left := children(search.pid)) == 2 and killed not in left, "a new process for the killed one")
    orphans = children(search.pid)
    search.kill()
    search.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans), "the processes of a killed search to end")
    done = started(home, "--trials", "5")
    result = json.loads(done.communicate()[0])
    assert done.returncode == 0 and result["finished"] + result["stopped"] == len(result["trials"]) == 5
    assert len({t["settings"] for t in result["trials"]}) == 5
    assert result["searched"]["now"] is not None and set(result["importances"]) <= {"rounds", "leaves", "rate"}
    assert result["held_out"]["best"]["examples"] > 1000 and not result["better"]  # a day is too little
    logged = json.loads(next((home / "tune" / "clicks").glob("*/search.json")).read_text())
    assert logged["trials"] == result["trials"] and "mlflow.db" in result["mlflow_run"]


def test_better_settings_are_kept_and_a_version_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[str, str]] = []
    trained: list[Any] = []

    def train(settings: Settings, name: str, ranks: int, *, unannounced: bool) -> Any:
        assert kept and unannounced
        trained.append((name, ranks))
        return SimpleNamespace(version="7", __str__=lambda self: "")

    registry = SimpleNamespace(set_settings=lambda name, text: kept.append((name, text)))
    monkeypatch.setattr(service.wiring, "registry", lambda settings: registry)
    monkeypatch.setattr(service, "train", train)
    task = Task(tmp_path, Plan("clicks", Range(SPRING, SPRING + DAY_MS), SPRING, ("online:rate=0.001",)), SPRING)
    result = {"better": False, "settings": {"best": "rate=0.002"}}
    assert service.challenger(Settings(), task, result, 2)[0] is None and not kept
    assert service.challenger(Settings(), task, result | {"better": True}, None)[0] is None and not kept
    assert service.challenger(Settings(), task, result | {"better": True}, 2)[0] == "7"
    assert kept == [("clicks", "rate=0.002")] and trained == [("clicks", 2)]
    assert task.learner("replay=2").changed == "rate=0.001,replay=2"
