"""A version's net that goes on learning: the champion between two retrains."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from features.inputs import Floats, Inputs
from features.usecase import ModelInputs
from pipelines import net
from pipelines.archive import Examples
from pipelines.learners import online_recipe
from pipelines.online import OnlineNet, Replay
from pipelines.onnx_model import example_inputs

MEMORY = 16_384
NEVER = 1 << 62


class Refresher(OnlineNet):
    """A version's net, continued. Its trees stay as the retrain grew them: days of a stream teach new ones less.

    Its snapshot has weights, normaliser and optimizer, and not the examples it replays: whoever keeps the snapshot
    knows which they are, and has them remembered again.

    Parameters
    ----------
    folder : the version's files
    memory : the newest so many examples are replayed
    """

    def __init__(self, folder: Path, memory: int = MEMORY) -> None:
        torch.set_num_threads(1)  # the predictor beside it needs the others; batches are small
        declaration = json.loads((folder / "inputs.json").read_bytes())
        shape = {"members": declaration["members"], "hidden": tuple(declaration["hidden"])}
        recipe = online_recipe(declaration.get("settings", ""))
        recipe = replace(recipe, trees=declaration["trees"], memory=memory, refit=NEVER, **shape)
        self.targets_named = tuple(declaration["targets"])
        super().__init__(ModelInputs.from_json(declaration), len(self.targets_named), 0.5, recipe)
        net.load_weights(self.model, folder)
        self.seen = self.started = self.grown = recipe.last_start
        self.example = example_inputs(self.inputs, json.loads((folder / "example.json").read_bytes()))
        self.template = (folder / "model.onnx").read_bytes()

    def remember(self, examples: Examples) -> None:
        """Have these replayed, without learning from them now."""
        self.replay.add(examples.inputs, np.column_stack([examples.label, examples.targets]))

    def recent(self, rows: int) -> tuple[Inputs, Floats] | None:
        """Inputs and labels [n] of the newest examples that are remembered, at most `rows`; None without any."""
        n = len(self.replay)
        if not n:
            return None
        inputs, truth = self.replay.take(np.arange(max(0, n - rows), n))
        return inputs, truth[:, 0]

    def attempt(self, examples: Examples) -> Callable[[], None]:
        """Learn; returns what undoes it."""
        before, blocks = self.snapshot(), list(self.replay.blocks)
        self.update(examples)

        def undo() -> None:
            self.restore(before)
            self.replay.blocks = blocks

        return undo

    def is_finite(self) -> bool:
        """Whether every weight is a number; a tree that parts nulls from numbers does so at an infinite threshold."""
        weights = ((n, w) for n, w in self.model.state_dict().items() if n != "trees.threshold")
        return all(bool(torch.isfinite(w).all()) for _, w in weights)

    def graph(self) -> bytes:
        """The model as it is now, in ONNX."""
        return net.refreshed(self.template, self.model)

    def snapshot(self) -> bytes:
        """Weights, optimizer, normaliser and counters."""
        with self._without_memory():
            return super().snapshot()

    def restore(self, data: bytes) -> None:
        """Back to a snapshot; what is remembered stays."""
        with self._without_memory():
            super().restore(data)

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        memory, self.replay = self.replay, Replay(0)
        try:
            yield
        finally:
            self.replay = memory


def write_version(source: Path, graph: bytes, score: Sequence[float], folder: Path) -> None:
    """The files of a version from a refresh of the version in `source`: its graph, and what it scores the recorded
    example."""
    folder.mkdir(parents=True)
    net.save_weights(net.read_weights(source) | net.weights_of(graph), folder)
    net.write(folder / "model.onnx", graph)
    net.write(folder / "inputs.json", (source / "inputs.json").read_bytes())
    example = json.loads((source / "example.json").read_bytes()) | {"score": list(score)}
    net.write(folder / "example.json", json.dumps(example).encode())
