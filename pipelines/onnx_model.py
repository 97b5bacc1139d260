"""A model version in ONNX Runtime: data only, nothing in it is executed but the graph.

A version's folder holds `model.onnx` (inputs `numbers` float32 [n, F] and `ids` int64 [n, C], output `score`
float32 [n]), `inputs.json` (what to feed it) and `example.json` (inputs with the scores its maker saw).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from features.errors import InputError
from features.usecase import ModelInputs

TOLERANCE = 1e-4  # of a score: more than float32 arithmetic on another machine can explain


class OnnxModel:
    """One loaded version; use `load`.

    Attributes
    ----------
    version : its number in the registry
    inputs : which features it reads
    """

    def __init__(self, session: onnxruntime.InferenceSession, inputs: ModelInputs, version: str) -> None:
        self._session = session
        self.inputs, self.version = inputs, version

    @classmethod
    def load(cls, folder: Path, version: str) -> OnnxModel:
        """The version in `folder`, warm and checked against its recorded example.

        Raises
        ------
        InputError : a file is missing or unreadable, the graph has other inputs, or the example's scores differ
        """
        try:
            inputs = ModelInputs.from_json(json.loads((folder / "inputs.json").read_bytes()))
            example = json.loads((folder / "example.json").read_bytes())
            model = cls(_session(folder / "model.onnx"), inputs, version)
            model._verify(example)
        except InputError:
            raise
        except Exception as error:  # ONNX Runtime's own errors share no public base
            raise InputError(f"version {version} can't be loaded: {type(error).__name__}: {_line(error)}") from error
        return model

    def score(self, numbers: npt.NDArray[np.float32], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Probabilities [n] of numbers [n, F], NaN allowed, and ids [n, C]."""
        (score,) = self._session.run(["score"], {"numbers": numbers, "ids": ids})
        return np.asarray(score, dtype=np.float32).reshape(len(numbers))

    def _verify(self, example: dict[str, Any]) -> None:
        expected = np.array(example["score"], dtype=np.float32)
        n = len(expected)
        numbers = np.array(example["numbers"], dtype=np.float32).reshape(n, len(self.inputs.numbers))
        ids = np.array(example["ids"], dtype=np.int64).reshape(n, len(self.inputs.categories))
        if n == 0:
            raise InputError(f"version {self.version} is refused: its recorded example is empty")
        difference = float(np.max(np.abs(self.score(numbers, ids) - expected)))
        if not difference <= TOLERANCE:
            raise InputError(
                f"version {self.version} is refused: its recorded example scores differently here, by {difference:.3g}"
            )
        self.score(numbers[:1], ids[:1])


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    wrong = {i.name for i in session.get_inputs()} ^ {"numbers", "ids"}
    if wrong or "score" not in {o.name for o in session.get_outputs()}:
        raise InputError(f"{path.name}: expected inputs numbers and ids and an output score")
    return session


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
