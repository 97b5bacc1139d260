"""From stored rows to the vector a model reads: the same code in the predictor, the scorer and the backtest.

A vector has, in this order, the request's entity keys (given and derived), its fields, the features of every view
and the outputs of the on-demand views. A view without a row, or with one past its ttl, reads as the empty window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from features.errors import ConfigError
from features.usecase import ModelInputs, Row, UseCase

if TYPE_CHECKING:
    from feast import StreamFeatureView

DUMMY = "__dummy"  # what Feast calls the entity of a view that has none
NUMBER_LISTS = ("DOUBLE_LIST", "INT64_LIST")
ZERO_WHEN_EMPTY = ("count", "sum", "count_distinct")
StoredRow = tuple[Row | None, int | None]


class Column(NamedTuple):
    """One feature of a view: `dtype` is Feast's value type (INT64, DOUBLE, STRING, ..._LIST), `function` that of
    its aggregation or ""."""

    name: str
    dtype: str
    function: str


@dataclass(slots=True)
class Vector:
    """What a model sees of one request, and where it comes from.

    features : name -> number, string, list or None
    feature_times : view name -> epoch ms from which its row holds, None without a row
    missing, stale : views that read as the empty window; stale ones because their row was past the ttl
    """

    features: Row
    feature_times: dict[str, int | None]
    missing: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)


def view_columns(view: StreamFeatureView) -> tuple[Column, ...]:
    """The features of a view in the order of its schema."""
    functions = {a.name: a.function for a in view.aggregations}
    return tuple(Column(f.name, f.dtype.to_value_type().name, functions.get(f.name, "")) for f in view.features)


def join_keys(view: StreamFeatureView) -> tuple[str, ...]:
    """The entity keys of a view in its order; none for a global view. An entity's join key has its name."""
    return tuple(name for name in view.entities if name != DUMMY)


def empty_row(view: StreamFeatureView) -> Row:
    """What a view reads as over an empty window: count, sum and count_distinct 0, lists [], the rest None."""
    return {column.name: _empty(column) for column in view_columns(view)}


def _empty(column: Column) -> Any:
    if column.dtype.endswith("_LIST"):
        return []
    if column.function in ZERO_WHEN_EMPTY:
        return 0.0 if column.dtype == "DOUBLE" else 0
    return None


class _View(NamedTuple):
    name: str
    ttl: int
    empty: Row


class Vectorizer:
    """Builds the vectors of one use case; all that needs Feast's objects is done once, here."""

    def __init__(self, use_case: UseCase) -> None:
        self.use_case = use_case
        self._views = [_View(v.name, _ms(v.ttl), empty_row(v)) for v in use_case.views]
        transformations: list[Any] = [view.feature_transformation for view in use_case.on_demand]
        self._on_demand = [transformation.udf for transformation in transformations]
        not_fields = {*use_case.entities, use_case.request.time, use_case.request.id}
        self.fields = tuple(f.name for f in use_case.request.fields if f.name not in not_fields)
        """Request fields: those of the request's contract that are neither its id, its time nor entity keys."""
        self.types = _vector_types(use_case, self.fields)
        """Name -> type of everything in a vector."""
        declared = dict.fromkeys((*use_case.entities, *(key for view in use_case.views for key in join_keys(view))))
        self.entities = tuple(declared)
        """Entity keys: those of the request, then the derived ones that views use."""
        self.schema_id = hashlib.sha256(repr(sorted(self.types.items())).encode()).hexdigest()[:12]

    def entity_keys(self, entities: Row, fields: Row) -> Row:
        """The request's entity keys with the derived ones."""
        return {**entities, **self.use_case.derive({**entities, **fields})}

    def assemble(self, keys: Row, fields: Row, event_time: int, rows: Mapping[str, StoredRow]) -> Vector:
        """The vector of one request.

        Parameters
        ----------
        keys : entity keys as `entity_keys` gives them
        fields : request fields
        event_time : epoch ms of the request; drives ttl and on-demand features
        rows : view name -> (row with all its features, epoch ms from which it holds), or (None, None)
        """
        features = {name: keys.get(name) for name in self.entities}
        for name in self.fields:
            features[name] = fields.get(name)
        vector = Vector(features, {})
        for name, ttl, empty in self._views:
            row, time = rows.get(name, (None, None))
            vector.feature_times[name] = time
            if row is not None and time is not None and ttl and event_time - time > ttl:
                vector.stale.append(name)
                row = None
            if row is None:
                vector.missing.append(name)
                row = empty
            features.update(row)
        inputs = {**features, "event_time": event_time}
        for function in self._on_demand:
            features.update(function(inputs))
        return vector

    def check(self, inputs: ModelInputs) -> None:
        """Raise ConfigError when a model reads what the vector does not have, or a list as a number."""
        singles = (*inputs.numbers, *(c.name for c in inputs.categories))
        if unknown := sorted(set(inputs.columns) - set(self.types)):
            raise ConfigError(
                f"{self.use_case.name}: model inputs {', '.join(unknown)} are not in the vector: they must be features "
                "of a view, outputs of an on-demand view, request fields or entity keys"
            )
        if lists := [n for n in singles if self.types[n].endswith("_LIST")]:
            raise ConfigError(f"{self.use_case.name}: model inputs {', '.join(lists)} are lists, not single values")
        events = (column for s in inputs.sequences for column in s.columns)
        if wrong := [n for n in events if self.types[n] not in NUMBER_LISTS]:
            raise ConfigError(
                f"{self.use_case.name}: events of a sequence, {', '.join(wrong)}, are no lists of numbers"
            )


def _ms(ttl: timedelta | None) -> int:
    return ttl // timedelta(milliseconds=1) if ttl else 0


def _vector_types(use_case: UseCase, fields: Sequence[str]) -> dict[str, str]:
    """Name -> type of everything in a vector, in its order."""
    request = {f.name: f.type if isinstance(f.type, str) else f.type.__name__ for f in use_case.request.fields}
    types = {name: request[name] for name in use_case.entities}
    keys = [(view, f) for view in use_case.views for f in view.entity_columns]
    types |= {f.name: f.dtype.to_value_type().name for view, f in keys if f.name in join_keys(view)}
    types |= {name: request[name] for name in fields}
    types |= {column.name: column.dtype for view in use_case.views for column in view_columns(view)}
    return types | {f.name: f.dtype.to_value_type().name for view in use_case.on_demand for f in view.features}


def schema_id(use_case: UseCase) -> str:
    """Short hash of the names and types of a use case's vector."""
    return Vectorizer(use_case).schema_id
