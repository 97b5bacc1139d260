"""Rows in Redis as Feast's `RedisOnlineStore` lays them: a hash per entity key, a field per feature.

Feast's functions make keys and field names. A write is one pipeline for all views, whose script compares and stores on
the server: one round trip, and a paused former owner that wakes up can't overwrite newer rows. Time stamps keep
milliseconds (Feast stores and compares nanoseconds).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from feast import RepoConfig
from feast.infra.online_stores.helpers import _mmh3, _redis_key, _redis_key_prefix
from feast.infra.online_stores.redis import RedisOnlineStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp
from numpy.typing import NDArray
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from features.errors import UnavailableError
from features.vectors import StoredRow
from pipelines.feature_store import Group, View, plain, proto, unproto
from pipelines.step import Rows

CHUNK = 500  # rows a script call: Redis serves nobody else meanwhile, some 2 ms
DOUBLE_TAG = b"\x29"  # protobuf: field 5 of Value (double_val), wire type 1: eight bytes, little endian
_length, _unpack = struct.Struct("<I").pack, struct.Struct("<d").unpack_from
NULL = _length(0)

# ARGV: count of fields, rows, the fields (the view's time last). A row: its time as a double, then, each behind its
# length, the key and the fields' values.
WRITE = """
local count, rows, time_field = tonumber(ARGV[1]), ARGV[2], ARGV[#ARGV]
local call, byte, unpack_row, at = redis.call, string.byte, struct.unpack, 1
local format, command = '<d' .. string.rep('I4c0', count + 1), {}
for i = 1, count do command[2 * i] = ARGV[i + 2] end
local function milliseconds(timestamp)
  local numbers, number, place = {[8] = 0, [16] = 0}, 0, 1
  local field = byte(timestamp, 1)
  local i = 2
  while i <= #timestamp do
    local b = byte(timestamp, i)
    number = number + b % 128 * place
    place = place * 128
    if b < 128 then
      numbers[field], number, place, field = number, 0, 1, byte(timestamp, i + 1)
      i = i + 1
    end
    i = i + 1
  end
  return numbers[8] * 1000 + numbers[16] / 1000000
end
while at <= #rows do
  local row = {unpack_row(format, rows, at)}
  local before = call('HGET', row[2], time_field)
  if not before or row[1] > milliseconds(before) then
    command[1] = row[2]
    for i = 1, count do command[2 * i + 1] = row[i + 2] end
    call('HSET', unpack(command))
  end
  at = row[count + 3]
end
"""
MARKS = "penstock:marks"
# KEYS: the hash; ARGV: the time that was read, the view's fields, its time last.
FORGET = """
if redis.call('HGET', KEYS[1], ARGV[#ARGV]) ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[1], unpack(ARGV, 2))
return 1
"""


class _Layout(NamedTuple):
    """Where a view lies in a hash; the last of `fields` is its time."""

    fields: tuple[bytes, ...]
    decoders: tuple[Callable[[bytes], Any], ...]


class RedisBackend:
    """One Redis server; a caller hears at once when it is away, and knows better what to do than a retry loop."""

    def __init__(self, config: RepoConfig, groups: Sequence[Group], timeout_s: float) -> None:
        self._config, self._groups = config, groups
        self._layouts = {view.name: _layout(view) for group in groups for view in group.views}
        self._fields = {
            group.keys: [f for view in group.views for f in self._layouts[view.name].fields] for group in groups
        }
        self._redis: Any = _connect(config, timeout_s)  # its stubs know no keys of bytes

    def key(self, entity: EntityKey) -> bytes:
        return bytes(_redis_key(self._config.project, entity, self._config.entity_key_serialization_version))

    def write(self, rows: Sequence[tuple[View, list[bytes | None], Rows]]) -> None:
        with self._answering(), self._redis.pipeline(transaction=False) as pipe:
            for view, keys, batch in rows:
                fields = self._layouts[view.name].fields
                for packed in _packed(view, keys, batch):
                    pipe.eval(WRITE, 0, len(fields), packed, *fields)
            pipe.execute()

    def read(self, keys: Sequence[tuple[bytes, Group]]) -> list[dict[str, StoredRow]]:
        with self._answering(), self._redis.pipeline(transaction=False) as pipe:
            for key, group in keys:
                pipe.hmget(key, self._fields[group.keys])
            replies = pipe.execute()
        return [self._decoded(group, values) for (_, group), values in zip(keys, replies, strict=True)]

    def _decoded(self, group: Group, values: Sequence[bytes | None]) -> dict[str, StoredRow]:
        rows: dict[str, StoredRow] = {}
        start = 0
        for view in group.views:
            end = start + len(view.columns)
            rows[view.name] = self._row(view, values[start:end], values[end])
            start = end + 1
        return rows

    def _row(self, view: View, values: Sequence[bytes | None], time: bytes | None) -> StoredRow:
        if time is None:
            return None, None
        decoders = self._layouts[view.name].decoders
        row = {
            name: decode(raw) if raw else empty if raw is None else None
            for name, decode, raw, empty in zip(view.columns, decoders, values, view.empty, strict=True)
        }
        at = Timestamp.FromString(time)
        return row, int(at.seconds * 1000 + at.nanos // 1_000_000)

    def forget(self, before: int) -> int:
        with self._answering():
            return sum(self._forget(group, keys, before) for group in self._groups for keys in self._keys(group))

    def _keys(self, group: Group) -> Iterator[list[bytes]]:
        """The stored keys of a group, in batches; of none for global views."""
        if not group.keys:
            return
        prefix = re.sub(rb"([*?\[\]\\])", rb"\\\1", _redis_key_prefix(list(group.keys)))
        cursor = -1
        while cursor:
            pattern = prefix + b"*" + self._config.project.encode()
            cursor, keys = self._redis.scan(max(cursor, 0), match=pattern, count=1000)
            yield keys

    def _forget(self, group: Group, keys: Sequence[bytes], before: int) -> int:
        with self._redis.pipeline(transaction=False) as pipe:
            for key, rows in zip(keys, self.read([(key, group) for key in keys]), strict=True):
                for view in group.views:
                    row, time = rows[view.name]
                    if row is not None and time is not None and time < before and tuple(row.values()) == view.empty:
                        pipe.eval(FORGET, 1, key, _stamps(np.array([time]))[0][4:], *self._layouts[view.name].fields)
            return sum(pipe.execute())

    def knows(self, mark: str) -> bool:
        with self._answering():
            return bool(self._redis.sismember(MARKS, mark))

    def note(self, mark: str) -> None:
        with self._answering():
            self._redis.sadd(MARKS, mark)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except RedisError as error:
            raise UnavailableError(f"the online store does not answer: {error}") from None

    def close(self) -> None:
        self._redis.close()


def _connect(config: RepoConfig, timeout_s: float) -> Redis:
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


def _layout(view: View) -> _Layout:
    fields = (*(_mmh3(f"{view.name}:{column}") for column in view.columns), f"_ts:{view.name}".encode())
    return _Layout(fields, tuple(_decoder(dtype) for dtype in view.types))


def _packed(view: View, keys: Sequence[bytes | None], batch: Rows) -> Iterator[bytes]:
    """The rows of a batch that have a key as the script reads them, CHUNK at a time."""
    times = np.asarray(batch.times, np.int64)
    cells: list[Iterable[bytes]] = [
        times.astype("<f8").view("V8").tolist(),
        [b"" if key is None else _behind_length(key) for key in keys],
        *(_encoded(dtype, batch.columns[name]) for name, dtype in zip(view.columns, view.types, strict=True)),
        _stamps(times),
    ]
    rows = [row for row in zip(*cells, strict=True) if row[1]]
    for i in range(0, len(rows), CHUNK):
        yield b"".join(chain.from_iterable(rows[i : i + CHUNK]))


def _encoded(dtype: str, column: Any) -> list[bytes]:
    """Each value as protobuf bytes behind their length."""
    if dtype == "DOUBLE":
        return _doubles(np.asarray(column, "<f8"))
    values = plain(column)
    if dtype.endswith("_LIST"):
        return [_value(dtype, value) for value in values]
    known = {value: _value(dtype, value) for value in set(values)}
    return [known[value] for value in values]


def _doubles(values: NDArray[np.float64]) -> list[bytes]:
    """[n] numbers, NaN for null; packed here because most features are of this type."""
    head = np.frombuffer(_behind_length(DOUBLE_TAG + bytes(8))[:5], np.uint8)
    cells = np.empty((len(values), 13), np.uint8)
    cells[:, :5] = head
    cells[:, 5:] = np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8)
    encoded: list[bytes] = cells.view("V13").ravel().tolist()
    for i in np.flatnonzero(np.isnan(values)).tolist():
        encoded[i] = NULL
    return encoded


def _value(dtype: str, value: Any) -> bytes:
    return _behind_length(proto(dtype, value).SerializeToString())


def _behind_length(data: bytes) -> bytes:
    return _length(len(data)) + data


def _decoder(dtype: str) -> Callable[[bytes], Any]:
    def double(raw: bytes) -> float:
        packed = len(raw) == 9 and raw[:1] == DOUBLE_TAG
        return float(_unpack(raw, 1)[0] if packed else Value.FromString(raw).double_val)

    if dtype == "DOUBLE":
        return double
    if dtype.endswith("_LIST"):
        return lambda raw: unproto(dtype, Value.FromString(raw))
    return lru_cache(maxsize=65_536)(lambda raw: unproto(dtype, Value.FromString(raw)))


def _stamps(times: NDArray[np.int64]) -> list[bytes]:
    """[n] epoch ms as protobuf timestamps behind their length, in varints of a fixed width."""
    cells = np.empty((len(times), 16), np.uint8)
    cells[:, :4] = 12, 0, 0, 0
    for tag, first, number in ((8, 4, times // 1000), (16, 10, times % 1000 * 1_000_000)):
        cells[:, first] = tag
        cells[:, first + 1 : first + 6] = (number[:, None] >> np.arange(0, 35, 7)) & 127 | (128, 128, 128, 128, 0)
    stamps: list[bytes] = cells.view("V16").ravel().tolist()
    return stamps
