"""What every online store does; the Redis one is also read and written by Feast itself."""

from __future__ import annotations

import socket
import sqlite3
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis import Redis

from features.errors import UnavailableError
from features.vectors import empty_row
from features.views import entity
from pipelines.feature_store import FeatureStore, repo_config
from pipelines.memory_store import MemoryStore
from pipelines.step import Rows
from tests.redis_server import free_port, redis_server
from tests.toy import all_orders, dearness, shop_item, use_case

T = 1_767_225_600_123


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    with redis_server() as address:
        yield address


FEAST = ("sqlite", pytest.param("redis", marks=pytest.mark.integration))


@pytest.fixture(params=["memory", *FEAST])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "memory":
        yield MemoryStore(use_case)
    else:
        yield from opened(request, tmp_path)


@pytest.fixture(params=FEAST)
def feast_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    yield from opened(request, tmp_path)


@pytest.fixture
def feast_only(redis: str) -> Iterator[Any]:
    flush(redis)
    store = FeatureStore(use_case, repo_config(redis))
    yield store
    store.close()


def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    address = f"sqlite:{tmp_path}/online.db"
    if request.param == "redis":
        address = request.getfixturevalue("redis")
        flush(address)
    store = FeatureStore(use_case, repo_config(address))
    yield store
    store.close()


def flush(redis: str) -> None:
    host, port = redis.split(":")
    with Redis(host=host, port=int(port)) as client:
        client.flushdb()


def orders(times: list[int], counts: list[int], means: list[float | None]) -> Rows:
    return Rows("all_orders", [], times, {"all_count": counts, "all_mean": means})


def item(key: tuple[Any, ...], time: int, **values: Any) -> Rows:
    row = {**empty_row(shop_item), **values}
    return Rows("shop_item", [[k] for k in key], [time], {name: [value] for name, value in row.items()})


def test_a_key_without_a_row_reads_as_nothing(store: Any) -> None:
    assert store.read([{"shop": "a", "item": 1}]) == [{"all_orders": (None, None), "shop_item": (None, None)}]
    assert store.read([]) == []


def test_every_type_comes_back_as_it_was_written(store: Any) -> None:
    row = {
        "si_count": -(2**62),
        "si_sum": -0.1,
        "si_last": None,
        "si_last_3": [1.5, -2.0],
        "si_who": "",
        "si_whos": ["ä", ""],
    }
    store.write([item(("a", 1), T, **row), orders([T], [0], [0.0])])
    read = store.read([{"shop": "a", "item": 1}])[0]
    assert read == {"shop_item": (row, T), "all_orders": ({"all_count": 0, "all_mean": 0.0}, T)}
    assert {n: type(v) for n, v in read["shop_item"][0].items()} == {n: type(v) for n, v in row.items()}


def test_an_integer_in_a_float_column_comes_back_as_a_float(store: Any) -> None:
    store.write([orders([T], [1], [3])])
    assert repr(store.read([{"shop": "a", "item": 1}])[0]["all_orders"][0]["all_mean"]) == "3.0"


def test_empty_lists_are_not_null(store: Any) -> None:
    store.write([item(("a", 1), T, si_last_3=[])])
    assert store.read([{"shop": "a", "item": 1}])[0]["shop_item"][0]["si_last_3"] == []


def test_many_requests_are_answered_in_order(store: Any) -> None:
    store.write([item(("a", i), T + i, si_count=i) for i in range(20)])
    read = store.read([{"shop": "a", "item": i} for i in (7, 3, 7, 99)])
    assert [r["shop_item"][1] for r in read] == [T + 7, T + 3, T + 7, None]


def test_the_newer_row_wins_to_the_millisecond_whatever_the_order(store: Any) -> None:
    asked = [{"shop": "a", "item": 1}]
    store.write([orders([T, T + 1], [1, 2], [None, None])])
    assert store.read(asked)[0]["all_orders"] == ({"all_count": 2, "all_mean": None}, T + 1)
    store.write([orders([T + 1], [3], [None])])
    store.write([orders([T], [4], [None])])
    assert store.read(asked)[0]["all_orders"][0]["all_count"] == 2
    store.write([orders([T + 2], [5], [None]), orders([T - 5], [6], [None])])
    assert store.read(asked)[0]["all_orders"] == ({"all_count": 5, "all_mean": None}, T + 2)


def test_key_values_keep_their_type_and_their_place(store: Any) -> None:
    store.write([item(("1", 2), T)])
    read = store.read([{"shop": "1", "item": 2}, {"shop": "2", "item": 1}, {"shop": "1", "item": "2"}])
    assert [r["shop_item"][1] for r in read] == [T, None, None]


def test_a_null_in_a_key_belongs_to_no_entity(store: Any) -> None:
    store.write([item((None, 1), T)])
    assert (
        store.read([{"shop": None, "item": 1}, {"item": 1}])
        == [{"all_orders": (None, None), "shop_item": (None, None)}] * 2
    )


def test_columns_may_be_arrays_with_nan_for_null(feast_store: Any) -> None:
    feast_store.write(
        [Rows("all_orders", [], np.array([T]), {"all_count": np.array([2]), "all_mean": np.array([np.nan])})]  # type: ignore[arg-type, dict-item]
    )
    words, lists = np.empty(2, object), np.empty(2, object)
    words[:], lists[:] = ["x", None], [[1.5], []]
    empty = empty_row(shop_item)
    columns = {name: [value] * 2 for name, value in empty.items()}
    columns |= {"si_count": np.array([1, 2]), "si_sum": np.array([0.5, -0.0]), "si_last": np.array([2.0, np.nan])}
    columns |= {"si_who": words, "si_last_3": lists}
    feast_store.write([Rows("shop_item", [["a", "a"], [1, 2]], np.array([T, T + 1]), columns)])  # type: ignore[arg-type]
    first, second = feast_store.read([{"shop": "a", "item": i} for i in (1, 2)])
    assert first["all_orders"] == ({"all_count": 2, "all_mean": None}, T)
    row = {"si_count": 1, "si_sum": 0.5, "si_last": 2.0, "si_last_3": [1.5], "si_who": "x"}
    assert first["shop_item"] == (empty | row, T)
    assert second["shop_item"] == (empty | {"si_count": 2, "si_sum": 0.0, "si_last": None}, T + 1)


@pytest.mark.parametrize("time", [T - T % 1000, 1, 127, 128_000, 4_000_000_000_999])
def test_times_come_back_to_the_millisecond(feast_store: Any, time: int) -> None:
    """And order what came before them."""
    asked = [{"shop": "a", "item": 1}]
    feast_store.write([orders([time], [1], [None])])
    feast_store.write([orders([time - 1], [2], [None])])
    assert feast_store.read(asked)[0]["all_orders"] == ({"all_count": 1, "all_mean": None}, time)
    feast_store.write([orders([time + 1], [3], [None])])
    assert feast_store.read(asked)[0]["all_orders"][1] == time + 1


def test_many_rows_of_one_call_are_all_written(feast_store: Any) -> None:
    """More than one script call and one query take."""
    n = 1203
    rows = [item(("a", i), T + i, si_count=i) for i in range(n)]
    columns = {name: [r.columns[name][0] for r in rows] for name in rows[0].columns}
    feast_store.write(
        [
            Rows(
                "shop_item",
                [["a"] * n + [None], [*range(n), 1]],
                [T] * (n + 1),
                {k: [*c, c[0]] for k, c in columns.items()},
            )
        ]
    )
    read = feast_store.read([{"shop": "a", "item": i} for i in range(n)])
    assert [r["shop_item"][0]["si_count"] for r in read] == list(range(n))


def test_rows_that_are_long_the_empty_window_are_forgotten(feast_store: Any) -> None:
    """The others stay: a newer empty row, one with a value, a global view's."""
    feast_store.write(
        [item(("a", 1), T), item(("a", 2), T + 9_000), item(("a", 3), T, si_who="x"), orders([T], [0], [None])]
    )
    assert feast_store.forget(before=T + 5_000) == 1
    read = feast_store.read([{"shop": "a", "item": i} for i in (1, 2, 3)])
    assert [r["shop_item"][1] for r in read] == [None, T + 9_000, T]
    assert read[0]["all_orders"][1] == T
    assert feast_store.forget(before=T + 5_000) == 0


@pytest.mark.integration
def test_an_empty_row_that_has_changed_since_it_was_read_is_not_forgotten(feast_only: Any) -> None:
    backend = feast_only._backend
    feast_only.write([item(("a", 1), T)])
    stale = backend.read
    backend.read = lambda keys: [stale(keys), feast_only.write([item(("a", 1), T + 1, si_count=1)])][0]
    assert feast_only.forget(before=T + 5_000) == 0
    backend.read = stale
    assert feast_only.read([{"shop": "a", "item": 1}])[0]["shop_item"][1] == T + 1


def test_a_sqlite_file_that_is_locked_is_one_clear_error(tmp_path: Path) -> None:
    store = FeatureStore(use_case, repo_config(f"sqlite:{tmp_path}/online.db"), timeout_s=0.05)
    with sqlite3.connect(tmp_path / "online.db") as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UnavailableError, match="online store"):
            store.write([orders([T], [1], [None])])
        other.rollback()
    other.close()
    store.write([orders([T], [1], [None])])
    assert store.read([{"shop": "a", "item": 1}])[0]["all_orders"][1] == T
    store.close()


@pytest.mark.integration
def test_feast_reads_what_we_write(feast_only: Any, redis: str) -> None:
    from feast.infra.online_stores.redis import RedisOnlineStore

    feast_only.write([item(("a", 1), T, si_count=3, si_last=None, si_last_3=[1.0]), orders([T], [2], [0.5])])
    keys, _ = feast_keys()
    time, row = RedisOnlineStore().online_read(repo_config(redis), shop_item, [keys])[0]
    assert round(time.timestamp() * 1000) == T
    assert (row["si_count"].int64_val, row["si_last"].WhichOneof("val")) == (3, None)
    assert list(row["si_last_3"].double_list_val.val) == [1.0]
    _, everything = feast_keys()
    time, row = RedisOnlineStore().online_read(repo_config(redis), all_orders, [everything])[0]
    assert (row["all_count"].int64_val, row["all_mean"].double_val) == (2, 0.5)


@pytest.mark.integration
def test_we_read_what_feast_writes(feast_only: Any, redis: str) -> None:
    from feast.infra.online_stores.redis import RedisOnlineStore
    from feast.protos.feast.types.Value_pb2 import DoubleList, Value

    key, everything = feast_keys()
    at = datetime.fromtimestamp(T / 1000, UTC)
    row = {
        "si_count": Value(int64_val=3),
        "si_last": Value(),
        "si_last_3": Value(double_list_val=DoubleList(val=[1.5])),
    }
    row |= {"si_sum": Value(double_val=2.5), "si_who": Value(string_val="x")}
    store = RedisOnlineStore()
    store.online_write_batch(repo_config(redis), shop_item, [(key, row, at, None)], None)
    store.online_write_batch(
        repo_config(redis), all_orders, [(everything, {"all_count": Value(int64_val=1)}, at, None)], None
    )
    read = feast_only.read([{"shop": "a", "item": 1}])[0]
    expected = {"si_count": 3, "si_sum": 2.5, "si_last": None, "si_last_3": [1.5], "si_who": "x", "si_whos": []}
    assert read["shop_item"] == (expected, T)
    assert read["all_orders"] == ({"all_count": 1, "all_mean": None}, T)
    feast_only.write([item(("a", 1), T, si_count=9)])
    assert feast_only.read([{"shop": "a", "item": 1}])[0]["shop_item"][0]["si_count"] == 3


def test_a_mark_stays(store: Any) -> None:
    assert not store.knows("toy.featurizer.0")
    store.note("toy.featurizer.0")
    store.note("toy.featurizer.0")
    assert store.knows("toy.featurizer.0") and not store.knows("toy.featurizer.1")


@pytest.mark.integration
def test_a_mark_goes_with_the_rows(feast_only: Any, redis: str) -> None:
    feast_only.note("toy.featurizer.0")
    flush(redis)
    assert not feast_only.knows("toy.featurizer.0")


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_a_feast_user_gets_our_rows_as_online_features(feast_only: Any, redis: str, tmp_path: Path) -> None:
    """Feast's own FeatureStore, with its own registry, entities and on-demand transformation."""
    from feast import FeatureStore as Feast

    feast_only.write([item(("a", 1), T, si_count=3), orders([T], [2], [0.5])])
    feast = Feast(config=repo_config(redis, str(tmp_path / "registry.db")))
    feast.apply([entity("shop"), entity("item", int), all_orders, shop_item, dearness])
    names = ["shop_item:si_count", "all_orders:all_mean", "dearness:price_ratio"]
    asked = [{"shop": "a", "item": 1, "price": 2.0, "event_time": T}]
    row = feast.get_online_features(features=names, entity_rows=asked).to_dict()
    assert (row["si_count"], row["all_mean"], row["price_ratio"]) == ([3], [0.5], [4.0])


@pytest.mark.integration
def test_redis_away_is_one_clear_error() -> None:
    store = FeatureStore(use_case, repo_config(f"127.0.0.1:{free_port()}"), timeout_s=0.2)
    with pytest.raises(UnavailableError, match="online store"):
        store.read([{"shop": "a", "item": 1}])
    with pytest.raises(UnavailableError, match="online store"):
        store.write([orders([T], [1], [None])])


@pytest.mark.integration
def test_redis_that_hangs_is_given_up_after_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = FeatureStore(use_case, repo_config(f"127.0.0.1:{silent.getsockname()[1]}"), timeout_s=0.1)
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="online store"):
            store.read([{"shop": "a", "item": 1}])
        assert time.monotonic() - began < 1
        store.close()


def feast_keys() -> tuple[Any, Any]:
    """Keys of ("a", 1) and of the global view as Feast makes them."""
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    return (
        EntityKey(join_keys=["shop", "item"], entity_values=[Value(string_val="a"), Value(int64_val=1)]),
        EntityKey(join_keys=["__dummy_id"], entity_values=[Value(string_val="")]),
    )
