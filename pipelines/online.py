"""The net as a learner: it learns from each label as it comes, beside labels it has seen before."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from features.inputs import Floats, Inputs, Ragged
from features.usecase import ModelInputs
from pipelines import net
from pipelines.archive import Examples
from pipelines.job import OnlineRecipe

TRUST = 100.0  # in the blend that trees and members start with, as many examples' worth


class Replay:
    """The newest examples, as inputs and truth, in blocks, so that adding and drawing cost the same whatever it holds.

    Parameters
    ----------
    capacity : rows kept at least; up to a block more
    """

    BLOCK = 8192

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: list[tuple[Inputs, Floats]] = []

    def __len__(self) -> int:
        return sum(len(truth) for _, truth in self.blocks)

    def add(self, inputs: Inputs, truth: Floats) -> None:
        """Rows, and their label with the other targets [n, 1 + T]."""
        if self.blocks and len(self.blocks[-1][1]) < self.BLOCK:
            before, known = self.blocks.pop()
            inputs, truth = Inputs.join([before, inputs]), np.concatenate([known, truth])
        self.blocks.append((inputs, truth))
        while len(self) - len(self.blocks[0][1]) >= self.capacity:
            del self.blocks[0]

    def take(self, rows: npt.NDArray[np.int64]) -> tuple[Inputs, Floats]:
        """Rows by index, 0 the oldest, in any order."""
        ends = np.cumsum([len(truth) for _, truth in self.blocks])
        starts, parts = ends - [len(truth) for _, truth in self.blocks], []
        place = np.searchsorted(ends, rows, side="right")
        for i in np.unique(place):
            inputs, truth = self.blocks[i]
            chosen = rows[place == i] - starts[i]
            parts.append((inputs.take(chosen), truth[chosen]))
        return Inputs.join([inputs for inputs, _ in parts]), np.concatenate([truth for _, truth in parts])

    def all(self) -> tuple[Inputs, Floats]:
        """Every row, oldest first; there must be one."""
        return Inputs.join([inputs for inputs, _ in self.blocks]), np.concatenate([truth for _, truth in self.blocks])

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All rows, by name, as `np.savez` takes them."""
        if not self.blocks:
            return {}
        inputs, truth = self.all()
        found: dict[str, npt.NDArray[Any]] = {"numbers": inputs.numbers, "ids": inputs.ids, "truth": truth}
        for i, ragged in enumerate(inputs.sequences):
            found |= {f"values{i}": ragged.values, f"lengths{i}": ragged.lengths}
        return found | {"sizes": np.array([len(t) for _, t in self.blocks])}

    def restore(self, found: dict[str, npt.NDArray[Any]]) -> None:
        """What `arrays` gave."""
        self.blocks = []
        if not found:
            return
        count = sum(name.startswith("values") for name in found)
        sequences = tuple(Ragged(found[f"values{i}"], found[f"lengths{i}"]) for i in range(count))
        inputs = Inputs(found["numbers"], found["ids"], sequences)
        ends = np.cumsum(found["sizes"])
        for start, end in zip(ends - found["sizes"], ends, strict=True):
            self.blocks.append((inputs.take(slice(start, end)), found["truth"][start:end]))


class OnlineNet:
    """`pipelines.net.Net` as a `Learner`.

    Parameters
    ----------
    inputs : what it reads
    targets : how many other targets the examples carry
    prior : its answer until it has learned
    """

    def __init__(
        self, inputs: ModelInputs, targets: int, prior: float, recipe: OnlineRecipe | None = None, seed: int = 0
    ) -> None:
        self.inputs, self.targets, self.prior = inputs, targets, prior
        self.recipe, self.seed = recipe or OnlineRecipe(), seed
        self.replay = Replay(self.recipe.memory)
        self.seen = self.started = self.grown = 0
        self.steps = 0
        self.asked = np.empty((0, 3), np.float32)
        self._new_net()

    def score(self, inputs: Inputs) -> Floats:
        """Probabilities [n]."""
        return self.model.score(inputs) if self.started else np.full(len(inputs), self.prior, np.float32)

    def update(self, examples: Examples) -> None:
        """Learn: first and at doublings from all so far, else from these and as many earlier ones as the recipe has."""
        truth = np.column_stack([examples.label, examples.targets])
        for at in range(0, len(examples), self.recipe.batch):
            part = slice(at, at + self.recipe.batch)
            self._learn(examples.inputs.take(part), truth[part])

    def _learn(self, inputs: Inputs, truth: Floats) -> None:
        recipe = self.recipe
        self.replay.add(inputs, truth)
        self.seen += len(truth)
        due = max(recipe.first, 2 * self.started)
        if self.seen >= due and self.started < recipe.last_start:
            self._start()
        elif self.started:
            self._calibrate(inputs, truth[:, 0])
            self.model.normalise(inputs, 1 - 0.5 ** (len(truth) / net.HALF_LIFE))
            self._step(inputs, truth, recipe.rate)
            for _ in range(recipe.replay):
                self._step(*self.replay.take(self._rng().integers(len(self.replay), size=recipe.batch)), recipe.rate)
            if self.seen - self.grown >= recipe.refit:
                self._grow()

    def _start(self) -> None:
        """Anew, from every example that is remembered."""
        inputs, truth = self.replay.all()
        self._new_net()
        self.model.normalise(inputs)
        self.model.start_at(truth)
        batch, total, done = self.recipe.batch, self.recipe.epochs * len(truth), 0
        for _ in range(self.recipe.epochs):
            order = self._rng().permutation(len(truth))
            for at in range(0, len(truth), batch):
                rows = order[at : at + batch]
                rate = self.recipe.first_rate * min(1.0, 0.1 + 10 * done / total)
                self._step(inputs.take(rows), truth[rows], rate * 0.5 * (1 + math.cos(math.pi * done / total)))
                done += len(rows)
        self.started = self.seen
        self._grow()

    def _grow(self) -> None:
        inputs, truth = self.replay.all()
        self.model.grow(inputs, truth[:, 0], self.seed)
        self.grown = self.seen

    def _calibrate(self, inputs: Inputs, label: Floats) -> None:
        """Blend members and trees as is best for the newest examples, none of which they had learned when asked:
        logistic regression (Platt scaling with two scores), one Newton step at a time."""
        self.model.eval()
        with torch.no_grad():
            asked = torch.stack([*self.model.parts(*self.model.tensors(inputs)), torch.from_numpy(label)], 1)
        self.asked = np.concatenate([self.asked, asked.numpy()])[-self.recipe.calibrate :]
        x, y = np.column_stack([self.asked[:, :2], np.ones(len(self.asked))]).astype(np.float64), self.asked[:, 2]
        prior = np.array(net.HALVES if self.model.trees.count else net.ALONE)
        blend = self.model.blend.double().numpy()
        p = 1 / (1 + np.exp(-x @ blend))
        slope = x.T @ (p - y) + TRUST * (blend - prior)
        curvature = (x * (p * (1 - p))[:, None]).T @ x + TRUST * np.eye(3)
        self.model.blend.copy_(torch.from_numpy(blend - np.linalg.solve(curvature, slope)))

    def _new_net(self) -> None:
        recipe = self.recipe
        torch.manual_seed(self.seed)
        self.model = net.Net(self.inputs, self.targets, recipe.members, recipe.hidden, recipe.trees)
        self.optimizer = net.make_optimizer(self.model, recipe.weight_decay)

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.steps))

    def _step(self, inputs: Inputs, truth: Floats, rate: float) -> None:
        torch.manual_seed(hash((self.seed, self.steps)))
        self.steps += 1
        self.model.train()
        self.optimizer.zero_grad()
        logits = self.model.foretell(*self.model.tensors(inputs))
        loss = net.losses(logits, torch.from_numpy(truth), self.recipe.target_weight).mean()
        torch.autograd.backward(loss)
        net.step(self.model, self.optimizer, rate)

    def snapshot(self) -> bytes:
        """Weights, optimizer, normaliser, replay and counters."""
        out = io.BytesIO()
        counters = {"seen": self.seen, "started": self.started, "grown": self.grown, "steps": self.steps}
        replay = {name: torch.from_numpy(array) for name, array in self.replay.arrays().items()}
        state = {"net": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "replay": replay}
        torch.save(state | counters | {"asked": torch.from_numpy(self.asked)}, out)
        return out.getvalue()

    def restore(self, data: bytes) -> None:
        """Back to a snapshot; only tensors and numbers are read."""
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        self.model.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.replay.restore({name: tensor.numpy() for name, tensor in state["replay"].items()})
        self.asked = state["asked"].numpy()
        self.seen, self.started, self.grown, self.steps = (state[n] for n in ("seen", "started", "grown", "steps"))
