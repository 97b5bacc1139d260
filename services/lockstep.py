"""A replay in lockstep: each tick begins when the steps and the predictor have taken in all before it.

One tick [T, T + d): produce the events before T and a clock record T; wait until every running step has committed a
watermark of at least T; send the tick's requests; wait until their predictions are on Kafka, then declare them complete
with a clock record T + d. So windows are as of T, never ahead, and a run gives the same predictions again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from pipelines.checkpoint import watermark_of
from services.predict_client import Answer
from services.progress import iso
from services.replay_session import Session, wait_until
from services.source import Request

AtTick = Callable[[int, float], None]


class Lockstep:
    """Runs the ticks of a session."""

    def __init__(self, session: Session, at_tick: AtTick | None = None) -> None:
        self.session, self.at_tick = session, at_tick
        self.steps = ("featurizer", "joiner") if session.http else ("scorer", "joiner")
        if session.broker.members(session.group("learner")):
            self.steps += ("learner",)
        self.phases: dict[str, float] = {}

    def run(self) -> None:
        """From where the session starts to the end of its range."""
        s = self.session
        s.feed.send(s.clocked.clock_messages(s.start))
        for tick in range(s.start, s.plan.until_ms, s.plan.tick_ms):
            s.now, self.phases = tick, {}
            fresh = self._reach(tick)
            requests = s.source.requests(tick, tick + s.plan.tick_ms)
            answers = self._ask(requests, tick + s.plan.tick_ms)
            s.counts.requests += len(requests)
            s.log_tick(tick, fresh, answers, self.phases)
        self._reach(s.plan.until_ms)
        s.feed.producer.flush()
        s.log.add("end", until=s.plan.until_ms, wall=time.time())

    def _reach(self, tick: int) -> list[int]:
        """Produce what lies before `tick` and wait until it is taken in; returns the freshness of each event (ms)."""
        s = self.session
        with Stopwatch(self.phases, "produce"):
            sent = s.feed.produce(tick)
            s.feed.mark(tick)
        marked = time.time()
        s.counts.events += len(sent)
        with Stopwatch(self.phases, "steps"):
            readable, *_ = (self._wait_step(step, tick) for step in self.steps)
        if s.http:
            with Stopwatch(self.phases, "model"):
                self._wait_predictor()
        else:
            self._wait_logged(s.source.requests(max(s.start, tick - s.plan.tick_ms), tick))
        if self.at_tick:
            self.at_tick(tick, marked)
        return [round(readable * 1000) - at for _, at in sent]

    def _ask(self, requests: Sequence[Request], until: int) -> list[Answer]:
        """The tick's requests, answered and logged."""
        s = self.session
        there = s.clocked.read() if requests else set()
        left = [r for r in requests if r.id not in there]
        answers: list[Answer] = []
        if s.http:
            with Stopwatch(self.phases, "predict"):
                answers = s.client.predict(left)
            with Stopwatch(self.phases, "log"):
                self._wait_logged(requests)
                s.feed.producer.send(s.predictions.clock_messages(until))  # the next tick waits for it
            s.predictions.ids.clear()
        else:
            s.feed.send([*map(s.requests.request_message, left), *s.requests.clock_messages(until)])
            s.requests.ids.clear()
        return answers

    def _wait_step(self, step: str, tick: int) -> float:
        """Wall clock at which the step's committed watermark was seen at or past `tick`."""
        s, group = self.session, self.session.group(step)

        def reached() -> int | None:
            return watermark_of(s.broker, group, s.use_case.partitions)

        def lacking() -> str:
            mark = reached()
            where = "has committed nothing yet" if mark is None else f"has only reached {iso(mark)}"
            return f"step {group} {where}, awaited {iso(tick)}: see `penstock status` and {s.logs}"

        wait_until(lambda: (reached() or 0) >= tick, lacking, s.plan.deadline_s)
        return time.time()

    def _wait_predictor(self) -> None:
        """Until the predictor serves the newest state of the models topic, and its champion's newest refresh."""
        s = self.session
        models = s.models.read()
        state = models.get(b"state", {})
        newest, champion = int(state.get("generation", 0)), state.get("roles", {}).get("champion")
        refresh = int(models.get(f"refresh:{champion}".encode(), {}).get("number", 0))
        reply: dict[str, Any] = {}

        def serves() -> bool:
            nonlocal reply
            reply = s.client.get("/readyz") or {}
            refreshed = "learner" not in self.steps or int(reply.get("refresh") or 0) >= refresh
            return bool(reply.get("ready")) and int(reply.get("generation") or 0) >= newest and refreshed

        def lacking() -> str:
            wanted = f"generation {newest}, refresh {refresh}"
            return f"{s.client.url}/readyz says {reply or 'nothing'}, awaited {wanted}: see {s.logs}"

        wait_until(serves, lacking, s.plan.deadline_s)

    def _wait_logged(self, requests: Sequence[Request]) -> None:
        """Until the predictions of all these requests are on Kafka."""
        s, ids = self.session, {r.id for r in requests}

        def lacking() -> str:
            missing = sorted(ids - s.predictions.ids)
            who = "the predictor's spool ships them" if s.http else "the scorer writes them"
            what = f"{len(missing)} of {len(ids)} predictions ({missing[0]}, ...)"
            return f"{what} are not on {s.predictions.topic}; {who}: see {s.logs}"

        def logged() -> bool:
            return ids <= s.predictions.ids or ids <= s.predictions.read(0.05)

        wait_until(logged, lacking, s.plan.deadline_s)
        if not s.http:
            s.predictions.ids -= ids


class Stopwatch:
    """Puts the wall milliseconds of a `with` block into `into[name]`."""

    def __init__(self, into: dict[str, float], name: str) -> None:
        self.into, self.name = into, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.into[self.name] = round((time.perf_counter() - self.start) * 1000, 3)
