"""`<uc>_retrain`, woken by a cut, by drift and once a day, and `<uc>_tune`, once a week. Both have what they register
considered for serving. An event is a wake-up only: the command looks for the newest itself."""

from __future__ import annotations

import json

from airflow.providers.apache.kafka.triggers.shared_stream import KafkaSharedStreamTrigger
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import Asset, AssetWatcher, Param
from airflow.timetables.assets import AssetOrTimeSchedule
from factory import LONG, at, call, dag, features, model, use_cases

RETRAIN = """
Trains **{name}** up to its newest cut, or later after drift, with Horovod, evaluates, registers a version in MLflow
(`penstock train`), then asks the controller to consider it (`penstock rollout {name} consider V`). Runs without a new
cut end at once, their second task skipped. Runs for one cut register one version, so clearing a task is safe. What
serves changes by the controller's decision alone: a run that fails leaves it as it is.
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
CONSIDER = (
    "{%% set version = ti.xcom_pull(task_ids='train') %%}"
    "{%% if version %%}exec penstock rollout %s consider {{ version }}"
    "{%% else %%}echo 'no version to consider'; exit 99{%% endif %%}"  # 99 marks the task as skipped
)


def version_of(output: str) -> str | None:
    """The version that waits to be considered, from the last line of a command's `--json`."""
    return json.loads(output)["version"]


def told(name: str, topic: str) -> Asset:
    """The asset `<uc>_<topic>`, which a record of the topic changes."""
    trigger = KafkaSharedStreamTrigger(topics=[f"{name}.{topic}"])
    return Asset(f"{name}_{topic}", watchers=[AssetWatcher(name=f"{name}_{topic}", trigger=trigger)])


def then_consider(name: str, train: BashOperator) -> None:
    """The question whether what a task has registered shall serve."""
    doc = "Asks the controller whether the new version shall serve, and tells its decision; skipped without one."
    train >> call("consider", doc, CONSIDER % name, "upkeep", outlets=[model(name)])


for name in use_cases():
    cuts, drift = told(name, "cuts"), told(name, "drift")
    woken = AssetOrTimeSchedule(timetable=at("0 6 * * *"), assets=cuts | drift)
    with dag(name, "retrain", RETRAIN, schedule=woken):
        doc = "Trains, evaluates and registers the version of the newest cut; without a new one it says so and ends."
        command = f"exec penstock train {name} --ranks 2 --json"
        inlets = [features(name), cuts, drift]
        then_consider(name, call("train", doc, command, "training", output_processor=version_of, inlets=inlets))
    with dag(name, "tune", TUNE, schedule=at("0 3 * * 3"), params=PARAMS):  # cuts of whole weeks come on Thursdays
        doc = "Goes on with the search to so many trials; trains a version when settings are certainly better."
        command = f"exec penstock tune {name} --trials {{{{ params.trials }}}} --jobs {{{{ params.jobs }}}} --json"
        # Not in the pool of trainings: a search takes hours, and its processes give way to a retrain.
        more = {"output_processor": version_of, "inlets": [features(name)], "pool_slots": LONG}
        then_consider(name, call("train", doc, command, "upkeep", 12, **more))
