"""A version need not come from our trainer: a scikit-learn pipeline, exported, registers and serves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from features.inputs import encode
from pipelines.broker import Message
from pipelines.onnx_model import record_example
from services.serving_state import ServingState
from tests.memory_broker import MemoryBroker
from tests.predict_rig import ROW, Service
from tests.toy import use_case

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def test_a_scikit_learn_pipeline_serves(service: Service, tmp_path: Path) -> None:
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, len(use_case.inputs.numbers))).astype(np.float32)
    x[rng.random(x.shape) < 0.2] = np.nan
    pipeline = make_pipeline(SimpleImputer(strategy="constant", fill_value=0.0), LogisticRegression())
    pipeline.fit(x, np.nan_to_num(x[:, 0]) + rng.normal(size=300) > 0)
    kind = FloatTensorType([None, x.shape[1]])
    graph = convert_sklearn(pipeline, initial_types=[("numbers", kind)], options={"zipmap": False}, target_opset=17)
    folder = tmp_path / "1"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    (folder / "inputs.json").write_text(json.dumps(use_case.inputs.as_json()))
    rows = [dict(zip(use_case.inputs.numbers, map(float, row), strict=True)) for row in x[:20]]
    inputs, score = encode(use_case.inputs, rows), pipeline.predict_proba(x[:20])[:, 1].astype(np.float32)
    (folder / "example.json").write_text(json.dumps(record_example(use_case.inputs, inputs, score)))

    broker = MemoryBroker()
    broker.create_topics({"toy.models": {}}, 1)
    producer = broker.producer()
    producer.send([Message("toy.models", b'{"generation": 1, "roles": {"champion": "1"}}', b"state")])
    producer.flush()
    state = ServingState(use_case, broker, service.slot, lambda version: tmp_path / version).start()
    assert state.wait_caught_up(10)
    state.stop()
    assert state.report()["refused"] == {}
    answer = service.predict(ROW).json()["rows"][0]
    vector = service.records()[0][1]["features"]
    row = np.array([[vector[n] for n in use_case.inputs.numbers]], np.float64).astype(np.float32)
    assert (answer["version"], answer["score"]) == ("1", pytest.approx(pipeline.predict_proba(row)[0, 1], abs=1e-6))
