"""A small use case for tests: is the next order of a shop returned?"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from feast import FeatureService, RequestSource
from feast import Field as FeastField
from feast.aggregation import Aggregation
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64

from features.contracts import Contract, Field
from features.usecase import Category, Label, ModelInputs, UseCase
from features.views import entity, stream_view

HOUR = timedelta(hours=1)

ordered = Contract(
    "ordered",
    (
        Field("id", str),
        Field("time", "time"),
        Field("shop", str),
        Field("item", int),
        Field("price", float, decimals=2, optional=True),
    ),
    time="time",
    id="id",
)
returned = Contract(
    "returned", (Field("id", str), Field("time", "time"), Field("order", str), Field("why", str)), time="time", id="id"
)
request = Contract(
    "requests",
    (
        Field("request_id", str),
        Field("event_time", "time"),
        Field("shop", str),
        Field("item", int),
        Field("price", float),
        Field("due", "time", optional=True),
    ),
    time="event_time",
    id="request_id",
)


def spread(functions: dict[str, str], column: str) -> list[Aggregation]:
    """Aggregations over an hour in tiles of 15 minutes: name -> function."""
    return [Aggregation(column, f, HOUR, timedelta(minutes=15), name) for name, f in functions.items()]


all_orders = stream_view("all_orders", [], ordered, "toy", spread({"all_count": "count", "all_mean": "mean"}, "price"))
shop_item = stream_view(
    "shop_item",
    [entity("shop"), entity("item", int)],
    ordered,
    "toy",
    spread({"si_count": "count", "si_sum": "sum", "si_last": "last", "si_last_3": "last_3"}, "price")
    + spread({"si_who": "last", "si_whos": "last_2"}, "id"),
    last_types={"id": str},
    ttl=timedelta(hours=2),
)
asked = RequestSource(
    name="toy_request", schema=[FeastField(name="price", dtype=Float64), FeastField(name="event_time", dtype=Int64)]
)


@on_demand_feature_view(
    name="dearness",
    sources=[all_orders, asked],
    schema=[FeastField(name="price_ratio", dtype=Float64), FeastField(name="hour", dtype=Int64)],
    mode="python",
    singleton=True,
)
def dearness(row: dict[str, Any]) -> dict[str, Any]:
    """The price next to the mean of the last hour, and the hour of the day (UTC)."""
    mean = row["all_mean"]
    return {"price_ratio": row["price"] / mean if mean else None, "hour": row["event_time"] // 3_600_000 % 24}


use_case = UseCase(
    name="toy",
    contracts=(ordered, returned),
    request=request,
    entities=("shop", "item"),
    views=(all_orders, shop_item),
    on_demand=(dearness,),
    service=FeatureService(name="toy_v1", features=[all_orders, shop_item, dearness]),
    label=Label("returned", "order", lambda event: 1.0, wait=timedelta(hours=3), on_expiry=0.0),
    inputs=ModelInputs(
        ("all_count", "all_mean", "si_count", "si_sum", "si_last", "price", "price_ratio"),
        (Category("shop", 16, 2), Category("hour", 32, 2)),
    ),
    prior=0.3,
)
