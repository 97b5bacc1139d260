"""A version loads when it is whole and scores as recorded; anything else is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from features.errors import InputError
from features.inputs import Inputs
from pipelines.onnx_model import OnnxModel
from tests.models import save_model
from tests.toy import use_case


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "7", bias=0.5)


def test_a_version_scores_batches_of_any_size(folder: Path) -> None:
    model = OnnxModel.load(folder, "7")
    assert (model.version, model.inputs) == ("7", use_case.inputs)
    f, c = len(model.inputs.numbers), len(model.inputs.categories)
    for n in (0, 1, 33):
        score = model.score(Inputs(np.full((n, f), np.nan, np.float32), np.zeros((n, c), np.int64)))
        np.testing.assert_allclose(score, np.full(n, 1 / (1 + np.exp(-0.5))), rtol=1e-6)


def test_a_score_that_differs_from_the_recorded_one_is_refused(folder: Path) -> None:
    example = json.loads((folder / "example.json").read_text())
    example["score"][3] += 2e-4
    (folder / "example.json").write_text(json.dumps(example))
    with pytest.raises(InputError, match=r"version 7 is refused: .* differently"):
        OnnxModel.load(folder, "7")


def test_nan_in_the_example_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="version 8 is refused"):
        OnnxModel.load(save_model(tmp_path, nan=True), "8")


@pytest.mark.parametrize("name", ["model.onnx", "inputs.json", "example.json"])
def test_a_missing_or_damaged_file_is_one_line(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="version 7") as damaged:
        OnnxModel.load(folder, "7")
    (folder / name).unlink()
    with pytest.raises(InputError, match="version 7") as missing:
        OnnxModel.load(folder, "7")
    assert "\n" not in str(damaged.value) + str(missing.value)


def test_inputs_of_another_width_are_refused(folder: Path) -> None:
    inputs = json.loads((folder / "inputs.json").read_text())
    inputs["numbers"].pop()
    (folder / "inputs.json").write_text(json.dumps(inputs))
    with pytest.raises(InputError, match="version 7"):
        OnnxModel.load(folder, "7")


def test_an_empty_example_is_refused(folder: Path) -> None:
    (folder / "example.json").write_text('{"numbers": [], "ids": [], "score": []}')
    with pytest.raises(InputError, match="example is empty"):
        OnnxModel.load(folder, "7")
