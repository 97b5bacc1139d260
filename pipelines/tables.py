"""Rows as Arrow tables, with schemas that follow from the use case, so that every file of a table has the same one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pyarrow as pa

from features.usecase import UseCase
from features.vectors import join_keys

MS = pa.timestamp("ms", tz="UTC")
TYPES = {"String": pa.string(), "Int64": pa.int64(), "Float64": pa.float64(), "Bool": pa.bool_()}
FIELDS = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(), "time": pa.int64()}
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


def arrow_table(use_case: UseCase, table: str, rows: Sequence[Any]) -> pa.Table:
    """The rows of a view (`Rows` blocks, sorted by time) or of the examples (dicts) as one table."""
    if table == "examples":
        return pa.Table.from_pylist(list(rows), schema=examples_schema(use_case))
    schema = view_schema(use_case, table)
    keys = [k for block in rows for k in block.keys]
    columns: dict[str, Any] = {name: [k[i] for k in keys] for i, name in enumerate(schema.names[: _key_count(schema)])}
    columns["event_timestamp"] = [t for block in rows for t in block.times]
    for name in schema.names[_key_count(schema) + 1 :]:
        columns[name] = list(chain.from_iterable(block.columns[name] for block in rows))
    arrays = [pa.array(columns[f.name], pa.int64() if f.type == MS else f.type) for f in schema]
    arrays = [a.cast(f.type) if f.type == MS else a for a, f in zip(arrays, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema).sort_by("event_timestamp")


def _key_count(schema: pa.Schema) -> int:
    return int(schema.get_field_index("event_timestamp"))
