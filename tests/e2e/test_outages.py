"""Redis, Kafka and MLflow each away for a while under load: callers get answers that say what they lack, and no
prediction is lost.

PENSTOCK_OUTAGE_S (default 30) seconds each.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from features.clicks import use_case
from services import rollout, stack, wiring
from services.served import read_predictions
from services.settings import Settings
from tests.conftest import free_ports
from tests.models import save_model

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]
AWAY_S = float(os.environ.get("PENSTOCK_OUTAGE_S", "30"))
RATE = 25.0  # requests a second
PATIENCE_S = 60.0


class Load:
    """Asks the predictor at a steady rate, on a thread, and keeps what it was told by the part of the test."""

    def __init__(self, url: str) -> None:
        self.url, self.part, self.number = url, "calm", 0
        self.told: dict[str, Counter[str]] = {}
        self.answered: set[str] = set()
        self.slowest: dict[str, float] = {}
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=20) as client:
            while not self.stopping.wait(1 / RATE):
                self.number += 1
                self._ask(client, f"load-{self.number}")

    def _ask(self, client: httpx.Client, request: str) -> None:
        entities = {"user": f"u{self.number % 50}", "section": "sport"}
        row = {"request_id": request, "entities": entities, "fields": {"article": "a", "position": 1}}
        part, began = self.part, time.monotonic()
        try:
            reply = client.post("/predict", json=row)
        except httpx.HTTPError as error:
            self._note(part, type(error).__name__, began)
            return
        answer: dict[str, Any] = reply.json()["rows"][0] if reply.status_code == 200 else {}
        if answer:
            self.answered.add(request)
        self._note(part, f"{reply.status_code} by {answer.get('version')}", began)

    def _note(self, part: str, what: str, began: float) -> None:
        self.told.setdefault(part, Counter())[what] += 1
        self.slowest[part] = max(self.slowest.get(part, 0.0), time.monotonic() - began)

    def stop(self) -> None:
        self.stopping.set()
        self.thread.join(30)


@contextmanager
def away(settings: Settings, service: str) -> Any:
    """A service and its children hear nothing and say nothing meanwhile."""
    first = psutil.Process(stack.status(settings)["services"][service]["pid"])
    stopped = [first, *first.children(recursive=True)]
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in reversed(stopped):
            process.send_signal(signal.SIGCONT)


def until(what: str, check: Any) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < give_up, f"no {what} within {PATIENCE_S:.0f} s"
        threading.Event().wait(0.5)


def test_callers_are_answered_whatever_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"PENSTOCK_HOME": str(tmp_path / "home"), "PENSTOCK_PORT_BASE": str(free_ports())}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with stack.running(Settings.load(), ("clicks",)) as settings:
        folder = save_model(tmp_path / "model", inputs=use_case.inputs)
        version = wiring.registry(settings).register("clicks", folder, {}, {})
        rollout.send(settings, "clicks", "promote", version)
        until("version", lambda: httpx.get(f"{settings.predictor_url}/readyz").json().get("champion") == version)
        load = Load(settings.predictor_url)
        try:
            for part in ("calm", "redis", "kafka", "mlflow"):
                load.part = part
                with away(settings, part) if part != "calm" else monkeypatch.context():
                    threading.Event().wait(AWAY_S if part != "calm" else 5)
                load.part = f"after {part}"
                threading.Event().wait(5)
        finally:
            load.stop()
        broker = wiring.broker(settings)

        def logged() -> set[str]:
            return {p.request_id for p in read_predictions(broker, use_case)}

        until("prediction of every answer", lambda: load.answered <= logged())
        print(json.dumps({"told": load.told, "slowest_s": load.slowest, "answered": len(load.answered)}, indent=1))
        expected = {f"200 by {version}"}
        assert {what for told in load.told.values() for what in told} == expected
        assert min(sum(load.told[part].values()) for part in ("redis", "kafka", "mlflow")) > AWAY_S
