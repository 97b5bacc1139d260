import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from features.errors import ConfigError, StateError
from services import stack
from services.airflow_env import airflow_env
from services.embedded import closed_folder, own_services
from services.processes import Service, is_alive, process_id
from services.settings import ROOT, Settings
from services.topics import control_topics, topics
from tests.toy import use_case as toy

SUPERVISE = """
import asyncio, json, os, sys
from pathlib import Path
from services.processes import Service, Supervisor, guarded
home, specs = Path(sys.argv[1]), json.loads(sys.argv[2])
services = [Service(env=dict(os.environ), **spec) for spec in specs]
sys.exit(guarded(lambda: asyncio.run(Supervisor(services, home / "logs", home / "state.json").run())))
"""


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)
    return result


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


@contextmanager
def supervised(home: Path, *services: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SUPERVISE, str(home), json.dumps(services)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30)


def state(home: Path) -> dict[str, Any]:
    file = home / "state.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def ready(home: Path) -> Callable[[], bool]:
    return lambda: bool(state(home).get("ready"))


def all_pids(process: subprocess.Popen[str]) -> list[psutil.Process]:
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_services_start_after_what_they_need(tmp_path: Path) -> None:
    log = shlex.quote(str(tmp_path / "order"))
    last = {"name": "last", "command": shell(f"echo last >>{log}; sleep 60"), "needs": ["first"]}
    first = {"name": "first", "command": shell(f"sleep 0.3; echo first >>{log}"), "once": True}
    with supervised(tmp_path, last, first):
        wait_for("the stack", ready(tmp_path))
        wait_for("both", lambda: (tmp_path / "order").read_text() == "first\nlast\n")


def test_a_killed_service_is_back_at_once(tmp_path: Path) -> None:
    with supervised(tmp_path, {"name": "a", "command": ["sleep", "60"]}):
        wait_for("the stack", ready(tmp_path))
        killed = state(tmp_path)["services"]["a"]["pid"]
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        wait_for("another one", lambda: state(tmp_path)["services"]["a"]["pid"] not in (None, killed))
        assert time.monotonic() - began < 1.5
        assert state(tmp_path)["services"]["a"]["restarts"] == 1


def test_what_a_dead_service_left_in_its_group_goes_with_it(tmp_path: Path) -> None:
    with supervised(tmp_path, {"name": "a", "command": shell("sleep 4242 & sleep 60")}) as process:
        wait_for("the child", lambda: [p for p in all_pids(process) if "4242" in p.cmdline()])
        orphan = next(p for p in all_pids(process) if "4242" in p.cmdline())
        os.kill(state(tmp_path)["services"]["a"]["pid"], signal.SIGKILL)
        wait_for("the orphan's end", lambda: not alive([orphan]))


def test_a_service_that_cannot_start_stops_all_and_shows_its_last_words(tmp_path: Path) -> None:
    good = {"name": "good", "command": ["sleep", "60"]}
    bad = {"name": "bad", "command": shell("echo no such luck; exit 3"), "once": True}
    with supervised(tmp_path, good, bad) as process:
        said, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "bad: it ended with code 3" in said
    assert "no such luck" in said
    assert state(tmp_path)["services"]["good"]["state"] == "stopped"


def test_a_service_that_ignores_the_stop_is_killed(tmp_path: Path) -> None:
    deaf = {"name": "deaf", "command": shell("trap '' TERM; sleep 60 & wait; wait"), "grace_s": 0.3}
    with supervised(tmp_path, deaf) as process:
        wait_for("the stack", ready(tmp_path))
        members = all_pids(process)
        process.terminate()
        said, _ = process.communicate(timeout=20)
    assert "deaf did not stop" in said
    assert alive(members) == []


@pytest.mark.parametrize("victim", ["supervisor", "guard"])
def test_kill_9_leaves_no_process_behind(tmp_path: Path, victim: str) -> None:
    hidden = "import os, time; os.setsid(); time.sleep(60)"
    script = f"{shlex.quote(sys.executable)} -c {shlex.quote(hidden)} & wait"
    with supervised(tmp_path, {"name": "a", "command": shell(script), "grace_s": 1}) as process:
        wait_for("the stack", ready(tmp_path))
        wait_for("all processes", lambda: len(all_pids(process)) == 4)
        members = all_pids(process)
        os.kill(state(tmp_path)["pid" if victim == "supervisor" else "guard"], signal.SIGKILL)
        left = members if victim == "supervisor" else members[:3]  # a guard is what catches other sessions
        wait_for("the end of all", lambda: not alive(left))
        for process_left in alive(members):
            process_left.kill()


def test_a_reused_pid_is_another_process() -> None:
    mine = process_id(os.getpid())
    assert is_alive(int(mine["pid"]), mine["created"])
    assert not is_alive(int(mine["pid"]), mine["created"] - 5)


def service(name: str, *needs: str) -> Service:
    return Service(name, ["true"], {}, needs=needs)


SERVICES = (
    service("kafka"),
    service("postgres"),
    service("airflow-api", "postgres"),
    service("control-flights", "kafka"),
    service("learner-flights", "kafka"),
)


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (stack.Selection(), ["kafka", "postgres", "airflow-api", "control-flights", "learner-flights"]),
        (stack.Selection(airflow=False), ["kafka", "postgres", "control-flights", "learner-flights"]),
        (stack.Selection(learner=False), ["kafka", "postgres", "airflow-api", "control-flights"]),
        (stack.Selection(own=False), ["kafka", "postgres", "airflow-api"]),
        (stack.Selection(only=("airflow-api",)), ["postgres", "airflow-api"]),
    ],
)
def test_a_selection_has_what_it_needs(selection: stack.Selection, names: list[str]) -> None:
    assert [s.name for s in selection.of(SERVICES)] == names


def test_an_unknown_service_is_refused() -> None:
    with pytest.raises(ConfigError, match="no service kafak; there are kafka"):
        stack.Selection(only=("kafak",)).of(SERVICES)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A home and a range of free ports of this test's own."""
    monkeypatch.setenv("PENSTOCK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PENSTOCK_CONFIG", str(tmp_path / "none.toml"))
    base = next(b for b in range(24000 + os.getpid() % 1000 * 8, 60000, 8) if all(map(stack.is_free, range(b, b + 8))))
    monkeypatch.setenv("PENSTOCK_PORT_BASE", str(base))
    return Settings.load().make_secrets()


def test_a_taken_port_is_named_with_who_needs_it_and_the_mend(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", settings.port("redis")))
        taken.listen()
        with pytest.raises(ConfigError, match=rf"{settings.port('redis')} \(redis\).*PENSTOCK_PORT_BASE"):
            stack.check_ports(settings, [service("redis"), service("kafka")])


def test_the_first_folder_that_others_cannot_pass_is_found(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    tmp_path.chmod(0o755)
    assert closed_folder(private / "data") in (private, *private.parents)
    private.chmod(0o755)
    assert closed_folder(private / "data") != private


def test_a_shell_gets_the_variables_of_the_feature_store(settings: Settings) -> None:
    variables = stack.env(settings)
    yaml = (ROOT / "features/feature_store.yaml").read_text()
    assert all("${" + name + "}" in yaml for name in variables if name.startswith("PENSTOCK_FEAST"))
    assert variables["MLFLOW_TRACKING_URI"] == settings.mlflow_url
    assert len(airflow_env(settings)["AIRFLOW__CORE__FERNET_KEY"]) == 44


def test_no_password_is_on_a_command_line(settings: Settings) -> None:
    from services.embedded import services

    words = [word for s in services(settings, ["flights"]) for word in s.command]
    assert not [word for word in words for secret in settings.secrets.values() if secret in word]


def test_topics_keep_everything_and_event_time() -> None:
    declared = topics(toy) | control_topics(toy)
    assert {f"{toy.name}.predictions", f"{toy.name}.rejected", *toy.event_topics} <= set(declared)
    assert all(t["retention.ms"] == "-1" and t["message.timestamp.type"] == "CreateTime" for t in declared.values())
    assert [name for name, t in declared.items() if t.get("cleanup.policy") == "compact"] == [f"{toy.name}.models"]


def test_own_processes_wait_for_their_topics(settings: Settings) -> None:
    assert all("topics-flights" in s.needs for s in own_services(settings, "flights") if s.name != "topics-flights")


def test_feast_reads_use_cases_only() -> None:
    ignored = {line for line in (ROOT / "features/.feastignore").read_text().splitlines() if line[:1] != "#"}
    read = [f for f in (ROOT / "features").glob("*.py") if f.name not in {*ignored, "__init__.py"}]
    assert read
    assert all("use_case = UseCase(" in f.read_text() for f in read)


@pytest.mark.integration
def test_the_real_stack_starts_survives_and_stops(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    from redis import Redis

    def redis() -> Any:
        return Redis(port=settings.port("redis"), password=settings.secrets["redis_password"])

    with stack.running(settings, only=["kafka", "postgres", "redis"]):
        status = stack.status(settings)
        assert status["ready"]
        assert {s["state"] for s in status["services"].values()} == {"ready"}
        members = stack._members(stack._read(settings) or {})
        assert stack.up(settings, []) == 0
        assert "already running" in capsys.readouterr().out
        with pytest.raises(StateError, match="penstock down"), stack.running(settings):
            pass
        with redis() as client:
            client.set("kept", "yes")
            wait_for("the append-only file", lambda: client.info("persistence")["aof_pending_bio_fsync"] == 0)
        os.kill(status["services"]["redis"]["pid"], signal.SIGKILL)
        wait_for("redis again", lambda: stack.status(settings)["services"]["redis"]["restarts"] == 1)
        wait_for("its answer", lambda: stack.status(settings)["services"]["redis"]["state"] == "ready")
        with redis() as client:
            assert client.get("kept") == b"yes"
    assert alive(members) == []
    assert not stack.status(settings)["running"]
    assert stack.down(settings) == 0
