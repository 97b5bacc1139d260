"""The monitor: a use case's status again and again, its rates, its quality, and what is broken since when."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from pipelines.rollout import RolloutState
from services import airflow_env, served_quality
from services.metrics import MonitorMetrics
from services.settings import Settings
from services.status import StatusReader
from services.topic_reader import Fold

WATCHED_S, UNWATCHED_S = 2.0, 15.0  # between two looks, with a page open and without
WATCHERS_S = 10.0  # a page that hasn't asked for so long is closed
RESTARTED_S = 15.0  # a restart is told for so long: the process may answer again at once, and end again
STANDS_S = 15.0  # without a commit, beside records to read
RATE_S = 30.0  # what a rate is the mean of
READ_MOST = 5_000  # examples at a time
log = structlog.get_logger()


@dataclass(frozen=True)
class Trouble:
    """Something that is broken; `since` is epoch seconds."""

    what: str
    why: str
    since: float


@dataclass(frozen=True)
class Seen:
    """One look; what the page shows. `at` is epoch seconds, `rates` records a second by step."""

    at: float
    status: Mapping[str, Any]
    rates: Mapping[str, float] = field(default_factory=dict)
    broken: tuple[Trouble, ...] = ()
    days: list[dict[str, Any]] = field(default_factory=list)
    versions: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)


class Watch:
    """What looks in sequence tell: since when something is broken, which steps stand still, how fast they go."""

    def __init__(self) -> None:
        self.broken: dict[str, Trouble] = {}
        self.moved: dict[str, tuple[Any, float]] = {}
        self.positions: deque[tuple[float, dict[str, int]]] = deque()

    def look(self, status: Mapping[str, Any], now: float) -> tuple[Trouble, ...]:
        """What is broken at `now`, epoch seconds."""
        steps = status.get("steps", {})
        for name, step in steps.items():
            at = (step["position"], step["watermark"])
            if self.moved.get(name, (None,))[0] != at or not _is_behind(name, step, steps):
                self.moved[name] = (at, now)
        if steps:
            self.positions.append((now, {name: step["position"] for name, step in steps.items()}))
        while len(self.positions) > 2 and now - self.positions[0][0] > RATE_S:
            self.positions.popleft()
        found = _parts(status, now)
        for name, step in steps.items():
            found += self._step(name, step, status, now)
        self.broken = {t.what: Trouble(t.what, t.why, self.broken.get(t.what, t).since) for t in found}
        return tuple(self.broken.values())

    def rates(self) -> dict[str, float]:
        """Records a second by step."""
        if len(self.positions) < 2:
            return {}
        (before, first), (now, last) = self.positions[0], self.positions[-1]
        return {name: max(0.0, (last[name] - first[name]) / (now - before)) for name in last}

    def _step(self, name: str, step: Mapping[str, Any], status: Mapping[str, Any], now: float) -> list[Trouble]:
        if not _is_expected(name, step, status):
            return []
        if not step["members"]:
            return [Trouble(f"step {name}", "no instance runs", now)]
        since = self.moved[name][1]
        if now - since > STANDS_S and _is_behind(name, step, status["steps"]):
            return [Trouble(f"step {name}", f"stands still, {step['lag']:,} records behind", since)]
        return []


def _is_expected(name: str, step: Mapping[str, Any], status: Mapping[str, Any]) -> bool:
    """Whether a step is meant to run: a service of the embedded stack has it, or it has committed."""
    if status["running"]:
        return any(("control" if name == "drift" else name) in service for service in status["services"])
    return step["watermark"] is not None


def _is_behind(name: str, step: Mapping[str, Any], steps: Mapping[str, Any]) -> bool:
    """The learner's positions are those of its last refresh, so its watermark tells instead."""
    if name == "learner":
        return (step["watermark"] or 0) < (steps["joiner"]["watermark"] or 0)
    return bool(step["lag"])


def _parts(status: Mapping[str, Any], now: float) -> list[Trouble]:
    """Services and what the steps lean on. What answers nothing because its process is down is named once."""
    down = {n: s for n, s in status["services"].items() if _is_down(s, now)}
    found = [Trouble(n, f"{s['state']}, restarted {s['restarts']} times", s["since"]) for n, s in down.items()]
    silent = [part for part, there in status["reachable"].items() if not there]
    named = {n.split("-")[0] for n in down}
    found += [Trouble(p, status.get("problem", "no answer"), now) for p in silent if p.split("-")[0] not in named]
    ready = status["predictor"]
    if ready and not ready["ready"]:
        found.append(Trouble("predictor", f"not ready: {ready.get('problem') or 'it follows the serving state'}", now))
    return found


def _is_down(service: Mapping[str, Any], now: float) -> bool:
    restarted = service["restarts"] and now - service["since"] < RESTARTED_S
    return bool(restarted) or service["state"] not in ("ready", "done")


class Monitor:
    """Looks on a thread of its own, often while somebody watches. Whatever goes wrong in it is logged and tried again.

    seen : the newest look; None before the first
    """

    def __init__(self, settings: Settings, use_case_name: str, metrics: MonitorMetrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.reader = StatusReader(settings, use_case_name)
        self.use_case = self.reader.use_case
        self.seen: Seen | None = None
        self._watch = Watch()
        self._examples: Fold | None = None
        self._runs: tuple[float, list[dict[str, Any]]] = (0.0, [])
        self._quality: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        self._asked, self._watched_at = threading.Event(), 0.0

    def watched(self) -> Seen | None:
        """The newest look, for somebody who will ask again soon."""
        self._watched_at = time.monotonic()
        self._asked.set()
        return self.seen

    def run(self) -> None:
        """Look for ever."""
        while True:
            more = False
            try:
                more = self.look()
            except Exception as error:  # the page shows how old it is; the steps of this process go on
                log.warning("the monitor could not look, trying again", use_case=self.use_case.name, error=str(error))
            if not more:
                time.sleep(WATCHED_S)
            if time.monotonic() - self._watched_at > WATCHERS_S and not more:
                self._asked.clear()
                self._asked.wait(UNWATCHED_S - WATCHED_S)

    def look(self) -> bool:
        """One look; whether more examples wait to be read."""
        status, now = self.reader.read(), time.time()
        more = "problem" not in status and self._read_examples()
        broken = self._watch.look(status, now)
        days, versions = self._quality
        self.seen = Seen(now, status, self._watch.rates(), broken, days, versions, self._dag_runs(status, now))
        disk = shutil.disk_usage(self.settings.home)
        period = self.use_case.retrain_every.total_seconds()
        self.metrics.show(status, period, self._losses(status), disk.free / disk.total)
        return more

    def _read_examples(self) -> bool:
        self._examples = self._examples or self.reader.fold("examples", served_quality.fold)
        read, state = self._examples.read(READ_MOST), self._examples.state
        if read or not self._quality[0]:
            self._quality = (served_quality.by_day(state), served_quality.by_version(state))
        return read >= READ_MOST

    def _losses(self, status: Mapping[str, Any]) -> dict[str, float]:
        if not self._examples or "serving" not in status:
            return {}
        state = RolloutState.from_json(status["serving"])
        roles = {"champion": state.champion, "predecessor": state.previous}
        found = {r: served_quality.recent_loss(self._examples.state, v) for r, v in roles.items() if v}
        return {role: loss for role, loss in found.items() if loss is not None}

    def _dag_runs(self, status: Mapping[str, Any], now: float) -> list[dict[str, Any]]:
        """At most every 15 s; none where Airflow is not ours to ask."""
        asked, runs = self._runs
        if status["reachable"].get("airflow-api") and now - asked > UNWATCHED_S:
            with contextlib.suppress(OSError, KeyError):  # shown as away, or without our password
                runs = airflow_env.dag_runs(self.settings, self.use_case.name)
            self._runs = (now, runs)
        return runs
