"""The year 2013 as events: counts, time rules, order."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from features.flights import use_case
from services import timetable
from services.source import SourceEvent
from services.timetable import DAY, HOUR, OPENING

EVER = 1 << 50


@pytest.fixture(scope="module")
def winter() -> list[SourceEvent]:
    return timetable.events(0, OPENING + 40 * DAY)


def ms(text: str) -> int:
    return round(datetime.fromisoformat(text).astimezone(UTC).timestamp() * 1000)


def fields(event: SourceEvent) -> dict[str, Any]:
    return dict(msgspec.json.decode(event.value))


def flight(events: list[SourceEvent], id_: str) -> dict[str, dict[str, Any]]:
    return {e.event: fields(e) | {"at": e.time} for e in events if e.key == id_.encode()}


def test_counts_of_the_year() -> None:
    table = timetable._timetable()
    counts = {t.event: len(t.times) for t in table.timelines}
    assert counts == {"scheduled": 336_776, "departed": 328_521, "arrived": 327_346, "weather": 26_115}
    assert len(table.requests.times) == len(set(table._id)) == 336_776
    assert len(table.requests.times) + sum(counts.values()) - counts["scheduled"] == 1_018_758
    assert timetable.events(EVER, EVER + DAY) == timetable.requests(0, OPENING) == []


def test_order_and_ids(winter: list[SourceEvent]) -> None:
    keys = [(e.time, e.event) for e in winter]
    assert keys == sorted(keys)
    assert (winter[0].time, winter[0].event) == (OPENING, "scheduled")
    assert len({(e.event, fields(e)["id"]) for e in winter[:50_000]}) == 50_000


def test_a_range_is_half_open(winter: list[SourceEvent]) -> None:
    at = OPENING + 7 * HOUR
    inside = [e for e in winter if at <= e.time < at + HOUR]
    assert timetable.events(at, at + HOUR) == inside
    assert timetable.events(at, at) == []
    whole = timetable.events(OPENING, OPENING + DAY)
    assert timetable.events(OPENING, at) + timetable.events(at, OPENING + DAY) == whole


def test_the_first_flight(winter: list[SourceEvent]) -> None:
    events = flight(winter[:5000], "2013-01-01-UA-1545-EWR-0515")
    assert events["scheduled"]["at"] == OPENING
    assert "tailnum" not in events["scheduled"]
    assert events["departed"]["time"] == "2013-01-01T10:17:00Z"
    assert events["departed"]["dep_delay"] == 2
    assert events["arrived"]["sched_arr"] == "2013-01-01T14:19:00Z"  # 08:19 in Houston
    assert (events["arrived"]["at"], events["arrived"]["arr_delay"]) == (ms("2013-01-01T14:30:00Z"), 11)
    assert events["arrived"]["tailnum"] == "N14228"


def test_every_event_keeps_its_contract(winter: list[SourceEvent]) -> None:
    for event in winter[::50]:
        contract = use_case.contract(event.event)
        decoded = contract.decode(event.value)
        assert contract.time_of(decoded) == event.time


def test_requests_are_an_hour_before_departure() -> None:
    for request in timetable.requests(OPENING + 10 * DAY, OPENING + 11 * DAY):
        row = request.row
        assert (
            ms(row["fields"]["sched_dep"]) - request.time
            == HOUR
            == ms(row["fields"]["sched_dep"]) - ms(row["event_time"])
        )
        assert ms(row["fields"]["sched_arr"]) > ms(row["fields"]["sched_dep"])
        assert set(row["entities"]) == set(use_case.entities)


def test_cancelled_diverted_and_nothing_known(winter: list[SourceEvent]) -> None:
    happened: dict[str, set[str]] = {}
    for e in winter:
        if e.event != "weather":
            happened.setdefault(e.key.decode(), set()).add(e.event)
    assert {"scheduled"} in happened.values()
    assert {"scheduled", "departed"} in happened.values()
    weather = [fields(e) for e in winter if e.event == "weather"]
    assert any(w["wind_gust"] is None for w in weather)
    assert not any(v != v for w in weather for v in w.values())


@pytest.mark.parametrize(
    ("zone", "dest", "hhmm", "departs", "miles", "arrives"),
    [
        ("America/New_York", "BOS", 2359, "2013-06-01T23:00:00-04:00", 200, "2013-06-01T23:59:00-04:00"),
        ("America/New_York", "BOS", 2400, "2013-06-01T23:00:00-04:00", 200, "2013-06-02T00:00:00-04:00"),
        ("America/New_York", "BOS", 10, "2013-06-01T23:00:00-04:00", 200, "2013-06-02T00:10:00-04:00"),
        ("America/Los_Angeles", "LAX", 1000, "2013-03-10T07:00:00-04:00", 2475, "2013-03-10T10:00:00-07:00"),
        ("America/Puerto_Rico", "SJU", 430, "2013-01-01T23:59:00-05:00", 1598, "2013-01-02T04:30:00-04:00"),
    ],
)
def test_scheduled_arrival(zone: str, dest: str, hhmm: int, departs: str, miles: int, arrives: str) -> None:
    import numpy as np
    import pandas as pd

    flights = pd.DataFrame({"dest": [dest], "sched_arr_time": [hhmm], "distance": [miles]})
    found = timetable._scheduled_arrivals(flights, np.array([ms(departs)]), {dest: zone})
    assert found.tolist() == [ms(arrives)]


def test_arrivals_agree_with_the_clock() -> None:
    """Arrival time + delay gives the local time that the table itself has, but for one flight."""
    import numpy as np
    import pandas as pd

    flights = timetable._table("flights.csv.zip")
    table = timetable._timetable()
    arrives = timetable._after(table._arrives, table._arr_delay)
    airports = timetable._table("airports.csv").set_index("faa").tzone.to_dict() | timetable.MISSING_ZONES
    zones, clock = flights.dest.map(airports).to_numpy(), flights.arr_time.to_numpy()
    different = 0
    for zone in np.unique(zones):
        rows = (zones == zone) & table._landed
        local = pd.DatetimeIndex(arrives[rows].astype("datetime64[ms]")).tz_localize("UTC").tz_convert(zone)
        hhmm = clock[rows].astype(int)
        different += int((local.hour * 60 + local.minute != (hhmm // 100 * 60 + hhmm % 100) % 1440).sum())
    assert different == 1
