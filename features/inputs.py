"""A model's inputs as arrays: numbers, ids, and ragged sequences of events."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from features.usecase import EventSequence, ModelInputs

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Rows = npt.NDArray[Any] | slice


@dataclass(frozen=True)
class Ragged:
    """The events of n rows, one row's after the other's, oldest first.

    values : [m, D], NaN for null
    lengths : [n], how many of the m are each row's
    """

    values: Floats
    lengths: Ids

    def take(self, rows: Rows) -> Ragged:
        """The events of these rows, by index, mask or slice."""
        ends = np.cumsum(self.lengths)
        lengths = self.lengths[rows]
        starts = (ends - self.lengths)[rows]
        skipped = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        return Ragged(self.values[skipped + np.arange(len(skipped))], lengths)

    @property
    def rows(self) -> Ids:
        """[m], the row that each event belongs to."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


@dataclass(frozen=True)
class Inputs:
    """What a model reads of n rows.

    numbers : [n, F], NaN for null, booleans 0 and 1
    ids : [n, C], rows of the categories' tables
    sequences : one for each declared one
    """

    numbers: Floats
    ids: Ids
    sequences: tuple[Ragged, ...] = ()

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, rows: Rows) -> Inputs:
        """These rows, by index, mask or slice."""
        return Inputs(self.numbers[rows], self.ids[rows], tuple(s.take(rows) for s in self.sequences))

    @classmethod
    def join(cls, parts: Sequence[Inputs]) -> Inputs:
        """The rows of at least one part, one part's after the other's."""
        sequences = [
            Ragged(np.concatenate([s.values for s in same]), np.concatenate([s.lengths for s in same]))
            for same in zip(*(p.sequences for p in parts), strict=True)
        ]
        numbers, ids = np.concatenate([p.numbers for p in parts]), np.concatenate([p.ids for p in parts])
        return cls(numbers, ids, tuple(sequences))


def encode(declared: ModelInputs, vectors: Sequence[Mapping[str, Any]]) -> Inputs:
    """Vectors, by feature name, as a model's arrays; what a vector lacks is null."""
    names = declared.columns
    if len(names) > 1:
        with suppress(KeyError):
            return encode_values(declared, list(map(itemgetter(*names), vectors)))
    return encode_values(declared, [tuple(map(v.get, names)) for v in vectors])


def encode_values(declared: ModelInputs, rows: Sequence[tuple[Any, ...]]) -> Inputs:
    """Rows of values, in the order of `declared.columns`, as a model's arrays; an id is the crc32 of `name=value`
    modulo the category's buckets, null is hashed like any value."""
    n, width, place = len(rows), len(declared.numbers), declared.places
    numbers = np.array([row[:width] for row in rows], dtype=np.float64)
    hashed = [(c.name, place[c.name], c.buckets) for c in declared.categories]
    ids = [[bucket(name, row[at], buckets) for name, at, buckets in hashed] for row in rows]
    lists = [[place[c] for c in s.columns] for s in declared.sequences]
    with np.errstate(over="ignore"):
        return Inputs(
            numbers.reshape(n, width).astype(np.float32),
            np.array(ids, dtype=np.int64).reshape(n, len(hashed)),
            tuple(
                _ragged(s, ([row[at] or () for at in ats] for row in rows), n)
                for s, ats in zip(declared.sequences, lists, strict=True)
            ),
        )


@lru_cache(maxsize=262_144, typed=True)  # typed: 1, 1.0 and True are equal, but written differently
def bucket(name: str, value: Any, buckets: int) -> int:
    """The row of a category's table for a value."""
    return zlib.crc32(f"{name}={value}".encode()) % buckets


def _ragged(declared: EventSequence, lists: Iterable[Sequence[Sequence[float | None]]], n: int) -> Ragged:
    """Of lists of unequal length the newest elements, as many as the shortest has."""
    lengths = np.zeros(n, np.int64)
    events: list[tuple[float | None, ...]] = []
    for row, columns in enumerate(lists):
        shortest = lengths[row] = min(map(len, columns))
        events += zip(*(column[len(column) - shortest :] for column in columns), strict=True)
    return Ragged(np.array(events, np.float64).reshape(-1, len(declared.columns)).astype(np.float32), lengths)
