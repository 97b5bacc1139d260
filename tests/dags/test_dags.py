"""The DAGs as Airflow parses them, in a process and a home of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST_FILE = 80  # lines

PARSE = """
import json, time
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG
started = time.process_time()
bag = DagBag(dag_folder={folder!r})
seconds = time.process_time() - started
from airflow.serialization.serialized_objects import DagSerialization
dags = {{i: DagSerialization.to_dict(d)["dag"] for i, d in bag.dags.items()}}
print("RESULT" + json.dumps([dags, bag.import_errors, seconds], default=str))
"""

RENDER = """
import sys
sys.path.insert(0, {folder!r})
import training
class Instance:
    def xcom_pull(self, task_ids):
        return {version!r}
task = training.flights_retrain.get_task("consider")
print("RESULT" + task.render_template(task.bash_command, {{"ti": Instance()}}))
"""


def airflow(code: str, home: Path) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("AIRFLOW")}
    env |= {"AIRFLOW_HOME": str(home), "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "PYTHONPATH": str(ROOT)}
    env |= {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))[len("RESULT") :]


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, str], float]:
    home = tmp_path_factory.mktemp("airflow")
    dags, errors, seconds = json.loads(airflow(PARSE.format(folder=str(ROOT / "dags")), home))
    return dags, errors, seconds


def test_dags_parse_without_errors_in_under_a_second(parsed: Any) -> None:
    dags, errors, seconds = parsed
    assert errors == {}
    assert {"flights_retrain", "flights_tune", "clicks_retrain", "clicks_tune"} == set(dags)
    assert seconds < 1.0


def test_retrain_is_woken_by_cuts_and_daily(parsed: Any) -> None:
    dag = parsed[0]["flights_retrain"]
    schedule = json.dumps(dag["timetable"])
    assert "0 6 * * *" in schedule and "flights_cuts" in schedule
    assert "KafkaSharedStreamTrigger" in schedule and "flights.cuts" in schedule
    assert "flights_drift" in schedule and "flights.drift" in schedule and "asset_any" in schedule
    assert dag["catchup"] is False
    assert dag.get("max_active_runs") != 1  # it can drop asset events


def test_retrain_trains_in_its_pool_then_considers(parsed: Any) -> None:
    tasks = {t["__var"]["task_id"]: t["__var"] for t in parsed[0]["flights_retrain"]["tasks"]}
    assert list(tasks) == ["train", "consider"]
    assert tasks["train"]["pool"] == "training"
    assert tasks["train"]["bash_command"] == "exec penstock train flights --ranks 2 --json"
    assert tasks["train"]["downstream_task_ids"] == ["consider"]


def test_tune_asks_for_trials_and_jobs_then_considers(parsed: Any) -> None:
    dag = parsed[0]["flights_tune"]
    params = {name: param["default"] for name, param in dag["params"]}
    assert params == {"trials": 20, "jobs": 2} and "0 3 * * 3" in json.dumps(dag["timetable"])
    tasks = {t["__var"]["task_id"]: t["__var"] for t in dag["tasks"]}
    assert list(tasks) == ["train", "consider"] and tasks["train"]["pool"] == "training"
    asked = "--trials {{ params.trials }} --jobs {{ params.jobs }}"
    assert tasks["train"]["bash_command"] == f"exec penstock tune flights {asked} --json"


@pytest.mark.parametrize(("version", "command"), [("3", "exec penstock rollout flights consider 3"), (None, "exit 99")])
def test_consider_gets_the_version_or_is_skipped(tmp_path: Path, version: str | None, command: str) -> None:
    assert airflow(RENDER.format(folder=str(ROOT / "dags"), version=version), tmp_path) == command


def test_dag_files_are_short() -> None:
    for file in (ROOT / "dags").glob("*.py"):
        assert len(file.read_text().splitlines()) < LONGEST_FILE, file
