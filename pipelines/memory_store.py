"""An online store in this process: what streamed scoring and the backtest read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from features.usecase import UseCase
from features.vectors import StoredRow, join_keys, view_columns
from pipelines.step import Rows


class MemoryStore:
    """Newest row per view and key; same contract as `pipelines.feature_store.FeatureStore`."""

    def __init__(self, use_case: UseCase) -> None:
        self._keys = {view.name: join_keys(view) for view in use_case.views}
        self._columns = {view.name: view_columns(view) for view in use_case.views}
        self._rows: dict[str, dict[tuple[Any, ...], StoredRow]] = {view.name: {} for view in use_case.views}
        self._marks: set[str] = set()

    def write(self, rows: Sequence[Rows]) -> None:
        """Keep each row that is newer than what its key has; a key with a null belongs to no entity."""
        for batch in rows:
            stored, columns = self._rows[batch.view], self._columns[batch.view]
            values = zip(*(_typed(batch.columns[c.name], c.dtype) for c in columns), strict=True)
            names = [c.name for c in columns]
            for key, time, row in zip(batch.entities, _plain(batch.times), values, strict=True):
                before = stored.get(key, (None, None))[1]
                if None not in key and (before is None or time > before):
                    stored[key] = (dict(zip(names, row, strict=True)), time)

    def read(self, keys: Sequence[Mapping[str, Any]]) -> list[dict[str, StoredRow]]:
        """For each dict of entity keys: view name -> (row, epoch ms), or (None, None)."""
        return [
            {
                view: self._rows[view].get(tuple(map(entity.get, names)), (None, None))
                for view, names in self._keys.items()
            }
            for entity in keys
        ]

    def knows(self, mark: str) -> bool:
        """Whether a mark that `note` left is still there."""
        return mark in self._marks

    def note(self, mark: str) -> None:
        """Leave a mark beside the rows."""
        self._marks.add(mark)

    def snapshot(self) -> list[Any]:
        """Every row as plain values."""
        return [[view, list(key), row, time] for view, rows in self._rows.items() for key, (row, time) in rows.items()]

    def restore(self, data: Sequence[Any]) -> None:
        for view, key, row, time in data:
            self._rows[view][tuple(key)] = (row, time)


def _plain(column: Any) -> list[Any]:
    return column.tolist() if isinstance(column, np.ndarray) else list(column)


def _typed(column: Any, dtype: str) -> list[Any]:
    """The values as a store gives them back; NaN is null."""
    values = _plain(column)
    if dtype == "DOUBLE":
        return [None if v is None or v != v else float(v) for v in values]
    return [None if v is None else int(v) for v in values] if dtype == "INT64" else values
