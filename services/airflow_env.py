"""Airflow's settings, and how it is set up.

`python -m services.airflow_env scheduler ...` is `airflow scheduler ...` with these settings, but what the environment
says stays; `python -m services.airflow_env health scheduler` fails while that is ill.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

from services.settings import ROOT, Settings

POOLS = {  # name: slots, what for; what runs at most at once, so that a machine is not over-committed
    "training": (1, "one training at a time"),
    "upkeep": (3, "all else; a backfill or a search takes two slots, so that one is left for what is short"),
}
SET_UP = (("db", "migrate"), *(("pools", "set", name, str(n), what) for name, (n, what) in POOLS.items()))
TIMEOUT_S = 5.0


def airflow_env(settings: Settings) -> dict[str, str]:
    """Environment variables for every Airflow process, and for a shell that runs `airflow`."""
    secrets, home, url = settings.secrets, settings.home / "airflow", settings.airflow_url
    return {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(home / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / "passwords.json"),
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "AIRFLOW__CORE__FERNET_KEY": secrets["airflow_fernet"].rstrip("=") + "=",
        "AIRFLOW__CORE__HOSTNAME_CALLABLE": "socket.gethostname",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"{settings.postgres}/airflow",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(settings.port("airflow")),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API__SECRET_KEY": secrets["airflow_secret"],
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets["airflow_jwt"] + secrets["airflow_secret"],
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
        "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_STORAGE_PATH": str(home / "bundles"),
        "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "300",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "30",
        "AIRFLOW__DAG_PROCESSOR__STALE_DAG_THRESHOLD": "600",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "AIRFLOW_CONN_KAFKA_DEFAULT": kafka_connection(settings),
    }


def kafka_connection(settings: Settings) -> str:
    """The connection of the Kafka provider's triggers; offsets are read by the tasks, an event only wakes them."""
    config: dict[str, Any] = {
        "bootstrap.servers": settings.kafka_bootstrap,
        "group.id": "airflow",
        "enable.auto.commit": False,
        "auto.offset.reset": "earliest",
        "security.protocol": settings.kafka_security,
    }
    if settings.kafka_security.startswith("SASL"):
        config |= {"sasl.mechanism": "PLAIN", "sasl.username": settings.kafka_username}
        config |= {"sasl.password": settings.kafka_password}
    if settings.kafka_cafile:
        config["ssl.ca.location"] = settings.kafka_cafile
    return json.dumps({"conn_type": "kafka", "extra": config})


def write_passwords(settings: Settings) -> None:
    """The password file of Airflow's simple auth manager, readable by the owner alone."""
    home = settings.home / "airflow"
    home.mkdir(exist_ok=True)
    file = Path(home / "passwords.json")
    file.touch(0o600)
    file.write_text(json.dumps({"admin": settings.secrets["airflow_password"]}))


def part_is_healthy(settings: Settings, part: str) -> bool:
    """Whether Airflow's API says that `part` (scheduler, triggerer, dag_processor, metadatabase) is healthy."""
    reply: Any = _call(f"{settings.airflow_url}/api/v2/monitor/health")
    return bool((reply.get(part) or {}).get("status") == "healthy")


def dag_runs(settings: Settings, use_case: str, most: int = 8) -> list[dict[str, Any]]:
    """The newest runs of a use case's DAGs: {"dag", "state", "start", "end"}, times in RFC 3339 or None."""
    url = f"{settings.airflow_url}/api/v2/dags/~/dagRuns?order_by=-run_after&limit=50"
    runs = _call(url, headers=_authorization(settings))["dag_runs"]
    ours = [run for run in runs if run["dag_id"].startswith(f"{use_case}_")][:most]
    return [{"dag": r["dag_id"], "state": r["state"], "start": r["start_date"], "end": r["end_date"]} for r in ours]


def _authorization(settings: Settings) -> dict[str, str]:
    login = {"username": "admin", "password": settings.secrets["airflow_password"]}
    return {"Authorization": f"Bearer {_call(f'{settings.airflow_url}/auth/token', login)['access_token']}"}


def _call(url: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    with _direct.open(request, timeout=TIMEOUT_S) as reply:
        return json.load(reply)


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy


def child_env(settings: Settings) -> dict[str, str]:
    """What every process of the stack gets: this environment, the settings' place, no writing anywhere else."""
    home = settings.home
    config = Path(os.environ.get("PENSTOCK_CONFIG", "penstock.toml")).absolute()
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",
        "PENSTOCK_HOME": str(home),
        "PENSTOCK_PORT_BASE": str(settings.port_base),
        "PENSTOCK_CONFIG": str(config),
        "MPLCONFIGDIR": str(home / "cache/matplotlib"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "FEAST_USAGE": "False",
        "DO_NOT_TRACK": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


if __name__ == "__main__":
    if sys.argv[1] == "health":
        sys.exit(not part_is_healthy(Settings.load(), sys.argv[2]))
    os.execvpe("airflow", ["airflow", *sys.argv[1:]], {**airflow_env(Settings.load()), **os.environ})
