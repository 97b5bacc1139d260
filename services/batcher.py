"""Requests that wait are answered together, on the event loop. Nothing waits for company.

Whatever the loop has read from its sockets by the time it comes back to the queue is one batch: alone at rest, dozens
under load. A thread would cost two hand-overs of the interpreter lock a batch, more than it could overlap.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from features.errors import UnavailableError

BATCH_ROWS = 256
WAITING_ROWS = 10_000

RowT, AnswerT = TypeVar("RowT"), TypeVar("AnswerT")
Answers = tuple[list[AnswerT], bool]  # in the order of the rows; False: they should have been logged and are not


@dataclass(slots=True)
class _Waiting(Generic[RowT, AnswerT]):
    rows: Sequence[RowT]
    deadline: float
    reply: asyncio.Future[Answers[AnswerT]]


class Batcher(Generic[RowT, AnswerT]):
    """Gathers what waits and answers it in batches; at most `WAITING_ROWS` may wait.

    clock : monotonic seconds, against which deadlines are held
    """

    def __init__(
        self, answer: Callable[[Sequence[RowT]], Answers[AnswerT]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._answer, self._clock = answer, clock
        self._queue: deque[_Waiting[RowT, AnswerT]] = deque()
        self._rows = 0

    def submit(self, rows: Sequence[RowT], deadline: float) -> asyncio.Future[Answers[AnswerT]]:
        """Answers to these rows; UnavailableError when too many wait already, or `deadline` passes first."""
        if self._rows + len(rows) > WAITING_ROWS:
            raise UnavailableError(f"{self._rows} rows are waiting already: try again later")
        loop = asyncio.get_running_loop()
        waiting = _Waiting(rows, deadline, loop.create_future())
        if not self._queue:
            loop.call_soon(self._run, loop)
        self._queue.append(waiting)
        self._rows += len(rows)
        return waiting.reply

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        batch, size, now = list[_Waiting[RowT, AnswerT]](), 0, self._clock()
        while self._queue and size < BATCH_ROWS:
            waiting = self._queue.popleft()
            self._rows -= len(waiting.rows)
            if waiting.reply.cancelled():
                continue
            if waiting.deadline < now:
                waiting.reply.set_exception(UnavailableError("its deadline passed before its turn: try again later"))
            else:
                batch.append(waiting)
                size += len(waiting.rows)
        if self._queue:
            loop.call_soon(self._run, loop)
        if batch:
            self._reply(batch)

    def _reply(self, batch: list[_Waiting[RowT, AnswerT]]) -> None:
        try:
            answers, logged = self._answer([row for waiting in batch for row in waiting.rows])
        except Exception as error:  # goes to the caller whose row it is
            if len(batch) > 1 and not isinstance(error, UnavailableError):
                for waiting in batch:
                    self._reply([waiting])
            else:
                for waiting in batch:
                    waiting.reply.set_exception(error)
            return
        start = 0
        for waiting in batch:
            waiting.reply.set_result((answers[start : start + len(waiting.rows)], logged))
            start += len(waiting.rows)
