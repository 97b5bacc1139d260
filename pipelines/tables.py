"""Rows as Arrow tables, with schemas that follow from the use case, so that every file of a table has the same one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.contracts import INTEGER
from features.usecase import UseCase
from features.vectors import join_keys
from pipelines.step import Rows

MS = pa.timestamp("ms", tz="UTC")
TYPES = {"String": pa.string(), "Int64": pa.int64(), "Float64": pa.float64(), "Bool": pa.bool_()}
FIELDS = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(), "time": pa.int64()}
PLAIN: dict[pa.DataType, Any] = {pa.string(): str, pa.int64(): INTEGER, pa.float64(): float, pa.bool_(): bool}
EXAMPLE = {
    "request_id": pa.string(),
    "event_time": pa.int64(),
    "label": pa.float64(),
    "label_time": pa.int64(),
    "score": pa.float64(),
    "version": pa.string(),
    "arm": pa.string(),
}


def arrow_type(dtype: Any) -> pa.DataType:
    """The Arrow type of a Feast type."""
    text = str(dtype)
    if text.startswith("Array("):
        return pa.list_(TYPES[text[6:-1]])
    return TYPES[text]


def view_schema(use_case: UseCase, view_name: str) -> pa.Schema:
    """Entity keys, the instant from which the row holds, the view's features."""
    view = next(v for v in use_case.views if v.name == view_name)
    keys = [(c.name, arrow_type(c.dtype)) for c in view.entity_columns if c.name in join_keys(view)]
    return pa.schema([*keys, ("event_timestamp", MS), *((f.name, arrow_type(f.dtype)) for f in view.features)])


def examples_schema(use_case: UseCase) -> pa.Schema:
    """Who, when, the label and the other targets, what was answered, and the served vector by feature name."""
    fields = EXAMPLE | dict.fromkeys(use_case.label.targets, pa.float64())
    fields |= {f.name: FIELDS[f.type] for f in use_case.request.fields if f.name not in fields}
    outputs = chain(use_case.views, use_case.on_demand)
    fields |= {f.name: arrow_type(f.dtype) for view in outputs for f in view.features}
    return pa.schema(list(fields.items()))


def vector_type(use_case: UseCase) -> type[msgspec.Struct]:
    """What a served vector must look like to become a row of the examples: entity keys, fields and features."""

    def plain(kind: pa.DataType) -> Any:
        return list[plain(kind.value_type)] if pa.types.is_list(kind) else PLAIN[kind]  # type: ignore[misc]

    others = EXAMPLE.keys() | use_case.label.targets.keys()
    columns = [f for f in examples_schema(use_case) if f.name not in others]
    names = {f"c{i}": f.name for i, f in enumerate(columns)}  # a feature's name need not be one of Python's
    fields = [(name, plain(f.type) | None, None) for name, f in zip(names, columns, strict=True)]
    return msgspec.defstruct("Vector", fields, rename=names)


def arrow_table(use_case: UseCase, table: str, rows: Sequence[Any]) -> pa.Table:
    """The rows of a view (`Rows` blocks) sorted by time, or of the examples (dicts), after those that are a table."""
    made = [part for part in rows if isinstance(part, pa.Table)]
    new = [part for part in rows if not isinstance(part, pa.Table)]
    if table == "examples":
        return pa.concat_tables([*made, pa.Table.from_pylist(new, schema=examples_schema(use_case))])
    schema = view_schema(use_case, table)
    whole = pa.concat_tables([*made, *([_table(schema, new)] if new else [])])
    times = whole["event_timestamp"].to_numpy().view(np.int64)
    return whole if (np.diff(times) >= 0).all() else whole.sort_by("event_timestamp")


def _table(schema: pa.Schema, blocks: Sequence[Rows]) -> pa.Table:
    """Many small blocks as one table: put together as arrays, since each Arrow column costs microseconds."""
    at = schema.get_field_index("event_timestamp")
    columns: dict[str, Any] = {
        name: np.concatenate([_array(block.keys[i]) for block in blocks]) for i, name in enumerate(schema.names[:at])
    }
    columns |= {n: np.concatenate([_array(block.columns[n]) for block in blocks]) for n in schema.names[at + 1 :]}
    columns["event_timestamp"] = np.concatenate([np.asarray(b.times, "datetime64[ms]") for b in blocks])
    return pa.Table.from_arrays([pa.array(columns[f.name], f.type, from_pandas=True) for f in schema], schema=schema)


def _array(column: Any) -> NDArray[Any]:
    if isinstance(column, np.ndarray):
        return column
    out = np.empty(len(column), object)
    out[:] = column
    return out


def to_bytes(table: pa.Table) -> bytes:
    """A table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def from_bytes(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
