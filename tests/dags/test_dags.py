"""The DAGs as Airflow parses them, in a process and a home of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.airflow_env import POOLS

ROOT = Path(__file__).resolve().parents[2]
LONGEST_FILE = 80  # lines
HEAVY = ("torch", "feast", "mlflow", "pandas", "numpy", "kafka", "features", "services")
TASKS = ("retrain", "tune", "features", "backfill", "housekeeping")

PARSE = """
import json, sys
from pathlib import Path
from airflow.dag_processing.dagbag import BundleDagBag
bag = BundleDagBag(dag_folder={folder!r}, bundle_path=Path({folder!r}))
imported = [name for name in {heavy!r} if name in sys.modules]
from airflow.serialization.serialized_objects import DagSerialization
dags = {{i: DagSerialization.to_dict(d)["dag"] for i, d in bag.dags.items()}}
print("RESULT" + json.dumps([dags, bag.import_errors, imported], default=str))
"""

RUN = """
import json, sys
from pathlib import Path
from airflow.dag_processing.dagbag import BundleDagBag
bag = BundleDagBag(dag_folder={folder!r}, bundle_path=Path({folder!r}))
task = bag.dags[{dag!r}].get_task({task!r})
class Instance:
    def xcom_pull(self, task_ids):
        return {version!r}
context = {{"ti": Instance(), "params": json.loads({params!r})}}
task.render_template_fields(context)
print("RESULT" + task.bash_command)
try:
    task.execute(context)
except Exception as error:
    print(type(error).__name__)
"""


def airflow(code: str, home: Path, **more: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "PENSTOCK_USE_CASES"))}
    env |= {"AIRFLOW_HOME": str(home), "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "PYTHONPATH": str(ROOT), **more}
    env |= {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))[len("RESULT") :]


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    home = tmp_path_factory.mktemp("airflow")
    dags, errors, imported = json.loads(airflow(PARSE.format(folder=str(ROOT / "dags"), heavy=HEAVY), home))
    return dags, errors, imported


def tasks_of(dag: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {task["__var"]["task_id"]: task["__var"] for task in dag["tasks"]}


def test_every_use_case_has_every_dag_and_parsing_imports_nothing_heavy(parsed: Any) -> None:
    dags, errors, imported = parsed
    assert errors == {}
    assert set(dags) == {f"{name}_{task}" for name in ("flights", "clicks") for task in TASKS}
    assert imported == []


def test_of_some_use_cases_only_theirs(tmp_path: Path) -> None:
    code = PARSE.format(folder=str(ROOT / "dags"), heavy=HEAVY)
    dags, _, _ = json.loads(airflow(code, tmp_path, PENSTOCK_USE_CASES="clicks,nothing"))
    assert set(dags) == {f"clicks_{task}" for task in TASKS}


def test_every_task_is_told_about_tried_again_and_in_a_pool(parsed: Any) -> None:
    for dag in parsed[0].values():
        assert dag["doc_md"] and dag["catchup"] is False
        for task in tasks_of(dag).values():
            assert task["doc_md"] and task["retries"] == 2
            assert task["pool"] == ("training" if "penstock train" in task["bash_command"] else "upkeep")


def test_what_takes_long_leaves_a_slot_to_what_is_short(parsed: Any) -> None:
    slots = {name: [task.get("pool_slots", 1) for task in tasks_of(dag).values()] for name, dag in parsed[0].items()}
    assert slots["flights_tune"] == [2, 1] and slots["flights_backfill"] == [2]
    assert POOLS["upkeep"][0] == 3


def test_retrain_is_woken_by_cuts_and_daily(parsed: Any) -> None:
    dag = parsed[0]["flights_retrain"]
    schedule = json.dumps(dag["timetable"])
    assert "0 6 * * *" in schedule and "flights_cuts" in schedule
    assert "KafkaSharedStreamTrigger" in schedule and "flights.cuts" in schedule
    assert "flights_drift" in schedule and "flights.drift" in schedule and "asset_any" in schedule
    assert dag.get("max_active_runs") != 1  # it can drop asset events


def test_retrain_trains_then_considers_and_shows_what_from_what(parsed: Any) -> None:
    tasks = tasks_of(parsed[0]["flights_retrain"])
    assert list(tasks) == ["train", "consider"]
    assert tasks["train"]["bash_command"] == "exec penstock train flights --ranks 2 --json"
    assert tasks["train"]["downstream_task_ids"] == ["consider"]
    inlets, outlets = json.dumps(tasks["train"]["inlets"]), json.dumps(tasks["consider"]["outlets"])
    assert all(name in inlets for name in ("flights_features", "flights_cuts", "flights_drift"))
    assert "flights_model" in outlets


def test_tune_asks_for_trials_and_jobs_then_considers(parsed: Any) -> None:
    dag = parsed[0]["flights_tune"]
    params = {name: param["default"] for name, param in dag["params"]}
    assert params == {"trials": 20, "jobs": 2} and "0 3 * * 3" in json.dumps(dag["timetable"])
    tasks = tasks_of(dag)
    assert list(tasks) == ["train", "consider"]
    asked = "--trials {{ params.trials }} --jobs {{ params.jobs }}"
    assert tasks["train"]["bash_command"] == f"exec penstock tune flights {asked} --json"


@pytest.mark.parametrize(
    ("task", "schedule", "paused"), [("features", "*/15 * * * *", True), ("housekeeping", "30 4 * * *", None)]
)
def test_upkeep_goes_by_the_clock(parsed: Any, task: str, schedule: str, paused: bool | None) -> None:
    dag = parsed[0][f"clicks_{task}"]
    assert schedule in json.dumps(dag["timetable"]) and dag["max_active_runs"] == 1
    assert dag.get("is_paused_upon_creation") is paused


def run(home: Path, dag: str, task: str, params: Any = None, version: str | None = None) -> tuple[str, list[str]]:
    """A task with a `penstock` that writes down its arguments; its rendered command, and those."""
    stand_in = home / "bin" / "penstock"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {home}/arguments\n')
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"
    code = RUN.format(folder=str(ROOT / "dags"), dag=dag, task=task, version=version, params=json.dumps(params or {}))
    command = airflow(code, home, PATH=path)
    called = home / "arguments"
    return command, called.read_text().splitlines() if called.exists() else []


@pytest.mark.parametrize("version", ["3", None])
def test_consider_gets_the_version_or_is_skipped(tmp_path: Path, version: str | None) -> None:
    _, arguments = run(tmp_path, "flights_retrain", "consider", version=version)
    assert arguments == (["rollout", "flights", "consider", "3"] if version else [])


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({"from": None, "until": None}, []),
        ({"from": "2013-01-01", "until": "2013-02-01"}, ["--from=2013-01-01", "--until=2013-02-01"]),
    ],
)
def test_backfill_passes_on_what_was_filled_in(tmp_path: Path, given: dict[str, Any], asked: list[str]) -> None:
    _, arguments = run(tmp_path, "flights_backfill", "backfill", {"view": "origin_dep", **given})
    assert arguments == ["backfill", "flights", "--view=origin_dep", *asked]


def test_no_value_of_the_form_is_run(tmp_path: Path) -> None:
    """Even one that has got past the form's checks: it stays one argument, and the command is the same."""
    bad = "\"; touch owned; $(touch owned) `touch owned` ' && touch owned # --json"
    command, arguments = run(tmp_path, "flights_backfill", "backfill", {"view": bad, "from": bad, "until": bad})
    assert arguments == ["backfill", "flights", f"--view={bad}", f"--from={bad}", f"--until={bad}"]
    assert "touch" not in command
    assert not list(tmp_path.rglob("owned"))


def test_the_form_checks_its_values(parsed: Any) -> None:
    from jsonschema import FormatChecker, ValidationError, validate

    schemas = {name: param["schema"]["__var"] for name, param in parsed[0]["flights_backfill"]["params"]}

    def refused(name: str, value: object) -> bool:
        try:
            validate(value, schemas[name], format_checker=FormatChecker())
        except ValidationError:
            return True
        return False

    assert [refused("view", value) for value in ("origin_dep", "a b", "$(id)", "", None)] == [False, *[True] * 4]
    assert [refused("from", value) for value in (None, "2013-01-01", "soon", "2013-01-01;id")] == [0, 0, 1, 1]


def test_dag_files_are_short() -> None:
    for file in (ROOT / "dags").glob("*.py"):
        assert len(file.read_text().splitlines()) < LONGEST_FILE, file
