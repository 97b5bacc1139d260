"""Rows in a sqlite file through Feast's own `SqliteOnlineStore`: for one machine without a server.

Feast keeps whole seconds there and lets an older row overwrite a newer one. So a row carries its time in ms as one
more value, and reading the stored times and writing are one transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from feast import RepoConfig
from feast.infra.key_encoding_utils import deserialize_entity_key, serialize_entity_key
from feast.infra.online_stores.sqlite import SqliteOnlineStore, _table_id
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from features.errors import UnavailableError
from features.vectors import StoredRow
from pipelines.feature_store import Group, View, plain, proto, unproto
from pipelines.step import Rows

TIME = "_epoch_ms"  # beside the features of a row
BATCH = 500  # keys a query
MARKS = "penstock_marks"


class SqliteBackend:
    """One sqlite file; a writer and readers in other processes wait for each other."""

    def __init__(self, config: RepoConfig, groups: Sequence[Group], timeout_s: float) -> None:
        self._config, self._groups = config, groups
        self._feast = SqliteOnlineStore()
        self._entity = lru_cache(maxsize=65_536)(self._make_entity)
        with self._errors():
            self._db: sqlite3.Connection = self._feast._get_conn(config)
            self._db.execute(f"PRAGMA busy_timeout = {round(timeout_s * 1000)}")
            self._db.execute(f"CREATE TABLE IF NOT EXISTS {MARKS} (mark TEXT PRIMARY KEY)")
            self._feast.update(config, [], [v.feast for group in groups for v in group.views], [], [], partial=True)

    def key(self, entity: EntityKey) -> bytes:
        return bytes(serialize_entity_key(entity, self._config.entity_key_serialization_version))

    def _make_entity(self, key: bytes) -> EntityKey:
        return deserialize_entity_key(key, self._config.entity_key_serialization_version)

    def write(self, rows: Sequence[tuple[View, list[bytes | None], Rows]]) -> None:
        for view, keys, batch in rows:
            with self._transaction():
                self._write(view, keys, batch)

    def _write(self, view: View, keys: Sequence[bytes | None], batch: Rows) -> None:
        known = [key for key in dict.fromkeys(keys) if key]
        stored = {key: time or -1 for key, (_, time) in zip(known, self._rows(view, known), strict=True)}
        columns = [plain(batch.columns[name]) for name in view.columns]
        data: list[Any] = []
        for i, (key, time) in enumerate(zip(keys, plain(batch.times), strict=True)):
            if key and time > stored[key]:
                stored[key] = time
                values = {n: proto(t, c[i]) for n, t, c in zip(view.columns, view.types, columns, strict=True)}
                values[TIME] = Value(int64_val=time)
                data.append((self._entity(key), values, datetime.fromtimestamp(time / 1000, UTC), None))
        self._feast.online_write_batch(self._config, view.feast, data, None)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Nobody else writes meanwhile; Feast's own write commits it."""
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            finally:
                self._db.rollback()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise UnavailableError(f"the online store {self._config.online_store.path} fails: {error}") from None

    def read(self, keys: Sequence[tuple[bytes, Group]]) -> list[dict[str, StoredRow]]:
        rows: list[dict[str, StoredRow]] = [{} for _ in keys]
        with self._errors():
            for view in (view for group in self._groups for view in group.views):
                at = [i for i, (_, group) in enumerate(keys) if view in group.views]
                for i, row in zip(at, self._rows(view, [keys[i][0] for i in at]), strict=True):
                    rows[i][view.name] = row
        return rows

    def _rows(self, view: View, keys: Sequence[bytes]) -> list[StoredRow]:
        found: list[StoredRow] = []
        for i in range(0, len(keys), BATCH):
            entities = [self._entity(key) for key in keys[i : i + BATCH]]
            read = self._feast.online_read(self._config, view.feast, entities)
            found += [_row(view, at, values) for at, values in read]
        return found

    def forget(self, before: int) -> int:
        forgotten = 0
        for view in (view for group in self._groups if group.keys for view in group.views):
            with self._transaction():
                table = _table_id(self._config.project, view.feast)
                query = f'SELECT DISTINCT entity_key FROM "{table}" WHERE event_ts < ?'
                keys = [key for (key,) in self._db.execute(query, (before // 1000,))]
                rows = zip(keys, self._rows(view, keys), strict=True)
                dead = [key for key, (row, _) in rows if row is not None and tuple(row.values()) == view.empty]
                self._db.executemany(f'DELETE FROM "{table}" WHERE entity_key = ?', [(key,) for key in dead])
                self._db.commit()
                forgotten += len(dead)
        return forgotten

    def knows(self, mark: str) -> bool:
        with self._errors():
            return bool(self._db.execute(f"SELECT 1 FROM {MARKS} WHERE mark = ?", (mark,)).fetchone())

    def note(self, mark: str) -> None:
        with self._transaction():
            self._db.execute(f"INSERT OR IGNORE INTO {MARKS} VALUES (?)", (mark,))
            self._db.commit()

    def close(self) -> None:
        self._db.close()


def _row(view: View, at: datetime | None, values: Any) -> StoredRow:
    if at is None:
        return None, None
    row = {
        name: unproto(dtype, values[name]) if name in values else empty
        for name, dtype, empty in zip(view.columns, view.types, view.empty, strict=True)
    }
    return row, values[TIME].int64_val if TIME in values else round(at.timestamp() * 1000)
