"""A round of housekeeping beside a featurizer that goes on: what is asked of the stores reads the same as before."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from feast.aggregation import Aggregation
from typer.testing import CliRunner

from features.errors import InputError
from features.vectors import empty_row
from features.views import stream_view
from pipelines.backfill import Backfill
from pipelines.broker import Message, clock_message
from pipelines.checkpoint import read_snapshot
from pipelines.featurizer import Featurizer
from pipelines.offline_files import FAN, partitions
from pipelines.offline_store import PenstockOfflineStoreConfig, historical_features
from pipelines.registry import Version
from pipelines.runner import CommitPolicy, Runner
from services import wiring
from services.cli import app
from services.housekeeping import DAY, Done, keep_house, keep_registry
from services.settings import Settings
from tests.memory_broker import MemoryBroker
from tests.toy import shop_item
from tests.toy import use_case as toy

HOUR = 3_600_000
START = 500_000 * HOUR
use_case = replace(toy, file_every=timedelta(hours=1))


class House:
    """A stack of the toy use case in this process; `run(h)` plays an order an hour and the clock, up to hour `h`."""

    def __init__(self, path: Path) -> None:
        self.settings = Settings(home=path, state_url=str(path / "state"), redis=f"sqlite:{path}/online.db")
        self.broker = MemoryBroker()
        self.broker.create_topics({f"toy.{name}": {} for name in ("ordered", "returned", "rejected")}, 1)
        self.store = wiring.feature_store(self.settings, use_case)
        self.hours = 0
        self.offline = PenstockOfflineStoreConfig(state_url=self.settings.state_url, broker=self.broker)

    def run(self, until: int) -> None:
        while self.hours < until:
            self._play(self.hours)
            self.hours += 1
            runner = Runner(
                self.broker,
                use_case,
                lambda partition: Featurizer(use_case),
                self.settings.state_url,
                store=self.store,
                policy=CommitPolicy(1e9),
            )
            runner.run(threading.Event(), once=True)

    def _play(self, hour: int) -> None:
        at = START + hour * HOUR + 60_000
        value = {"id": f"o{hour}", "time": at, "shop": f"s{hour // 12}", "item": 1, "price": hour / 4}
        end = START + (hour + 1) * HOUR
        producer = self.broker.producer()
        producer.send([Message("toy.ordered", json.dumps(value).encode(), timestamp=at)])
        producer.send([clock_message(f"toy.{name}", 0, end) for name in ("ordered", "returned")])
        producer.flush()

    def keep(self, later: float = 0.0, **settings: Any) -> Done:
        """A round `later` seconds from now."""
        return keep_house(replace(self.settings, **settings), use_case, self.broker, self.store, time.time() + later)

    def history(self, first: int = 0) -> pd.DataFrame:
        rng = random.Random(1)
        at = [START + rng.randrange(first * HOUR, self.hours * HOUR, 1000) for _ in range(300)]
        frame = pd.DataFrame({"event_timestamp": pd.to_datetime(at, unit="ms", utc=True), "event_time": at})
        frame = frame.assign(shop=[f"s{(t - START) // HOUR // 12}" for t in at], item=1, price=1.0)
        return historical_features(use_case, self.offline, frame)

    def online(self) -> list[Any]:
        return [r["shop_item"] for r in self.store.read([{"shop": f"s{day}", "item": 1} for day in range(5)])]

    @property
    def rows(self) -> int:
        return sum(pq.read_metadata(p).num_rows for p in Path(self.settings.state_url).rglob("*.parquet"))

    @property
    def backfills(self) -> list[str]:
        return [p.name for p in Path(self.settings.state_url, "toy").glob("backfill-*")]

    @property
    def files(self) -> int:
        return len(list(Path(self.settings.state_url).rglob("*.parquet")))


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    with closing(house.store):
        yield house


def test_before_the_first_commit_there_is_nothing_to_do(house: House) -> None:
    assert house.keep() == Done()


def test_rounds_between_runs_change_nothing_that_is_read(house: House) -> None:
    house.run(18)
    before = house.history()
    assert house.keep().merged >= 2
    pd.testing.assert_frame_equal(house.history(), before)
    files = house.files
    deleted = house.keep(later=3700).deleted
    assert deleted >= 4 * FAN and house.files == files - deleted
    pd.testing.assert_frame_equal(house.history(), before)
    house.run(24)
    house.keep(later=3700)
    house.run(30)
    undisturbed = House(house.settings.home / "undisturbed")
    with closing(undisturbed.store):
        undisturbed.run(30)
        pd.testing.assert_frame_equal(house.history(), undisturbed.history())


def test_dead_online_keys_are_removed_and_come_back_with_their_next_event(house: House) -> None:
    house.run(48)
    shops = house.online()
    assert shops[0] == (empty_row(shop_item), shops[0][1]) and shops[0][1] < START + 48 * HOUR - DAY
    assert house.keep().forgotten == 1
    assert house.online() == [(None, None), *shops[1:]]
    assert house.keep().forgotten == 0


def test_retention_answers_as_before_from_its_instant_on_and_refuses_older_questions(house: House) -> None:
    house.run(48)
    before = house.history(first=24)
    rows = house.rows
    done = house.keep(offline_keep_days=1)
    assert done.shortened >= 24
    pd.testing.assert_frame_equal(house.history(first=24), before)
    with pytest.raises(InputError, match="retention"):
        house.history()
    house.keep(later=3700, offline_keep_days=1)
    assert house.rows < 2 / 3 * rows


def test_a_backfill_goes_once_the_featurizer_serves_its_view(house: House) -> None:
    house.run(10)
    longer = [Aggregation("price", "count", timedelta(hours=2), timedelta(minutes=15), "all_count")]
    changed = replace(use_case, views=(stream_view("all_orders", [], toy.contracts[0], "toy", longer), shop_item))
    for case in (use_case, changed):
        step = Backfill(case, "all_orders")
        Runner(house.broker, case, lambda _, step=step: step, house.settings.state_url).run(
            threading.Event(), once=True
        )
    history = house.history()
    assert len(house.backfills) == 2
    assert (house.keep().backfills, house.keep().backfills) == (1, 0)
    assert house.backfills == [step.name], "what is still to be adopted stays"
    assert house.broker.committed(f"toy.{step.name}")
    pd.testing.assert_frame_equal(house.history(), history)


def test_a_snapshot_removed_between_asking_and_reading_is_asked_for_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.run(3)
    stale = house.broker.committed("toy.featurizer")
    house.run(4)
    for path in Path(house.settings.state_url).rglob("snapshots/*"):
        if path.name in next(iter(stale.values())).metadata:
            path.unlink()
    fresh = house.broker.committed
    answers = iter([stale])
    monkeypatch.setattr(house.broker, "committed", lambda group: next(answers, None) or fresh(group))
    (part,) = partitions(house.settings.state_url, "toy", house.broker)
    metadata = next(iter(fresh("toy.featurizer").values())).metadata
    assert list(part.listed) == read_snapshot(part.fs, part.root, metadata.rpartition(":")[0]).files


def test_the_command_prints_what_it_did(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiring, "broker", lambda settings: closable(house.broker))
    monkeypatch.setattr(Settings, "load", classmethod(lambda cls: house.settings))
    monkeypatch.setattr("features.usecase.load", lambda name: use_case)
    monkeypatch.setattr(wiring, "registry", lambda settings: Versions())
    house.broker.create_topics({"toy.models": {}}, 1)
    house.run(10)
    result = CliRunner().invoke(app, ["housekeeping", "toy", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["merged"] == 2
    result = CliRunner().invoke(app, ["housekeeping", "toy"])
    assert "0 larger offline files written" in result.stdout


class Versions:
    """A registry: what it has, and what was deleted."""

    def __init__(self, *versions: Version) -> None:
        self.there, self.deleted = list(versions), list[str]()

    def versions(self, name: str) -> list[Version]:
        return self.there

    def delete(self, name: str, version: str) -> None:
        self.deleted.append(version)


def test_versions_that_never_served_go_but_those_of_the_newest_cut(house: House) -> None:
    now = 100 * DAY
    old = {
        "1": {"cut": "10", "role": "retired"},
        "2": {"cut": "20", "role": "refused"},
        "3": {"cut": "30"},
        "4": {"cut": "30", "refresh_of": "3"},
        "5": {"cut": "25"},
        "6": {"cut": "26", "role": "rolled_back"},
    }
    versions = [Version(name, tags, {}, now - 2 * DAY) for name, tags in old.items()]
    registry = Versions(*versions, Version("7", {"cut": "30", "refresh_of": "3"}, {}, now - DAY // 2))
    house.broker.create_topics({"toy.models": {}}, 1)
    state = {"roles": {"champion": "5"}, "versions": {"5": {}}}
    house.broker.producer().send([Message("toy.models", json.dumps(state).encode(), b"state")])
    assert keep_registry(house.settings, use_case, house.broker, registry, now / 1000) == 2  # type: ignore[arg-type]
    assert registry.deleted == ["2", "4"]


def closable(broker: Any) -> Any:
    broker.close = lambda: None
    return broker
