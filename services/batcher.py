"""Requests that wait are answered together, by one thread. Nothing waits for company."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from features.errors import UnavailableError
from services.predict_request import Asked

BATCH_ROWS = 256
WAITING_ROWS = 10_000

Answer = dict[str, Any]


@dataclass(slots=True)
class _Waiting:
    rows: list[Asked]
    loop: asyncio.AbstractEventLoop
    reply: asyncio.Future[list[Answer]]


class Batcher:
    """Gathers what waits and answers it in one thread; at most `WAITING_ROWS` may wait."""

    def __init__(self, answer: Callable[[Sequence[Asked]], list[Answer]]) -> None:
        self._answer = answer
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._waiting_rows = 0
        self._count = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="predictor", daemon=True)
        self._thread.start()

    async def submit(self, rows: list[Asked]) -> list[Answer]:
        """Answers to these rows; raises UnavailableError when too many wait already."""
        with self._count:
            if self._waiting_rows + len(rows) > WAITING_ROWS:
                raise UnavailableError(f"{self._waiting_rows} rows are waiting already: try again later")
            self._waiting_rows += len(rows)
        loop = asyncio.get_running_loop()
        waiting = _Waiting(rows, loop, loop.create_future())
        self._queue.put(waiting)
        return await waiting.reply

    def close(self) -> None:
        """Answer what waits, then end."""
        self._queue.put(None)
        self._thread.join(10)

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, size, last = [first], len(first.rows), False
            while size < BATCH_ROWS and not self._queue.empty():
                following = self._queue.get()
                if following is None:
                    last = True
                    break
                batch.append(following)
                size += len(following.rows)
            self._reply(batch)
            with self._count:
                self._waiting_rows -= size
            if last:
                return

    def _reply(self, batch: list[_Waiting]) -> None:
        try:
            answers = self._answer([row for waiting in batch for row in waiting.rows])
        except Exception as error:  # goes to the caller whose row it is
            if len(batch) > 1 and not isinstance(error, UnavailableError):
                for waiting in batch:
                    self._reply([waiting])
            else:
                for waiting in batch:
                    _call(waiting, _fail, error)
            return
        start = 0
        for waiting in batch:
            _call(waiting, _resolve, answers[start : start + len(waiting.rows)])
            start += len(waiting.rows)


def _call(waiting: _Waiting, act: Callable[[asyncio.Future[Any], Any], None], what: Any) -> None:
    if not waiting.loop.is_closed():
        waiting.loop.call_soon_threadsafe(act, waiting.reply, what)


def _resolve(reply: asyncio.Future[Any], answers: list[Answer]) -> None:
    if not reply.done():
        reply.set_result(answers)


def _fail(reply: asyncio.Future[Any], error: Exception) -> None:
    if not reply.done():
        reply.set_exception(error)
