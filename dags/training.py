"""Two DAGs per use case: `<uc>_retrain`, woken by a cut, by drift and once a day, and `<uc>_tune`, once a week. Both
have what they register considered for serving. An event is a wake-up only: the command looks for the newest itself."""

from __future__ import annotations

import json
import os
import re
from datetime import datetime, timedelta
from pathlib import Path

from airflow.providers.apache.kafka.triggers.shared_stream import KafkaSharedStreamTrigger
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, Asset, AssetWatcher, Param
from airflow.timetables.assets import AssetOrTimeSchedule
from airflow.timetables.trigger import CronTriggerTimetable

FEATURES = Path(__file__).resolve().parent.parent / "features"
DECLARATION = re.compile(r"^use_case(: UseCase)? = ", re.MULTILINE)
RETRAIN = """
Trains **{name}** up to its newest cut, or later after drift, with Horovod, evaluates, registers a version in MLflow
(`penstock train`), then asks the controller to consider it (`penstock rollout {name} consider V`). Runs without a new
cut end at once, their second task skipped. Runs for one cut register one version, so clearing a task is safe.
"""
TUNE = """
Searches for better settings of **{name}** on its live examples (`penstock tune`) and judges the best on later ones.
Certainly better settings are what retrains use from there on; a version is trained with them now and the controller is
asked to consider it. Otherwise the second task is skipped. A run that is cleared goes on where the last one stopped.
"""
PARAMS = {
    "trials": Param(20, type="integer", minimum=1, description="In all: a search goes on to so many."),
    "jobs": Param(2, type="integer", minimum=1, maximum=64, description="Processes of one thread each."),
}


def version_of(output: str) -> str | None:
    """The version that waits to be considered, from the last line of a command's `--json`."""
    return json.loads(output)["version"]


def told(name: str, topic: str) -> Asset:
    """The asset `<uc>_<topic>`, which a record of the topic changes."""
    trigger = KafkaSharedStreamTrigger(topics=[f"{name}.{topic}"])
    return Asset(f"{name}_{topic}", watchers=[AssetWatcher(name=f"{name}_{topic}", trigger=trigger)])


def dag(name: str, task: str, about: str, command: str, hours: int, **more: object) -> DAG:
    """A DAG `<uc>_<task>` of two tasks: what may register a version, and the question whether that shall serve."""
    with DAG(
        f"{name}_{task}",
        start_date=datetime(2013, 1, 1),
        catchup=False,
        default_args={"retries": 2, "retry_delay": timedelta(seconds=5), "execution_timeout": timedelta(hours=hours)},
        doc_md=about.format(name=name),
        tags=["penstock", name],
        **more,
    ) as made:
        work = BashOperator(task_id="train", bash_command=command, output_processor=version_of, pool="training")
        consider = BashOperator(
            task_id="consider",
            bash_command="{% set version = ti.xcom_pull(task_ids='train') %}"
            f"{{% if version %}}exec penstock rollout {name} consider {{{{ version }}}}"
            "{% else %}exit 99{% endif %}",  # 99 marks the task as skipped
        )
        work >> consider
    return made


asked = os.environ.get("PENSTOCK_USE_CASES", "").split(",")  # those whose topics there are; without it, all
names = [m.stem for m in sorted(FEATURES.glob("*.py")) if DECLARATION.search(m.read_text())]
for name in names if asked == [""] else set(names) & set(asked):
    daily = CronTriggerTimetable("0 6 * * *", timezone="UTC")
    woken = AssetOrTimeSchedule(timetable=daily, assets=told(name, "cuts") | told(name, "drift"))
    weekly = CronTriggerTimetable("0 3 * * 3", timezone="UTC")  # cuts of whole weeks come on Thursdays
    train = f"exec penstock train {name} --ranks 2 --json"
    search = f"exec penstock tune {name} --trials {{{{ params.trials }}}} --jobs {{{{ params.jobs }}}} --json"
    globals()[f"{name}_retrain"] = dag(name, "retrain", RETRAIN, train, 1, schedule=woken)
    globals()[f"{name}_tune"] = dag(name, "tune", TUNE, search, 12, schedule=weekly, params=PARAMS)
