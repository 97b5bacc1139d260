"""What the DAG files share: the use cases, a DAG `<uc>_<task>` of one, a task that calls the command line, assets."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, Asset
from airflow.timetables.trigger import CronTriggerTimetable

FEATURES = Path(__file__).resolve().parent.parent / "features"
DECLARATION = re.compile(r"^use_case(: UseCase)? = ", re.MULTILINE)
LONG = 2  # slots of the pool upkeep, of three: one is always left for what is short


def use_cases() -> list[str]:
    """Those that are declared and, where PENSTOCK_USE_CASES names some, among them: the others have no topics."""
    asked = os.environ.get("PENSTOCK_USE_CASES", "")
    names = [m.stem for m in sorted(FEATURES.glob("*.py")) if DECLARATION.search(m.read_text())]
    return [name for name in names if not asked or name in asked.split(",")]


def dag(name: str, task: str, about: str, **more: object) -> DAG:
    """The DAG `<uc>_<task>`; `{name}` in `about` is the use case."""
    return DAG(f"{name}_{task}", catchup=False, doc_md=about.format(name=name), tags=["penstock", name], **more)


def call(task: str, doc: str, command: str, pool: str, hours: int = 1, **more: object) -> BashOperator:
    """A task that runs a command line, twice again when it fails: every command may be repeated."""
    limits = {"retries": 2, "retry_delay": timedelta(seconds=5), "execution_timeout": timedelta(hours=hours)}
    return BashOperator(task_id=task, doc_md=doc, bash_command=command, pool=pool, **limits, **more)


def at(cron: str) -> CronTriggerTimetable:
    """A schedule by the clock, in UTC. Without a start date, what was due before the stack was up is not run."""
    return CronTriggerTimetable(cron, timezone="UTC")


def features(name: str) -> Asset:
    """The rows of the feature store."""
    return Asset(f"{name}_features")


def model(name: str) -> Asset:
    """The versions that were considered for serving."""
    return Asset(f"{name}_model")
