"""Drift: what moves is named, what stays or only comes round each week is not; the same however examples come."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.usecase import Category, ModelInputs
from pipelines.broker import Message, clock_message
from pipelines.drift import BASE, DAY_MS, FEWEST, KEPT, Drift
from pipelines.runner import CommitPolicy, Runner
from pipelines.step import Event
from services.topic_reader import read_all
from tests.memory_broker import MemoryBroker
from tests.toy import use_case as toy

NUMBERS = tuple(f"n{i}" for i in range(40))
INPUTS = ModelInputs(NUMBERS, (Category("carrier", 16, 2), Category("weekday", 8, 2)))
USE_CASE: Any = SimpleNamespace(inputs=INPUTS, topic=lambda name: f"toy.{name}")
Change = Callable[[dict[str, Any]], dict[str, Any]]


def example(vector: dict[str, Any], time: int, label: float, score: float, name: str) -> Event:
    value = SimpleNamespace(features=vector, label=label, score=score, request_id=name)
    return Event(Any, value, time, time)  # type: ignore[arg-type]


def days(count: int, per_day: int = 60, change: Change = dict, since: int = 30, seed: int = 0) -> list[list[Event]]:
    """Days of examples with a weekly cycle; from day `since` on their vectors are changed, a spoiled score too."""
    rng, found = np.random.default_rng(seed), []
    for day in range(count):
        weekly, times = (np.sin(day * 2 * np.pi / 7) * 0.5, np.sort(rng.integers(0, DAY_MS, per_day)))
        rows = rng.lognormal(1 + weekly, 1, (per_day, len(NUMBERS)))
        of = []
        for i, row in enumerate(rows):
            vector = dict(zip(NUMBERS, row.tolist(), strict=True))
            vector |= {"carrier": str(rng.choice(["UA", "DL", "B6"])), "weekday": day % 7, "score": 0.3}
            vector = change(vector) if day >= since else vector
            label = float(rng.random() < 0.3)
            of.append(example(vector, day * DAY_MS + int(times[i]), label, vector["score"], f"{day}-{i}"))
        found.append(of)
    return found


def told(step: Drift, batches: list[list[Event]]) -> list[dict[str, Any]]:
    found = []
    for events in batches:
        at = events[-1].applied // DAY_MS * DAY_MS + DAY_MS
        found += [json.loads(m.value or b"") for m in step.process(events, at).messages]
    return found


def test_what_only_comes_round_each_week_is_no_drift() -> None:
    assert told(Drift(USE_CASE), days(KEPT + 60)) == []


def scaled(v: dict[str, Any]) -> dict[str, Any]:
    return v | {"n7": 60 * v["n7"]}


def nulls(v: dict[str, Any]) -> dict[str, Any]:
    return v | {"n3": None if v["n2"] > 2.7 else v["n3"]}


def gone(v: dict[str, Any]) -> dict[str, Any]:
    return v | {"carrier": "DL"} if v["carrier"] == "UA" else v


def wrong(v: dict[str, Any]) -> dict[str, Any]:
    return v | {"score": 0.9}


@pytest.mark.parametrize(
    ("change", "name", "what"),
    [
        (scaled, "n7", "inputs"),
        (nulls, "n3 is null", "inputs"),
        (gone, "carrier=UA", "inputs"),
        (wrong, "loss", "loss"),
    ],
)
def test_what_moves_is_named_within_a_week(change: Change, name: str, what: str) -> None:
    found = told(Drift(USE_CASE), days(37, change=change))
    assert len(found) == 1 and found[0]["what"] == what
    assert 31 * DAY_MS <= found[0]["time"] <= 37 * DAY_MS and found[0]["time"] % DAY_MS == 0
    named = {f["name"]: f for f in found[0]["features"]}
    assert name in named and name in found[0]["sentence"] and abs(named[name]["score"]) > 4
    assert set(named) <= {name, "carrier=DL"}


def test_one_odd_day_is_no_drift_and_a_few_examples_are_no_day() -> None:
    odd = days(60)
    odd[35] = days(36, change=scaled, since=35)[35]
    assert told(Drift(USE_CASE), odd) == []
    step = Drift(USE_CASE)
    told(step, days(3, per_day=FEWEST // 2 + 1))
    assert len(step.blocks) == 1 and step.sums.examples == FEWEST // 2 + 1


@given(st.integers(0, 2**32), st.lists(st.integers(1, 200), min_size=5, max_size=40))
@settings(max_examples=15, deadline=None)
def test_a_snapshot_at_any_batch_gives_the_same_bits(at: int, sizes: list[int]) -> None:
    events = [e for day in days(BASE + 12, change=scaled, since=BASE + 2) for e in day]
    end = (BASE + 12) * DAY_MS
    whole, parts, out, i, k = Drift(USE_CASE), Drift(USE_CASE), [], 0, 0
    expected = whole.process(events, end).messages
    while i < len(events):
        size = sizes[k % len(sizes)]
        batch = events[i : i + size]
        out += parts.process(batch, batch[-1].applied).messages
        i, k = i + size, k + 1
        if k % 7 == at % 7:
            state = parts.snapshot()
            parts = Drift(USE_CASE)
            parts.restore(state)
            assert parts.snapshot() == state
    out += parts.process([], end).messages
    assert out == expected and len(out) == 1 and parts.snapshot() == whole.snapshot()


def test_through_the_runner_a_shift_is_told_once_though_the_step_starts_anew_each_day(tmp_path: Path) -> None:
    use_case = replace(toy, inputs=INPUTS)
    broker = MemoryBroker()
    broker.create_topics({f"toy.{name}": {} for name in ("examples", "drift")}, 1)
    for day, events in enumerate(days(37, change=scaled)):
        messages = [as_message(e) for e in events]
        producer = broker.producer()
        producer.send([*messages, clock_message("toy.examples", 0, (day + 1) * DAY_MS)])
        producer.flush()
        policy = CommitPolicy.every(seconds=0.001)
        runner = Runner(broker, use_case, lambda p: Drift(use_case, p), str(tmp_path), policy=policy, rejects=False)
        runner.run(threading.Event(), once=True)
    (told_of,) = [json.loads(r.value) for r in read_all(broker, "toy.drift") if r.value]
    assert told_of["features"][0]["name"] == "n7" and told_of["time"] <= 37 * DAY_MS


def as_message(event: Event) -> Message:
    value, at = event.value, event.applied
    record = {"request_id": value.request_id, "event_time": at, "features": value.features, "version": "1"}
    record |= {"score": value.score, "label": value.label, "label_time": at}
    return Message("toy.examples", json.dumps(record).encode(), value.request_id.encode(), 0, timestamp=at)
