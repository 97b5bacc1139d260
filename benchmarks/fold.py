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
from pipelines.runner import CommitPolicy, Runner
from pipelines.step import Event, Outputs, Rows
from services import wiring
from services.settings import Settings

NAME, HOURS = "fold", (1, 3, 24)


def fold_use_case() -> UseCase:
    """The flights' departures alone, in 27 features."""
    contract = replace(departed, topic=flights.topic("departed"))
    views = tuple(departures(e.name, [e], HOURS) for e in (origin, carrier, dest))
    return replace(flights, name=NAME, contracts=(contract,), views=views, on_demand=(), timers={})


class Fold(Featurizer):
    """The featurizer without offline rows; `began` is when its first event came (wall and CPU seconds)."""

    began: tuple[float, float] | None = None

    def process(self, events: Sequence[Event], watermark: int) -> Outputs:
        self.began = self.began or now()
        out = super().process(events, watermark)
        out.offline = []
        return out


def now() -> tuple[float, float]:
    """Wall and CPU seconds of this process."""
    return time.monotonic(), time.process_time()


class Values:
    """The newest values of every key."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[tuple[Any, ...], tuple[Any, ...]]] = {}

    def write(self, rows: Sequence[Rows]) -> None:
        for batch in rows:
            self.rows.setdefault(batch.view, {}).update(
                zip(batch.keys, zip(*batch.columns.values(), strict=True), strict=True)
            )


def main() -> dict[str, Any]:
    """Seconds of the run, and the values at its end: grouping -> key -> count, mean and rate of each window."""
    settings, use_case, values = Settings.load(), fold_use_case(), Values()
    steps: list[Fold] = []

    def make(partition: int) -> Fold:
        steps.append(Fold(use_case))
        return steps[-1]

    Runner(
        wiring.broker(settings),
        use_case,
        make,
        settings.state_url,
        store=values,
        policy=CommitPolicy.every(settings.commit_interval_s),
    ).run(threading.Event(), once=True)
    began = next(step.began for step in steps if step.began)
    seconds, cpu_seconds = (later - earlier for earlier, later in zip(began, now(), strict=True))
    found = {view: {key[0]: ordered(row) for key, row in rows.items()} for view, rows in values.rows.items()}
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "values": found}


def ordered(row: Sequence[Any]) -> list[Any]:
    """Count, mean, rate per window, from a row's (mean, count) of each window and then its rates."""
    means, counts, rates = row[0:6:2], row[1:6:2], row[6:]
    return [value for window in zip(counts, means, rates, strict=True) for value in window]


if __name__ == "__main__":
    print(json.dumps(main()))
