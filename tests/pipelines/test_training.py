"""Real Horovod jobs on this machine's gloo ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from features.errors import PenstockError
from features.inputs import Inputs
from pipelines import archive
from pipelines.job import Champion, Job, Recipe
from pipelines.onnx_model import OnnxModel
from services.ranks import run_ranks
from tests.archive_files import DAY, INPUTS, START, TARGETS, write_archive

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
CUT = START + 10 * DAY
DEADLINE_S = 90.0


def make_job(folder: Path, rows: int, **changes: object) -> Job:
    (folder / "rows").mkdir(parents=True)
    files = write_archive(folder / "archive", rows)
    recipe = Recipe(epochs=2, batch=32)
    job = Job(tuple(files), INPUTS, str(folder / "result"), CUT, recipe=recipe, row_log=str(folder / "rows"), seed=5)
    return replace(job, **changes)  # type: ignore[arg-type]


def run(folder: Path, job: Job, ranks: int = 2, timeline: Path | None = None) -> dict[str, object]:
    job.save(folder / "job.json")
    run_ranks("pipelines.training", folder / "job.json", ranks, folder, Path(job.result) / "result.json", timeline)
    return json.loads((Path(job.result) / "result.json").read_text())


def counted_rows(job: Job, result: dict[str, object]) -> dict[tuple[str, str], Counter[str]]:
    """How often each row counted, by phase and epoch: the rows that ranks took in steps that were committed."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    committed = set(result["steps"])
    for file in Path(job.row_log).iterdir():
        for line in file.read_text().splitlines():
            taken = json.loads(line)
            if taken["step"] in committed:
                _, phase, epoch, _ = taken["step"].split()
                counts.setdefault((phase, epoch), Counter()).update(taken["rows"])
    return counts


def assert_each_row_counts_once(job: Job, result: dict[str, object]) -> None:
    examples = archive.load(job.files, job.inputs, job.range_from, job.cut)
    fit = {str(r) for r in examples.between(0, CUT - DAY).request_id}
    held = {str(r) for r in examples.between(CUT - DAY, CUT).request_id}
    counts = counted_rows(job, result)
    for epoch in range(job.recipe.epochs):
        assert counts["fit", str(epoch)] == Counter(fit)
    assert counts["finish", "0"] == Counter(fit | held)


def assert_gradients_travel_together(timeline: Path, steps: int) -> None:
    """Horovod's trace has each step's gradients in its fusion buffer."""
    events = json.loads(timeline.read_text())
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name" and "name" in e["args"]}
    fused = Counter(names[e["pid"]] for e in events if e.get("name") == "MEMCPY_IN_FUSION_BUFFER")
    assert len(fused) > 1 and all("gradients" in name for name in fused)
    assert set(fused.values()) == {steps}


def ranks_by_run(job: Job, result: dict[str, object]) -> list[int]:
    """How many ranks took the steps that count, from one coming or going of ranks to the next."""
    took: dict[str, set[str]] = {step.split()[0]: set() for step in result["steps"]}  # type: ignore[attr-defined]
    for file in Path(job.row_log).iterdir():
        for line in file.read_text().splitlines():
            took.get(json.loads(line)["step"].split()[0], set()).add(file.stem)
    return [len(files) for files in took.values()]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < give_up, f"waited in vain for {what}"
        time.sleep(0.02)


def processes_of(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


def logged_steps(job: Job) -> dict[int, int]:
    """Steps that each rank, by its process, has taken so far."""
    return {int(f.stem): f.read_text().count("\n") for f in sorted(Path(job.row_log).glob("*.jsonl"))}


def ranks_at_work(job: Job, steps: int) -> int:
    """Ranks that have taken so many steps."""
    return sum(taken >= steps for taken in logged_steps(job).values())


def in_background(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def kill_a_rank(job: Job, which: int, after_lines: int) -> threading.Thread:
    """Once both ranks have taken some steps, one is killed with SIGKILL."""

    def strike() -> None:
        wait_for(lambda: ranks_at_work(job, after_lines) == 2, "steps to interrupt")
        os.kill(list(logged_steps(job))[which], signal.SIGKILL)

    return in_background(strike)


def test_a_job_learns_evaluates_and_counts_each_row_once(tmp_path: Path) -> None:
    job = make_job(tmp_path, 3000, targets=TARGETS)
    result = run(tmp_path, job, timeline=tmp_path / "timeline.json")
    assert_each_row_counts_once(job, result)
    assert_gradients_travel_together(tmp_path / "timeline.json", steps=len(result["steps"]))  # type: ignore[arg-type]
    evaluation = json.loads((tmp_path / "result/evaluation.json").read_text())
    assert evaluation["champion"] is None and evaluation["blocks"] == []
    assert evaluation["auc"] > 0.7
    model = OnnxModel.load(tmp_path / "result", "1")
    assert model.inputs == INPUTS
    assert result["ranks"] == 2 and result["examples"] == 3000
    assert CUT - DAY < result["latest_label_time"] < CUT  # type: ignore[operator]


@pytest.mark.parametrize(("which", "compression"), [(0, "none"), (1, "powersgd:2")])
def test_a_killed_rank_loses_and_doubles_nothing(tmp_path: Path, which: int, compression: str) -> None:
    job = make_job(tmp_path, 12_000, recipe=Recipe(epochs=2, batch=32, compression=compression))
    thread = kill_a_rank(job, which, after_lines=30)
    result = run(tmp_path, job)
    thread.join()
    runs = {step.split()[0] for step in result["steps"]}  # type: ignore[attr-defined]
    assert len(runs) > 1, "the kill came too late to matter"
    assert_each_row_counts_once(job, result)


def test_ranks_join_and_leave_as_the_hosts_file_says(tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch=4, members=1, hidden=(16,), trees=0, compression="powersgd:2")
    job = make_job(tmp_path, 12_000, recipe=recipe)

    def list_hosts(hosts: str) -> None:
        (tmp_path / "hosts.new").write_text(hosts)
        (tmp_path / "hosts.new").replace(tmp_path / "hosts")

    def grow_and_shrink() -> None:
        wait_for(lambda: ranks_at_work(job, 30) == 1, "the first rank to work")
        list_hosts("localhost:2\n127.0.0.1:1\n")
        wait_for(lambda: ranks_at_work(job, 30) == 3, "two more ranks to work")
        list_hosts("localhost:1\n")

    thread = in_background(grow_and_shrink)
    result = run(tmp_path, job, ranks=1)
    thread.join()
    assert_each_row_counts_once(job, result)
    worlds = ranks_by_run(job, result)
    assert worlds[0] == worlds[-1] == result["ranks"] == 1 and max(worlds) == 3


def test_warm_start_continues_the_champion_and_compares_with_it(tmp_path: Path) -> None:
    first = make_job(tmp_path / "first", 3000, cut=CUT - 3 * DAY, recipe=Recipe(epochs=2, batch=32, trees=0))
    run(tmp_path / "first", first, ranks=1)
    champion = Champion("1", first.result, first.cut)
    none = Recipe(epochs=0, rate=0.0, finish_rate=0.0, batch=32, trees=0)
    second = make_job(tmp_path / "second", 3000, champion=champion, warm_start=True, recipe=none)
    run(tmp_path / "second", second, ranks=1)
    evaluation = json.loads((tmp_path / "second/result/evaluation.json").read_text())
    assert evaluation["champion"] == "1"
    assert evaluation["auc"] == pytest.approx(evaluation["champion_auc"], abs=0.01)
    assert sum(b["n"] for b in evaluation["blocks"]) == evaluation["examples"]
    assert all(abs(b["difference"]) < 0.05 for b in evaluation["blocks"])


def test_the_same_job_gives_the_same_model(tmp_path: Path) -> None:
    job = make_job(tmp_path, 1500)
    inputs = Inputs(np.ones((4, 3), np.float32), np.ones((4, 2), np.int64))
    scores = []
    for _ in range(2):
        run(tmp_path, job, ranks=1)
        scores.append(OnnxModel.load(tmp_path / "result", "1").score(inputs))
        (tmp_path / "result/result.json").unlink()
    assert np.array_equal(*scores)


def test_a_failed_job_says_why_and_leaves_no_process(tmp_path: Path) -> None:
    job = make_job(tmp_path, 1000, files=(str(tmp_path / "missing.parquet"),))
    with pytest.raises(PenstockError, match=r"missing\.parquet"):
        run(tmp_path, job)
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_training_leaves_no_rank(tmp_path: Path, how: signal.Signals) -> None:
    job = make_job(tmp_path, 30_000)
    job.save(tmp_path / "job.json")
    folder, result = repr(tmp_path), Path(job.result) / "result.json"
    code = f"""
import signal
from pathlib import Path, PosixPath
from services.ranks import run_ranks
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
folder = {folder}
run_ranks("pipelines.training", folder / "job.json", 2, folder, folder / {str(result)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(Path(job.row_log).iterdir())) == 2, "both ranks to start")
    process.send_signal(how)
    process.wait(DEADLINE_S)
    wait_for(lambda: not processes_of(tmp_path), "the ranks to end")
    assert not result.exists()
