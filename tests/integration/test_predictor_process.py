"""`serve` as a process of its own, with a real Kafka and a real Redis: killed, stopped, restarted."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.broker import Message
from tests.models import save_model
from tests.redis_server import free_port, redis_server

# kafka-python reads its own files in a way Python has deprecated, when it is first imported
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*_text is deprecated")]
PROGRAM = """
import dataclasses, signal, sys, types
from tests.toy import use_case
from services.serve import serve
from services.settings import Settings
name = sys.argv[1]
module = types.ModuleType(f"features.{name}")
module.use_case = dataclasses.replace(use_case, name=name)
sys.modules[module.__name__] = module
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
serve(Settings.load(), name)
"""


class Process:
    """One predictor on its own port and home; the toy use case under a name of its own, so topics are its own."""

    def __init__(self, kafka: str, redis: str, home: Path) -> None:
        from pipelines.kafka import KafkaBroker

        self.name, self.port, self.home = f"toy_{uuid.uuid4().hex[:12]}", free_port(), home
        self.broker = KafkaBroker(kafka)
        self.broker.create_topics({f"{self.name}.{t}": {} for t in ("models", "predictions")}, 1)
        self.environment = os.environ | {
            "PENSTOCK_HOME": str(home),
            "PENSTOCK_KAFKA_BOOTSTRAP": kafka,
            "PENSTOCK_REDIS": redis,
            "PENSTOCK_PREDICTOR_PORT": str(self.port),
            "PENSTOCK_MLFLOW_URL": f"http://127.0.0.1:{free_port()}",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        root = Path(__file__).parents[2]
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, self.name]
        self.process = subprocess.Popen(command, cwd=root, env=self.environment)
        self.reports(ready=True)

    def stop(self, how: int = signal.SIGTERM) -> int:
        assert self.process
        self.process.send_signal(how)
        return self.process.wait(20)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def predict(self, request_id: str) -> dict[str, Any]:
        row = {"request_id": request_id, "entities": {"shop": "a", "item": 1}, "fields": {"price": 2.0}}
        return dict(self.ask("POST", "/predict", row)["rows"][0])

    def reports(self, seconds: float = 40.0, **expected: Any) -> None:
        deadline = time.monotonic() + seconds
        report: Any = "no answer"
        while True:
            try:
                report = self.ask("GET", "/readyz")
            except (OSError, http.client.HTTPException, ValueError):
                time.sleep(0.05)
            else:
                if expected.items() <= report.items():
                    return
            assert time.monotonic() < deadline, f"/readyz: {report}, awaited {expected}"

    def publish(self, generation: int, champion: str) -> None:
        producer = self.broker.producer()
        value = json.dumps({"generation": generation, "roles": {"champion": champion}}).encode()
        producer.send([Message(f"{self.name}.models", value, b"state")])
        producer.flush()
        producer.close()

    def predictions(self, n: int, seconds: float = 20.0) -> list[dict[str, Any]]:
        """The first `n` records of the topic, or those there are by then."""
        consumer, found, deadline = self.broker.consumer([f"{self.name}.predictions"]), [], time.monotonic() + seconds
        while len(found) < n and time.monotonic() < deadline:
            found += [json.loads(r.value) for r in consumer.poll(0.2) if r.value]
        consumer.close()
        return found


@pytest.fixture
def predictor(kafka: str, tmp_path: Path) -> Iterator[Process]:
    with redis_server() as redis:
        process = Process(kafka, redis, tmp_path)
        for version in ("1", "2"):
            save_model(tmp_path / "models" / process.name / version, bias=float(version))
        yield process
        process.broker.close()
        if process.process and process.process.poll() is None:
            process.stop(signal.SIGKILL)


def test_a_predictor_survives_kills_and_stops_without_losing_a_prediction(predictor: Process) -> None:
    predictor.start()
    assert predictor.predict("a")["version"] == "prior"
    predictor.publish(1, "1")
    predictor.reports(generation=1, champion="1")
    answers = [predictor.predict(f"b{i}") for i in range(50)]
    predictor.stop(signal.SIGKILL)
    predictor.publish(2, "2")
    predictor.start()
    assert predictor.predict("c")["version"] == "2"
    assert predictor.stop() == 143
    records = predictor.predictions(52)
    assert {r["request_id"] for r in records} == {"a", "c", *(f"b{i}" for i in range(50))}
    served = {r["request_id"]: (r["version"], r["score"]) for r in records}
    assert all(served[a["request_id"]] == (a["version"], a["score"]) for a in answers)


def test_workers_answer_on_one_port_and_a_killed_one_comes_back(predictor: Process) -> None:
    predictor.environment |= {"PENSTOCK_PREDICTOR_WORKERS": "2"}
    predictor.start()
    predictor.publish(1, "1")
    predictor.reports(generation=1, champion="1", workers=2)
    asked = [f"a{i}" for i in range(30)]
    assert {predictor.predict(name)["version"] for name in asked} == {"1"}
    assert predictor.process
    parent = psutil.Process(predictor.process.pid)
    workers = parent.children()
    assert len(workers) == 2
    workers[0].kill()
    deadline = time.monotonic() + 60
    while len(now := parent.children()) < 2 or workers[0] in now:
        assert time.monotonic() < deadline, f"no worker in the killed one's place: {now}"
        threading.Event().wait(0.05)
    workers = [workers[0], *now]
    predictor.reports(ready=True, generation=1, workers=2)
    assert predictor.predict("b")["version"] == "1"
    assert predictor.stop() == 143
    assert not any(worker.is_running() for worker in workers)
    assert {r["request_id"] for r in predictor.predictions(31)} == {*asked, "b"}
