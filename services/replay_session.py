"""What a replay works with: its range, its connections, its waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from features.errors import InputError, UnavailableError
from features.usecase import UseCase
from pipelines.broker import Broker
from services.feed import Feed, Followed
from services.predict_client import Answer, PredictClient
from services.progress import Progress, iso
from services.replay_log import ReplayLog, log_path
from services.settings import Settings
from services.source import Source
from services.topic_reader import Newest

Mode = Literal["http", "topic"]
POLL_S = 0.004  # a look at a committed position costs client and broker half a millisecond each


@dataclass(frozen=True)
class Plan:
    """The range and its ticks, in epoch ms; `requests` go over HTTP or to `<uc>.requests`."""

    from_ms: int
    until_ms: int
    tick_ms: int
    requests: Mode = "http"
    deadline_s: float = 180.0

    @classmethod
    def of(cls, from_: datetime, until: datetime, tick: timedelta, requests: Mode = "http") -> Plan:
        """Checked: InputError when the range is empty or doesn't consist of whole ticks."""
        start, end, step = to_ms(from_), to_ms(until), tick // timedelta(milliseconds=1)
        if start >= end:
            raise InputError(f"nothing to replay: --from {iso(start)} is not before --until {iso(end)}")
        if step <= 0 or start % step or end % step:
            raise InputError(f"{iso(start)} and {iso(end)} must both be multiples of the tick, {tick}, in UTC")
        return cls(start, end, step, requests)


@dataclass
class Counts:
    """What a replay has done so far."""

    events: int = 0
    requests: int = 0
    ticks: int = 0
    unanswered: int = 0


@dataclass
class Session:
    """The connections of one replay. `clocked` is the topic whose clock the replay moves, tick by tick:
    the predictions when requests go over HTTP, the requests when they are records."""

    settings: Settings
    use_case: UseCase
    source: Source
    broker: Broker
    plan: Plan
    progress: Progress
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        with ExitStack() as opened:  # what is open is closed when the next one can't be
            self._connect(opened)
            self.start = self._start()
            self._opened = opened.pop_all()
        self.logs = self.settings.home / "logs"
        self.now = self.progress.start_ms = self.start

    def _connect(self, opened: ExitStack) -> None:
        plan = self.plan
        self.http = plan.requests == "http"
        self.feed = Feed(self.broker, self.use_case, self.source, plan.from_ms)
        opened.callback(self.feed.producer.close)
        self.predictions = opened.enter_context(closing(Followed(self.broker, self.use_case, "predictions")))
        self.requests = opened.enter_context(closing(Followed(self.broker, self.use_case, "requests")))
        self.clocked = self.predictions if self.http else self.requests
        self.models = opened.enter_context(closing(Newest(self.broker, self.use_case.topic("models"))))
        client = PredictClient(
            self.settings.predictor_url, deadline_s=plan.deadline_s, token=self.settings.predictor_token
        )
        self.client = opened.enter_context(closing(client))
        self.log = opened.enter_context(closing(ReplayLog(log_path(self.settings, self.use_case.name))))

    def group(self, step: str) -> str:
        """The consumer group of a step."""
        return f"{self.use_case.name}.{step}"

    def _start(self) -> int:
        """The range's start, or where an earlier replay of these topics stopped."""
        plan = self.plan
        start = max(plan.from_ms, self.clocked.clock or 0)
        if start >= plan.until_ms:
            self.progress.line(f"already replayed up to {iso(start)}")
            return plan.until_ms
        if start > plan.from_ms:
            self.progress.line(f"resuming at {iso(start)}")
        if start % plan.tick_ms:
            raise InputError(f"an earlier replay stopped at {iso(start)}, within a tick: use the tick it was run with")
        return start

    def log_tick(self, tick: int, fresh: Sequence[int], answers: Sequence[Answer], phases: dict[str, float]) -> None:
        """Record what one tick showed.

        fresh : of each event, the milliseconds until it was readable
        phases : wall milliseconds; empty when nothing waited for the steps
        """
        self.counts.ticks += 1
        rows = [[a.request_id, a.event_time, a.score, a.version, a.arm, len(a.missing), a.answered] for a in answers]
        held = "" if not phases else "tick" if self.http else "request"
        until = tick + self.plan.tick_ms
        self.log.add("tick", tick=tick, until=until, held=held, phases=phases, freshness=fresh, answers=rows)
        self.progress.update(tick + self.plan.tick_ms)

    def close(self) -> None:
        """Give the connections back; what was sent stays sent."""
        self._opened.close()


def wait_until(
    reached: Callable[[], bool], lacking: Callable[[], str], deadline_s: float, poll_s: float = POLL_S
) -> None:
    """Poll until reached; past the deadline UnavailableError says what is lacking."""
    give_up = time.monotonic() + deadline_s
    while not reached():
        if time.monotonic() > give_up:
            raise UnavailableError(f"{lacking()} (waited {deadline_s:.0f} s)")
        time.sleep(poll_s)


def to_ms(at: datetime) -> int:
    """Epoch ms of an instant."""
    return round(at.timestamp() * 1000)
