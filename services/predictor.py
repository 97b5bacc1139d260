"""The predictor: `POST /predict` by entity keys, features from the online store, scored by the model in the slot.

Requests that wait are answered together by one thread: one read of the store, one run of the model, one write to the
spool, then the replies. Nothing waits for company: a request alone is answered alone.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import msgspec
import structlog
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from features.errors import ConfigError, UnavailableError
from features.inputs import encode
from features.usecase import UseCase, load
from features.vectors import StoredRow, Vectorizer
from pipelines.broker import Message
from pipelines.prediction import prediction_message
from services.batcher import Answer, Batcher
from services.predict_metrics import PredictMetrics
from services.predict_request import MAX_BODY, Asked, Refused, RequestDecoder
from services.serving_state import ModelSlot, Prior, ServingState
from services.settings import Settings
from services.spool import Shipper, Spool

log = structlog.get_logger()
ARM = "champion"
STORE_TIMEOUT_S = 0.3
STORE_PAUSE_S = 1.0
STARTUP_S = 20.0
DRAIN_S = 5.0


class Reader(Protocol):
    """What the predictor needs of an online store."""

    def read(self, keys: Sequence[Mapping[str, Any]]) -> list[dict[str, StoredRow]]: ...


def wall_ms() -> int:
    """Epoch ms now."""
    return time.time_ns() // 1_000_000


class Predictor:
    """Answers batches of rows: reads, assembles, scores, spools."""

    def __init__(
        self,
        use_case: UseCase,
        store: Reader,
        spool: Spool,
        slot: ModelSlot,
        *,
        simulated_time: bool,
        clock: Callable[[], int],
        metrics: PredictMetrics,
        unserved: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self.use_case, self.store, self.spool, self.slot = use_case, store, spool, slot
        self.simulated_time, self.clock, self.metrics, self.unserved = simulated_time, clock, metrics, unserved
        self.vectorizer = Vectorizer(use_case)
        self._store_again_at = 0.0

    def answer(self, rows: Sequence[Asked]) -> list[Answer]:
        """Answers in the order of `rows`, whose predictions are spooled; raises UnavailableError when they can't be."""
        model, now = self.slot.current, self.clock()
        times = [now if row.event_time is None else row.event_time for row in rows]
        keys = [self.vectorizer.entity_keys(row.entities, row.fields) for row in rows]
        vectors = [
            self.vectorizer.assemble(k, row.fields, t, stored)
            for row, k, t, stored in zip(rows, keys, times, self._read(keys), strict=True)
        ]
        scores = self._finite(model.score(encode(model.inputs, [v.features for v in vectors])).tolist())
        messages, answers = [], []
        for row, k, t, vector, score in zip(rows, keys, times, vectors, scores, strict=True):
            served = {"request_id": row.request_id, "score": score, "version": model.version}
            served |= {"arm": ARM, "refresh": model.refresh}
            messages.append(self._message(row, k, t, now, vector, served))
            answers.append({**served, "missing": vector.missing, "stale": vector.stale})
        self.spool.append(messages)
        self.metrics.answered(vectors)
        return answers

    def _message(self, row: Asked, keys: Any, time: int, now: int, vector: Any, served: Answer) -> Message:
        return prediction_message(
            self.use_case,
            event_time=time,
            keys=keys,
            fields=row.fields,
            vector=vector,
            schema=self.vectorizer.schema_id,
            timestamp=time if self.simulated_time else now,
            sent=now,
            **served,
        )

    def _read(self, keys: Sequence[Mapping[str, Any]]) -> list[dict[str, StoredRow]]:
        """Stored rows, or none at all while the store is away: the model knows nulls, a caller wants an answer."""
        if time.monotonic() < self._store_again_at:
            self.metrics.store_errors.inc()
            return [{}] * len(keys)
        try:
            rows = self.store.read(keys)
        except UnavailableError as error:
            if self._store_again_at == 0.0:
                log.warning("answering without stored features", error=str(error))
            self.metrics.store_errors.inc()
            self._store_again_at = time.monotonic() + STORE_PAUSE_S
            return [{}] * len(keys)
        if self._store_again_at:
            log.info("stored features are back")
            self._store_again_at = 0.0
        if unserved := self.unserved():
            return [{view: row for view, row in found.items() if view not in unserved} for found in rows]
        return rows

    def _finite(self, scores: list[float]) -> list[float]:
        finite = [score if math.isfinite(score) else self.use_case.prior for score in scores]
        self.metrics.nan_scores.inc(sum(not math.isfinite(score) for score in scores))
        return finite


def create_app(
    use_case: UseCase,
    store: Reader,
    spool: Spool,
    slot: ModelSlot,
    settings: Settings,
    clock: Callable[[], int] = wall_ms,
    readiness: Callable[[], dict[str, Any]] | None = None,
    unserved: Callable[[], frozenset[str]] = frozenset,
) -> FastAPI:
    """The predictor's HTTP application.

    unserved : views whose rows read as missing
    readiness : what `/readyz` answers, with `ready`, `generation` and `champion`; default: ready with what is in `slot`
    """
    ready = readiness or (lambda: {"ready": True, "generation": None, "champion": slot.current.version, "refused": {}})
    metrics = PredictMetrics(lambda: spool.waiting_bytes, lambda: ready()["generation"])
    predictor = Predictor(
        use_case,
        store,
        spool,
        slot,
        simulated_time=settings.allow_event_time,
        clock=clock,
        metrics=metrics,
        unserved=unserved,
    )
    decoder = RequestDecoder(use_case, settings.allow_event_time, lambda: str(uuid.uuid4()))
    batcher = Batcher(predictor.answer)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title=f"Penstock predictor: {use_case.name}", lifespan=lifespan, redoc_url=None)
    app.state.close = batcher.close

    async def predict(request: Request) -> Response:
        """Scores of 1 to 1,000 rows."""
        began = time.perf_counter()
        status, body = await _predict(request, decoder, batcher)
        metrics.replied(status, time.perf_counter() - began)
        return _json(body, status)

    async def healthz() -> Response:
        """The process is alive."""
        return _json({"ok": True})

    async def readyz() -> Response:
        """What serves, and whether requests should come here."""
        report = ready()
        return _json(report, 200 if report["ready"] else 503)

    async def show_metrics() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.post("/predict", openapi_extra=_openapi(use_case, settings.allow_event_time))(predict)
    app.get("/healthz")(healthz)
    app.get("/readyz")(readyz)
    app.get("/metrics")(show_metrics)
    app.exception_handler(HTTPException)(_http_error)
    return app


async def _predict(request: Request, decoder: RequestDecoder, batcher: Batcher) -> tuple[int, dict[str, Any]]:
    try:
        return 200, {"rows": await batcher.submit(decoder.decode(await _body(request)))}
    except Refused as error:
        return error.status, error.as_json()
    except ClientDisconnect:
        return 400, {"error": {"message": "the request ended before its body"}}
    except UnavailableError as error:
        return 503, {"error": {"message": str(error)}}
    except Exception as error:
        log.exception("a request failed", error=str(error))
        return 500, {"error": {"message": "the request could not be answered; the predictor's log says why"}}


async def _body(request: Request) -> bytes:
    length = request.headers.get("content-length", "")
    parts, size = [], int(length) if length.isdigit() else 0
    if size <= MAX_BODY:
        size = 0
        async for part in request.stream():
            parts.append(part)
            if (size := size + len(part)) > MAX_BODY:
                break
    if size > MAX_BODY:
        raise Refused(413, f"the body is over {MAX_BODY} bytes: send fewer rows")
    return b"".join(parts)


def _json(body: Any, status: int = 200) -> Response:
    headers = {"retry-after": "1"} if status == 503 else None
    return Response(msgspec.json.encode(body), status, headers, "application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    response = _json({"error": {"message": message}}, error.status_code)
    response.headers.update(error.headers or {})
    return response


def _openapi(use_case: UseCase, allow_event_time: bool) -> dict[str, Any]:
    """The body of `/predict` with an example made from the request contract."""
    samples = {str: "a", int: 1, float: 1.5, bool: True, "time": "2013-01-15T12:00:00Z", list: [], dict: {}}
    fields = {f.name: samples[f.type] for f in use_case.request.fields}
    keys = {name: fields[name] for name in use_case.entities}
    row: dict[str, Any] = {"request_id": "r-1", "entities": keys}
    row["fields"] = {name: fields[name] for name in Vectorizer(use_case).fields}
    if allow_event_time:
        row["event_time"] = samples["time"]
    answer = {"request_id": "r-1", "score": 0.25, "version": "3", "arm": ARM}
    answer |= {"refresh": 417, "missing": [], "stale": []}
    reply = {"application/json": {"schema": {"type": "object"}, "example": {"rows": [answer]}}}
    problem = {"application/json": {"schema": {"type": "object"}, "example": {"error": {"message": "...", "row": 0}}}}
    refusals = {"400": "not JSON", "413": "too big", "422": "not as the contract says", "503": "try again later"}
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"type": "object"}, "example": {"rows": [row]}}},
        },
        "responses": {
            "200": {"description": "scores in the order of the rows", "content": reply},
            **{code: {"description": text, "content": problem} for code, text in refusals.items()},
        },
    }


def serve(settings: Settings, use_case_name: str, port: int = 0) -> None:
    """Run the predictor until it is told to stop: SIGTERM ends requests in progress, then ships the spool."""
    from pipelines.feature_store import FeatureStore, repo_config
    from services import wiring

    use_case, port = load(use_case_name), port or settings.predictor_port
    listening = _listen(settings.predictor_host, port)
    broker, slot = wiring.broker(settings), ModelSlot(Prior(use_case.prior))
    spool = Spool(settings.home / "spool" / use_case.name / str(port), settings.spool_max_mb << 20)
    shipper = Shipper(spool, use_case.topic("predictions"), broker.producer).start()
    registry, models = wiring.registry(settings), settings.home / "models" / use_case.name
    state = ServingState(
        use_case,
        broker,
        slot,
        lambda version: registry.download(use_case.name, version, models),
        refreshes=settings.state_url,
    ).start()
    store = FeatureStore(use_case, repo_config(settings.redis), timeout_s=STORE_TIMEOUT_S)
    try:
        if not state.wait_caught_up(STARTUP_S):
            log.warning("starting with the prior", reason=state.report().get("problem"))
        app = create_app(
            use_case, store, spool, slot, settings, readiness=state.report, unserved=lambda: state.unserved
        )
        _run(app, listening)
    finally:
        state.stop()
        if not shipper.stop(DRAIN_S):
            log.warning("records wait in the spool for the next start", waiting_bytes=spool.waiting_bytes)
        store.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{host}:{port} can't be listened on: {getattr(error, 'strerror', None) or error}") from None


def _run(app: FastAPI, listening: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", access_log=False, log_level="warning", timeout_graceful_shutdown=10
    )
    uvicorn.Server(config).run(sockets=[listening])
