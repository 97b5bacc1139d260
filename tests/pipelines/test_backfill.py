"""A view that is new or changed beside a running featurizer: backfilled, adopted, and then as if it had always been."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast.aggregation import Aggregation

from features.columns import Columns
from features.errors import ConfigError, StateError
from features.timers import TimerRule
from features.usecase import UseCase
from features.views import entity, stream_view
from pipelines.backfill import Adoption, Backfill
from pipelines.broker import Message, clock_message
from pipelines.checkpoint import listed_files, unserved_views, watermark_of
from pipelines.featurizer import Featurizer
from pipelines.memory_store import MemoryStore
from pipelines.runner import CommitPolicy, Runner
from services.topics import create_topics
from tests.memory_broker import MemoryBroker
from tests.toy import ordered, use_case

MINUTE, START = 60_000, 1_767_225_600_000
SHOPS, NEVER = ("north", "south", "east"), CommitPolicy(0.0, 50, patient_seconds=0.0)
HOUR, QUARTER = timedelta(hours=1), timedelta(minutes=15)
FUNCTIONS = {
    "ids": ("id", "last_3"),
    "prices": ("price", "count_distinct"),
    "most": ("price", "max"),
    "n": ("id", "count"),
}
by_shop = stream_view(
    "by_shop",
    [entity("shop")],
    ordered,
    "toy",
    [Aggregation(column, f, 2 * HOUR, QUARTER, name) for name, (column, f) in FUNCTIONS.items()],
    last_types={"id": str},
)


def quiet_from(orders: Columns) -> Columns:
    """A shop is quiet from half an hour after an order, for two hours at most."""
    due = orders["time"] + 30 * MINUTE
    return {"key": orders["shop"], "due": due, "until": due + 120 * MINUTE, "one": np.ones(len(due), np.int64)}


quiet = stream_view("quiet", [entity("shop")], ordered, "toy", [Aggregation("one", "count", 4 * HOUR, HOUR, "quiet_n")])
BEFORE = replace(use_case, name="toy")
ADDED = {
    "by_shop": replace(BEFORE, views=(*BEFORE.views, by_shop)),
    "quiet": replace(BEFORE, views=(*BEFORE.views, quiet), timers={"quiet": TimerRule({"ordered": quiet_from})}),
}


def feed(broker: MemoryBroker, first: int, n: int) -> int:
    """Orders some minutes apart, some late; a clock record behind. Returns its time."""
    messages, at = [], START
    for i in range(first, first + n):
        rng = random.Random(i)
        at = START + i * 7 * MINUTE
        late = rng.randrange(90) * MINUTE if rng.random() < 0.2 else 0
        body = {"id": str(i), "time": at - late, "shop": rng.choice(SHOPS), "item": 1, "price": rng.randrange(5) / 4}
        messages.append(Message("toy.ordered", msgspec.json.encode(body), b"", timestamp=at))
    broker.producer().send(messages + [clock_message(topic, 0, at + MINUTE) for topic in BEFORE.event_topics])
    return at + MINUTE


class System:
    """Runs featurizers and backfills of a use case over one broker, store and folder."""

    def __init__(self, path: Path) -> None:
        self.broker, self.path = MemoryBroker(), str(path)
        create_topics(self.broker, BEFORE)
        self.store = MemoryStore(ADDED["by_shop"])
        self.store_of = {"by_shop": self.store, "quiet": MemoryStore(ADDED["quiet"])}

    def featurize(self, case: UseCase, store: MemoryStore | None = None) -> None:
        """A bounded run, then one more turn: what a live one would do next."""
        adoption = Adoption(self.broker, case, self.path)
        runner = Runner(
            self.broker, case, lambda _: Featurizer(case), self.path, store=store, policy=NEVER, adoption=adoption
        )
        runner.run(threading.Event(), once=True)

    def backfill(self, case: UseCase, view: str, stop: Callable[[], threading.Event] = threading.Event) -> None:
        runner = Runner(
            self.broker, case, lambda _: Backfill(case, view), self.path, store=self.store_of[view], policy=NEVER,
            rejects=False,
        )  # fmt: skip
        runner.run(stop(), once=True)

    def online(self, view: str) -> dict[str, Any]:
        return {shop: self.store_of[view].read([{"shop": shop, "item": 1}])[0][view] for shop in SHOPS}

    def offline(self, case: UseCase, view: str) -> list[dict[str, Any]]:
        files = listed_files(self.path, case.name, "featurizer", view, self.broker)
        tables = [pq.read_table(file.removeprefix("file://")) for file in files]
        return pa.concat_tables(tables).sort_by([("event_timestamp", "ascending"), ("shop", "ascending")]).to_pylist()


@pytest.mark.parametrize("view", ADDED)
def test_an_adopted_view_is_as_if_it_had_always_been(tmp_path: Path, view: str) -> None:
    after = ADDED[view]
    system, always = System(tmp_path / "a"), System(tmp_path / "b")
    for first, n in ((0, 150), (150, 30), (180, 60), (240, 400)):
        feed(always.broker, first, n)
    feed(system.broker, 0, 150)
    system.featurize(BEFORE)
    feed(system.broker, 150, 30)
    system.featurize(after, system.store_of[view])
    assert unserved_views(system.broker, "toy.featurizer") == {view}
    assert set(system.online(view).values()) == {(None, None)}, "rows that lack history are not written"
    system.backfill(after, view)
    end = feed(system.broker, 180, 60)
    system.featurize(after, system.store_of[view])
    assert not unserved_views(system.broker, "toy.featurizer")
    assert watermark_of(system.broker, "toy.featurizer") == end
    feed(system.broker, 240, 400)
    for one in (system, always):
        one.featurize(after, one.store_of[view])
    assert system.online(view) == always.online(view)
    assert system.offline(after, view) == always.offline(after, view)


def test_a_changed_view_waits_for_its_backfill(tmp_path: Path) -> None:
    system, changed = System(tmp_path), ADDED["by_shop"]
    shorter = stream_view(
        "by_shop", [entity("shop")], ordered, "toy", [Aggregation("id", "count", HOUR, QUARTER, "n")], last_types={}
    )
    old = replace(BEFORE, views=(*BEFORE.views, shorter))
    feed(system.broker, 0, 50)
    system.featurize(old)
    with pytest.raises(StateError, match="penstock backfill"):
        system.featurize(changed)
    system.backfill(changed, "by_shop")
    system.featurize(changed, system.store)
    feed(system.broker, 50, 10)
    system.featurize(changed, system.store)
    assert not unserved_views(system.broker, "toy.featurizer")
    assert all(row["n"] is not None for row, _ in system.online("by_shop").values())


def test_a_view_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="no view 'nothing'"):
        Backfill(BEFORE, "nothing")
