"""The predictor's OpenAPI document; its schemas are those of the types that decode and encode."""

from __future__ import annotations

from typing import Any

import msgspec

from features.usecase import UseCase
from features.vectors import Vectorizer
from services.predict_protocols import Inference, Schema
from services.predict_request import MAX_ROWS, Reply
from services.settings import Settings

JSON = "application/json"
DOCS = """<!doctype html><title>Predictor</title>
<link rel="stylesheet" href="https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/swagger-ui.css"><div id="ui"></div>
<script src="https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "openapi.json", dom_id: "#ui"})</script>
"""
SAMPLES = {"FP64": 1.5, "INT64": 1, "BYTES": "a", "BOOL": True}
REFUSALS = {
    "400": "not JSON",
    "401": "the token is missing or wrong",
    "413": "too big",
    "422": "not as the contract says",
    "503": "try again later",
}


class Problem(msgspec.Struct, omit_defaults=True):
    """What is wrong, and with which row and field."""

    message: str
    row: int | None = None
    field: str | None = None


class Problems(msgspec.Struct):
    """The body of every answer that is no 2xx."""

    error: Problem


def document(use_case: UseCase, row_type: type[msgspec.Struct], vectors: Schema, settings: Settings) -> dict[str, Any]:
    """The document, with examples made from the request contract and the model's inputs."""
    types = (row_type, Reply, Problems, list[vectors.record], Inference)
    found, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    row, reply, problems, features, inference = found
    rows = {"type": "object", "required": ["rows"]}
    rows["properties"] = {"rows": {"type": "array", "minItems": 1, "maxItems": MAX_ROWS, "items": row}}
    answers = {"200": _content("scores in the order of the rows", reply, _answer())}
    answers |= {code: _content(text, problems) for code, text in REFUSALS.items()}
    deadline = {"name": "x-deadline-ms", "in": "header", "schema": {"type": "integer", "minimum": 1}}
    operation = {
        "summary": "Scores of 1 to 1,000 rows, or of one bare row",
        "parameters": [deadline],
        "requestBody": {"required": True} | _content("", {"anyOf": [rows, row]}, _rows(use_case, settings)),
        "responses": answers,
    }
    told: dict[str, Any] = {"type": "object"}
    nulls = dict.fromkeys(vectors.datatypes)
    refused = {code: _content(REFUSALS[code], problems) for code in ("400", "413", "422", "503")}
    invocations = {
        "summary": "MLflow's protocol: scores of feature vectors; nothing is looked up and nothing logged",
        "description": "One of dataframe_split, dataframe_records, instances and inputs, by feature name, with null.",
        "parameters": [deadline],
        "requestBody": {"required": True}
        | _content("", told | {"properties": {"dataframe_records": features}}, {"dataframe_records": [nulls]}),
        "responses": {"200": _content("scores", told, {"predictions": [0.25]})} | refused,
    }
    tensors = [{"name": n, "datatype": d, "shape": [1], "data": [SAMPLES[d]]} for n, d in vectors.datatypes.items()]
    infer = {
        "summary": "Open Inference Protocol v2: scores of feature vectors; nothing is looked up and nothing logged",
        "description": "NaN is null; lists of an event sequence are BYTES that hold JSON; binary tensors are taken.",
        "parameters": [deadline],
        "requestBody": {"required": True} | _content("", inference, {"inputs": tensors}),
        "responses": {"200": _content("scores", told)} | dict.fromkeys(refused, _content("a text", told)),
    }
    model = f"/v2/models/{use_case.name}"
    gets = {
        "/healthz": {"200": _content("the process is alive", told)},
        "/readyz": {c: _content("what serves, and whether requests should come here", told) for c in ("200", "503")},
        "/v2": {"200": _content("the server", told)},
        "/v2/health/live": {"200": _content("the process is alive", told)},
        "/v2/health/ready": {c: _content("as /readyz", told) for c in ("200", "503")},
        model: {"200": _content("the model's inputs, output and versions", told)},
        f"{model}/ready": {"200": _content("the model is loaded", told)},
        "/ping": {"200": {"description": "the process is alive", "content": {"text/plain": {}}}},
        "/version": {"200": {"description": "MLflow's whose protocol this is", "content": {"text/plain": {}}}},
        "/metrics": {"200": {"description": "Prometheus metrics", "content": {"text/plain": {}}}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": f"Penstock predictor: {use_case.name}", "version": Vectorizer(use_case).schema_id},
        "paths": {
            "/predict": {"post": operation},
            "/invocations": {"post": invocations},
            f"{model}/infer": {"post": infer},
            **{path: {"get": {"responses": responses}} for path, responses in gets.items()},
        },
        "components": {"schemas": components},
    }


def _content(text: str, schema: Any, example: Any = None) -> dict[str, Any]:
    body = {"schema": schema} | ({} if example is None else {"example": example})
    return {"description": text, "content": {JSON: body}}


def _answer() -> dict[str, Any]:
    answer = {"request_id": "r-1", "score": 0.25, "version": "3", "arm": "champion"}
    return {"rows": [answer | {"refresh": 417, "missing": [], "stale": []}]}


def _rows(use_case: UseCase, settings: Settings) -> dict[str, Any]:
    samples = {str: "a", int: 1, float: 1.5, bool: True, "time": "2013-01-15T12:00:00Z", list: [], dict: {}}
    fields = {f.name: samples[f.type] for f in use_case.request.fields}
    row: dict[str, Any] = {"request_id": "r-1", "entities": {name: fields[name] for name in use_case.entities}}
    row["fields"] = {name: fields[name] for name in Vectorizer(use_case).fields}
    return {"rows": [row | ({"event_time": samples["time"]} if settings.allow_event_time else {})]}
