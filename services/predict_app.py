"""The predictor over HTTP: `/predict`, two protocols of model servers, health, metrics, documentation.

`/v2` and `/invocations` score vectors that the caller has made: nothing is read from the store and nothing logged, as
there is no request that a label could belong to.
"""

from __future__ import annotations

import asyncio
import hmac
import importlib.metadata
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from features.errors import UnavailableError
from features.usecase import UseCase
from services.batcher import Batcher
from services.metrics import MEDIA_TYPE, PredictMetrics, as_text
from services.predict_openapi import DOCS, document
from services.predict_protocols import Schema, Values, mlflow_rows, schema_of, v2_reply, v2_rows
from services.predict_request import MAX_BODY, Refused, Reply, RequestDecoder
from services.predict_workers import Siblings
from services.predictor import Predictor, Reader
from services.serving_state import PRIOR, Model, ModelSlot
from services.settings import Settings
from services.spool import Spool

log = structlog.get_logger()
encode_json = msgspec.json.Encoder().encode
Handler = Callable[[Request], Awaitable[Response]]
BODY_S = 10.0
MODELS = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
SERVER = {"name": "penstock", "version": "2", "extensions": ["binary_tensor_data"]}


def wall_ms() -> int:
    """Epoch ms now."""
    return time.time_ns() // 1_000_000


def create_app(
    use_case: UseCase,
    store: Reader,
    spool: Spool,
    slot: ModelSlot,
    settings: Settings,
    clock: Callable[[], int] = wall_ms,
    readiness: Callable[[], dict[str, Any]] | None = None,
    unserved: Callable[[], frozenset[str]] = frozenset,
    siblings: Siblings | None = None,
) -> Starlette:
    """The predictor's HTTP application.

    unserved : views whose rows read as missing
    readiness : what `/readyz` answers, with `ready`, `generation` and `champion`; default: ready with what is in `slot`
    siblings : other processes on the same port
    """
    ready = readiness or (lambda: {"ready": True, "generation": None, "champion": slot.serving.champion.version})
    metrics = PredictMetrics(lambda: spool.waiting_bytes, lambda: ready()["generation"], settings.spool_max_mb << 20)
    predictor = Predictor(use_case, store, spool, slot, settings, clock=clock, metrics=metrics, unserved=unserved)
    scoring = Scoring(use_case, predictor, metrics, settings)
    vectors = Vectors(use_case, predictor, settings)
    documented = encode_json(
        document(use_case, scoring.decoder.row_type, vectors.schema(slot.serving.champion), settings)
    )

    def others(request: Request) -> Siblings | None:
        return None if siblings and request.scope["server"][1] in siblings.ports else siblings

    async def readyz(request: Request) -> Response:
        report = await all_.readiness() if (all_ := others(request)) else ready()
        return json_response(report, 200 if report["ready"] else 503)

    async def show_metrics(request: Request) -> Response:
        registry: Any = await all_.metrics() if (all_ := others(request)) else metrics.registry
        return Response(as_text(registry), media_type=MEDIA_TYPE)

    routes = [
        Route("/predict", scoring.endpoint(scoring.predict), methods=["POST"]),
        Route("/invocations", scoring.endpoint(vectors.invocations), methods=["POST"]),
        *(Route(f"{model}/infer", scoring.endpoint(vectors.infer), methods=["POST"]) for model in MODELS),
        *(Route(f"{model}{part}", scoring.endpoint(vectors.model)) for model in MODELS for part in ("", "/ready")),
        Route("/v2", fixed(encode_json(SERVER))),
        Route("/v2/health/live", fixed(b'{"live":true}')),
        Route("/v2/health/ready", readyz),
        Route("/ping", fixed("\n", PlainTextResponse, None)),
        Route("/version", fixed(importlib.metadata.version("mlflow"), PlainTextResponse, None)),
        Route("/healthz", fixed(b'{"ok":true}')),
        Route("/readyz", readyz),
        Route("/metrics", show_metrics),
        Route("/openapi.json", fixed(documented)),
        Route("/docs", fixed(DOCS, HTMLResponse, None)),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})


def fixed(body: Any, kind: type[Response] = Response, media_type: str | None = "application/json") -> Handler:
    """An endpoint that says the same always."""

    async def answer(request: Request) -> Response:
        return kind(body, media_type=media_type)

    return answer


class Scoring:
    """The endpoints that score."""

    def __init__(self, use_case: UseCase, predictor: Predictor, metrics: PredictMetrics, settings: Settings) -> None:
        self.predictor, self.metrics = predictor, metrics
        self.decoder = RequestDecoder(use_case, settings.allow_event_time, lambda: str(uuid.uuid4()))
        self.batcher = Batcher(predictor.answer)
        self._bearer = f"Bearer {settings.predictor_token}".encode() if settings.predictor_token else b""
        self._deadline_ms = settings.predictor_deadline_ms

    def endpoint(self, handler: Handler) -> Handler:
        """A handler whose errors are answers, counted and timed."""

        async def answer(request: Request) -> Response:
            began = time.perf_counter()
            response = await _answered(handler, request)
            self.metrics.replied(response.status_code, time.perf_counter() - began)
            return response

        return answer

    async def predict(self, request: Request) -> Response:
        """Scores of 1 to 1,000 rows."""
        deadline = deadline_of(request, self._deadline_ms)
        if self._bearer and not hmac.compare_digest(request.headers.get("authorization", "").encode(), self._bearer):
            raise Refused(401, "authorization: Bearer and the setting predictor_token are needed here")
        rows, logged = await self.batcher.submit(self.decoder.decode(await body_of(request)), deadline)
        return json_response(Reply(rows), headers=None if logged else {"x-prediction-log": "dropped"})


class Vectors:
    """The endpoints that score vectors which the caller has made, with the champion or the version that is named."""

    def __init__(self, use_case: UseCase, predictor: Predictor, settings: Settings) -> None:
        self.use_case, self.predictor = use_case, predictor
        self.batcher = Batcher(predictor.score)
        self._deadline_ms = settings.predictor_deadline_ms
        self._types = tuple(predictor.vectorizer.types.items())

    def schema(self, model: Model) -> Schema:
        """What a model reads; the prior, what the use case declares."""
        return schema_of(self.use_case.inputs if model.version == PRIOR else model.inputs, self._types)

    async def invocations(self, request: Request) -> Response:
        """MLflow's protocol."""
        deadline, champion = deadline_of(request, self._deadline_ms), self.predictor.slot.serving.champion
        rows = mlflow_rows(await body_of(request), self.schema(champion))
        return json_response({"predictions": await self._scores(champion, rows, deadline)})

    async def infer(self, request: Request) -> Response:
        """The Open Inference Protocol's."""
        deadline, model = deadline_of(request, self._deadline_ms), self._model(request)
        length = request.headers.get("inference-header-content-length")
        if length is not None and not (length.isascii() and length.isdigit()):
            raise Refused(400, "inference-header-content-length is no number")
        rows, asked = v2_rows(await body_of(request), None if length is None else int(length), self.schema(model))
        scores = await self._scores(model, rows, deadline)
        body, headers = v2_reply(self.use_case.name, model.version, scores, asked)
        return Response(body, 200, headers, "application/octet-stream" if headers else "application/json")

    async def _scores(self, model: Model, rows: Sequence[Values], deadline: float) -> list[float]:
        scores, _ = await self.batcher.submit([(model, values) for values in rows], deadline)
        return scores

    async def model(self, request: Request) -> Response:
        """A model's metadata; of `/ready`, its name."""
        model = self._model(request)
        if request.url.path.endswith("/ready"):
            return json_response({"name": self.use_case.name, "ready": True})
        champion, challenger, _ = self.predictor.slot.serving
        versions = [m.version for m in (champion, challenger) if m]
        return json_response(self.schema(model).metadata(self.use_case.name, versions))

    def _model(self, request: Request) -> Model:
        serving, named = self.predictor.slot.serving, request.path_params
        model = serving.find(named["version"]) if "version" in named else serving.champion
        if named["name"] != self.use_case.name or model is None:
            raise Refused(404, f"no such model or version here: /v2/models/{self.use_case.name} says what serves")
        return model


async def _answered(handler: Handler, request: Request) -> Response:
    try:
        return await handler(request)
    except Refused as error:
        plain = request.url.path.startswith("/v2")  # whose clients expect a text
        return json_response({"error": str(error)} if plain else error.as_json(), error.status)
    except ClientDisconnect:
        return problem("the request ended before its body", 400)
    except UnavailableError as error:
        return problem(str(error), 503)
    except Exception as error:
        log.exception("a request failed", error=str(error))
        return problem("the request could not be answered; the predictor's log says why", 500)


def deadline_of(request: Request, most_ms: int) -> float:
    """Monotonic seconds up to which a request may wait for its turn: its `x-deadline-ms`, or `most_ms`."""
    text = request.headers.get("x-deadline-ms", str(most_ms))
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 10):
        raise Refused(400, f"x-deadline-ms is {text!r}: send whole milliseconds, such as 250")
    return time.monotonic() + min(int(text), most_ms) / 1000


async def body_of(request: Request) -> bytes:
    """A request's body; Refused when it is over `MAX_BODY` bytes, which are not read then, or takes `BODY_S`."""
    length = request.headers.get("content-length", "")
    parts, size = [], int(length) if length.isdigit() else 0
    if size <= MAX_BODY:
        size = 0
        try:
            async with asyncio.timeout(BODY_S):
                async for part in request.stream():
                    parts.append(part)
                    if (size := size + len(part)) > MAX_BODY:
                        break
        except TimeoutError:
            raise Refused(408, f"the body did not come in {BODY_S:g} s") from None
    if size > MAX_BODY:
        raise Refused(413, f"the body is over {MAX_BODY} bytes: send fewer rows")
    return b"".join(parts)


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A body as JSON; a 503 says when to try again."""
    return Response(encode_json(body), status, {"retry-after": "1"} if status == 503 else headers, "application/json")


def problem(message: str, status: int) -> Response:
    """What went wrong."""
    return json_response({"error": {"message": message}}, status)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = problem(f"{request.method} {request.url.path}: {error.detail}", error.status_code)
    response.headers.update(error.headers or {})
    return response
