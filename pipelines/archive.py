"""The examples archive as arrays: what was served, with the label that came for it."""

from __future__ import annotations

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
from features.inputs import Inputs, Ragged, bucket, encode
from features.usecase import Category, EventSequence, ModelInputs

OWN_COLUMNS = ("request_id", "event_time", "label", "label_time", "score", "version")
Times = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Examples:
    """Labelled examples in columns, ordered by (label_time, request_id); n rows each.

    inputs : what the model reads
    label : 0 .. 1
    targets : [n, T], 0 .. 1, NaN for null
    event_time, label_time : epoch ms
    request_id, version : text
    score : what was answered, by `version`
    """

    inputs: Inputs
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
        return Examples(self.inputs.take(rows), *(getattr(self, name)[rows] for name in COLUMNS))

    @classmethod
    def join(cls, parts: Sequence[Examples]) -> Examples:
        """All examples of at least one part, in order."""
        whole = cls(
            Inputs.join([p.inputs for p in parts]), *(np.concatenate([getattr(p, n) for p in parts]) for n in COLUMNS)
        )
        return whole.take(np.lexsort((whole.request_id, whole.label_time)))

    def between(self, from_ms: int, until_ms: int) -> Examples:
        """Those with from_ms <= label_time < until_ms."""
        first, last = np.searchsorted(self.label_time, [from_ms, until_ms])
        return self.take(slice(int(first), int(last)))


COLUMNS = tuple(f.name for f in fields(Examples) if f.name != "inputs")


def load(
    files: Sequence[str], inputs: ModelInputs, from_ms: int, until_ms: int, targets: Sequence[str] = ()
) -> Examples:
    """The examples of closed archive files whose label came in [from_ms, until_ms).

    Parameters
    ----------
    files : paths or URLs (fsspec) of Parquet files
    inputs : which columns are read, and as what
    targets : names of the label's other targets; one that a file is too old to have is null in its rows

    Raises
    ------
    StateError : a file is missing or unreadable
    ConfigError : an input is no column of the archive
    """
    parts = [part for file in files if len(part := _load_file(file, inputs, targets, from_ms, until_ms))]
    return Examples.join(parts) if parts else _none(inputs, len(targets))


def _none(inputs: ModelInputs, targets: int) -> Examples:
    times, floats, texts = np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, object)
    return Examples(encode(inputs, []), floats, np.empty((0, targets), np.float32), times, times, texts, floats, texts)


def _load_file(file: str, inputs: ModelInputs, targets: Sequence[str], from_ms: int, until_ms: int) -> Examples:
    wanted = list(dict.fromkeys((*OWN_COLUMNS, *inputs.columns)))
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
    ids = np.empty((table.num_rows, len(inputs.categories)), np.int64)
    for i, category in enumerate(inputs.categories):
        ids[:, i] = _bucketed(table[category.name], category)
    return Examples(
        Inputs(_numbers(table, inputs.numbers), ids, tuple(_ragged(table, s) for s in inputs.sequences)),
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
    """As `features.inputs.encode` has it: null is NaN, booleans are 0 and 1."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    with np.errstate(over="ignore"):
        return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float32)


def _bucketed(column: pa.ChunkedArray, category: Category) -> npt.NDArray[np.int64]:
    """As `features.inputs.encode` hashes, but each distinct value once."""
    coded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    hashes = [bucket(category.name, v, category.buckets) for v in coded.dictionary.to_pylist()]
    return np.asarray(np.take(hashes, coded.indices.to_numpy()), np.int64)


def _ragged(table: pa.Table, declared: EventSequence) -> Ragged:
    """As `features.inputs.encode` has it, whole columns at a time."""
    columns = [table[name].combine_chunks() for name in declared.columns]
    counts = [pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False) for column in columns]
    lengths = np.asarray(np.min(counts, 0), np.int64)
    values = np.empty((int(lengths.sum()), len(columns)), np.float32)
    for i, (column, count) in enumerate(zip(columns, counts, strict=True)):
        every = Ragged(_number(pa.chunked_array([column.flatten()]))[:, None], np.asarray(count, np.int64))
        values[:, i] = every.values[_newest(every, lengths), 0]
    return Ragged(values, lengths)


def _newest(every: Ragged, wanted: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Mask [m] of each row's last `wanted` [n] events."""
    ends = np.cumsum(every.lengths)
    from_the_end = np.repeat(ends, every.lengths) - np.arange(len(every.values))
    return np.asarray(from_the_end <= np.repeat(wanted, every.lengths))
