"""A model version in ONNX Runtime: data only, nothing in it is executed but the graph.

A version's folder holds `model.onnx`, `inputs.json` (what to feed it) and `example.json` (inputs with the scores its
maker saw). The graph's inputs are `numbers` float32 [n, F], `ids` int64 [n, C], and for each declared sequence `<name>`
float32 [m, D] and `<name>_rows` int64 [m], the row of each event; it may leave out what it doesn't read. Its output is
`score` [n] or [n, 1], or `probabilities` [n, classes] of which the last one counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from features.errors import InputError
from features.inputs import Inputs, Ragged
from features.usecase import ModelInputs

TOLERANCE = 1e-4  # of a score: more than float32 arithmetic on another machine can explain


class OnnxModel:
    """One loaded version; use `load`.

    Attributes
    ----------
    version : its number in the registry
    refresh : how often its weights have been refreshed since
    inputs : which features it reads
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, inputs: ModelInputs, version: str, example: Any, refresh: int = 0
    ) -> None:
        self._session, self._example = session, example
        self._reads, self._output = {i.name for i in session.get_inputs()}, _output(session)
        self.inputs, self.version, self.refresh = inputs, version, refresh

    @classmethod
    def load(cls, folder: Path, version: str) -> OnnxModel:
        """The version in `folder`, warm and checked against its recorded example.

        Raises
        ------
        InputError : a file is missing or unreadable, the graph has other inputs, or the example's scores differ
        """
        with _told(f"version {version}"):
            inputs = ModelInputs.from_json(json.loads((folder / "inputs.json").read_bytes()))
            example = json.loads((folder / "example.json").read_bytes())
            model = cls(_session((folder / "model.onnx").read_bytes(), inputs), inputs, version, example)
            model._verify()
        return model

    @classmethod
    def record(cls, folder: Path) -> None:
        """Write the `example.json` of a version without one: what it scores a row of zeros and one of ones here.

        Raises InputError as `load` does.
        """
        with _told(f"the model in {folder}"):
            declared = ModelInputs.from_json(json.loads((folder / "inputs.json").read_bytes()))
            ones = np.array([[0], [1]])
            lengths = np.zeros(2, np.int64)
            inputs = Inputs(
                np.repeat(ones, len(declared.numbers), 1).astype(np.float32),
                np.repeat(ones, len(declared.categories), 1),
                tuple(Ragged(np.zeros((0, len(s.columns)), np.float32), lengths) for s in declared.sequences),
            )
            model = cls(_session((folder / "model.onnx").read_bytes(), declared), declared, "", None)
            example = record_example(declared, inputs, model.score(inputs))
        (folder / "example.json").write_text(json.dumps(example))

    def refreshed(self, graph: bytes, score: Sequence[float], number: int) -> OnnxModel:
        """The version with the weights of a refresh: its graph, and its scores of the version's recorded example.

        Raises InputError as `load` does.
        """
        with _told(f"refresh {number} of version {self.version}"):
            example = {**self._example, "score": list(score)}
            model = OnnxModel(_session(graph, self.inputs), self.inputs, self.version, example, number)
            model._verify()
        return model

    def score(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Probabilities [n]."""
        feed = {"numbers": inputs.numbers, "ids": inputs.ids}
        for declared, ragged in zip(self.inputs.sequences, inputs.sequences, strict=True):
            feed |= {declared.name: ragged.values, f"{declared.name}_rows": ragged.rows}
        (score,) = self._session.run([self._output], {n: v for n, v in feed.items() if n in self._reads})
        scores = np.asarray(score, dtype=np.float32)
        return scores if scores.ndim == 1 else scores[:, -1]

    def _verify(self) -> None:
        expected = np.array(self._example["score"], dtype=np.float32)
        if len(expected) == 0:
            raise InputError("is refused: its recorded example is empty")
        inputs = example_inputs(self.inputs, self._example)
        difference = float(np.max(np.abs(self.score(inputs) - expected)))
        if not difference <= TOLERANCE:
            raise InputError(f"is refused: its recorded example scores differently here, by {difference:.3g}")
        self.score(inputs.take(slice(1)))


def record_example(declared: ModelInputs, inputs: Inputs, score: npt.NDArray[np.float32]) -> dict[str, Any]:
    """`example.json`: inputs with the scores their maker saw."""
    sequences = {
        d.name: {"values": _plain(s.values), "lengths": s.lengths.tolist()}
        for d, s in zip(declared.sequences, inputs.sequences, strict=True)
    }
    return {
        "numbers": _plain(inputs.numbers),
        "ids": inputs.ids.tolist(),
        "sequences": sequences,
        "score": score.tolist(),
    }


def example_inputs(declared: ModelInputs, example: dict[str, Any]) -> Inputs:
    """The inputs of a recorded example."""
    n = len(example["score"])
    sequences = [example["sequences"][s.name] for s in declared.sequences]
    return Inputs(
        np.array(example["numbers"], dtype=np.float32).reshape(n, len(declared.numbers)),
        np.array(example["ids"], dtype=np.int64).reshape(n, len(declared.categories)),
        tuple(
            Ragged(np.array(s["values"], np.float32).reshape(-1, len(d.columns)), np.array(s["lengths"], np.int64))
            for d, s in zip(declared.sequences, sequences, strict=True)
        ),
    )


def _plain(numbers: npt.NDArray[np.float32]) -> list[list[float | None]]:
    return [[None if np.isnan(v) else float(v) for v in row] for row in numbers]


def input_names(declared: ModelInputs) -> list[str]:
    """The inputs of a version's graph."""
    return ["numbers", "ids", *(name for s in declared.sequences for name in (s.name, f"{s.name}_rows"))]


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever goes wrong as an InputError about `what`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what} {error}") from error
    except Exception as error:  # ONNX Runtime's own errors share no public base
        raise InputError(f"{what} can't be loaded: {type(error).__name__}: {_line(error)}") from error


def _session(graph: bytes, declared: ModelInputs) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = input_names(declared)
    if not {i.name for i in session.get_inputs()} <= set(names) or not _output(session):
        raise InputError(f"is refused: expected inputs of {', '.join(names)} and an output score or probabilities")
    return session


def _output(session: onnxruntime.InferenceSession) -> str:
    names = [o.name for o in session.get_outputs()]
    return next((name for name in ("score", "probabilities") if name in names), "")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
