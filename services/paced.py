"""A replay at a speed: events and requests go out at their time by the wall clock, and nothing waits for a step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from features.errors import PenstockError
from pipelines.checkpoint import watermark_of
from services.predict_client import Answer
from services.replay_session import Session, wait_until
from services.source import Request

LOOK_EVERY_S = 0.005


class Paced:
    """Runs a session at `speed` simulated seconds per second."""

    def __init__(self, session: Session, speed: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.session, self.speed, self.clock = session, speed, clock
        self.began = clock()
        self.unread: deque[tuple[int, int]] = deque()
        self.asked: dict[str, tuple[Request, Future[list[Answer]] | None]] = {}
        self.answers: list[Answer] = []

    def run(self) -> None:
        """From where the session starts to the end of its range, then until everything sent is answered."""
        s = self.session
        s.feed.send(s.clocked.clock_messages(s.start))
        s.feed.mark(s.start)
        with ThreadPoolExecutor(8, thread_name_prefix="request") as pool:
            for tick in range(s.start, s.plan.until_ms, s.plan.tick_ms):
                s.now = tick
                self._tick(tick, pool)
            wait_until(
                self._settled,
                lambda: f"{len(self.asked)} requests are not on {s.predictions.topic}: see {s.logs}",
                s.plan.deadline_s,
            )
        s.feed.send(s.clocked.clock_messages(s.plan.until_ms))

    def _tick(self, tick: int, pool: ThreadPoolExecutor) -> None:
        s, end = self.session, tick + self.session.plan.tick_ms
        waiting, fresh, sent_until = deque(s.source.requests(tick, end)), list[int](), tick
        while sent_until < end:
            sent_until = min(end, s.start + round((self.clock() - self.began) * 1000 * self.speed))
            sent = s.feed.produce(sent_until)
            s.counts.events += len(sent)
            self.unread.extend(sent)
            while waiting and waiting[0].time < sent_until:
                self._ask(waiting.popleft(), pool)
            fresh += self._read()
            self._settled()
            time.sleep(LOOK_EVERY_S)
        s.feed.mark(end)
        s.feed.send(s.clocked.clock_messages(self._complete_until(end)))
        s.log_tick(tick, fresh, self.answers, {})
        self.answers = []

    def _ask(self, request: Request, pool: ThreadPoolExecutor) -> None:
        s = self.session
        s.counts.requests += 1
        if s.http:
            self.asked[request.id] = request, pool.submit(s.client.predict, [request])
        else:
            s.feed.producer.send([s.requests.request_message(request)])

    def _settled(self) -> bool:
        """Take in answers; a request is settled when its prediction is on Kafka, or when nobody answers it."""
        logged = self.session.predictions.read()
        for id_, (request, future) in list(self.asked.items()):
            if future is not None and future.done():
                if isinstance(future.exception(), PenstockError):
                    self.session.counts.unanswered += 1
                    del self.asked[id_]
                    continue
                self.answers += future.result()
                future = None
                self.asked[id_] = request, None
            if future is None and id_ in logged:
                del self.asked[id_]
                logged.discard(id_)
        return not self.asked

    def _complete_until(self, end: int) -> int:
        """The end of the last tick whose requests are all settled."""
        first = min([end, *(request.time for request, _ in self.asked.values())])
        return first - first % self.session.plan.tick_ms

    def _read(self) -> list[int]:
        """Milliseconds since `sent` of the events that the featurizer's watermark has newly passed."""
        if not self.unread:
            return []
        s = self.session
        step = s.group("featurizer" if s.http else "scorer")
        mark = watermark_of(s.broker, step, s.use_case.partitions) or 0
        now, fresh = round(time.time() * 1000), []
        while self.unread and self.unread[0][0] < mark:
            fresh.append(now - self.unread.popleft()[1])
        return fresh
