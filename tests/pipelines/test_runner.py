"""The runner on the in-memory broker: killed at any point of a commit, what it leaves equals an undisturbed run."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from features.errors import StateError
from pipelines.broker import Message, clock_message, clock_of
from pipelines.checkpoint import Checkpoints, listed_files, watermark_of
from pipelines.featurizer import Featurizer
from pipelines.joiner import Joiner
from pipelines.memory_store import MemoryStore
from pipelines.runner import CommitPolicy, Runner
from tests.memory_broker import MemoryBroker
from tests.toy import use_case as toy

MINUTE = 60_000
START = 1_000_000 * MINUTE
use_case = replace(toy, file_every=timedelta(minutes=30))
TOPICS = ["ordered", "returned", "predictions", "examples", "cuts", "rejected"]


class Killed(BaseException):
    """Stands for kill -9: nothing of the process goes on."""


class Store(MemoryStore):
    """A store that counts what was ever written."""

    def snapshot_rows(self) -> Any:
        return {view: dict(rows) for view, rows in self._rows.items()}


def make_broker() -> MemoryBroker:
    broker = MemoryBroker()
    broker.create_topics({f"toy.{name}": {} for name in TOPICS}, 1)
    return broker


def orders(broker: MemoryBroker, start: int, n: int, clock: bool = True) -> None:
    """n orders and some returns, a minute apart; then clock records."""
    messages = []
    for i in range(start, start + n):
        at = START + i * MINUTE
        value = {"id": f"o{i}", "time": at, "shop": f"s{i % 3}", "item": i % 2, "price": i * 0.25}
        messages.append(Message("toy.ordered", json.dumps(value).encode(), timestamp=at))
        if i % 4 == 0:
            value = {"id": f"r{i}", "time": at, "order": f"o{i}", "why": "late"}
            messages.append(Message("toy.returned", json.dumps(value).encode(), timestamp=at))
    if clock:
        end = START + (start + n) * MINUTE
        messages += [clock_message(f"toy.{name}", 0, end) for name in ("ordered", "returned", "predictions")]
    producer = broker.producer()
    producer.send(messages)
    producer.flush()


def predictions(broker: MemoryBroker, start: int, n: int) -> None:
    producer = broker.producer()
    for i in range(start, start + n):
        at = START + i * MINUTE
        value = {
            "request_id": f"o{i}", "event_time": at, "entities": {"shop": "s", "item": 1}, "fields": {"price": 1.0},
            "features": {"all_count": i}, "schema": "x", "feature_times": {}, "version": "1", "arm": "champion",
            "score": 0.5,
        }  # fmt: skip
        producer.send([Message("toy.predictions", json.dumps(value).encode(), f"o{i}".encode(), timestamp=at)])
    producer.flush()


def values(broker: MemoryBroker, topic: str) -> list[Any]:
    """The committed records of a topic, without clocks."""
    consumer = broker.consumer([topic])
    return [json.loads(r.value or b"null") for r in consumer.poll(0, 10**6) if clock_of(r) is None]


def runner(broker: MemoryBroker, step: Any, path: Path, store: MemoryStore | None = None) -> Runner:
    return Runner(broker, use_case, step, str(path), store=store, policy=CommitPolicy(1e9, 7))


def once(r: Runner) -> None:
    r.run(threading.Event(), once=True)


def offline(broker: MemoryBroker, path: Path, step: str, table: str) -> list[Any]:
    rows = [row for f in listed_files(str(path), "toy", step, table, broker) for row in pq.read_table(f).to_pylist()]
    return sorted(rows, key=repr)


def kill_at(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, when: int, after: bool) -> None:
    """The `when`-th call of target.name kills the process, before or after it did its work."""
    original, calls = getattr(target, name), [0]

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == when and not after:
            raise Killed
        result = original(*args, **kwargs)
        if calls[0] == when:
            raise Killed
        return result

    monkeypatch.setattr(target, name, dying)


def crash_points() -> list[Any]:
    from tests.memory_broker import MemoryProducer

    points = [(Checkpoints, "save_base"), (Checkpoints, "save_delta"), (Checkpoints, "write_table")]
    points += [(MemoryProducer, "commit"), (Store, "write")]  # type: ignore[list-item]
    return [
        pytest.param(target, name, when, after, id=f"{name}-{when}-{'after' if after else 'before'}")
        for target, name in points
        for when in (1, 2)
        for after in (False, True)
        if (name, when) != ("save_base", 2)
    ]


def work(broker: MemoryBroker, path: Path, store: Store, kill: Any = None) -> None:
    """Both steps over two stretches of input, started again after every kill."""
    for start in (0, 60):
        orders(broker, start, 60)
        predictions(broker, start, 60)
        for make in (lambda _: Featurizer(use_case), lambda _: Joiner(use_case)):
            for _ in range(4):
                try:
                    once(runner(broker, make, path, store))
                    break
                except Killed:
                    pass
            else:
                raise AssertionError("killed more often than asked")


@pytest.mark.parametrize(("target", "name", "when", "after"), crash_points())
def test_killed_anywhere_nothing_is_lost_or_doubled(
    target: Any, name: str, when: int, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, calm_store = make_broker(), Store(use_case)
    work(calm, tmp_path / "calm", calm_store)
    broker, store = make_broker(), Store(use_case)
    kill_at(monkeypatch, target, name, when, after)
    work(broker, tmp_path / "killed", store)
    assert store.snapshot_rows() == calm_store.snapshot_rows()
    for topic in ("toy.examples", "toy.rejected", "toy.cuts"):
        assert values(broker, topic) == values(calm, topic), topic
    assert values(calm, "toy.examples")
    for step, table in (("featurizer", "all_orders"), ("featurizer", "shop_item"), ("joiner", "examples")):
        expected = offline(calm, tmp_path / "calm", step, table)
        assert expected
        assert offline(broker, tmp_path / "killed", step, table) == expected
    assert watermark_of(broker, "toy.joiner") == watermark_of(calm, "toy.joiner") == START + 120 * MINUTE


def test_every_bad_record_is_on_the_rejected_topic(tmp_path: Path) -> None:
    broker = make_broker()
    producer = broker.producer()
    producer.send(
        [
            Message("toy.ordered", b"{", timestamp=START),
            Message("toy.ordered", b'{"id": 1}', timestamp=START),
            Message("toy.ordered", b"x" * 100_000, timestamp=START),
            Message("toy.ordered", json.dumps(order("f", START + 10**9)).encode(), timestamp=START),
            Message("toy.ordered", json.dumps(order("a", START)).encode(), timestamp=START),
            Message("toy.ordered", json.dumps(order("a", START)).encode(), timestamp=START),
            *(clock_message(f"toy.{n}", 0, START + 600 * MINUTE) for n in ("ordered", "returned")),
            Message("toy.ordered", json.dumps(order("old", START)).encode(), timestamp=START),
            clock_message("toy.ordered", 0, START + 601 * MINUTE),
            clock_message("toy.returned", 0, START + 601 * MINUTE),
        ]
    )
    producer.flush()
    once(runner(broker, lambda _: Featurizer(use_case), tmp_path, Store(use_case)))
    rejected = values(broker, "toy.rejected")
    assert [r["reason"] for r in rejected] == ["malformed", "invalid", "oversized", "future", "duplicate", "late"]
    big = rejected[2]
    assert (big["size"], len(big["raw"]) < 6000, big["topic"], big["offset"]) == (100_000, True, "toy.ordered", 2)


def order(id: str, time: int) -> dict[str, Any]:
    return {"id": id, "time": time, "shop": "s", "item": 1, "price": 1.0}


def test_positions_without_their_snapshot_are_refused(tmp_path: Path) -> None:
    broker = make_broker()
    orders(broker, 0, 20)
    once(runner(broker, lambda _: Featurizer(use_case), tmp_path, Store(use_case)))
    for file in tmp_path.glob("toy/featurizer/0/snapshots/*"):
        file.unlink()
    with pytest.raises(StateError, match="missing"):
        once(runner(broker, lambda _: Featurizer(use_case), tmp_path, Store(use_case)))


def test_a_snapshot_without_positions_is_refused(tmp_path: Path) -> None:
    broker = make_broker()
    for start in (0, 20):
        orders(broker, start, 20)
        once(runner(broker, lambda _: Featurizer(use_case), tmp_path, Store(use_case)))
    orders(again := make_broker(), 0, 20)
    with pytest.raises(StateError, match="no committed positions"):
        once(runner(again, lambda _: Featurizer(use_case), tmp_path, Store(use_case)))


def test_another_plan_is_refused(tmp_path: Path) -> None:
    orders(broker := make_broker(), 0, 20)
    once(runner(broker, lambda _: Featurizer(use_case), tmp_path, Store(use_case)))
    fewer = replace(use_case, views=use_case.views[:1])
    with pytest.raises(StateError, match="backfill"):
        once(Runner(broker, fewer, lambda _: Featurizer(fewer), str(tmp_path), store=Store(use_case)))
