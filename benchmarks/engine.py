"""The window engine alone, on one core: `python -m benchmarks.engine year DAYS | HOURS KEYS` prints JSON.

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
from typing import Any

import numpy as np
import psutil
from feast.aggregation import Aggregation

from benchmarks.rig import DAY_MS, YEAR_MS
from features.contracts import Contract, Field
from features.engine import Applied, Engine, Events
from features.usecase import UseCase, load
from features.views import entity, stream_view
from services import timetable

BATCH, WARM_UP = 5_000, 10  # events a batch, as a poll in a backlog brings them; batches before the measurement
DAYS, EVENTS, SLIDE = 120, 1_000_000, timedelta(minutes=15)

Cut = tuple[list[Applied], int]


def cut(events: Iterable[Applied]) -> Iterator[Cut]:
    """Batches, and the watermark that applies all of each; events of one instant stay together."""
    held: list[Applied] = []
    for event in events:
        if len(held) >= BATCH and event.time > held[-1].time:
            yield held, event.time
            held = []
        held.append(event)
    yield held, held[-1].time + 1


def timings(engine: Engine, cuts: Iterable[Cut]) -> Iterator[tuple[int, int, float, float]]:
    """(events, rows written, CPU seconds for making columns of decoded events, and for applying them) of each batch."""
    for events, watermark in cuts:
        decoded, began = Events.of(events), time.process_time()
        batch, _ = engine.columns(decoded)
        made = time.process_time()
        changed = engine.apply(batch, watermark)
        done = time.process_time()
        yield len(events), sum(len(rows.times) for rows in changed.values()), made - began, done - made


def flights(use_case: UseCase, days: int) -> Iterator[Applied]:
    """The flights' events, decoded."""
    for day in range(YEAR_MS, YEAR_MS + days * DAY_MS, DAY_MS):
        for event in timetable.events(day, day + DAY_MS):
            value = use_case.contract(event.event).decode(event.value)
            yield Applied(event.event, value, event.time, event.time)


def year(days: int) -> dict[str, Any]:
    """Throughput of the flights' views."""
    use_case = load("flights")
    warm(use_case, flights(use_case, 10))
    found = list(timings(Engine(use_case), cut(flights(use_case, days))))
    events, rows, making, applying = (sum(column) for column in zip(*found, strict=True))
    return {
        "events": events,
        "engine_events_per_s": round(events / applying),
        "engine_from_decoded_events_per_s": round(events / (making + applying)),
        "rows_per_event": round(rows / events, 2),
        "batch": BATCH,
    }


def warm(use_case: UseCase, events: Iterable[Applied]) -> None:
    """Compile what compiles at first use."""
    engine = Engine(use_case)
    for _, batch in zip(range(WARM_UP), timings(engine, cut(events)), strict=False):
        del batch


reading = Contract("read", (Field("time", "time"), Field("key", int), Field("value", int)), time="time")


def one_view(window: timedelta) -> UseCase:
    """One window over a synthetic stream, in the flights' place."""
    aggregations = [Aggregation("value", f, window, SLIDE, f) for f in ("count", "sum", "mean", "std")]
    view = stream_view("readings", [entity("key", int)], reading, "bench", aggregations)
    return replace(load("flights"), name="bench", contracts=(reading,), views=(view,), on_demand=(), timers={})


def zipf(keys: int) -> tuple[Any, Any]:
    """Event times (epoch ms, in order) and keys of the synthetic stream; key k has probability ~ 1 / (k + 1)."""
    rng = np.random.default_rng(0)
    times = YEAR_MS + np.sort(rng.integers(0, DAYS * DAY_MS, EVENTS))
    weight = np.cumsum(1 / np.arange(1, keys + 1))
    return times, np.searchsorted(weight, rng.random(EVENTS) * weight[-1])


def readings(times: Sequence[int], keys: Sequence[int]) -> Iterator[Applied]:
    """The synthetic stream as events."""
    for i, (at, key) in enumerate(zip(times, keys, strict=True)):
        yield Applied("read", reading.struct(at, key, i % 1000), at, at)


def scaling(hours: int, keys: int) -> dict[str, Any]:
    """Cost per event once the window is full (second half), over the run, and memory at its end."""
    window = timedelta(hours=hours)
    use_case, (times, drawn) = one_view(window), zipf(keys)
    warm(use_case, readings(times[: BATCH * WARM_UP].tolist(), drawn[: BATCH * WARM_UP].tolist()))
    before = resident()
    engine = Engine(use_case)
    found = list(timings(engine, cut(readings(times.tolist(), drawn.tolist()))))
    grown = resident() - before
    inside = times >= times[-1] - window // timedelta(milliseconds=1)
    tile = SLIDE // timedelta(milliseconds=1)
    tiles = len(np.unique(np.stack([drawn[inside], times[inside] // tile]), axis=1).T)
    tenth = len(found) // 10
    return {
        "us_per_event": us_per_event(found[len(found) // 2 :]),
        "us_first_tenth": us_per_event(found[:tenth]),
        "us_last_tenth": us_per_event(found[-tenth:]),
        "state_mb": round(grown / 1e6, 1),
        "live_keys": len(np.unique(drawn[inside])),
        "tiles": tiles,
    }


def us_per_event(found: Sequence[tuple[int, int, float, float]]) -> float:
    """Microseconds per event of timed batches, columns included."""
    events, _, making, applying = (sum(column) for column in zip(*found, strict=True))
    return round((making + applying) / events * 1e6, 3)


def resident() -> int:
    """Bytes of memory that this process holds, without what only waits to be collected."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    first, second = sys.argv[1:]
    print(json.dumps(year(int(second)) if first == "year" else scaling(int(first), int(second))))
