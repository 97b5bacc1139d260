"""One DAG per use case, `<uc>_retrain`: woken by a cut and once a day, it trains up to the newest cut and has the
version considered for serving. An event is a wake-up only: the command looks for the newest cut itself."""

from __future__ import annotations

import json
import os
import re
from datetime import datetime, timedelta
from pathlib import Path

from airflow.providers.apache.kafka.triggers.shared_stream import KafkaSharedStreamTrigger
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, Asset, AssetWatcher
from airflow.timetables.assets import AssetOrTimeSchedule
from airflow.timetables.trigger import CronTriggerTimetable

FEATURES = Path(__file__).resolve().parent.parent / "features"
DECLARATION = re.compile(r"^use_case(: UseCase)? = ", re.MULTILINE)
ABOUT = """
Trains **{name}** up to its newest cut with Horovod, evaluates, registers a version in MLflow (`penstock train`), then
asks the controller to consider it (`penstock rollout {name} consider V`). Runs without a new cut end at once, their
second task skipped. Any number of runs for one cut register one version, so clearing a task is safe.
"""


def version_of(output: str) -> str | None:
    """The version that waits to be considered, from the last line of `penstock train --json`."""
    return json.loads(output)["version"]


def retrain(name: str) -> DAG:
    """The retrain DAG of a use case."""
    watcher = AssetWatcher(name=f"{name}_cut", trigger=KafkaSharedStreamTrigger(topics=[f"{name}.cuts"]))
    cuts = Asset(f"{name}_cuts", watchers=[watcher])
    with DAG(
        f"{name}_retrain",
        schedule=AssetOrTimeSchedule(timetable=CronTriggerTimetable("0 6 * * *", timezone="UTC"), assets=(cuts,)),
        start_date=datetime(2013, 1, 1),
        catchup=False,
        default_args={"retries": 2, "retry_delay": timedelta(seconds=5), "execution_timeout": timedelta(hours=1)},
        doc_md=ABOUT.format(name=name),
        tags=["penstock", name],
    ) as dag:
        train = BashOperator(
            task_id="train",
            bash_command=f"exec penstock train {name} --ranks 2 --json",
            output_processor=version_of,
            pool="training",
        )
        consider = BashOperator(
            task_id="consider",
            bash_command="{% set version = ti.xcom_pull(task_ids='train') %}"
            f"{{% if version %}}exec penstock rollout {name} consider {{{{ version }}}}"
            "{% else %}exit 99{% endif %}",  # 99 marks the task as skipped
        )
        train >> consider
    return dag


asked = os.environ.get("PENSTOCK_USE_CASES", "").split(",")  # those whose topics there are; without it, all
for module in sorted(FEATURES.glob("*.py")):
    if DECLARATION.search(module.read_text()) and (asked == [""] or module.stem in asked):
        globals()[f"{module.stem}_retrain"] = retrain(module.stem)
