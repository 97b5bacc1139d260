"""`penstock backfill`: a new or changed view over all of history, then live without a gap."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from features.usecase import UseCase
from pipelines.backfill import Backfill
from pipelines.broker import Broker
from pipelines.checkpoint import unserved_views, watermark_of
from pipelines.feature_store import FeatureStore
from pipelines.runner import CommitPolicy, Runner
from services import wiring
from services.progress import Progress, iso
from services.settings import Settings

PATIENT = CommitPolicy(seconds=5.0, records=50_000)
ADOPTED_S = 60.0  # how long to wait for a live featurizer, which looks every few seconds
LOOK_S = 0.5


@dataclass(frozen=True)
class Filled:
    """How far a view has been computed (epoch ms), and whether a live featurizer serves it now."""

    view: str
    watermark: int | None
    live: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        until = iso(self.watermark) if self.watermark else "the start"
        rest = "and is live" if self.live else "and goes live when the featurizer runs and history is complete"
        return f"{self.view}: computed up to {until} {rest}"


def backfill(settings: Settings, use_case: UseCase, view: str, from_ms: int, until_ms: int | None) -> Filled:
    """Compute `view` over the topics, up to their end or to `until_ms`; run again, it goes on."""
    with (
        contextlib.closing(wiring.broker(settings)) as broker,
        contextlib.closing(wiring.feature_store(settings, use_case)) as store,
    ):
        _compute(settings, use_case, view, from_ms, until_ms, broker, store)
        group = use_case.topic(Backfill(use_case, view).name)
        live = until_ms is None and _adopted(broker, use_case, view)
        return Filled(view, watermark_of(broker, group), live)


def _compute(
    settings: Settings,
    use_case: UseCase,
    view: str,
    from_ms: int,
    until_ms: int | None,
    broker: Broker,
    store: FeatureStore,
) -> None:
    def make(partition: int) -> Backfill:
        return Backfill(use_case, view, from_ms)

    runner = Runner(broker, use_case, make, settings.state_url, store=store, policy=PATIENT, rejects=False)
    live = watermark_of(broker, use_case.topic("featurizer"), use_case.partitions)
    end = until_ms or live or round(time.time() * 1000)
    shown = Progress(from_ms, end)
    stop, done = threading.Event(), threading.Event()

    def watch() -> None:
        while not done.wait(LOOK_S):
            mark = watermark_of(broker, runner.group, use_case.partitions) or from_ms
            shown.start_ms = shown.start_ms or mark
            shown.update(min(mark, end))
            if until_ms is not None and mark >= until_ms:
                stop.set()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        runner.run(stop, once=True)
    finally:
        done.set()
        watcher.join()


def _adopted(broker: Broker, use_case: UseCase, view: str) -> bool:
    """Wait until the live featurizer has taken the view over; False at once when none runs."""
    group = use_case.topic("featurizer")

    def waits() -> bool:
        return view in unserved_views(broker, group)

    if not broker.members(group):
        return False
    _poll(lambda: not waits(), ADOPTED_S)
    return not waits()


def _poll(reached: Callable[[], bool], patience: float) -> None:
    deadline, pause = time.monotonic() + patience, threading.Event()
    while not reached() and time.monotonic() < deadline:
        pause.wait(LOOK_S)
