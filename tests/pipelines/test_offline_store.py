"""Historical features: equal to brute force over the raw events, and to Feast's own store where that is right."""

from __future__ import annotations

import json
import random
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pyarrow as pa
import pytest
from feast import FeatureStore, FeatureView, Field, FileSource, RepoConfig
from feast.types import Float64, Int64, String

from features.engine import Applied
from features.errors import ConfigError, InputError, StateError
from features.oracle import brute_force
from features.vectors import empty_row
from features.views import entity
from pipelines.broker import Message, Position, clock_message
from pipelines.checkpoint import Checkpoints, Plan
from pipelines.featurizer import Featurizer
from pipelines.memory_store import MemoryStore
from pipelines.offline_store import NAME, PenstockOfflineStoreConfig, historical_features
from pipelines.runner import CommitPolicy, Runner
from tests.memory_broker import MemoryBroker
from tests.toy import all_orders, dearness, shop_item, use_case

MINUTE = 60_000
START = 1_000_000 * MINUTE
VALUES = [f.name for view in (*use_case.views, dearness) for f in view.features]


class Committed:
    """A broker as far as the offline store asks: the featurizer's committed snapshot."""

    def __init__(self, name: str) -> None:
        self.name = name

    def committed(self, group: str) -> dict[Any, Position]:
        assert group == "toy.featurizer"
        return {("toy.ordered", 0): Position(1, f"{self.name}:1")}


def played(path: Path, seed: int, n: int = 150) -> tuple[PenstockOfflineStoreConfig, list[Applied]]:
    """Random orders of six hours through the featurizer."""
    rng = random.Random(seed)
    broker = MemoryBroker()
    broker.create_topics({f"toy.{name}": {} for name in ("ordered", "returned", "rejected")}, 1)
    contract = use_case.contract("ordered")
    events, messages = [], []
    for i, at in enumerate(sorted(START + rng.randrange(0, 360 * MINUTE, 250) for _ in range(n))):
        price = rng.choice([None, rng.randrange(10_000) / 100])
        value = {"id": f"o{i}", "time": at, "shop": rng.choice("abé"), "item": rng.randrange(2), "price": price}
        raw = json.dumps(value).encode()
        messages.append(Message("toy.ordered", raw, timestamp=at))
        events.append(Applied("ordered", contract.decode(raw), at, at))
    messages += [clock_message(f"toy.{name}", 0, START + 480 * MINUTE) for name in ("ordered", "returned")]
    producer = broker.producer()
    producer.send(messages)
    producer.flush()
    runner = Runner(
        broker,
        use_case,
        lambda partition: Featurizer(use_case),
        str(path),
        store=MemoryStore(use_case),
        policy=CommitPolicy(1e9, 40),
    )
    runner.run(threading.Event(), once=True)
    return PenstockOfflineStoreConfig(state_url=str(path), broker=broker), events


def asked(rng: random.Random, n: int) -> pd.DataFrame:
    at = [START + rng.randrange(-30 * MINUTE, 480 * MINUTE, 125) for _ in range(n)]
    return pd.DataFrame(
        {
            "event_timestamp": pd.to_datetime(at, unit="ms", utc=True),
            "event_time": at,
            "shop": [rng.choice(["a", "b", "é", "nobody", None]) for _ in at],
            "item": [rng.choice([0, 1, 1, 7]) for _ in at],
            "price": [rng.randrange(100) / 4 for _ in at],
        }
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_features_equal_brute_force_at_any_instant(tmp_path: Path, seed: int) -> None:
    config, events = played(tmp_path, seed)
    frame = asked(random.Random(seed), 200)
    found = historical_features(use_case, config, frame)
    assert list(found.columns) == [*frame.columns, *VALUES]
    pd.testing.assert_frame_equal(found[list(frame.columns)], frame)
    moments = found.to_dict("records")
    for row in moments:
        everyone = brute_force(use_case, "all_orders", (), events, row["event_time"])
        item = brute_force(use_case, "shop_item", (row["shop"], row["item"]), events, row["event_time"])
        mean = everyone["all_mean"]
        made = {"price_ratio": row["price"] / mean if mean else None, "hour": row["event_time"] // 3_600_000 % 24}
        for name, value in (everyone | item | made).items():
            assert same(row[name], value), (name, row)
    assert {row["si_who"] is None for row in moments} == {True, False}


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return list(found) == pytest.approx(expected)
    if expected is None:
        return bool(pd.isna(found))
    return bool(found == pytest.approx(expected))


@pytest.fixture
def stored(tmp_path: Path) -> PenstockOfflineStoreConfig:
    """Rows of shop a, item 1 at START (count 1), + 10 min (2), and of all orders at START; and a file that no
    snapshot lists."""
    checkpoints = Checkpoints(f"{tmp_path}/toy/featurizer/0", "o")
    files = [
        checkpoints.write_table("shop_item", shop_rows((START, 1), (START + 10 * MINUTE, 2)), 1),
        checkpoints.write_table("all_orders", all_rows((START, 5)), 2),
    ]
    checkpoints.write_table("shop_item", shop_rows((START + 5 * MINUTE, 99)), 3)
    name = checkpoints.save_base(Plan("featurizer", {}, {}), b"", files)
    return PenstockOfflineStoreConfig(state_url=str(tmp_path), broker=Committed(name))


def shop_rows(*rows: tuple[int, int]) -> pa.Table:
    times = pa.array([t for t, _ in rows], pa.timestamp("ms", "UTC"))
    n = len(rows)
    return pa.table(
        {
            "shop": ["a"] * n,
            "item": [1] * n,
            "event_timestamp": times,
            "si_count": [count for _, count in rows],
            "si_sum": [0.5] * n,
            "si_last": pa.array([None] * n, pa.float64()),
            "si_last_3": pa.array([[1.0, 2.0]] * n, pa.list_(pa.float64())),
            "si_who": ["x"] * n,
            "si_whos": pa.array([["x", "y"]] * n, pa.list_(pa.string())),
        }
    )


def all_rows(*rows: tuple[int, int]) -> pa.Table:
    times = pa.array([t for t, _ in rows], pa.timestamp("ms", "UTC"))
    means = pa.array([1.5] * len(rows), pa.float64())
    return pa.table({"event_timestamp": times, "all_count": [count for _, count in rows], "all_mean": means})


def at(*times: int, **columns: Any) -> pd.DataFrame:
    frame = pd.DataFrame({"event_timestamp": pd.to_datetime(list(times), unit="ms", utc=True)})
    defaults = {"shop": "a", "item": 1, "price": 3.0, "event_time": START}
    return frame.assign(**(defaults | columns))


def test_a_row_holds_from_its_millisecond_until_the_ttl(stored: PenstockOfflineStoreConfig) -> None:
    """And a file that the committed snapshot does not list is never read."""
    end = START + 10 * MINUTE + 120 * MINUTE
    moments = [end + 1, START - 1, START, START + 9 * MINUTE, START + 10 * MINUTE, end]
    found = historical_features(use_case, stored, at(*moments))
    assert found.si_count.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.all_count.tolist() == [5, 0, 5, 5, 5, 5]


def test_what_has_no_row_reads_as_the_empty_window(stored: PenstockOfflineStoreConfig) -> None:
    found = historical_features(use_case, stored, at(START, START, shop=[None, "b"])).to_dict("records")
    for row in found:
        assert {
            n: list(v) if n in ("si_last_3", "si_whos") else v for n, v in row.items() if n in empty_row(shop_item)
        } == {
            **empty_row(shop_item),
            "si_last": pytest.approx(float("nan"), nan_ok=True),
        }


def test_a_null_in_a_stored_row_stays_null(stored: PenstockOfflineStoreConfig) -> None:
    row = historical_features(use_case, stored, at(START)).to_dict("records")[0]
    assert pd.isna(row["si_last"]) and list(row["si_whos"]) == ["x", "y"] and row["price_ratio"] == 2.0


def test_naive_timestamps_are_utc_and_keys_may_be_floats(stored: PenstockOfflineStoreConfig) -> None:
    frame = at(START, START, item=[1.0, float("nan")])
    frame["event_timestamp"] = frame.event_timestamp.dt.tz_localize(None)
    assert historical_features(use_case, stored, frame).si_count.tolist() == [1, 0]


def test_no_rows_are_no_rows(stored: PenstockOfflineStoreConfig) -> None:
    assert len(historical_features(use_case, stored, at(START).head(0))) == 0


def test_a_view_without_files_reads_as_the_empty_window(tmp_path: Path) -> None:
    name = Checkpoints(f"{tmp_path}/toy/featurizer/0", "o").save_base(Plan("featurizer", {}, {}), b"", [])
    config = PenstockOfflineStoreConfig(state_url=str(tmp_path), broker=Committed(name))
    assert historical_features(use_case, config, at(START)).si_count.tolist() == [0]


def test_files_may_lie_behind_any_filesystem() -> None:
    checkpoints = Checkpoints("memory://far/toy/featurizer/0", "o")
    files = [checkpoints.write_table("shop_item", shop_rows((START, 1)), 1)]
    config = PenstockOfflineStoreConfig(
        state_url="memory://far", broker=Committed(checkpoints.save_base(Plan("featurizer", {}, {}), b"", files))
    )
    assert historical_features(use_case, config, at(START)).si_count.tolist() == [1]
    fsspec.filesystem("memory").rm("/far", recursive=True)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ("SELECT 1", "SQL"),
        (None, "DataFrame"),
        (at(START).drop(columns="shop"), "shop"),
        (at(START).drop(columns="event_timestamp"), "timestamps"),
        (at(START).drop(columns="price"), "price"),
        (at(START, item="one"), "item"),
        (at(START).assign(event_timestamp=pd.Series([pd.NaT], dtype="datetime64[ms, UTC]")), "no event_timestamp"),
    ],
)
def test_what_can_not_be_joined_is_one_clear_error(
    stored: PenstockOfflineStoreConfig, frame: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        historical_features(use_case, stored, frame)


def test_a_listed_file_that_is_gone_is_one_clear_error(stored: PenstockOfflineStoreConfig) -> None:
    next(Path(stored.state_url).glob("toy/featurizer/0/all_orders/*.parquet")).unlink()
    with pytest.raises(StateError, match="all_orders"):
        historical_features(use_case, stored, at(START))


def test_variables_that_are_not_set_are_named() -> None:
    config = PenstockOfflineStoreConfig(
        state_url="${PENSTOCK_STATE_URL}", kafka_bootstrap="${PENSTOCK_KAFKA_BOOTSTRAP}"
    )
    with pytest.raises(ConfigError, match="penstock up --env"):
        historical_features(use_case, config, at(START))


def feast_of(path: Path, offline: dict[str, Any], objects: list[Any]) -> FeatureStore:
    path.mkdir()
    feast = FeatureStore(
        config=RepoConfig(
            project="penstock",
            provider="local",
            registry=str(path / "registry.db"),
            online_store=None,
            offline_store=offline,
            entity_key_serialization_version=3,
        )
    )
    feast.apply(objects)
    return feast


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("full_names", [False, True])
def test_a_feast_user_gets_a_feature_service_with_on_demand_features(tmp_path: Path, full_names: bool) -> None:
    """Feast's own FeatureStore, registry and interface; its on-demand views get one row at a time."""
    config, _ = played(tmp_path, 5)
    objects = [entity("shop"), entity("item", int), all_orders, shop_item, dearness, use_case.service]
    offline = {"type": NAME, "state_url": config.state_url, "broker": config.broker}
    feast = feast_of(tmp_path / "feast", offline, objects)
    frame = asked(random.Random(5), 50)
    expected = historical_features(use_case, config, frame)
    job = feast.get_historical_features(frame, feast.get_feature_service("toy_v1"), full_feature_names=full_names)
    found = job.to_df()
    if full_names:
        found.columns = [name.rpartition("__")[2] for name in found.columns]
    pd.testing.assert_frame_equal(found[expected.columns], expected)
    some = feast.get_historical_features(frame, ["shop_item:si_count", "dearness:hour"]).to_df()
    assert {"si_count", "hour"} <= set(some.columns) and "price_ratio" not in some.columns
    with pytest.raises(InputError, match="SQL"):
        feast.get_historical_features("SELECT 1", ["shop_item:si_count"])


@pytest.mark.filterwarnings("ignore")
def test_where_feasts_own_store_is_right_ours_equals_it(tmp_path: Path) -> None:
    """It knows no empty window: a key without a row is null there."""
    config, _ = played(tmp_path, 6)
    fields = {"si_count": Int64, "si_sum": Float64, "si_last": Float64, "si_who": String}
    source = FileSource(path=f"{tmp_path}/toy/featurizer/0/shop_item/*.parquet", timestamp_field="event_timestamp")
    keys = [entity("shop"), entity("item", int)]
    view = FeatureView(
        name="shop_item",
        entities=keys,
        schema=[Field(name=n, dtype=t) for n, t in (fields | {"shop": String, "item": Int64}).items()],
        source=source,
        ttl=timedelta(hours=2),
    )
    feast = feast_of(tmp_path / "feast", {"type": "duckdb"}, [*keys, view])
    frame = asked(random.Random(6), 120).dropna().drop_duplicates(["event_timestamp", "shop", "item"])
    theirs = feast.get_historical_features(frame.copy(), [f"shop_item:{n}" for n in fields]).to_df()
    ours = historical_features(use_case, config, frame)
    by = ["event_time", "shop", "item"]
    theirs, ours = (f.sort_values(by).reset_index(drop=True)[list(fields)] for f in (theirs, ours))
    present = theirs.si_count.notna()
    assert 20 < present.sum() < len(frame)
    pd.testing.assert_frame_equal(theirs[present], ours[present], check_dtype=False)
    assert (ours[~present].si_count == 0).all()


def test_the_class_is_the_one_that_feature_store_yaml_names() -> None:
    yaml = (Path(__file__).parents[2] / "features/feature_store.yaml").read_text()
    assert f"type: {NAME}\n" in yaml
