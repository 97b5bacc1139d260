"""A client of `POST /predict` that doesn't give up: keep-alive connections, concurrent requests, retries."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from features.errors import InputError, UnavailableError
from services.source import Request

CONNECTIONS = 32
RETRY_LATER = (408, 425, 429)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request; `answered` is the wall clock, `event_time` the request's, both epoch ms."""

    request_id: str
    event_time: int
    score: float
    version: str
    arm: str
    missing: tuple[str, ...]
    answered: int


@dataclass
class PredictClient:
    """Sends requests one row each; all of a batch are on their way before the first answer is read.

    Threads may share it.

    token : `predictor_token`, where it is set
    timeout_s : for one answer; deadline_s : for a request with all its retries, under the same request id
    """

    url: str
    timeout_s: float = 10.0
    deadline_s: float = 180.0
    token: str = ""
    clock: Callable[[], float] = time.time
    _idle: list[http.client.HTTPConnection] = field(default_factory=list)

    def predict(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of the requests; raises UnavailableError past the deadline, InputError on a 4xx."""
        give_up, pause = time.monotonic() + self.deadline_s, 0.02
        answers: dict[str, Answer] = {}
        while left := [r for r in requests if r.id not in answers]:
            problem = ""
            for start in range(0, len(left), CONNECTIONS):
                problem = self._round(left[start : start + CONNECTIONS], answers) or problem
            if problem and time.monotonic() > give_up:
                waiting = len([r for r in requests if r.id not in answers])
                raise UnavailableError(
                    f"{self.url}/predict: {waiting} of {len(requests)} requests are unanswered after "
                    f"{self.deadline_s:.0f} s ({problem}); see the predictor's log"
                )
            if problem:
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
        return [answers[r.id] for r in requests]

    def get(self, path: str) -> dict[str, Any] | None:
        """The JSON answer to a GET, also of a 503; None while nobody answers."""
        connection = self._connection()
        try:
            connection.request("GET", path)
            body = connection.getresponse().read()
            reply = msgspec.json.decode(body)
        except (OSError, http.client.HTTPException, msgspec.DecodeError):
            connection.close()
            return None
        self._idle.append(connection)
        return reply if isinstance(reply, dict) else None

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    def _round(self, requests: Sequence[Request], answers: dict[str, Answer]) -> str:
        """Send all, then read all; returns why some are unanswered, or ""."""
        problem, sent = "", []
        for request in requests:
            connection = self._connection()
            try:
                connection.request("POST", "/predict", encode_row(request), self._headers)
                sent.append((request, connection))
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                problem = describe(error)
        for request, connection in sent:
            try:
                response = connection.getresponse()
                body = response.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                problem = describe(error)
                continue
            self._idle.append(connection)
            if response.status == 200:
                answers[request.id] = self._answer(request, body)
            elif response.status < 500 and response.status not in RETRY_LATER:
                raise InputError(f"{self.url}/predict refuses {request.id}: {response.status} {body[:300].decode()}")
            else:
                problem = f"status {response.status}"
        return problem

    @property
    def _headers(self) -> dict[str, str]:
        access = {"authorization": f"Bearer {self.token}"} if self.token else {}
        return {"content-type": "application/json"} | access

    def _connection(self) -> http.client.HTTPConnection:
        try:
            return self._idle.pop()
        except IndexError:
            address = urlsplit(self.url)
            return http.client.HTTPConnection(address.hostname or "", address.port, timeout=self.timeout_s)

    def _answer(self, request: Request, body: bytes) -> Answer:
        row = msgspec.json.decode(body, type=_Reply).rows[0]
        return Answer(
            request.id, request.time, row.score, row.version, row.arm, tuple(row.missing), round(self.clock() * 1000)
        )


class _Row(msgspec.Struct):
    score: float
    version: str
    arm: str
    missing: list[str]


class _Reply(msgspec.Struct):
    rows: list[_Row]


def encode_row(request: Request) -> bytes:
    """The body of a request with one row."""
    return msgspec.json.encode({"rows": [request.row]})


def describe(error: Exception) -> str:
    """An error's own words, or its name when it has none."""
    return str(error) or type(error).__name__
