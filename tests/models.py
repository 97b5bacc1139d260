"""Tiny ONNX models for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from features.usecase import ModelInputs
from pipelines.onnx_model import _session
from tests.toy import use_case


def save_model(folder: Path, bias: float = 0.0, inputs: ModelInputs = use_case.inputs, nan: bool = False) -> Path:
    """A version whose score is sigmoid(bias + .01 x first number), nulls read as 0; `nan`: it always says NaN."""
    f, c = len(inputs.numbers), len(inputs.categories)
    weights = np.zeros((f, 1), np.float32)
    weights[0] = 0.01
    constants = {
        "zero": np.zeros((), np.float32),
        "w": weights,
        "b": np.array([np.nan if nan else bias], np.float32),
        "none": np.array([-1], np.int64),
        "no": np.zeros((), np.float32),
    }
    nodes = [
        helper.make_node("IsNaN", ["numbers"], ["null"]),
        helper.make_node("Where", ["null", "zero", "numbers"], ["filled"]),
        helper.make_node("MatMul", ["filled", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["logit2"]),
        helper.make_node("Reshape", ["logit2", "none"], ["logit"]),
        helper.make_node("Cast", ["ids"], ["idf"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["idf"], ["ids_sum"], keepdims=0),
        helper.make_node("Mul", ["ids_sum", "no"], ["nothing"]),
        helper.make_node("Add", ["logit", "nothing"], ["all"]),
        helper.make_node("Sigmoid", ["all"], ["score"]),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [
            helper.make_tensor_value_info("numbers", TensorProto.FLOAT, ["n", f]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", c]),
        ],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n"])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    (folder / "inputs.json").write_text(json.dumps(inputs.as_json()))
    numbers = [[float(i), *[None] * (f - 1)] for i in range(8)]
    ids = [[0] * c] * 8
    score = _session((folder / "model.onnx").read_bytes(), inputs).run(
        ["score"], {"numbers": np.array(numbers, np.float32), "ids": np.array(ids, np.int64)}
    )[0]
    (folder / "example.json").write_text(json.dumps({"numbers": numbers, "ids": ids, "score": score.tolist()}))
    return folder
