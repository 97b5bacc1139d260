"""Clicks: will this reader open the article that is shown? No click within half an hour is a no.

Everything is counted by reader, so readers are divided over four partitions that work side by side.
"""

import math
from datetime import timedelta
from typing import Any

from feast import FeatureService, RequestSource, StreamFeatureView
from feast import Field as FeastField
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64, String

from features.contracts import Contract, Field
from features.usecase import Category, Label, ModelInputs, UseCase
from features.views import entity, over, stream_view

HOUR = 3_600_000

head = (Field("id", str), Field("time", "time"))
about = (Field("user", str), Field("section", str), Field("article", str))
shown = Contract("shown", (*head, *about, Field("position", int)), time="time", id="id")
clicked = Contract("clicked", (*head, *about, Field("impression", str)), time="time", id="id")
request = Contract(
    "requests",
    (Field("request_id", str), Field("event_time", "time"), *about, Field("position", int)),
    time="event_time",
    id="request_id",
)

user, section = entity("user"), entity("section")


def counts(name: str, keys: list[Any], contract: Contract, hours: tuple[int, ...]) -> StreamFeatureView:
    """How often, by `keys`, and when last."""
    aggregations = over(name, "time", ("count",), hours) + over(name, "time", ("last",), hours[-1:])
    return stream_view(name, keys, contract, "clicks", aggregations, last_types={"time": int})


views = (
    counts("user_shown", [user], shown, (1, 24)),
    counts("user_clicked", [user], clicked, (1, 24, 168)),
    counts("user_section_shown", [user, section], shown, (1, 24, 168)),
    counts("user_section_clicked", [user, section], clicked, (1, 24, 168)),
)
user_shown, user_clicked, user_section_shown, user_section_clicked = views

asked = RequestSource(
    name="clicks_request",
    schema=[FeastField(name="event_time", dtype=Int64), FeastField(name="article", dtype=String)],
)
DERIVED = ("rate_1h", "rate_24h", "section_rate_1h", "section_rate_7d", "since_click_h", "hour_sin", "hour_cos")


@on_demand_feature_view(  # type: ignore[untyped-decorator]
    name="reader_now",
    sources=[*views, asked],
    schema=[FeastField(name=name, dtype=Float64) for name in DERIVED],
    mode="python",
    singleton=True,
)
def reader_now(row: dict[str, Any]) -> dict[str, Any]:
    """Click rates, smoothed towards one in ten; hours since the last click; the hour of the day."""

    def rate(of: str, window: str) -> Any:
        return (1.0 + row[f"{of}_clicked_time_count_{window}"]) / (10.0 + row[f"{of}_shown_time_count_{window}"])

    last, day = row["user_clicked_time_last_7d"], 2 * math.pi * (row["event_time"] / HOUR % 24) / 24
    return {
        "rate_1h": rate("user", "1h"),
        "rate_24h": rate("user", "24h"),
        "section_rate_1h": rate("user_section", "1h"),
        "section_rate_7d": rate("user_section", "7d"),
        "since_click_h": None if last is None else (row["event_time"] - last) / HOUR,
        "hour_sin": math.sin(day),
        "hour_cos": math.cos(day),
    }


use_case = UseCase(
    name="clicks",
    contracts=(shown, clicked),
    request=request,
    entities=("user", "section"),
    views=views,
    on_demand=(reader_now,),
    service=FeatureService(name="clicks_v1", features=[*views, reader_now]),
    label=Label("clicked", "impression", lambda click: 1.0, wait=timedelta(minutes=30), on_expiry=0.0),
    inputs=ModelInputs(
        (*DERIVED, "position", *(f.name for view in views for f in view.features if "count" in f.name)),
        (Category("user", 1024, 8), Category("section", 64, 4), Category("article", 4096, 8)),
    ),
    prior=0.1,
    partition_key="user",
    partitions=4,
    retrain_every=timedelta(days=1),
)
