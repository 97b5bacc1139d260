"""Feast's online store: the only place where rows go to it and come from it.

Rows lie in Redis and in sqlite exactly as Feast's own stores lay them, so any Feast client reads them; what differs is
how they travel. An older row never overwrites a newer one, to the millisecond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from feast import RepoConfig
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from features.errors import ConfigError, InputError
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


def repo_config(address: str, registry: str = "none") -> RepoConfig:
    """Feast's configuration of the online store at `address`.

    address : Redis as `host:port,password=...`, or `sqlite:<path>`
    registry : never read by us: views are passed as objects, so no code stored elsewhere runs
    """
    kind, _, path = address.partition(":")
    sqlite = {"type": "sqlite", "path": path}
    return RepoConfig(
        project=PROJECT,
        provider="local",
        registry=registry,
        online_store=sqlite if kind == "sqlite" else {"type": "redis", "connection_string": address},
        entity_key_serialization_version=3,
    )


class View(NamedTuple):
    """A view as a store needs it; `types` and `empty` (the empty window) go with `columns`."""

    name: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    types: tuple[str, ...]
    empty: tuple[Any, ...]
    feast: Any


class Group(NamedTuple):
    """The views with the same entity keys."""

    keys: tuple[str, ...]
    views: tuple[View, ...]


class Backend(Protocol):
    """One kind of online store; `key` is an entity key as it stores it."""

    def key(self, entity: EntityKey) -> bytes: ...

    def write(self, rows: Sequence[tuple[View, list[bytes | None], Rows]]) -> None:
        """Keep each row that is newer than what its key has; a row without a key is left out."""

    def read(self, keys: Sequence[tuple[bytes, Group]]) -> list[dict[str, StoredRow]]: ...

    def forget(self, before: int) -> int: ...

    def knows(self, mark: str) -> bool: ...

    def note(self, mark: str) -> None: ...

    def close(self) -> None: ...


class FeatureStore:
    """The rows of one use case in Feast's online store.

    timeout_s : how long one call may wait for the store; past it, or when it is away, UnavailableError
    """

    def __init__(self, use_case: UseCase, config: RepoConfig, *, timeout_s: float = 5.0) -> None:
        self._views = {view.name: _compile(view) for view in use_case.views}
        by_keys: dict[tuple[str, ...], list[View]] = {}
        for view in self._views.values():
            by_keys.setdefault(view.keys, []).append(view)
        self._groups = [Group(keys, tuple(views)) for keys, views in by_keys.items()]
        self._backend = _backend(config, self._groups, timeout_s)
        self._key = lru_cache(maxsize=65_536, typed=True)(self._make_key)

    def write(self, rows: Sequence[Rows]) -> None:
        """Write rows and wait for the acknowledgement.

        A row not newer than the stored one is dropped, and one whose key has a null belongs to no entity.

        Raises
        ------
        UnavailableError : the store does not answer; some rows may be written, and writing all again is right
        """
        keyed = []
        for batch in rows:
            view = self._views[batch.view]
            keys = [None if None in values else self._key(view.keys, values) for values in batch.entities]
            keyed.append((view, keys, batch))
        self._backend.write(keyed)

    def read(self, keys: Sequence[Mapping[str, Any]]) -> list[dict[str, StoredRow]]:
        """For each dict of entity keys: view name -> (row, epoch ms from which it holds), or (None, None).

        A view whose key is null in the request has no row. What is stored under a key is read once, however many of
        the requests and views share it.
        """
        wanted: dict[tuple[bytes, int], dict[str, StoredRow]] = {}
        plan: list[list[tuple[bytes, int] | None]] = []
        for entity in keys:
            places: list[tuple[bytes, int] | None] = []
            for g, group in enumerate(self._groups):
                values = tuple(entity.get(name) for name in group.keys)
                place = None if None in values else (self._key(group.keys, values), g)
                if place:
                    wanted.setdefault(place, {})
                places.append(place)
            plan.append(places)
        found = dict(zip(wanted, self._backend.read([(key, self._groups[g]) for key, g in wanted]), strict=True))
        nothing: list[dict[str, StoredRow]] = [{v.name: (None, None) for v in group.views} for group in self._groups]
        result: list[dict[str, StoredRow]] = []
        for places in plan:
            merged: dict[str, StoredRow] = {}
            for g, place in enumerate(places):
                merged.update(nothing[g] if place is None else found[place])
            result.append(merged)
        return result

    def forget(self, before: int) -> int:
        """Remove the rows that are the empty window since before `before` (epoch ms); returns how many.

        A key without a row reads as the empty window, so no vector changes. Rows of a global view stay.
        """
        return self._backend.forget(before)

    def knows(self, mark: str) -> bool:
        """Whether a mark that `note` left is still there: an emptied store has lost it. UnavailableError as `write`."""
        return self._backend.knows(mark)

    def note(self, mark: str) -> None:
        """Leave a mark beside the rows."""
        self._backend.note(mark)

    def _make_key(self, names: tuple[str, ...], values: tuple[Any, ...]) -> bytes:
        """Feast's key of an entity: types by value, a global view by its dummy entity."""
        pairs = list(zip(names, values, strict=True)) or [("__dummy_id", "")]
        key = EntityKey(join_keys=[n for n, _ in pairs], entity_values=[_entity_value(n, v) for n, v in pairs])
        return self._backend.key(key)

    def close(self) -> None:
        self._backend.close()


def _backend(config: RepoConfig, groups: Sequence[Group], timeout_s: float) -> Backend:
    if config.online_store.type == "sqlite":
        from pipelines.sqlite_store import SqliteBackend

        return SqliteBackend(config, groups, timeout_s)
    from pipelines.redis_store import RedisBackend

    return RedisBackend(config, groups, timeout_s)


def _compile(view: Any) -> View:
    columns = view_columns(view)
    if unknown := [f"{c.name} ({c.dtype})" for c in columns if c.dtype not in FIELDS]:
        raise ConfigError(f"view {view.name}: no such feature types here: {unknown}; use Int64, Float64, String, Array")
    names, types = tuple(c.name for c in columns), tuple(c.dtype for c in columns)
    return View(view.name, join_keys(view), names, types, tuple(empty_row(view).values()), view)


def plain(column: Any) -> list[Any]:
    """A column (array or list) as a list, null as None."""
    values = column.tolist() if isinstance(column, np.ndarray) else column
    return [None if v != v else v for v in values]


def proto(dtype: str, value: Any) -> Value:
    """A value as Feast's protobuf; null is the empty one."""
    made = Value()
    if value is None:
        return made
    if dtype.endswith("_LIST"):
        getattr(made, FIELDS[dtype]).val.extend(value)
    else:
        setattr(made, FIELDS[dtype], int(value) if dtype == "INT64" else value)
    return made


def unproto(dtype: str, value: Value) -> Any:
    """What `proto` was given."""
    if value.WhichOneof("val") is None:
        return None
    found = getattr(value, FIELDS[dtype])
    return list(found.val) if dtype.endswith("_LIST") else found


def _entity_value(name: str, value: Any) -> Value:
    if isinstance(value, str):
        return Value(string_val=value)
    if isinstance(value, bool | float):
        raise InputError(f"entity key {name}: expected a string or an integer, got {value!r}")
    return Value(int64_val=value)
