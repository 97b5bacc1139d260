"""Other servers' clients, unchanged, against the real application; and a fuzzer that reads its OpenAPI document."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
import uvicorn

from features.usecase import ModelInputs
from pipelines.onnx_model import OnnxModel
from services.predict_protocols import Schema, mlflow_rows
from services.serving_state import Serving
from tests.models import save_model
from tests.predict_rig import Make, Service
from tests.toy import use_case

NAMES = use_case.inputs.columns
ROW = dict.fromkeys(NAMES, 0.0) | {"all_count": 2.0, "shop": "a", "hour": 7}
SCORE = 1 / (1 + math.exp(-1.02))


@pytest.fixture
def loaded(service: Service, tmp_path: Path) -> Service:
    three, four = (OnnxModel.load(save_model(tmp_path / v, bias=b), v) for v, b in (("3", 1.0), ("4", -1.0)))
    service.slot.serving = Serving(three, four)
    return service


@pytest.fixture
def url(loaded: Service) -> Iterator[str]:
    """The address of the application under a real server."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(loaded.app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield f"127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


def post(service: Service, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return service.send(("POST", path, {"content": content, "headers": headers}))[0]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of its import
def test_mlflows_client(url: str) -> None:
    from mlflow.pyfunc.scoring_server.client import ScoringServerClient

    host, port = url.split(":")
    client = ScoringServerClient(host, int(port))
    client.wait_server_ready(timeout=20)
    answer = client.invoke(pd.DataFrame([ROW, ROW])).get_predictions()
    np.testing.assert_allclose(answer[0], [SCORE, SCORE], rtol=1e-6)
    assert client.get_version()


@pytest.mark.parametrize("binary", [False, True])
def test_tritons_client(url: str, binary: bool) -> None:
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

    client = InferenceServerClient(url)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("toy")
    described = client.get_model_metadata("toy")
    kinds: dict[str, Any] = {"FP64": np.float64, "INT64": np.int64, "BYTES": np.object_}
    inputs = []
    for tensor in described["inputs"]:
        inputs.append(InferInput(tensor["name"], [2], tensor["datatype"]))
        values = np.array([ROW[tensor["name"]]] * 2, kinds[tensor["datatype"]])
        inputs[-1].set_data_from_numpy(values, binary_data=binary)
    for outputs in (None, [InferRequestedOutput("score", binary_data=binary)]):
        answer = client.infer("toy", inputs, outputs=outputs, request_id="r1")
        np.testing.assert_allclose(answer.as_numpy("score"), [SCORE, SCORE], rtol=1e-6)
    assert (answer.get_response()["model_version"], described["versions"]) == ("3", ["3", "4"])
    named = client.infer("toy", inputs, model_version="4")
    np.testing.assert_allclose(named.as_numpy("score"), [1 / (1 + math.exp(0.98))] * 2, rtol=1e-6)
    client.close()


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_split": {"columns": list(ROW), "data": [list(ROW.values())]}},
        {"dataframe_split": {"columns": ["more", *list(ROW)[::-1]], "data": [[[1], *list(ROW.values())[::-1]]]}},
        {"dataframe_records": [ROW | {"more": 1}]},
        {"instances": [ROW]},
        {"inputs": {"more": ["1"]} | {name: [value] for name, value in reversed(ROW.items())}},
    ],
)
def test_every_form_of_an_invocation(loaded: Service, body: Any) -> None:
    reply = post(loaded, "/invocations", body)
    assert reply.json() == {"predictions": [pytest.approx(SCORE, abs=1e-6)]}, reply.text
    assert loaded.records() == [] and loaded.store.reads == 0


def test_a_model_of_one_column_is_asked_in_every_form() -> None:
    schema = Schema(ModelInputs(("price",)), {})
    for body in (
        {"dataframe_split": {"columns": ["price"], "data": [[1.5], [None]]}},
        {"dataframe_split": {"columns": ["more", "price"], "data": [["x", 1.5], ["x", None]]}},
        {"instances": [{"price": 1.5}, {"price": None}]},
        {"inputs": {"price": [1.5, None]}},
    ):
        assert mlflow_rows(json.dumps(body).encode(), schema) == [(1.5,), (None,)]


def test_a_value_of_another_type_in_a_table_is_named(loaded: Service) -> None:
    table = {"columns": list(ROW), "data": [list((ROW | {"price": "1"}).values())]}
    told = post(loaded, "/invocations", {"dataframe_split": table}).json()["error"]["message"]
    assert told.startswith("price: Expected")


def test_requests_that_wait_are_scored_together_each_by_the_version_it_names(
    loaded: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, score = [], OnnxModel.score
    monkeypatch.setattr(OnnxModel, "score", lambda model, rows: runs.append(len(rows)) or score(model, rows))
    named = [f"/v2/models/toy/versions/{v}/infer" for v in "3344"]
    replies = loaded.send(*(("POST", path, {"content": json.dumps(tensors())}) for path in named))
    other = 1 / (1 + math.exp(0.98))
    found = [reply.json()["outputs"][0]["data"] for reply in replies]
    assert found == [[pytest.approx(s, abs=1e-6)] for s in (SCORE, SCORE, other, other)] and runs == [2, 2]


def test_vectors_past_their_deadline_are_503(loaded: Service) -> None:
    assert post(loaded, "/invocations", {"instances": [ROW]}, **{"x-deadline-ms": "0"}).status_code == 503


def tensors(**changed: Any) -> dict[str, Any]:
    kinds = {"shop": "BYTES", "hour": "INT64"}
    return {
        "inputs": [
            {"name": n, "datatype": kinds.get(n, "FP64"), "shape": [1], "data": [v], **changed} for n, v in ROW.items()
        ]
    }


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/invocations", b"{", 400),
        ("/invocations", {}, 422),
        ("/invocations", {"instances": []}, 422),
        ("/invocations", {"instances": [ROW] * 1001}, 413),
        ("/invocations", {"instances": [{"shop": "a"}]}, 422),
        ("/invocations", {"instances": [ROW | {"price": "1"}]}, 422),
        ("/invocations", {"dataframe_split": {"columns": ["shop"], "data": [[1, 2]]}}, 422),
        ("/invocations", {"dataframe_split": {"columns": ["shop"], "data": [["a"]]}}, 422),
        ("/invocations", {"dataframe_split": {"columns": list(ROW), "data": [["a"]]}}, 422),
        ("/invocations", {"inputs": {"shop": ["a"], "hour": []}}, 422),
        ("/v2/models/toy/infer", b"\xff", 400),
        ("/v2/models/toy/infer", {"inputs": []}, 400),
        ("/v2/models/toy/infer", tensors(shape=[2]), 400),
        ("/v2/models/toy/infer", tensors(data=["x"]), 422),
        ("/v2/models/toy/infer", tensors(parameters={"binary_data_size": 8}), 400),
        ("/v2/models/toy/infer", tensors(parameters={"binary_data_size": "x"}), 422),
        ("/v2/models/toy/versions/9/infer", tensors(), 404),
        ("/v2/models/other/infer", tensors(), 404),
    ],
)
def test_what_can_not_be_scored_is_a_4xx(loaded: Service, path: str, body: Any, status: int) -> None:
    reply = post(loaded, path, body)
    error = reply.json()["error"]
    assert reply.status_code == status, reply.text
    assert error if path.startswith("/v2") else error["message"]


def test_the_documents_examples_are_answered(loaded: Service) -> None:
    paths = loaded.get("/openapi.json").json()["paths"]
    for path, operations in paths.items():
        if "get" in operations:
            assert loaded.get(path).status_code == 200, path
            continue
        example = operations["post"]["requestBody"]["content"]["application/json"]["example"]
        assert post(loaded, path, example).status_code == 200, path


def test_a_fuzzer_that_reads_the_document_finds_no_5xx(make: Make) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error

    service = make(allow_event_time=True)
    schema = schemathesis.openapi.from_asgi("/openapi.json", service.app)
    statuses: set[int] = set()
    for operation in schema.get_all_operations():

        @settings(
            max_examples=60,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.ok().as_strategy())
        def run(case: Any) -> None:
            response = case.call()
            statuses.add(response.status_code)
            case.validate_response(response, checks=[not_a_server_error])

        run()
    assert {200, 400} <= statuses or {200, 422} <= statuses
