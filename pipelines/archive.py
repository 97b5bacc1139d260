"""The examples archive as arrays: what was served, with the label that came for it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.errors import ConfigError, StateError
from features.usecase import Category, ModelInputs

OWN_COLUMNS = ("request_id", "event_time", "label", "label_time", "score", "version")
Times = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Examples:
    """Labelled examples in columns, ordered by (label_time, request_id); n rows each.

    numbers : [n, F], NaN for null
    ids : [n, C], rows of the categories' tables
    label : 0 .. 1
    targets : [n, T], 0 .. 1, NaN for null
    event_time, label_time : epoch ms
    request_id, version : text
    score : what was answered, by `version`
    """

    numbers: Floats
    ids: npt.NDArray[np.int64]
    label: Floats
    targets: Floats
    event_time: Times
    label_time: Times
    request_id: npt.NDArray[Any]
    score: Floats
    version: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: npt.NDArray[Any] | slice) -> Examples:
        """These rows, by index, mask or slice."""
        return Examples(*(getattr(self, f.name)[rows] for f in fields(self)))

    def between(self, from_ms: int, until_ms: int) -> Examples:
        """Those with from_ms <= label_time < until_ms."""
        first, last = np.searchsorted(self.label_time, [from_ms, until_ms])
        return self.take(slice(int(first), int(last)))


def load(
    files: Sequence[str], inputs: ModelInputs, from_ms: int, until_ms: int, targets: Sequence[str] = ()
) -> Examples:
    """The examples of closed archive files whose label came in [from_ms, until_ms).

    Parameters
    ----------
    files : paths or URLs (fsspec) of Parquet files
    inputs : which columns become numbers and ids
    targets : names of the label's other targets; one that a file is too old to have is null in its rows

    Raises
    ------
    StateError : a file is missing or unreadable
    ConfigError : an input is no column of the archive
    """
    parts = [part for file in files if len(part := _load_file(file, inputs, targets, from_ms, until_ms))]
    if not parts:
        return _none(inputs, len(targets))
    whole = Examples(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Examples)))
    return whole.take(np.lexsort((whole.request_id, whole.label_time)))


def _none(inputs: ModelInputs, targets: int) -> Examples:
    numbers, ids = np.empty((0, len(inputs.numbers)), np.float32), np.empty((0, len(inputs.categories)), np.int64)
    times, floats, texts = np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, object)
    return Examples(numbers, ids, floats, np.empty((0, targets), np.float32), times, times, texts, floats, texts)


def _load_file(file: str, inputs: ModelInputs, targets: Sequence[str], from_ms: int, until_ms: int) -> Examples:
    wanted = list(dict.fromkeys((*OWN_COLUMNS, *inputs.numbers, *(c.name for c in inputs.categories))))
    try:
        with fsspec.open(file, "rb") as stream:
            parquet = pq.ParquetFile(stream)
            if unknown := sorted(set(wanted) - set(parquet.schema_arrow.names)):
                raise ConfigError(f"model inputs {', '.join(unknown)} are no columns of the examples archive ({file})")
            table = parquet.read(columns=[*wanted, *targets])
    except (OSError, pa.ArrowException) as error:
        raise StateError(f"archive file {file} can't be read: {error}") from error
    times = pc.field("label_time")
    return _columns(table.filter((times >= from_ms) & (times < until_ms)), inputs, targets)


def _columns(table: pa.Table, inputs: ModelInputs, targets: Sequence[str]) -> Examples:
    n = table.num_rows
    ids = np.empty((n, len(inputs.categories)), np.int64)
    for i, category in enumerate(inputs.categories):
        ids[:, i] = _bucketed(table[category.name], category)
    return Examples(
        _numbers(table, inputs.numbers),
        ids,
        _number(table["label"]),
        _numbers(table, targets),
        table["event_time"].to_numpy(),
        table["label_time"].to_numpy(),
        table["request_id"].to_numpy(zero_copy_only=False),
        _number(table["score"]),
        table["version"].to_numpy(zero_copy_only=False),
    )


def _numbers(table: pa.Table, names: Sequence[str]) -> Floats:
    numbers = np.full((table.num_rows, len(names)), np.nan, np.float32)
    for i, name in enumerate(names):
        if name in table.column_names:
            numbers[:, i] = _number(table[name])
    return numbers


def _number(column: pa.ChunkedArray) -> Floats:
    """As `features.vectors.encode` has it: null is NaN, booleans are 0 and 1."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    with np.errstate(over="ignore"):
        return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float32)


def _bucketed(column: pa.ChunkedArray, category: Category) -> npt.NDArray[np.int64]:
    """As `features.vectors.encode` hashes, but each distinct value once."""
    coded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    hashes = [zlib.crc32(f"{category.name}={v}".encode()) % category.buckets for v in coded.dictionary.to_pylist()]
    return np.asarray(np.take(hashes, coded.indices.to_numpy()), np.int64)
