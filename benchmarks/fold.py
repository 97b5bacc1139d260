"""27 features from Kafka, values kept in state: ours. `python -m benchmarks.fold` prints JSON; the peer is beside it.

The job: departures by origin, carrier and destination, over 1, 3 and 24 hours: how many, their mean delay, the rate
of late ones. Nothing is produced. Ours is the runner as it is, with its snapshots and transactions.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from features.flights import carrier, departed, departures, dest, origin
from features.flights import use_case as flights
from features.usecase import UseCase
from pipelines.featurizer import Featurizer
from pipelines.memory_store import MemoryStore
from pipelines.runner import CommitPolicy, Runner
from pipelines.step import Event, Outputs
from services import wiring
from services.settings import Settings

HOURS, WHAT = (1, 3, 24), ("dep_delay_count", "dep_delay_mean", "late_mean")


def fold_use_case() -> UseCase:
    """The flights' departures alone, in 27 features."""
    contract = replace(departed, topic=flights.topic("departed"))
    views = tuple(departures(e.name, [e], HOURS) for e in (origin, carrier, dest))
    return replace(flights, name="fold", contracts=(contract,), views=views, on_demand=(), timers={})


class Fold(Featurizer):
    """The featurizer without offline rows."""

    def process(self, events: Sequence[Event], watermark: int) -> Outputs:
        out = super().process(events, watermark)
        out.offline = []
        return out


def now() -> tuple[float, float]:
    """Wall and CPU seconds of this process."""
    return time.monotonic(), time.process_time()


def main() -> dict[str, Any]:
    """Seconds of the run, and the values at its end: grouping -> key -> count, mean and rate of each window."""
    settings, use_case = Settings.load(), fold_use_case()
    store = MemoryStore(use_case)
    made: list[tuple[float, float]] = []

    def make(partition: int) -> Fold:
        made.append(now())
        return Fold(use_case)

    Runner(
        wiring.broker(settings),
        use_case,
        make,
        settings.state_url,
        store=store,
        policy=CommitPolicy.every(settings.commit_interval_s),
    ).run(threading.Event(), once=True)
    # The last step was made when the partition was given to it, before anything was read.
    seconds, cpu_seconds = (later - earlier for earlier, later in zip(made[-1], now(), strict=True))
    found: dict[str, dict[str, list[Any]]] = {view.name: {} for view in use_case.views}
    for view, (key,), row, _ in store.snapshot():
        found[view][key] = [row[f"{view}_{what}_{hours}h"] for hours in HOURS for what in WHAT]
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "values": found}


if __name__ == "__main__":
    print(json.dumps(main()))
