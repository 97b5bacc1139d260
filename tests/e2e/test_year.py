"""The flights year with late events: the online row, the offline point-in-time row and the backtest's row agree.

PENSTOCK_YEAR_DAYS (default 365) days are produced; at 20 instants the requests of the hours that follow are looked up
in all three as of the instant: 100 each, 2,000 in all.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pandas as pd
import pytest

from features.flights import use_case
from features.vectors import StoredRow, Vectorizer
from pipelines.broker import Message, Record, clock_message
from pipelines.featurizer import Featurizer
from pipelines.memory_store import MemoryStore
from pipelines.offline_store import PenstockOfflineStoreConfig, historical_features
from pipelines.runner import Runner
from pipelines.task import Task
from services import stack, timetable, topics, wiring
from services.recompute import differences
from services.settings import Settings
from tests.conftest import free_ports

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]
DAYS = int(os.environ.get("PENSTOCK_YEAR_DAYS", "365"))
DAY, HOUR = 86_400_000, 3_600_000
START = timetable.OPENING // DAY * DAY
INSTANTS, EACH = 20, 100
LATE_SHARE, LATEST = 0.02, 5 * HOUR
SEED = 3


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    home = tmp_path_factory.mktemp("year")
    base = {"PENSTOCK_HOME": str(home), "PENSTOCK_PORT_BASE": str(free_ports())}
    with stack.running(Settings.load(base), only=["kafka", "redis"]) as reachable:
        topics.create(reachable, "flights")
        yield reachable


def disordered() -> Iterator[tuple[int, Message]]:
    """(when it is sent, event), in the order of sending: one in fifty comes up to five hours late, some doubled."""
    rng, names = random.Random(SEED), {c.name: t for t, c in use_case.event_topics.items()}
    held: list[tuple[int, Message]] = []
    for day in range(START, START + DAYS * DAY, DAY):
        for event in timetable.events(day, day + DAY):
            delay = rng.randrange(LATEST) if rng.random() < LATE_SHARE else 0
            message = Message(names[event.event], event.value, event.key, 0, timestamp=event.time + delay)
            held += [(event.time + delay, message)] * (2 if rng.random() < 0.001 else 1)
        held.sort(key=lambda item: item[0])
        ready = [item for item in held if item[0] < day + DAY - LATEST]
        held = held[len(ready) :]
        yield from ready
    yield from held


def strict(settings: Settings) -> Runner:
    store = wiring.feature_store(settings, use_case)
    return Runner(wiring.broker(settings), use_case, lambda _: Featurizer(use_case), settings.state_url, store=store)


class Backtest:
    """The same step over the same topics, in this process, with no store and no commits."""

    def __init__(self, settings: Settings) -> None:
        self.task, self.store = Task(use_case, Featurizer(use_case)), MemoryStore(use_case)
        self.consumer = wiring.broker(settings).consumer(list(use_case.event_topics))
        self.read: list[Record] = []

    def until(self, instant: int) -> None:
        """Everything that is on Kafka now."""
        ends = self.consumer.end_offsets(sorted(self.consumer.assignment()))
        while any(self.consumer.position(tp) < end for tp, end in ends.items()):
            self.store.write(self.task.advance(self.consumer.poll(1.0, 5000)).online)
        assert self.task.watermark == instant


def asked(instant: int, rng: random.Random, vectorizer: Vectorizer) -> list[dict[str, Any]]:
    """Requests after the instant: entity keys, fields and the instant itself."""
    found = timetable.requests(instant, instant + 12 * HOUR)
    rows = []
    for request in rng.sample(found, min(EACH, len(found))):
        fields = {k: timetable_ms(v) for k, v in request.row["fields"].items()}
        rows.append({"keys": vectorizer.entity_keys(request.row["entities"], fields), "fields": fields})
    return rows


def timetable_ms(value: Any) -> Any:
    return round(datetime.fromisoformat(value).timestamp() * 1000) if isinstance(value, str) else value


def test_online_offline_and_backtest_agree(settings: Settings) -> None:
    rng, vectorizer, backtest = random.Random(SEED), Vectorizer(use_case), Backtest(settings)
    days = sorted(rng.sample(range(1, DAYS), min(INSTANTS, DAYS - 1)))
    instants = [START + day * DAY + rng.randrange(11, 23) * HOUR for day in days]
    producer, online = wiring.broker(settings).producer(), wiring.feature_store(settings, use_case)
    questions: list[dict[str, Any]] = []
    stream, sent = disordered(), 0
    following = next(stream)
    for instant in instants:
        while following[0] < instant:
            producer.send([following[1]])
            sent += 1
            if sent % 20_000 == 0:
                producer.flush()
            following = next(stream, (1 << 62, following[1]))
        producer.send([clock_message(topic, 0, instant) for topic in use_case.event_topics])
        producer.flush()
        strict(settings).run(threading.Event(), once=True)
        backtest.until(instant)
        rows = asked(instant, rng, vectorizer)
        keys = [row["keys"] for row in rows]
        for row, served, again in zip(rows, online.read(keys), backtest.store.read(keys), strict=True):
            row |= {"at": instant, "online": vector(vectorizer, row, instant, served)}
            assert differences(row["online"], vector(vectorizer, row, instant, again)) == [], (instant, row["keys"])
        questions += rows
        print(
            f"{sent:,} events, {len(questions):,} requests as of {datetime.fromtimestamp(instant / 1000, UTC)}",
            flush=True,
        )
    assert len(questions) == EACH * len(instants)
    counts = backtest.task.intake.counts
    assert counts["counted_late"] > 0 and counts["duplicate"] > 0, counts
    compare_offline(settings, questions)


def vector(vectorizer: Vectorizer, row: dict[str, Any], at: int, stored: dict[str, StoredRow]) -> dict[str, Any]:
    return vectorizer.assemble(row["keys"], row["fields"], at, stored).features


def compare_offline(settings: Settings, questions: list[dict[str, Any]]) -> None:
    frame = pd.DataFrame([{**q["keys"], **q["fields"], "event_time": q["at"]} for q in questions])
    frame["event_timestamp"] = pd.to_datetime(frame.event_time, unit="ms", utc=True)
    config = PenstockOfflineStoreConfig(state_url=settings.state_url, broker=wiring.broker(settings))
    found = historical_features(use_case, config, frame)
    wrong = {}
    for question, (_, offline) in zip(questions, found.iterrows(), strict=True):
        expected = question["online"]
        row = {name: plain(offline[name]) for name in expected if name in found.columns}
        if names := differences(row, {name: plain(expected[name]) for name in row}):
            wrong[question["at"]] = (names[0], row[names[0]], expected[names[0]])
    assert not wrong, f"{len(wrong)} instants differ: {msgspec.json.encode(list(wrong.values())[:5])!r}"
    print(f"{len(questions):,} requests x {len(found.columns)} columns agree online, offline and in the backtest")


def plain(value: Any) -> Any:
    return None if value is None or value != value else value
