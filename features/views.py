"""Feast objects without the repetition: a source for a contract, a stream view for a list of aggregations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from types import FunctionType
from typing import Any, cast

from feast import Entity, FileSource, KafkaSource, StreamFeatureView, ValueType
from feast import Field as FeastField
from feast.aggregation import Aggregation
from feast.data_format import JsonFormat
from feast.types import Array, Float64, Int64, String

from features.contracts import Contract

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
SLIDES = ((3 * HOUR, HOUR / 4), (DAY, HOUR), (14 * DAY, 6 * HOUR))
TYPES = {float: Float64, int: Int64, str: String}


def entity(name: str, kind: type = str) -> Entity:
    """An entity whose join key has its own name."""
    value_type = ValueType.STRING if kind is str else ValueType.INT64
    return Entity(name=name, join_keys=[name], value_type=value_type)


def slide_of(window: timedelta) -> timedelta:
    """The default slide: 15 minutes to 3 h, 1 h to a day, 6 h to two weeks, a day beyond."""
    return next((slide for longest, slide in SLIDES if window <= longest), DAY)


def label_of(window: timedelta) -> str:
    """A window in a feature's name: 3h, 7d."""
    hours = window // timedelta(hours=1)
    return f"{hours}h" if hours <= 24 else f"{hours // 24}d"


def over(prefix: str, column: str, functions: Iterable[str], hours: Iterable[int]) -> list[Aggregation]:
    """Aggregations named `<prefix>_<column>_<function>_<window>` for every function and window."""
    windows = [timedelta(hours=h) for h in hours]
    return [
        Aggregation(column, f, w, slide_of(w), f"{prefix}_{column}_{f}_{label_of(w)}")
        for w in windows
        for f in functions
    ]


def stream_view(
    name: str,
    entities: Sequence[Entity],
    contract: Contract,
    use_case: str,
    aggregations: Sequence[Aggregation],
    udf: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    last_types: dict[str, type] | None = None,
    ttl: timedelta = timedelta(0),
) -> StreamFeatureView:
    """A StreamFeatureView on a contract's topic.

    udf : columns of a batch -> further columns, vectorised; NaN or None are nulls
    last_types : column -> type of its `last` and `last_n` values; float otherwise
    """

    def dtype(a: Aggregation) -> Any:
        if a.function in ("count", "count_distinct"):
            return Int64
        kind = TYPES[(last_types or {}).get(a.column, float)] if a.function.startswith("last") else Float64
        return Array(kind) if a.function.startswith("last_") else kind

    topic = contract.topic or f"{use_case}.{contract.name}"
    path = f"../.penstock/state/{use_case}/featurizer/*/{name}/*.parquet"
    batch = FileSource(name=f"{name}_rows", path=path, timestamp_field="event_timestamp")
    source = KafkaSource(
        name=topic,
        timestamp_field=contract.time,
        message_format=JsonFormat(schema_json=""),
        kafka_bootstrap_servers="as configured by penstock",
        topic=topic,
        batch_source=batch,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Stream feature views are experimental", RuntimeWarning)
        return StreamFeatureView(
            name=name,
            entities=list(entities),
            schema=[
                *(FeastField(name=e.join_key, dtype=_key_type(e)) for e in entities),
                *(FeastField(name=a.name, dtype=dtype(a)) for a in aggregations),
            ],
            source=source,
            aggregations=list(aggregations),
            mode="python",
            udf=cast(FunctionType | None, udf),
            timestamp_field=contract.time,
            online=True,
            ttl=ttl,
        )


def _key_type(entity: Entity) -> Any:
    return String if entity.value_type == ValueType.STRING else Int64
