"""Instances of one step over four partitions: each partition's state moves with it, whoever leaves and however."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from features.clicks import use_case
from features.errors import FencedError, PenstockError
from pipelines.broker import Message, clock_message
from pipelines.checkpoint import watermark_of
from pipelines.featurizer import Featurizer
from pipelines.memory_store import MemoryStore
from pipelines.runner import CommitPolicy, Runner
from services.topics import create_topics
from tests.memory_broker import MemoryBroker

MINUTE, START = 60_000, 1_767_225_600_000
USERS = tuple(f"u{i}" for i in range(12))


def feed(broker: MemoryBroker, first: int, n: int) -> int:
    """An impression a minute and a click on every fourth; clock records behind. Returns their time."""
    messages, end = [], START + (first + n) * MINUTE
    for i in range(first, first + n):
        user, at = USERS[i % len(USERS)], START + i * MINUTE
        about = {"time": at, "user": user, "section": "sport", "article": "a"}
        body = {"id": f"s{i}", **about, "position": 1}
        messages.append(Message("clicks.shown", msgspec.json.encode(body), b"", use_case.partition(user), (), at))
        if i % 4 == 0:
            body = {"id": f"c{i}", **about, "impression": f"s{i}"}
            messages.append(Message("clicks.clicked", msgspec.json.encode(body), b"", use_case.partition(user), (), at))
    messages += [clock_message(t, p, end) for t in use_case.event_topics for p in range(use_case.partitions)]
    producer = broker.producer()
    producer.send(messages)
    return end


class Instance:
    """A runner on a thread of its own."""

    def __init__(self, broker: MemoryBroker, store: MemoryStore, path: Path) -> None:
        self.runner = Runner(
            broker, use_case, lambda _: Featurizer(use_case), str(path), store=store, policy=CommitPolicy(0.05, 10)
        )
        self.stop = threading.Event()
        self.error: PenstockError | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.runner.run(self.stop)
        except PenstockError as error:
            self.error = error

    def close(self) -> None:
        self.stop.set()
        self.thread.join(20)


def until(reached: Callable[[], Any], what: str) -> None:
    deadline, pause = time.monotonic() + 20, threading.Event()
    while not reached():
        assert time.monotonic() < deadline, f"no {what} within 20 s"
        pause.wait(0.01)


def reached(broker: MemoryBroker, end: int) -> None:
    until(lambda: (watermark_of(broker, "clicks.featurizer", 4) or 0) >= end, "watermark on all partitions")


def newest(store: MemoryStore) -> list[Any]:
    return [store.read([{"user": user, "section": "sport"}])[0] for user in USERS]


@pytest.fixture
def calm(tmp_path: Path) -> list[Any]:
    """The rows after three rounds by one instance that nothing happens to."""
    broker, store = MemoryBroker(), MemoryStore(use_case)
    create_topics(broker, use_case)
    one = Instance(broker, store, tmp_path / "calm")
    for r in range(3):
        reached(broker, feed(broker, 60 * r, 60))
    one.close()
    assert newest(store)[0]["user_clicked"][0]["user_clicked_time_count_24h"] == 15
    return newest(store)


def test_state_moves_with_its_partition(tmp_path: Path, calm: list[Any]) -> None:
    broker, store = MemoryBroker(), MemoryStore(use_case)
    create_topics(broker, use_case)
    a = Instance(broker, store, tmp_path)
    reached(broker, feed(broker, 0, 60))
    b = Instance(broker, store, tmp_path)
    until(lambda: (sorted(a.runner.owned), sorted(b.runner.owned)) == ([0, 1], [2, 3]), "two shares")
    reached(broker, feed(broker, 60, 60))
    a.close()
    reached(broker, feed(broker, 120, 60))
    assert sorted(b.runner.owned) == [0, 1, 2, 3]
    b.close()
    assert a.error is b.error is None
    assert newest(store) == calm


def test_an_owner_that_was_away_is_fenced(tmp_path: Path, calm: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    broker, store = MemoryBroker(session_s=0.2), MemoryStore(use_case)
    create_topics(broker, use_case)
    a = Instance(broker, store, tmp_path)
    reached(broker, feed(broker, 0, 60))
    away, back = threading.Event(), threading.Event()
    commit = a.runner._commit

    def paused(i: int) -> None:
        away.set()
        back.wait(20)
        commit(i)

    monkeypatch.setattr(a.runner, "_commit", paused)
    end = feed(broker, 60, 60)
    assert away.wait(20)
    b = Instance(broker, store, tmp_path)
    reached(broker, end)
    reached(broker, feed(broker, 120, 60))
    back.set()
    a.close()
    b.close()
    assert isinstance(a.error, FencedError)
    assert b.error is None
    assert newest(store) == calm
