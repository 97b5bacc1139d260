"""The model: hashed embeddings and normalised numbers into a few small MLPs, beside boosted trees, as one graph."""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from features.usecase import ModelInputs
from pipelines.trees import Trees

CLIP = 5.0  # standard deviations
LEAST_VARIANCE = 1e-3  # of a signed log1p: a column that hardly moves must not be blown up
EXAMPLE_ROWS = 8


class Normaliser(nn.Module):
    """Numbers [n, F] with NaN -> [n, 2F]: signed log1p, standardised, clipped at 5; then flags of what is missing."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("variance", torch.ones(numbers))
        self.mean: Tensor
        self.variance: Tensor

    def forward(self, numbers: Tensor) -> Tensor:
        missing = torch.isnan(numbers)
        squashed = squash(torch.where(missing, torch.zeros_like(numbers), numbers))
        standard = (squashed - self.mean) / torch.sqrt(self.variance)
        standard = torch.clamp(standard, -CLIP, CLIP)
        return torch.cat([torch.where(missing, torch.zeros_like(standard), standard), missing.to(numbers.dtype)], 1)

    def fit(self, numbers: npt.NDArray[np.float32], weight: float = 1.0) -> None:
        """Move mean and variance to those of `numbers` [n, F], NaN left out; `weight` 1 forgets what was there."""
        squashed = squash(torch.from_numpy(numbers).double())
        known = ~torch.isnan(squashed)
        n = known.sum(0)
        zero = torch.zeros_like(squashed)
        mean = torch.where(known, squashed, zero).sum(0) / n.clamp(min=1)
        variance = torch.where(known, (squashed - mean) ** 2, zero).sum(0) / n.clamp(min=1)
        step = torch.where(n > 0, weight, 0.0)
        self.mean += (step * (mean - self.mean)).float()
        self.variance += (step * (variance.clamp(min=LEAST_VARIANCE) - self.variance)).float()


def squash(numbers: Tensor) -> Tensor:
    """Signed log1p: keeps the sign, tames long tails."""
    return torch.sign(numbers) * torch.log1p(torch.abs(numbers))


class Linears(nn.Module):
    """A linear layer for each of K members: [n, inputs] or [K, n, inputs] -> [K, n, outputs]."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight) + self.bias


class Net(nn.Module):
    """Scores from a model's inputs: the mean, in logit space, of some MLPs that share embeddings and normaliser, and
    of boosted trees.

    Parameters
    ----------
    inputs : sizes of everything follow from it
    targets : what each member foretells beside the label
    members : MLPs, which differ by their first weights and their dropout
    hidden : widths of an MLP's layers
    trees : how many
    dropout : after each of them
    input_dropout : of what an MLP reads
    """

    def __init__(
        self,
        inputs: ModelInputs,
        targets: int = 0,
        members: int = 4,
        hidden: Sequence[int] = (192, 96),
        trees: int = 200,
        dropout: float = 0.2,
        input_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.trees = Trees(trees)
        self.normaliser = Normaliser(len(inputs.numbers))
        self.tables = nn.ModuleList(nn.Embedding(c.buckets, c.dim) for c in inputs.categories)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.05)  # type: ignore[arg-type]
        width = 2 * len(inputs.numbers) + sum(c.dim for c in inputs.categories)
        self.skip = Linears(members, width, 1 + targets)
        layers: list[nn.Module] = [nn.Dropout(input_dropout)]
        for size in hidden:
            norm = nn.LayerNorm(size, elementwise_affine=False)  # what follows is linear: it scales and shifts itself
            layers += [Linears(members, width, size), nn.SiLU(), norm, nn.Dropout(dropout)]
            width = size
        self.body = nn.Sequential(*layers)
        self.head = Linears(members, width, 1 + targets)
        for last in (self.skip, self.head):  # random ones would be noise in every score until much has been learned
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def start_at(self, truth: npt.NDArray[np.float32]) -> None:
        """Let an untrained net answer with the mean of each column of `truth` [n, 1 + targets], NaN left out."""
        known = ~np.isnan(truth)
        means = np.where(known, truth, 0).sum(0) / np.maximum(1, known.sum(0))
        rates = np.where(known.any(0), means.clip(0.001, 0.999), 0.5)
        with torch.no_grad():
            self.head.bias[:] = torch.logit(torch.from_numpy(rates)).float()

    def embed(self, numbers: Tensor, ids: Tensor) -> Tensor:
        """Everything a model reads as one vector per row."""
        return torch.cat([self.normaliser(numbers), *(t(ids[:, i]) for i, t in enumerate(self.tables))], 1)

    def foretell(self, numbers: Tensor, ids: Tensor) -> Tensor:
        """Logits [members, n, 1 + targets], the label's first, of numbers [n, F], NaN allowed, and ids [n, C]."""
        x = self.embed(numbers, ids)
        logits: Tensor = self.head(self.body(x)) + self.skip(x)
        return logits

    def forward(self, numbers: Tensor, ids: Tensor) -> Tensor:
        """The label's logits [n]: the members' mean, and once there are trees the mean of that and theirs."""
        members: Tensor = self.foretell(numbers, ids)[:, :, 0].mean(0)
        if not self.trees.count:
            return members
        both: Tensor = members + self.trees.fitted * (self.trees(numbers) - members) / 2
        return both

    def score(self, numbers: npt.NDArray[np.float32], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Probabilities [n], without dropout or gradient; the net stays in the mode it was in."""
        training = self.training
        self.eval()
        device = self.head.weight.device
        with torch.no_grad():
            parts = [
                torch.sigmoid(self(torch.from_numpy(n).to(device), torch.from_numpy(i).to(device)))
                for n, i in zip(_chunks(numbers), _chunks(ids), strict=True)
            ]
        self.train(training)
        return torch.cat(parts).cpu().numpy() if parts else np.empty(0, np.float32)


def _chunks(rows: npt.NDArray[Any], size: int = 8192) -> list[npt.NDArray[Any]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def losses(logits: Tensor, truth: Tensor, target_weight: float) -> Tensor:
    """Loss of each row [n]: the label's cross-entropy and the weighted mean of the targets', summed over the members.

    Parameters
    ----------
    logits : [members, n, 1 + targets], the label first
    truth : [n, 1 + targets], 0 .. 1, NaN for a target that is not known
    """
    known = ~torch.isnan(truth)
    wanted = torch.where(known, truth, 0.0).expand_as(logits)
    each = (binary_cross_entropy_with_logits(logits, wanted, reduction="none") * known).sum(0)
    return each[:, 0] + target_weight * each[:, 1:].sum(1) / max(1, each.shape[1] - 1)


class _Scorer(nn.Module):
    """What is exported: probabilities instead of logits."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, numbers: Tensor, ids: Tensor) -> Tensor:
        return torch.sigmoid(self.net(numbers, ids))


def export(
    net: Net,
    folder: Path,
    declaration: Mapping[str, Any],
    numbers: npt.NDArray[np.float32],
    ids: npt.NDArray[np.int64],
) -> None:
    """Write the files of a version: model.onnx, weights.pt, inputs.json (its declaration), and example.json of the
    first 8 given rows."""
    net = net.cpu().eval()
    numbers, ids = numbers[:EXAMPLE_ROWS], ids[:EXAMPLE_ROWS]
    score = net.score(numbers, ids)
    folder.mkdir(parents=True, exist_ok=True)
    graph, weights = folder / "model.onnx.new", io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the TorchScript exporter is deprecated, and 20 times as fast as its successor
        torch.onnx.export(
            _Scorer(net).eval(),
            (torch.from_numpy(numbers), torch.from_numpy(ids)),
            graph,
            input_names=["numbers", "ids"],
            output_names=["score"],
            dynamic_axes={name: {0: "rows"} for name in ("numbers", "ids", "score")},
            opset_version=17,
            dynamo=False,
        )
    torch.save(net.state_dict(), weights)
    example = {
        "numbers": [[None if np.isnan(v) else float(v) for v in row] for row in numbers],
        "ids": ids.tolist(),
        "score": score.tolist(),
    }
    os.replace(graph, folder / "model.onnx")
    write(folder / "weights.pt", weights.getvalue())
    write(folder / "inputs.json", json.dumps(declaration).encode())
    write(folder / "example.json", json.dumps(example).encode())


def load_weights(net: Net, folder: Path) -> None:
    """Put a version's weights into a net of the same declaration; only tensors are read, no code."""
    net.load_state_dict(torch.load(folder / "weights.pt", weights_only=True, map_location="cpu"))


def write(path: Path, data: bytes) -> None:
    """All or nothing."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(data)
    os.replace(temporary, path)
