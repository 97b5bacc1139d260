"""The dashboard's answers: the status as the command gives it, guarded, escaped; and it holds nobody back."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.broker import Message
from pipelines.control import ControlStep
from services import dashboard, status, wiring
from services.metrics import MonitorMetrics, StepMetrics
from services.monitor import Monitor
from services.settings import Settings
from services.status import StatusReader
from tests import toy
from tests.memory_broker import MemoryBroker

BAD = '<img src=x onerror="alert(1)">'


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> MemoryBroker:
    broker = MemoryBroker()
    names = ("models", "rejected", "drift", "examples", "commands", "evidence")
    broker.create_topics({f"toy.{name}": {} for name in names}, 1)
    monkeypatch.setattr(broker, "close", lambda: None, raising=False)
    monkeypatch.setattr(wiring, "broker", lambda settings: broker)
    monkeypatch.setitem(__import__("sys").modules, "features.toy", toy)
    return broker


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    outside = {"redis": "sqlite:x", "mlflow_url": "http://127.0.0.1:9", "airflow_url": "http://127.0.0.1:9"}
    env = {f"PENSTOCK_{name.upper()}": value for name, value in outside.items()}
    return Settings.load(env | {"PENSTOCK_HOME": str(tmp_path)}, tmp_path / "none.toml")


def send(broker: MemoryBroker, topic: str, *values: Any, key: bytes = b"k") -> None:
    producer = broker.producer()
    producer.send([Message(f"toy.{topic}", json.dumps(value).encode(), key) for value in values])
    producer.flush()


def fill(broker: MemoryBroker) -> None:
    """A topic each, all texts hostile."""
    send(broker, "rejected", {"reason": BAD}, {"reason": "late"}, {"reason": "late"})
    moved = {"name": BAD, "before": 1.0, "after": 2.0, "score": 9.0}
    send(broker, "drift", {"time": 5, "what": BAD, "features": [moved], "sentence": BAD})
    state = ControlStep(toy.use_case).state.as_json()
    decision = {"version": BAD, "action": BAD, "sentence": BAD, "command": "c", "who": BAD, "time": 1, "cut": 7}
    send(
        broker,
        "models",
        state | {"decisions": [decision], "roles": {"champion": BAD, "challenger": None}},
        key=b"state",
    )
    rows = [{"event_time": d, "version": v, "score": 0.5, "label": 1.0} for d, v in ((1, "1"), (86_400_001, BAD))]
    send(broker, "examples", *rows)


@pytest.fixture
def monitor(broker: MemoryBroker, settings: Settings) -> Monitor:
    return Monitor(settings, "toy", MonitorMetrics())


def get(monitor: Monitor, path: str, host: str = "127.0.0.1:9200", bound: str = "127.0.0.1") -> httpx.Response:
    app = dashboard.create_app(monitor, dashboard.allowed_hosts(bound))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{host}") as client:
            return await client.get(path)

    return asyncio.run(ask())


def test_the_api_gives_what_the_command_gives(broker: MemoryBroker, settings: Settings, monitor: Monitor) -> None:
    fill(broker)
    assert get(monitor, "/api/status").status_code == 503 and "under way" in get(monitor, "/").text
    monitor.look()
    told = get(monitor, "/api/status").json()
    assert told == json.loads(json.dumps(status.status(settings, "toy")))
    assert told["rejected"] == {BAD: 1, "late": 2} and told["drift"]["time"] == 5
    assert told["reachable"] == {
        "predictor": False,
        "redis": True,
        "mlflow": False,
        "airflow-api": False,
        "kafka": True,
    }
    assert [d["day"] for d in get(monitor, "/api/quality").json()["days"]] == ["1970-01-01", "1970-01-02"]
    assert {b["what"] for b in get(monitor, "/api/live").json()["broken"]} == {"predictor", "mlflow", "airflow-api"}
    text = get(monitor, "/metrics").text
    assert "penstock_monitor_retrain_cut_timestamp_seconds 0.007" in text
    assert 'penstock_monitor_reachable{part="mlflow"} 0.0' in text


def test_all_text_from_data_is_escaped_and_nothing_from_elsewhere_is_asked_for(
    broker: MemoryBroker, monitor: Monitor
) -> None:
    fill(broker)
    monitor.look()
    reply = get(monitor, "/")
    assert reply.text.count("&lt;img src=x onerror=&quot;alert(1)&quot;&gt;") >= 7 and "<img" not in reply.text
    assert not re.search(r"https?://|style=|\son\w+=", reply.text.replace("&lt;img src=x onerror=", ""))
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "unsafe" not in reply.headers["content-security-policy"]
    for path in ("/dashboard.js", "/style.css", "/sections", "/healthz"):
        assert "http://" not in get(monitor, path).text


@pytest.mark.parametrize(("host", "code"), [("evil.example", 400), ("evil.example:9200", 400), ("localhost:9", 200)])
def test_on_loopback_other_names_are_refused(monitor: Monitor, host: str, code: int) -> None:
    assert get(monitor, "/healthz", host).status_code == code
    assert get(monitor, "/healthz", host, "0.0.0.0").status_code == 200


def test_what_was_read_once_is_not_read_again(
    broker: MemoryBroker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(broker)
    read: list[bytes] = []
    count = status._count_reason
    monkeypatch.setattr(status, "_count_reason", lambda state, r: (read.append(r.value or b""), count(state, r)))
    assert status.status(settings, "toy")["rejected"]["late"] == 2 and len(read) == 3
    reader = StatusReader(settings, "toy")
    send(broker, "rejected", {"reason": "late"})
    assert reader.read()["rejected"] == {BAD: 1, "late": 3} and len(read) == 4
    assert reader.read()["rejected"]["late"] == 3 and len(read) == 4
    reader.close()


def test_a_taken_port_leaves_the_steps_alone(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        dashboard.start(replace(settings, dashboard_port=taken.getsockname()[1]), "toy", StepMetrics())
