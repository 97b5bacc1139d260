"""Two instances of a step on a real broker: partitions move with their state, a killed owner is replaced, a paused one
is fenced. Whatever happens, each prediction becomes one example."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from features.clicks import use_case
from pipelines.broker import Message, clock_message
from pipelines.checkpoint import listed_files, watermark_of
from pipelines.kafka import KafkaBroker
from services.settings import ROOT, Settings
from services.topic_reader import read_all
from services.topics import create_topics

pytestmark = pytest.mark.integration
MINUTE, START = 60_000, 1_767_225_600_000  # 2026-01-01T00:00:00Z
ROUND = 120  # minutes of a round, with a prediction each
DEADLINE_S = 60.0
WAIT = use_case.label.wait // timedelta(minutes=1)


def until(reached: Callable[[], Any], what: str) -> None:
    deadline, pause = time.monotonic() + DEADLINE_S, threading.Event()
    while not reached():
        assert time.monotonic() < deadline, f"no {what} within {DEADLINE_S:.0f} s"
        pause.wait(0.05)


class Instance:
    """`penstock run joiner clicks` as a process; `log` is what it has said."""

    def __init__(self, settings: Settings, folder: Path, name: str) -> None:
        self.file = folder / f"{name}.log"
        place = {
            "PENSTOCK_HOME": str(settings.home), "PENSTOCK_PORT_BASE": str(settings.port_base),
            "PENSTOCK_STATE_URL": str(folder / "state"), "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = [sys.executable, "-m", "services.cli", "run", "joiner", "clicks"]
        with self.file.open("wb") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **place}, stdout=out, stderr=out)

    @property
    def log(self) -> str:
        return self.file.read_text()

    @property
    def owns(self) -> int:
        """How many partitions it has now, by its own words."""
        return self.log.count("partition owned") - self.log.count("partition handed over")

    def stop(self, signum: signal.Signals) -> int:
        self.process.send_signal(signum)
        return self.process.wait(DEADLINE_S)


class Rig:
    """The topics, and rounds of predictions with a click on every third."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder, self.broker = settings, folder, KafkaBroker(settings.kafka_bootstrap)
        create_topics(self.broker, use_case)
        self.rounds = 0
        self.instances: list[Instance] = []

    def start(self) -> Instance:
        self.instances.append(Instance(self.settings, self.folder, f"instance-{len(self.instances)}"))
        return self.instances[-1]

    def feed(self) -> None:
        """A round, then clock records that end every wait of it."""
        first = self.rounds * (ROUND + WAIT + 1)
        self.rounds += 1
        messages = [m for i in range(first, first + ROUND) for m in records(i)]
        end = self.end
        topics = [use_case.topic(name) for name in ("clicked", "predictions")]
        messages += [clock_message(topic, p, end) for topic in topics for p in range(use_case.partitions)]
        producer = self.broker.producer()
        producer.send(messages)
        producer.flush()
        producer.close()

    @property
    def end(self) -> int:
        return START + self.rounds * (ROUND + WAIT + 1) * MINUTE

    def reached(self) -> bool:
        return (watermark_of(self.broker, "clicks.joiner", use_case.partitions) or 0) >= self.end

    def close(self) -> None:
        for instance in self.instances:
            if instance.process.poll() is None:
                instance.process.kill()
                instance.process.wait()
        self.broker.close()


def records(i: int) -> Iterator[Message]:
    """The prediction of minute i, and for every third a click."""
    at, user, id_ = START + i * MINUTE, f"u{i % 11}", f"p{i}"
    about = {"user": user, "section": "sport"}
    prediction = {
        "request_id": id_, "event_time": at, "entities": about, "fields": {"article": "a", "position": 1},
        "features": {**about, "rate_1h": i}, "schema": "x", "feature_times": {}, "version": "1", "arm": "champion",
        "score": 0.5,
    }  # fmt: skip
    click = {"id": f"c{i}", "time": at + MINUTE, **about, "article": "a", "impression": id_}
    partition = use_case.partition(user)
    yield Message("clicks.predictions", json.dumps(prediction).encode(), id_.encode(), partition, (), at)
    if i % 3 == 0:
        yield Message("clicks.clicked", json.dumps(click).encode(), user.encode(), partition, (), at + MINUTE)


@pytest.fixture
def rig(kafka_settings: Settings, tmp_path: Path) -> Iterator[Rig]:
    made = Rig(kafka_settings, tmp_path)
    yield made
    made.close()


def test_instances_share_replace_and_fence_each_other(rig: Rig) -> None:
    a = rig.start()
    rig.feed()
    until(rig.reached, "first round, by one instance")
    b = rig.start()
    until(lambda: (a.owns, b.owns) == (2, 2), "partitions shared by two")
    rig.feed()
    until(rig.reached, "second round, by two instances")
    a.stop(signal.SIGKILL)
    rig.feed()
    until(rig.reached, "third round, by the survivor")
    c = rig.start()
    until(lambda: (b.owns, c.owns) == (2, 2), "partitions shared again")
    b.process.send_signal(signal.SIGSTOP)
    rig.feed()
    until(lambda: rig.reached() and c.owns == 4, "fourth round, without the paused instance")
    b.process.send_signal(signal.SIGCONT)
    until(lambda: b.process.poll() is not None or b.owns == c.owns == 2, "end or return of the paused instance")
    rig.feed()
    until(rig.reached, "fifth round")
    assert "Traceback" not in a.log + b.log + c.log
    assert c.stop(signal.SIGTERM) in (0, 143)
    check(rig)


def check(rig: Rig) -> None:
    """One example for each prediction, on the topic and in the archive, with the label that belongs to it."""
    asked = [i for r in range(rig.rounds) for i in range(r * (ROUND + WAIT + 1), r * (ROUND + WAIT + 1) + ROUND)]
    expected = sorted((f"p{i}", float(i % 3 == 0)) for i in asked)
    found = [json.loads(r.value) for r in read_all(rig.broker, "clicks.examples") if r.value]
    assert sorted((e["request_id"], e["label"]) for e in found) == expected
    assert not list(read_all(rig.broker, "clicks.rejected"))
    files = listed_files(str(rig.folder / "state"), "clicks", "joiner", "examples", rig.broker)
    closed = [(r["request_id"], r["label"]) for file in files for r in pq.read_table(file).to_pylist()]
    hour = use_case.file_every // timedelta(milliseconds=1)
    past = {(e["request_id"], e["label"]) for e in found if e["label_time"] < rig.end - rig.end % hour}
    assert len(closed) == len(set(closed))
    assert past <= set(closed) <= set(expected)
