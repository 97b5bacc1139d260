"""The model as one graph: hashed embeddings, normalised numbers and pooled events into a few small MLPs, beside boosted
trees."""

from __future__ import annotations

import copy
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
import onnx
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from features.errors import InputError
from features.inputs import Inputs
from features.usecase import ModelInputs
from pipelines.onnx_model import input_names, record_example
from pipelines.trees import NODE_OPSET, Trees, node_weights, set_node_weights

CLIP = 5.0  # standard deviations
LEAST_VARIANCE = 1e-3  # of a signed log1p: a column that hardly moves must not be blown up
EXAMPLE_ROWS = 8
CHUNK = 8192  # rows scored at a time
HALF_LIFE = 40_000  # examples after which half of a normaliser comes from newer ones
LARGEST_NORM = 1.0  # of a member's gradient
EVENT_WIDTH = 16
ALONE, HALVES = (1.0, 0.0, 0.0), (0.5, 0.5, 0.0)  # the say of members and trees, and a shift
STEEPEST = 5.0  # largest logit of attention: no event is lost, and nothing overflows


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


class Events(nn.Module):
    """Events [m, D] of n rows -> [n, 2 x 16 + 1]: their attention-weighted mean, their mean, log1p of how many.

    All events of a batch are encoded side by side and added up by row, so the cost follows the events that are there:
    no row is padded (the dynamic batching of Looks et al. 2017, "Deep learning with dynamic computation graphs").
    """

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.normaliser = Normaliser(columns)
        self.encoder = nn.Sequential(nn.Linear(2 * columns, EVENT_WIDTH), nn.SiLU())
        self.attention = nn.Linear(EVENT_WIDTH, 1)

    def forward(self, values: Tensor, rows: Tensor, like: Tensor) -> Tensor:
        """Events with the row of each [m]; `like` has as many rows as there shall be."""
        encoded = self.encoder(self.normaliser(values))
        weight = torch.exp(STEEPEST * torch.tanh(self.attention(encoded) / STEEPEST))
        summands = torch.cat([weight * encoded, encoded, weight, torch.ones_like(weight)], 1)
        zeros = torch.zeros(like.shape[0], summands.shape[1], device=like.device)
        sums = zeros.scatter_add(0, rows[:, None].expand_as(summands), summands)
        attended, plain, weights, count = torch.split(sums, [EVENT_WIDTH, EVENT_WIDTH, 1, 1], 1)
        return torch.cat([attended / weights.clamp(min=1e-6), plain / count.clamp(min=1), torch.log1p(count)], 1)


class Linears(nn.Module):
    """A linear layer for each of K members: [n, inputs] or [K, n, inputs] -> [K, n, outputs].

    What all members read is one matrix product for all of them: ONNX Runtime packs its matrix once, when it loads.
    """

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return torch.matmul(x, self.weight) + self.bias
        members, inputs, outputs = self.weight.shape
        together = self.weight.transpose(0, 1).reshape(inputs, members * outputs)
        return torch.matmul(x, together).reshape(-1, members, outputs).transpose(0, 1) + self.bias


class Net(nn.Module):
    """Scores from a model's inputs: a blend, in logit space, of some MLPs that share embeddings and normaliser, and of
    boosted trees.

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
        self.events = nn.ModuleList(Events(len(s.columns)) for s in inputs.sequences)
        width = 2 * len(inputs.numbers) + sum(c.dim for c in inputs.categories)
        width += (2 * EVENT_WIDTH + 1) * len(inputs.sequences)
        self.skip = Linears(members, width, 1 + targets)
        layers: list[nn.Module] = [nn.Dropout(input_dropout)]
        for size in hidden:
            norm = nn.LayerNorm(size, elementwise_affine=False)  # what follows is linear: it scales and shifts itself
            layers += [Linears(members, width, size), nn.SiLU(), norm, nn.Dropout(dropout)]
            width = size
        self.body = nn.Sequential(*layers)
        self.head = Linears(members, width, 1 + targets)
        self.register_buffer("blend", torch.tensor(ALONE))
        self.blend: Tensor
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

    def normalise(self, inputs: Inputs, weight: float = 1.0) -> None:
        """Move all normalisers to these inputs; `weight` 1 forgets what was there."""
        self.normaliser.fit(inputs.numbers, weight)
        for events, ragged in zip(self.events, inputs.sequences, strict=True):
            events.normaliser.fit(ragged.values, weight)  # type: ignore[operator, union-attr]

    def tensors(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Inputs as the methods below take them, on the net's device: numbers [n, F], NaN allowed, ids [n, C], then of
        each sequence its events [m, D] and the row of each [m]."""
        ragged = (array for s in inputs.sequences for array in (s.values, s.rows))
        device = self.head.weight.device
        return tuple(torch.from_numpy(array).to(device) for array in (inputs.numbers, inputs.ids, *ragged))

    def embed(self, numbers: Tensor, ids: Tensor, *events: Tensor) -> Tensor:
        """Everything a model reads as one vector per row."""
        parts = [self.normaliser(numbers), *(t(ids[:, i]) for i, t in enumerate(self.tables))]
        parts += [pool(*events[2 * i : 2 * i + 2], numbers) for i, pool in enumerate(self.events)]
        return torch.cat(parts, 1)

    def foretell(self, *tensors: Tensor) -> Tensor:
        """Logits [members, n, 1 + targets], the label's first."""
        x = self.embed(*tensors)
        logits: Tensor = self.head(self.body(x)) + self.skip(x)
        return logits

    def forward(self, *tensors: Tensor) -> Tensor:
        """The label's logits [n]: the blend of the members' mean and, once there are any, the trees'."""
        members, trees = self.parts(*tensors)
        logits: Tensor = self.blend[0] * members + self.blend[1] * trees + self.blend[2]
        return logits

    def parts(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """What is blended: the members' mean logit [n], and the trees' logit [n]."""
        members = self.foretell(*tensors)[:, :, 0].mean(0)
        return members, self.trees(tensors[0]) if self.trees.count else torch.zeros_like(members)

    def grow(self, inputs: Inputs, label: npt.NDArray[np.float32], seed: int) -> None:
        """New trees from rows in time order and their labels [n]; the first ones get half of the say."""
        if self.trees.fit(inputs.numbers, label, seed) and not self.blend[1]:
            self.blend.copy_(torch.tensor(HALVES))

    def score(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Probabilities [n], without dropout or gradient; the net stays in the mode it was in."""
        training = self.training
        self.eval()
        chunks = (inputs.take(slice(i, i + CHUNK)) for i in range(0, len(inputs), CHUNK))
        with torch.no_grad():
            parts = [torch.sigmoid(self(*self.tensors(chunk))) for chunk in chunks]
        self.train(training)
        return torch.cat(parts).cpu().numpy() if parts else np.empty(0, np.float32)


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


def make_optimizer(model: Net, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, weight matrices decaying. Its state exists from the start: a rank that joins must not take
    the step, with weight decay, by which Horovod would otherwise create it."""
    decayed = [module.weight for module in model.modules() if isinstance(module, Linears)]
    others = [p for p in model.parameters() if not any(p is d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].zero_()
    return optimizer


def step(model: Net, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Move the weights by the gradients that are there, clipped, at this learning rate."""
    members = len(model.head.weight)
    torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM * math.sqrt(members))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


class _Scorer(nn.Module):
    """What is exported: probabilities instead of logits."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.sigmoid(self.net(*tensors))


def export(net: Net, folder: Path, declaration: Mapping[str, Any], inputs: Inputs) -> None:
    """Write the files of a version: model.onnx, weights.pt, inputs.json (its declaration), and example.json of the
    first 8 given rows."""
    net = net.cpu().eval()
    declared, example = ModelInputs.from_json(declaration), inputs.take(slice(EXAMPLE_ROWS))
    recorded = record_example(declared, example, net.score(example))
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "model.onnx", refreshed(template(net, declared, example), net))
    save_weights(net.state_dict(), folder)
    write(folder / "inputs.json", json.dumps(declaration).encode())
    write(folder / "example.json", json.dumps(recorded).encode())


def graph(net: Net, declared: ModelInputs, example: Inputs) -> bytes:
    """The net as an ONNX graph whose initializers are its weights, each under its name in the state dictionary."""
    out, names = io.BytesIO(), input_names(declared)
    sizes = ["rows", "rows", *(f"{s.name}_events" for s in declared.sequences for _ in range(2)), "rows"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the TorchScript exporter is deprecated, and 20 times as fast as its successor
        torch.onnx.export(
            _Scorer(net).eval(),
            net.tensors(example),
            out,  # type: ignore[arg-type]  # what torch declares leaves buffers out
            input_names=names,
            output_names=["score"],
            dynamic_axes={name: {0: size} for name, size in zip([*names, "score"], sizes, strict=True)},
            opset_version=17,
            custom_opsets={"ai.onnx.ml": NODE_OPSET} if net.trees.count else {},
            dynamo=False,
            do_constant_folding=False,  # ONNX Runtime folds when it loads; here it would merge and rename weights
        )
    return out.getvalue()


def template(net: Net, declared: ModelInputs, example: Inputs) -> bytes:
    """A graph for `refreshed`, made of other weights than the net's: the exporter merges those that are equal."""
    other = copy.deepcopy(net).cpu().eval()
    with torch.no_grad():
        for weight in other.state_dict().values():
            if weight.is_floating_point():
                weight.uniform_(0.5, 1.0)
    return graph(other, declared, example)


def refreshed(template: bytes, net: Net) -> bytes:
    """A graph of the same kind of net, a version's own say, with this one's weights: some milliseconds where an export
    takes 100. InputError when it is of another kind."""
    model, weights = onnx.load_from_string(template), net.state_dict()
    if unknown := {t.name for t in model.graph.initializer} - {f"net.{name}" for name in weights}:
        raise InputError(f"a graph with {min(unknown)} is no net of this program's: train a version anew")
    for tensor in model.graph.initializer:
        values = weights[tensor.name.removeprefix("net.")].cpu().numpy()
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for node in _trees(model):
        set_node_weights(net.trees.state_dict(), node)
    return bytes(model.SerializeToString())


def weights_of(graph: bytes) -> dict[str, Tensor]:
    """The weights of a `refreshed` graph, by their names in the state dictionary."""
    model = onnx.load_from_string(graph)
    arrays = {t.name.removeprefix("net."): onnx.numpy_helper.to_array(t).copy() for t in model.graph.initializer}
    found = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return found | {f"trees.{name}": weight for node in _trees(model) for name, weight in node_weights(node).items()}


def _trees(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "TreeEnsemble"]


def save_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """A version's weights.pt."""
    out = io.BytesIO()
    torch.save(dict(weights), out)
    write(folder / "weights.pt", out.getvalue())


def load_weights(net: Net, folder: Path) -> None:
    """Put a version's weights into a net of the same declaration; only tensors are read, no code."""
    net.load_state_dict(read_weights(folder))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """A version's weights by name."""
    return dict(torch.load(folder / "weights.pt", weights_only=True, map_location="cpu"))


def write(path: Path, data: bytes) -> None:
    """All or nothing."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(data)
    os.replace(temporary, path)
