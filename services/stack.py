"""The embedded stack as a whole: up, down, status, and the variables a shell needs to talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from features.errors import ConfigError, PenstockError, StateError, UnavailableError
from services.airflow_env import airflow_env, child_env
from services.processes import Service, Supervisor, die_with_parent, guarded, is_alive
from services.settings import ROOT, Settings

POLL_S = 0.1
STOP_DEADLINE_S = 90.0
PORT_OF = {
    "kafka": ("kafka", "kafka_controller"),
    "postgres": ("postgres",),
    "redis": ("redis",),
    "mlflow": ("mlflow",),
    "airflow-api": ("airflow",),
    "predictor": ("predictor",),
    "featurizer+joiner": ("featurizer_metrics",),
    "learner": ("learner_metrics",),
    "control": ("dashboard", "control_metrics"),
}


@dataclass(frozen=True)
class Selection:
    """Which part of the stack to run: all of it, or `only` these services and what they need.

    own : our processes (featurizer+joiner, predictor, control); False leaves the infrastructure
    learner : the continuous learner, one of ours
    """

    use_cases: tuple[str, ...] = ()
    airflow: bool = True
    own: bool = True
    only: tuple[str, ...] = ()
    learner: bool = True

    def of(self, services: Sequence[Service]) -> list[Service]:
        """The selected services, each with what it needs; ConfigError on a name that none has."""
        by_name = {s.name: s for s in services}
        if unknown := sorted(set(self.only) - set(by_name)):
            raise ConfigError(f"no service {', '.join(unknown)}; there are {', '.join(by_name)}")
        wanted = [s for s in services if s.name in self.only] if self.only else [s for s in services if self._has(s)]
        names: set[str] = set()
        while wanted:
            service = wanted.pop()
            names.add(service.name)
            wanted += [by_name[n] for n in service.needs if n not in names]
        return [s for s in services if s.name in names]

    def _has(self, service: Service) -> bool:
        ours = service.name.startswith(("featurizer", "predictor-", "control-", "learner-"))
        learner, airflow = (service.name.startswith(part) for part in ("learner-", "airflow-"))
        return (self.own or not ours) and (self.airflow or not airflow) and (self.learner or not learner)


def up(
    settings: Settings,
    use_cases: Sequence[str],
    *,
    detach: bool = False,
    airflow: bool = True,
    own: bool = True,
    only: Sequence[str] = (),
    learner: bool = True,
) -> int:
    """`penstock up`: start the stack and stay until Ctrl-C; with `detach` return when it is ready."""
    selection = Selection(tuple(use_cases), airflow, own, tuple(only), learner)
    if state := _supervised(settings):
        print(f"already running since {time.strftime('%H:%M:%S', time.localtime(state['created']))}: {settings.home}")
        print(table(status(settings)))
        return 0
    process = _start(settings, selection, keep=detach)
    print(table(status(settings)))
    if detach:
        print("running in the background; stop it with `penstock down`")
        return 0
    try:
        _follow(settings, process, until_ready=False)
    except KeyboardInterrupt:
        print("stopping")
    finally:
        _terminate(process)
    return 0 if process.returncode == 0 else 1


def down(settings: Settings) -> int:
    """`penstock down`: stop the stack, wait for it, and make sure that nothing of it is left."""
    state = _read(settings)
    members = _members(state) if state else []
    if not state or not members:
        print(f"not running: {settings.home}")
        return 0
    if is_alive(state["pid"], state["created"]):
        os.kill(state["pid"], signal.SIGTERM)
    deadline = time.monotonic() + STOP_DEADLINE_S
    while left := [p for p in members if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > deadline:
            names = ", ".join(f"{p.name()} ({p.pid})" for p in left)
            raise UnavailableError(f"still running after {STOP_DEADLINE_S:.0f} s: {names}")
        time.sleep(POLL_S)
    print(f"stopped: {settings.home}")
    return 0


def status(settings: Settings) -> dict[str, Any]:
    """What runs: {"running", "ready", "home", "services": {name: {"state", "pid", "restarts", "since"}}, "urls"}."""
    state = _supervised(settings)
    services = state["services"] if state else {}
    return {
        "running": bool(state),
        "ready": bool(state and state.get("ready")),
        "home": str(settings.home),
        "services": services,
        "urls": urls(settings, services),
    }


def urls(settings: Settings, services: Mapping[str, Any]) -> dict[str, str]:
    """Addresses of what runs, for a person."""
    all_urls = {
        "kafka": settings.kafka_bootstrap,
        "mlflow": settings.mlflow_url,
        "airflow-api": settings.airflow_url,
        "predictor": settings.predictor_url,
    }
    there = {*services, *(name.split("-")[0] for name in services)}
    found = {part: url for part, url in all_urls.items() if part in there}
    return found | ({"dashboard": settings.dashboard_url} if "control" in there else {})


def table(status: Mapping[str, Any]) -> str:
    """A status as text."""
    if not status["running"]:
        return f"not running: {status['home']}"
    rows = [f"  {'service':30} {'state':11} {'pid':>8} {'restarts':>8}"]
    for name, s in status["services"].items():
        rows.append(f"  {name:30} {s['state']:11} {s['pid'] or '':>8} {s['restarts']:>8}")
    rows += [f"  {name:12} {url}" for name, url in status["urls"].items()]
    if "airflow-api" in status["urls"]:
        rows.append(f"  Airflow's user is admin, its password is in {status['home']}/airflow/passwords.json")
    return "\n".join([*rows, f"  logs         {status['home']}/logs"])


def env(settings: Settings) -> dict[str, str]:
    """Variables for a shell (`penstock up --env`): Feast's, MLflow's and Airflow's own commands work with them."""
    from services.embedded import feast_env

    settings = prepared(settings)
    names = ("PENSTOCK_HOME", "PENSTOCK_PORT_BASE")
    place = {name: child_env(settings)[name] for name in names}
    return {**place, **feast_env(settings), "MLFLOW_TRACKING_URI": settings.mlflow_url, **airflow_env(settings)}


@contextlib.contextmanager
def running(
    settings: Settings,
    use_cases: Sequence[str] = (),
    *,
    airflow: bool = True,
    own: bool = True,
    only: Sequence[str] = (),
    keep: bool = False,
    learner: bool = False,
) -> Iterator[Settings]:
    """The stack for the time of a `with` block; yields the settings to reach it with.

    learner : with the continuous learner
    keep : leave it running when the block ends well. Without, it also stops when this process is killed.
    """
    if _supervised(settings):
        raise StateError(f"a stack is already running in {settings.home}: stop it with `penstock down`")
    process = _start(settings, Selection(tuple(use_cases), airflow, own, tuple(only), learner), keep=keep)
    kept = False
    try:
        yield prepared(settings)
        kept = keep
    finally:
        if not kept:
            _terminate(process)


def prepared(settings: Settings) -> Settings:
    """The same settings with the embedded stack's secrets, which are made when missing."""
    place = {"PENSTOCK_HOME": str(settings.home), "PENSTOCK_PORT_BASE": str(settings.port_base)}
    settings.make_secrets()
    return Settings.load({**os.environ, **place})


def _start(settings: Settings, selection: Selection, *, keep: bool) -> subprocess.Popen[bytes]:
    """Start the supervisor in a session of its own and wait until all is ready."""
    settings = prepared(settings)
    chosen = _services(settings, selection)
    check_ports(settings, chosen)
    logs = settings.home / "logs"
    logs.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "services.stack", json.dumps(asdict(selection))]
    with (logs / "supervisor.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**child_env(settings), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=None if keep else _stop_with_parent,
        )
    try:
        _follow(settings, process, until_ready=True)
    except BaseException:
        _terminate(process)
        raise
    return process


def _stop_with_parent() -> None:
    die_with_parent(signal.SIGTERM)


def _follow(settings: Settings, process: subprocess.Popen[bytes], *, until_ready: bool) -> None:
    """Print the supervisor's lines until all is ready, or until it ends."""
    with (settings.home / "logs/supervisor.log").open(errors="replace") as log:
        if not until_ready:
            log.seek(0, os.SEEK_END)
        while True:
            ended = process.poll() is not None
            state = _read(settings) or {}
            if text := log.read():
                print(text, end="", flush=True)
            if until_ready and state.get("guard") == process.pid and state.get("ready"):
                return
            if ended and until_ready:
                raise UnavailableError(f"the stack did not start; logs are in {settings.home / 'logs'}")
            if ended:
                return
            time.sleep(POLL_S)


def _terminate(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"the supervisor (pid {process.pid}) does not stop") from None


def check_ports(settings: Settings, chosen: Sequence[Service]) -> None:
    """ConfigError naming every port that is taken, by whom if that can be seen, and the mend."""
    taken = []
    for service in chosen:
        ports = PORT_OF.get(service.name) or PORT_OF.get(service.name.split("-")[0], ())
        numbers = map(settings.listens, ports)
        taken += [f"{port} ({service.name}){holder(port)}" for port in numbers if not is_free(port)]
    if taken:
        raise ConfigError(
            f"ports are taken: {', '.join(taken)}; stop what holds them or set PENSTOCK_PORT_BASE to a free range"
            f" (it is {settings.port_base})"
        )


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback interface."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def holder(port: int) -> str:
    """` by NAME (pid N)` of the process that listens on a port, when this user may see it."""
    try:
        connections = psutil.net_connections("tcp")
        pid = next(c.pid for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port and c.pid)
        return f" by {psutil.Process(pid).name()} (pid {pid})"
    except (StopIteration, psutil.Error, PermissionError):
        return ""


def _services(settings: Settings, selection: Selection) -> list[Service]:
    from services.embedded import services

    return selection.of(services(settings, list(selection.use_cases)))


def _file(settings: Settings) -> Path:
    return settings.home / "supervisor.json"


def _read(settings: Settings) -> dict[str, Any] | None:
    file = _file(settings)
    return dict(json.loads(file.read_text())) if file.exists() else None


def _supervised(settings: Settings) -> dict[str, Any] | None:
    """The state of the supervisor that runs now; a file left by one that is gone doesn't count."""
    state = _read(settings)
    return state if state and is_alive(state["pid"], state["created"]) else None


def _members(state: Mapping[str, Any]) -> list[psutil.Process]:
    """The processes of a stack that still run: guard, supervisor, services, and everything below them."""
    found: set[psutil.Process] = set()
    for pid, created in ((state["guard"], state["guard_created"]), (state["pid"], state["created"])):
        if is_alive(pid, created):
            root = psutil.Process(pid)
            found |= {root, *root.children(recursive=True)}
    return list(found)


def supervise(arguments: str) -> int:
    """The supervisor itself, in its own process: `python -m services.stack '{"use_cases": ["flights"], ...}'`."""
    chosen: dict[str, Any] = json.loads(arguments)
    chosen |= {"use_cases": tuple(chosen["use_cases"]), "only": tuple(chosen["only"])}
    selection = Selection(**chosen)
    settings = Settings.load()
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {line}", flush=True)

    handle = os.open(settings.home, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held as long as this process lives
    except BlockingIOError:
        raise StateError(f"another stack is starting or stopping in {settings.home}: wait for it") from None
    services = _services(settings, selection)
    return asyncio.run(Supervisor(services, settings.home / "logs", _file(settings), say).run())


if __name__ == "__main__":
    try:
        sys.exit(guarded(lambda: supervise(sys.argv[1])))
    except PenstockError as error:
        sys.exit(f"penstock: {error}")
