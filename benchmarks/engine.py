"""The window engine alone, on one core: `python -m benchmarks.engine year DAYS | HOURS KEYS [text]` prints JSON.

`year` is the flights, all views. The other form is one view of a synthetic stream: 120 days of events, keys by Zipf's
law, one window of so many hours with a slide of 15 minutes, so that only what is asked about differs. Seconds are CPU
seconds of this process: what else runs on the machine doesn't count.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import psutil
from feast.aggregation import Aggregation

from benchmarks.rig import DAY_MS, YEAR_MS
from features.contracts import Contract, Field
from features.engine import Engine, Events, places_among
from features.usecase import UseCase, load
from features.values import read_values
from features.views import entity, stream_view
from services import timetable
from services.source import SourceEvent

BATCH, WARM_UP = 5_000, 10  # events a batch, as a poll in a backlog brings them; batches before the measurement
DAYS, EVENTS, SLIDE = 120, 1_000_000, timedelta(minutes=15)

Cut = tuple[list[SourceEvent], int]


class Timing(NamedTuple):
    """One batch: events, rows written, CPU seconds for reading records into columns, for what the kernel takes of them
    and for applying that."""

    events: int
    rows: int
    reading: float
    making: float
    applying: float


def cut(events: Iterable[SourceEvent]) -> Iterator[Cut]:
    """Batches, and the watermark that applies all of each; events of one instant stay together."""
    held: list[SourceEvent] = []
    for event in events:
        if len(held) >= BATCH and event.time > held[-1].time:
            yield held, event.time
            held = []
        held.append(event)
    yield held, held[-1].time + 1


def timings(use_case: UseCase, engine: Engine, cuts: Iterable[Cut]) -> Iterator[Timing]:
    """What each batch takes."""
    contracts, names = use_case.contracts, tuple(c.name for c in use_case.contracts)
    for events, watermark in cuts:
        kind = np.array([names.index(e.event) for e in events], np.int64)
        rows, times = places_among(kind), np.array([e.time for e in events], np.int64)
        raws = [[e.value for e in events if e.event == name] for name in names]
        began = time.process_time()
        values = [read_values(contract, own).values for contract, own in zip(contracts, raws, strict=True)]
        done = time.process_time()
        batch, _ = engine.columns(Events(names, kind, rows, values, times, times))
        made = time.process_time()
        changed = engine.apply(batch, watermark)
        applied = time.process_time()
        written = sum(len(rows.times) for rows in changed.values())
        yield Timing(len(events), written, done - began, made - done, applied - made)


def flights(days: int) -> Iterator[SourceEvent]:
    """The flights' events."""
    for day in range(YEAR_MS, YEAR_MS + days * DAY_MS, DAY_MS):
        yield from timetable.events(day, day + DAY_MS)


def year(days: int) -> dict[str, Any]:
    """Throughput of the flights' views."""
    use_case = load("flights")
    warm(use_case, flights(10))
    found = together(timings(use_case, Engine(use_case), cut(flights(days))))
    return {
        "events": found.events,
        "engine_events_per_s": round(found.events / found.applying),
        "engine_from_records_events_per_s": round(found.events / (found.reading + found.making + found.applying)),
        "rows_per_event": round(found.rows / found.events, 2),
        "batch": BATCH,
    }


def together(found: Iterable[Timing]) -> Timing:
    """Sums."""
    return Timing(*(sum(column) for column in zip(*found, strict=True)))


def warm(use_case: UseCase, events: Iterable[SourceEvent]) -> None:
    """Compile what compiles at first use."""
    for _ in timings(use_case, Engine(use_case), islice(cut(events), WARM_UP)):
        pass


def one_view(window: timedelta, key: type) -> UseCase:
    """One window over a synthetic stream, in the flights' place."""
    reading = Contract("read", (Field("time", "time"), Field("key", key), Field("value", int)), time="time")
    aggregations = [Aggregation("value", f, window, SLIDE, f) for f in ("count", "sum", "mean", "std")]
    view = stream_view("readings", [entity("key", key)], reading, "bench", aggregations)
    return replace(load("flights"), name="bench", contracts=(reading,), views=(view,), on_demand=(), timers={})


def zipf(keys: int) -> tuple[Any, Any]:
    """Event times (epoch ms, in order) and keys of the synthetic stream; key k has probability ~ 1 / (k + 1)."""
    rng = np.random.default_rng(0)
    times = YEAR_MS + np.sort(rng.integers(0, DAYS * DAY_MS, EVENTS))
    weight = np.cumsum(1 / np.arange(1, keys + 1))
    return times, np.searchsorted(weight, rng.random(EVENTS) * weight[-1])


def readings(times: Sequence[int], keys: Sequence[int], key: type) -> Iterator[SourceEvent]:
    """The synthetic stream as events."""
    form = '{"time":%d,"key":"key %d","value":%d}' if key is str else '{"time":%d,"key":%d,"value":%d}'
    for i, (at, number) in enumerate(zip(times, keys, strict=True)):
        yield SourceEvent("read", at, b"", (form % (at, number, i % 1000)).encode())


def scaling(hours: int, keys: int, key: type) -> dict[str, Any]:
    """Cost per event once the window is full (second half), over the run, and memory at its end."""
    window = timedelta(hours=hours)
    use_case, (times, drawn) = one_view(window, key), zipf(keys)
    warm(use_case, readings(times[: BATCH * WARM_UP].tolist(), drawn[: BATCH * WARM_UP].tolist(), key))
    before = resident()
    engine = Engine(use_case)
    found = list(timings(use_case, engine, cut(readings(times.tolist(), drawn.tolist(), key))))
    grown = resident() - before
    inside = times >= times[-1] - window // timedelta(milliseconds=1)
    tile = SLIDE // timedelta(milliseconds=1)
    tiles = len(np.unique(np.stack([drawn[inside], times[inside] // tile]), axis=1).T)
    tenth = len(found) // 10
    return {
        "us_per_event": us_per_event(found[len(found) // 2 :]),
        "us_reading": round(sum(t.reading for t in found) / EVENTS * 1e6, 3),
        "us_first_tenth": us_per_event(found[:tenth]),
        "us_last_tenth": us_per_event(found[-tenth:]),
        "state_mb": round(grown / 1e6, 1),
        "live_keys": len(np.unique(drawn[inside])),
        "tiles": tiles,
    }


def us_per_event(found: Sequence[Timing]) -> float:
    """Microseconds per event, from the record on."""
    all_ = together(found)
    return round((all_.reading + all_.making + all_.applying) / all_.events * 1e6, 3)


def resident() -> int:
    """Bytes of memory that this process holds, without what only waits to be collected."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    first, second, *kind = sys.argv[1:]
    found = year(int(second)) if first == "year" else scaling(int(first), int(second), str if kind == ["text"] else int)
    print(json.dumps(found))
