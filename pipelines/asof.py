"""Vectors of many requests at once, each as of an instant: the engine's rows joined in columns.

The values are those that `pipelines.scorer` and the predictor read row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.engine import Engine, Events
from features.kernel import Ints
from features.usecase import Row, UseCase
from features.vectors import Column, Vectorizer, empty_row, join_keys, view_columns
from features.windows import ViewRows

Columns = dict[str, NDArray[Any]]
CODE_BITS = 31


@dataclass(frozen=True)
class Asked:
    """One checked scoring request: its entity keys and fields, at `time` (epoch ms)."""

    id: str
    time: int
    entities: Row
    fields: Row


class AsOf:
    """The views of a use case, and the vectors that requests read from them."""

    def __init__(self, use_case: UseCase) -> None:
        self.engine, self.vectorizer = Engine(use_case), Vectorizer(use_case)
        transformations: list[Any] = [view.feature_transformation for view in use_case.on_demand]
        self.on_demand = [transformation.udf for transformation in transformations]
        self.views = [_View(view) for view in use_case.views]
        self.refused = 0

    def advance(self, events: Events, watermark: int, asked: Sequence[Asked], as_of: Ints) -> dict[str, list[Any]]:
        """Apply events, all before `watermark`, and answer requests as of instants since the last call's watermark.

        Parameters
        ----------
        as_of : [n] epoch ms, none after `watermark`: which rows are there. What is computed on demand, and how old a
            row may be, goes by the request's own time

        Returns
        -------
        the n vectors in columns, by name: plain values, None for null
        """
        changed, refused = self.engine.advance(events, watermark)
        self.refused += len(refused)
        keys = [self.vectorizer.entity_keys(a.entities, a.fields) for a in asked]
        columns = {name: [k.get(name) for k in keys] for name in self.vectorizer.entities}
        columns |= {name: [a.fields.get(name) for a in asked] for name in self.vectorizer.fields}
        coder = self.engine.coder
        codes = {name: coder.encode(values) for name, values in columns.items() if name in self.vectorizer.entities}
        times = np.array([a.time for a in asked], np.int64)
        for view in self.views:
            columns |= view.read(changed.get(view.name), codes, as_of, times)
        return columns | self._demanded(columns, times)

    def _demanded(self, columns: Mapping[str, list[Any]], times: Ints) -> dict[str, list[Any]]:
        """What the on-demand views make of the columns, row by row: they are plain functions."""
        names, made = [*columns, "event_time"], list[Row]()
        for values in zip(*columns.values(), times.tolist(), strict=True):
            row = dict(zip(names, values, strict=True))
            made.append({})
            for function in self.on_demand:
                made[-1].update(function(row))
        return {name: [row[name] for row in made] for name in (made[0] if made else ())}


class _View:
    """One view's newest rows, and how requests read it."""

    def __init__(self, view: Any) -> None:
        self.name, self.keys = view.name, join_keys(view)
        self.ttl = (view.ttl or timedelta(0)) // timedelta(milliseconds=1)
        self.columns, self.empty = view_columns(view), empty_row(view)
        self.held: ViewRows | None = None

    def read(
        self, changed: ViewRows | None, codes: Mapping[str, Ints], as_of: Ints, times: Ints
    ) -> dict[str, list[Any]]:
        """The features of each request's key as of its instant; the changed rows become the newest."""
        rows = _together([part for part in (self.held, changed) if part])
        asked = np.array([codes[k] for k in self.keys], np.int64).reshape(len(self.keys), len(as_of)).T
        if rows is None:
            return {name: [value] * len(as_of) for name, value in self.empty.items()}
        found = _newest_at(rows.codes, rows.times, asked, as_of)
        if self.ttl:
            found = np.where(times - rows.times[found] > self.ttl, -1, found)
        self.held = self._kept(rows)
        return {c.name: self._values(c, rows.columns[c.name], found) for c in self.columns}

    def _values(self, column: Column, values: NDArray[Any], found: Ints) -> list[Any]:
        """A feature as a store gives it back; where no row was found, that of the empty window."""
        there = found >= 0
        out = np.empty(len(found), object)
        out.fill(self.empty[column.name])
        got = values[found[there]]
        if column.dtype == "DOUBLE":
            got = got.astype(np.float64)
            out[there] = np.where(np.isnan(got), np.array(None), got)
        else:
            out[there] = got
        plain: list[Any] = out.tolist()
        return plain

    def _kept(self, rows: ViewRows) -> ViewRows | None:
        """Each key's newest row, or None. One that equals the empty window is left out: its codes may be given away."""
        order = np.lexsort((rows.times, _one_key(rows.codes)))
        key = _one_key(rows.codes)[order]
        newest = order[np.append(key[1:] != key[:-1], True)]
        alive = np.zeros(len(newest), bool)
        for column in self.columns:
            alive |= _filled(rows.columns[column.name][newest])
        return _taken(rows, np.sort(newest[alive])) if alive.any() else None


def _one_key(codes: Ints) -> Ints:
    """[n] one number for each combination of codes [n, K]."""
    key = np.zeros(len(codes), np.int64)
    for k in range(codes.shape[1]):
        packed = key if k < 2 else np.unique(key, return_inverse=True)[1]
        key = packed << CODE_BITS | codes[:, k]
    return key


def _newest_at(codes: Ints, times: Ints, asked: Ints, as_of: Ints) -> Ints:
    """[n] for each key asked the index of its newest row at that instant, -1 when it has none."""
    n = len(times)
    key = _one_key(np.concatenate([codes, np.maximum(asked, -1)]))
    key = np.where(np.concatenate([codes, asked]).min(axis=1, initial=0) < 0, -1, key)
    order = np.lexsort((np.arange(len(key)) >= n, np.concatenate([times, as_of]), key))
    place = np.maximum.accumulate(np.where(order < n, np.arange(len(order)), -1))
    row = np.where(place >= 0, order[place], -1)
    found = np.full(len(key), -1, np.int64)
    found[order] = np.where((row >= 0) & (key[row] == key[order]) & (key[order] >= 0), row, -1)
    return found[n:]


def _filled(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which values differ from the empty window's: 0, null or no list elements."""
    if values.dtype == object:
        return np.array([v is not None and v != 0 and v != [] for v in values.tolist()], bool)
    return np.asarray((values != 0) & (values == values))


def _taken(rows: ViewRows, at: Ints) -> ViewRows:
    columns = {name: column[at] for name, column in rows.columns.items()}
    return replace(rows, codes=rows.codes[at], times=rows.times[at], newest=rows.newest[at], columns=columns)


def _together(parts: Sequence[ViewRows]) -> ViewRows | None:
    """The rows of both, the older first."""
    if len(parts) < 2:
        return parts[0] if parts else None
    columns = {name: np.concatenate([p.columns[name] for p in parts]) for name in parts[0].columns}
    codes, times, newest = (np.concatenate([getattr(p, name) for p in parts]) for name in ("codes", "times", "newest"))
    return ViewRows(codes, times, newest, columns, parts[-1].decode)
