"""A loop to replay into: real featurizer and joiner on the in-memory broker, and a small predictor over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec

from features.usecase import UseCase
from features.vectors import Vectorizer
from pipelines.broker import Record, clock_of
from pipelines.featurizer import Featurizer
from pipelines.joiner import Joiner
from pipelines.memory_store import MemoryStore
from pipelines.prediction import Choice, prediction_message
from pipelines.runner import CommitPolicy, Runner
from services.progress import Progress
from services.replay_session import Plan, Session
from services.settings import Settings
from services.source import Request, SourceEvent
from services.topics import create_topics
from tests.memory_broker import MemoryBroker
from tests.toy import use_case

MINUTE = 60_000
START = 1_356_998_400_000  # 2013-01-01T00:00:00Z
TICK = 15 * MINUTE


class Orders:
    """An order every 5 minutes, every third returned 20 minutes later; a request every 4."""

    def events(self, from_ms: int, until_ms: int) -> list[SourceEvent]:
        found = []
        for i in range(2000):
            at = START + 5 * i * MINUTE
            order = {"id": f"o{i}", "time": at, "shop": f"s{i % 3}", "item": i % 2, "price": i % 7 + 0.25}
            found.append(SourceEvent("ordered", at, f"o{i}".encode(), msgspec.json.encode(order)))
            if i % 3 == 0:
                back = {"id": f"r{i}", "time": at + 20 * MINUTE, "order": f"q{i}", "why": "late"}
                found.append(SourceEvent("returned", back["time"], f"o{i}".encode(), msgspec.json.encode(back)))
        return sorted((e for e in found if from_ms <= e.time < until_ms), key=lambda e: (e.time, e.event))

    def requests(self, from_ms: int, until_ms: int) -> list[Request]:
        found = []
        for i in range(2000):
            at = START + 4 * i * MINUTE
            row = {"request_id": f"q{i}", "event_time": at, "entities": {"shop": f"s{i % 3}", "item": i % 2}}
            found.append(Request(f"q{i}", at, row | {"fields": {"price": i % 5 + 0.5}}))
        return [r for r in found if from_ms <= r.time < until_ms]


class Predictor:
    """Answers from the online store and logs the vector; the first `failures` requests are lost after logging."""

    def __init__(self, broker: MemoryBroker, store: MemoryStore, case: UseCase = use_case, failures: int = 0) -> None:
        self.producer, self.store, self.case, self.failures = broker.producer(), store, case, failures
        self.vectorizer, self.lock = Vectorizer(case), threading.Lock()
        self.answered: list[str] = []
        self.generation, self.champion = 0, "prior"

    def predict(self, row: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            keys = self.vectorizer.entity_keys(row["entities"], row["fields"])
            vector = self.vectorizer.assemble(keys, row["fields"], row["event_time"], self.store.read([keys])[0])
            score = 0.2 + 0.1 * (row["event_time"] // MINUTE % 5)
            message = prediction_message(
                self.case,
                Choice(self.champion, 0, "champion", score, {}, {}),
                request_id=row["request_id"],
                event_time=row["event_time"],
                keys=keys,
                fields=row["fields"],
                vector=vector,
                schema=self.vectorizer.schema_id,
                timestamp=row["event_time"],
                sent=0,
            )
            self.producer.send([message])
            self.answered.append(row["request_id"])
        reply = {"request_id": row["request_id"], "score": score, "version": self.champion, "arm": "champion"}
        return reply | {"missing": vector.missing, "stale": []}


@contextmanager
def serve(predictor: Predictor) -> Iterator[int]:
    """The predictor's HTTP server; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            row = json.loads(self.rfile.read(int(self.headers["content-length"])))["rows"][0]
            answer = predictor.predict(row)
            if predictor.failures:
                predictor.failures -= 1
                self.close_connection = True
                return
            self.reply(200, {"rows": [answer]})

        def do_GET(self) -> None:
            state = {"ready": True, "generation": predictor.generation, "champion": predictor.champion}
            self.reply(200, state)

        def reply(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def loop(broker: MemoryBroker, home: Path, failures: int = 0) -> Iterator[tuple[Settings, Predictor]]:
    """Steps and predictor running; the topics are there."""
    create_topics(broker, use_case)
    store, stop = MemoryStore(use_case), threading.Event()
    predictor = Predictor(broker, store, failures=failures)
    steps = [
        Runner(
            broker, use_case, lambda _: Featurizer(use_case), str(home / "state"), store=store, policy=CommitPolicy(9)
        ),
        Runner(broker, use_case, lambda i: Joiner(use_case, i), str(home / "state"), policy=CommitPolicy(9)),
    ]
    threads = [threading.Thread(target=step.run, args=(stop,), daemon=True) for step in steps]
    for thread in threads:
        thread.start()
    try:
        with serve(predictor) as port:
            yield Settings(home=home, predictor_port=port), predictor
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)


def session(
    broker: MemoryBroker, settings: Settings, until: int, requests: Any = "http", deadline_s: float = 20
) -> Session:
    """A session over [START, until)."""
    plan = Plan(START, until, TICK, requests, deadline_s)
    return Session(settings, use_case, Orders(), broker, plan, Progress(START, until, shown=False))


def records(broker: MemoryBroker, topic: str) -> list[Record]:
    """What is on a topic, without clock records."""
    return [r for r in broker.consumer([topic]).poll(0, 10**6) if clock_of(r) is None]


def clocks(broker: MemoryBroker, topic: str) -> Sequence[int]:
    """The times of the clock records on a topic."""
    found = [clock_of(r) for r in broker.consumer([topic]).poll(0, 10**6)]
    return [clock for clock in found if clock is not None]
