"""Feast's online store: the only place where rows go to it and come from it.

Rows lie in Redis exactly as Feast's own `RedisOnlineStore` lays them (keys, field names, values), so any Feast
client reads them; Feast's functions make keys and field names. Two things differ in how they travel: a call is one
pipeline for all views instead of two round trips a view, and the values of the two common types are packed without
a protobuf object. Time stamps keep milliseconds (Feast stores and compares nanoseconds).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from feast import RepoConfig
from feast.infra.online_stores.helpers import _mmh3, _redis_key
from feast.infra.online_stores.redis import RedisOnlineStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from features.errors import ConfigError, InputError, UnavailableError
from features.usecase import UseCase
from features.vectors import StoredRow, empty_row, join_keys, view_columns
from pipelines.step import Rows

PROJECT = "penstock"
FIELDS = {
    "INT64": "int64_val",
    "DOUBLE": "double_val",
    "STRING": "string_val",
    "INT64_LIST": "int64_list_val",
    "DOUBLE_LIST": "double_list_val",
    "STRING_LIST": "string_list_val",
}
DOUBLE_TAG = b"\x29"  # protobuf: field 5 of Value (double_val), wire type 1: eight bytes, little endian
_pack, _unpack = struct.Struct("<d").pack, struct.Struct("<d").unpack_from

Encoder = Callable[[Any], bytes]
Decoder = Callable[[bytes], Any]


def repo_config(redis: str, registry: str = "none") -> RepoConfig:
    """Feast's configuration of the online store at `redis` (`host:port,password=...`).

    The registry is never read: views are passed as objects, so no code stored elsewhere runs.
    """
    return RepoConfig(
        project=PROJECT,
        provider="local",
        registry=registry,
        online_store={"type": "redis", "connection_string": redis},
        entity_key_serialization_version=3,
    )


class _View(NamedTuple):
    """A view as the store needs it; `fields` are the Redis hash fields of its features, then of its time."""

    name: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    fields: tuple[bytes, ...]
    encoders: tuple[Encoder, ...]
    decoders: tuple[Decoder, ...]
    empty: tuple[Any, ...]


class FeatureStore:
    """The rows of one use case in Feast's online store.

    timeout_s : how long one call may wait for Redis; past it, or when Redis is away, UnavailableError
    """

    def __init__(self, use_case: UseCase, config: RepoConfig, *, timeout_s: float = 5.0) -> None:
        self._config = config
        self._views = {view.name: _compile(view) for view in use_case.views}
        by_keys: dict[tuple[str, ...], list[_View]] = {}
        for view in self._views.values():
            by_keys.setdefault(view.keys, []).append(view)
        self._groups = [(keys, views, [f for v in views for f in v.fields]) for keys, views in by_keys.items()]
        self._redis_key = lru_cache(maxsize=65_536, typed=True)(self._make_redis_key)
        self._redis: Any = _connect(config, timeout_s)  # its stubs know no keys of bytes

    def write(self, rows: Sequence[Rows]) -> None:
        """Write rows and wait for the acknowledgement.

        A row not newer than the stored one is dropped, and one whose key has a null belongs to no entity.

        Raises
        ------
        UnavailableError : Redis does not answer; some rows may be written, and writing all again is right
        """
        newest = self._newest(rows)
        try:
            stored = self._stored_times([(key, view) for key, view in newest])
            with self._redis.pipeline(transaction=False) as pipe:
                for ((key, _), (time, mapping)), before in zip(newest.items(), stored, strict=True):
                    if before is None or time > before:
                        pipe.hset(key, mapping=mapping)
                pipe.execute()
        except RedisError as error:
            raise UnavailableError(f"the online store does not take rows: {error}") from None

    def _newest(self, rows: Sequence[Rows]) -> dict[tuple[bytes, bytes], tuple[int, dict[bytes, bytes]]]:
        """(Redis key, time field) -> (time, hash) of the newest row that a key has among `rows`."""
        newest: dict[tuple[bytes, bytes], tuple[int, dict[bytes, bytes]]] = {}
        for batch in rows:
            view = self._views[batch.view]
            *fields, time_field = view.fields
            columns = [batch.columns[name] for name in view.columns]
            for i, (values, time) in enumerate(zip(batch.keys, batch.times, strict=True)):
                if None in values:
                    continue
                key = self._redis_key(view.keys, values)
                if newest.get((key, time_field), (-1,))[0] >= time:
                    continue
                mapping = {
                    f: b"" if (value := column[i]) is None else encode(value)
                    for f, column, encode in zip(fields, columns, view.encoders, strict=True)
                }
                mapping[time_field] = _time_bytes(time)
                newest[key, time_field] = (time, mapping)
        return newest

    def _stored_times(self, places: Sequence[tuple[bytes, bytes]]) -> Iterator[int | None]:
        with self._redis.pipeline(transaction=False) as pipe:
            for key, time_field in places:
                pipe.hget(key, time_field)
            return (_time_of(raw) for raw in pipe.execute())

    def read(self, keys: Sequence[Mapping[str, Any]]) -> list[dict[str, StoredRow]]:
        """For each dict of entity keys: view name -> (row, epoch ms from which it holds), or (None, None).

        A view whose key is null in the request has no row. Each stored hash is read once, however many of the
        requests and views share it.
        """
        wanted: dict[tuple[bytes, int], dict[str, StoredRow]] = {}
        plan: list[list[tuple[bytes, int] | None]] = []
        for entity in keys:
            places: list[tuple[bytes, int] | None] = []
            for g, (names, _, _) in enumerate(self._groups):
                values = tuple(entity.get(name) for name in names)
                place = None if None in values else (self._redis_key(names, values), g)
                if place:
                    wanted.setdefault(place, {})
                places.append(place)
            plan.append(places)
        self._fetch(wanted)
        nothing = [{v.name: (None, None) for v in views} for _, views, _ in self._groups]
        result: list[dict[str, StoredRow]] = []
        for places in plan:
            merged: dict[str, StoredRow] = {}
            for g, place in enumerate(places):
                merged.update(nothing[g] if place is None else wanted[place])
            result.append(merged)
        return result

    def _fetch(self, wanted: dict[tuple[bytes, int], dict[str, StoredRow]]) -> None:
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                for key, g in wanted:
                    pipe.hmget(key, self._groups[g][2])
                replies = pipe.execute()
        except RedisError as error:
            raise UnavailableError(f"the online store does not answer: {error}") from None
        for ((_, g), rows), values in zip(wanted.items(), replies, strict=True):
            start = 0
            for view in self._groups[g][1]:
                end = start + len(view.columns)
                rows[view.name] = _decode(view, values[start:end], values[end])
                start = end + 1

    def _make_redis_key(self, names: tuple[str, ...], values: tuple[Any, ...]) -> bytes:
        """Feast's key of an entity: types by value, a global view by its dummy entity."""
        pairs = list(zip(names, values, strict=True)) or [("__dummy_id", "")]
        key = EntityKey(join_keys=[n for n, _ in pairs], entity_values=[_entity_value(n, v) for n, v in pairs])
        return bytes(_redis_key(PROJECT, key, self._config.entity_key_serialization_version))

    def close(self) -> None:
        self._redis.close()


def _connect(config: RepoConfig, timeout_s: float) -> Redis:
    """A client of the configured server that fails at once: the caller knows better what to do than a retry loop."""
    nodes, options = RedisOnlineStore._parse_connection_string(config.online_store.connection_string)
    if "password" in options:
        options["password"] = str(options["password"])
    return Redis(
        host=nodes[0]["host"],
        port=int(nodes[0]["port"]),
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 1),
        **options,
    )


def _compile(view: Any) -> _View:
    columns = view_columns(view)
    if unknown := [f"{c.name} ({c.dtype})" for c in columns if c.dtype not in FIELDS]:
        raise ConfigError(f"view {view.name}: no such feature types here: {unknown}; use Int64, Float64, String, Array")
    return _View(
        view.name,
        join_keys(view),
        tuple(c.name for c in columns),
        (*(_mmh3(f"{view.name}:{c.name}") for c in columns), f"_ts:{view.name}".encode()),
        tuple(_encoder(c.dtype) for c in columns),
        tuple(_decoder(c.dtype) for c in columns),
        tuple(empty_row(view).values()),
    )


def _decode(view: _View, values: Sequence[bytes | None], time: bytes | None) -> StoredRow:
    if time is None:
        return None, None
    row = {
        name: decode(raw) if raw else empty if raw is None else None
        for name, decode, raw, empty in zip(view.columns, view.decoders, values, view.empty, strict=True)
    }
    return row, _time_of(time)


def _entity_value(name: str, value: Any) -> Value:
    if isinstance(value, str):
        return Value(string_val=value)
    if isinstance(value, bool | float):
        raise InputError(f"entity key {name}: expected a string or an integer, got {value!r}")
    return Value(int64_val=value)


def _encoder(dtype: str) -> Encoder:
    if dtype == "DOUBLE":
        return lambda value: DOUBLE_TAG + _pack(value)
    make: Any = Value
    name = FIELDS[dtype]
    if dtype.endswith("_LIST"):
        return lambda value: bytes(make(**{name: {"val": value}}).SerializeToString())
    return lru_cache(maxsize=65_536)(lambda value: bytes(make(**{name: value}).SerializeToString()))


def _decoder(dtype: str) -> Decoder:
    name = FIELDS[dtype]

    def double(raw: bytes) -> float:
        packed = len(raw) == 9 and raw[:1] == DOUBLE_TAG
        return float(_unpack(raw, 1)[0] if packed else Value.FromString(raw).double_val)

    if dtype == "DOUBLE":
        return double
    if dtype.endswith("_LIST"):
        return lambda raw: list(getattr(Value.FromString(raw), name).val)
    return lru_cache(maxsize=65_536)(lambda raw: getattr(Value.FromString(raw), name))


def _time_bytes(time: int) -> bytes:
    return bytes(Timestamp(seconds=time // 1000, nanos=time % 1000 * 1_000_000).SerializeToString())


def _time_of(raw: bytes | None) -> int | None:
    if raw is None:
        return None
    at = Timestamp.FromString(raw)
    return int(at.seconds * 1000 + at.nanos // 1_000_000)
