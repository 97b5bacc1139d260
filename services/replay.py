"""`penstock replay`: past events into Kafka, past requests to the predictor, in lockstep or at a speed."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from features.usecase import UseCase
from services.lockstep import AtTick, Lockstep
from services.paced import Paced
from services.progress import Progress, iso
from services.replay_log import freshness, read_log, tick_times
from services.replay_session import Mode, Plan, Session
from services.settings import Settings
from services.source import Source


@dataclass(frozen=True)
class ReplayReport:
    """What one run of a replay did. Times in epoch ms; `tick_ms` and `freshness_ms` are wall milliseconds."""

    start: int
    until: int
    events: int
    requests: int
    ticks: int
    unanswered: int
    wall_s: float
    tick_ms: dict[str, Any]
    freshness_ms: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return asdict(self)

    def __str__(self) -> str:
        done = f"{self.events:,} events, {self.requests:,} requests, {self.ticks:,} ticks in {self.wall_s:.0f} s"
        lines = [f"replayed {iso(self.start)} to {iso(self.until)}: {done}"]
        if self.unanswered:
            lines.append(f"{self.unanswered:,} requests were not answered")
        rows = {**self.tick_ms, "freshness": self.freshness_ms}
        lines += [f"  {n:<10} p50 {q['p50']:8.1f} ms  p95 {q['p95']:8.1f} ms" for n, q in rows.items() if q["n"]]
        return "\n".join(lines)


def replay(
    settings: Settings,
    use_case: UseCase,
    source: Source,
    from_: datetime,
    until: datetime,
    *,
    tick: timedelta = timedelta(minutes=15),
    speed: float | None = None,
    requests: Mode = "http",
    at_tick: AtTick | None = None,
    progress: bool = True,
) -> ReplayReport:
    """Replay [from_, until) by event time; goes on where an earlier replay into the same topics stopped.

    Parameters
    ----------
    tick : the lockstep's tick; at a speed, how much simulated time lies between clock records
    speed : simulated seconds per second; None is lockstep
    requests : over HTTP to the predictor, or as records of `<uc>.requests` for the scorer
    at_tick : called with (tick start in epoch ms, wall clock when its clock records were out) when every running
        step's watermark has reached the tick's start
    """
    from services.wiring import broker

    plan = Plan.of(from_, until, tick, requests)
    shown = Progress(plan.from_ms, plan.until_ms, progress)
    began = time.monotonic()
    with (
        closing(broker(settings)) as connected,
        closing(Session(settings, use_case, source, connected, plan, shown)) as session,
    ):
        before = len(read_log(session.log.path))
        try:
            Lockstep(session, at_tick).run() if speed is None else Paced(session, speed).run()
        except KeyboardInterrupt:
            shown.line(f"stopped in the tick of {iso(session.now)}; the same command goes on from there")
            raise
    entries = read_log(session.log.path)[before:]
    return ReplayReport(
        session.start,
        plan.until_ms,
        **asdict(session.counts),
        wall_s=round(time.monotonic() - began, 1),
        tick_ms=tick_times(entries),
        freshness_ms=freshness(entries),
    )
