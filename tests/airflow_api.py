"""A running Airflow, over its API."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

from services.settings import Settings

OVER = ("success", "failed")


class Airflow:
    """Runs of DAGs: started, waited for, looked at, cleared."""

    def __init__(self, settings: Settings) -> None:
        login = {"username": "admin", "password": settings.secrets["airflow_password"]}
        token = httpx.post(f"{settings.airflow_url}/auth/token", json=login).json()["access_token"]
        headers = {"authorization": f"Bearer {token}"}
        self.client = httpx.Client(base_url=f"{settings.airflow_url}/api/v2", headers=headers, timeout=60)

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        return dict(self.client.get(path, params=params).raise_for_status().json())

    def unpause(self, dag: str) -> None:
        self.client.patch(f"/dags/{dag}", json={"is_paused": False}).raise_for_status()

    def refused(self, dag: str, **conf: Any) -> bool:
        """Whether a run with these values is not even begun."""
        return self.client.post(f"/dags/{dag}/dagRuns", json={"logical_date": None, "conf": conf}).status_code == 400

    def start(self, dag: str, **conf: Any) -> str:
        """A run's id."""
        reply = self.client.post(f"/dags/{dag}/dagRuns", json={"logical_date": None, "conf": conf})
        return str(reply.raise_for_status().json()["dag_run_id"])

    def runs(self, dag: str) -> list[str]:
        """The ids of a DAG's runs, oldest first."""
        return [run["dag_run_id"] for run in self.get(f"/dags/{dag}/dagRuns", order_by="id")["dag_runs"]]

    def ended(self, dag: str, run: str, within_s: float = 600.0) -> dict[str, str]:
        """Task -> how it ended, of a run that is over."""
        self.until(lambda: self.get(f"/dags/{dag}/dagRuns/{run}")["state"] in OVER, f"end of {dag} {run}", within_s)
        return {task["task_id"]: task["state"] for task in self.tasks(dag, run)}

    def tasks(self, dag: str, run: str) -> list[dict[str, Any]]:
        return list(self.get(f"/dags/{dag}/dagRuns/{run}/taskInstances")["task_instances"])

    def clear(self, dag: str, run: str) -> None:
        """Have a run done again."""
        body = {"dry_run": False, "dag_run_id": run, "only_failed": False}
        self.client.post(f"/dags/{dag}/clearTaskInstances", json=body).raise_for_status()

    def log(self, dag: str, run: str, task: str) -> str:
        """What a task's last try has written."""
        tries = next(t["try_number"] for t in self.tasks(dag, run) if t["task_id"] == task)
        lines = self.get(f"/dags/{dag}/dagRuns/{run}/taskInstances/{task}/logs/{tries}")["content"]
        return "\n".join(line["event"] for line in lines)

    @staticmethod
    def until(reached: Callable[[], Any], what: str, within_s: float = 120.0) -> Any:
        """The first true value."""
        deadline, pause = time.monotonic() + within_s, threading.Event()
        while not (value := reached()):
            assert time.monotonic() < deadline, f"no {what} within {within_s:.0f} s"
            pause.wait(0.2)
        return value
