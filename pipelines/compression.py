"""What ranks send each other: the gradients as they are, in half precision, or as low-rank factors.

What a compressor leaves out of a step it keeps and adds to the next one (error feedback), so in the long run everything
is applied. Each rank keeps a part; only together do they mean what has not been applied yet. Alone a part also has how
the rank's gradients differed from the others', so when ranks come or go all parts are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

AllReduce = Callable[[Sequence[Tensor], str], object]  # sums in place over the ranks; the text names the exchange
HALF_SCALE = 256.0  # gradients of a mean are small, and half precision is coarse below 6e-5
HALF_LIMIT = 1000.0  # so that 64 ranks don't add up to infinity; what is above goes out with later steps


class Compressor(Protocol):
    """Sums gradients over the ranks, exactly or in the long run.

    left : what this rank has left out; to be zeroed on every rank when ranks come or go
    shared : what must be the same on every rank; a rank that joins takes it from rank 0
    """

    left: list[Tensor]
    shared: list[Tensor]

    def reduce(self, gradients: Sequence[Tensor], allreduce: AllReduce) -> None:
        """Put the sum over the ranks in place of each gradient; the result is the same on every rank."""


class Plain:
    """Gradients as they are."""

    def __init__(self) -> None:
        self.left: list[Tensor] = []
        self.shared: list[Tensor] = []

    def reduce(self, gradients: Sequence[Tensor], allreduce: AllReduce) -> None:
        allreduce(gradients, "gradients")


class Half:
    """Floats of 16 bits: half the bytes."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.left = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.shared: list[Tensor] = []

    def reduce(self, gradients: Sequence[Tensor], allreduce: AllReduce) -> None:
        sent = []
        for gradient, left in zip(gradients, self.left, strict=True):
            left += gradient
            sent.append((left * HALF_SCALE).clamp_(-HALF_LIMIT, HALF_LIMIT).half())
            left -= sent[-1].float() / HALF_SCALE
        allreduce(sent, "halves")
        for gradient, total in zip(gradients, sent, strict=True):
            torch.div(total.float(), HALF_SCALE, out=gradient)


class PowerSGD:
    """Factors of rank r by one power iteration a step, which starts from the last step's (Vogels et al. 2019, alg. 1).

    A tensor of three dimensions is a stack of matrices; one that factors would not make smaller goes as it is.
    """

    def __init__(self, parameters: Sequence[Tensor], rank: int, seed: int) -> None:
        chance = torch.Generator().manual_seed(seed)
        self.low = [i for i, p in enumerate(parameters) if p.dim() > 1 and rank * sum(p.shape[-2:]) < _area(p)]
        matrices = [parameters[i] for i in self.low]
        self.left = [torch.zeros_like(m, requires_grad=False) for m in matrices]
        shapes = [(*m.shape[:-2], m.shape[-1], rank) for m in matrices]
        self.shared = [torch.randn(s, generator=chance).to(m.device) for s, m in zip(shapes, matrices, strict=True)]

    def reduce(self, gradients: Sequence[Tensor], allreduce: AllReduce) -> None:
        for i, left in zip(self.low, self.left, strict=True):
            left += gradients[i]
        bases = [left @ right for left, right in zip(self.left, self.shared, strict=True)]
        allreduce([*bases, *(g for i, g in enumerate(gradients) if i not in self.low)], "bases")
        bases = [torch.linalg.qr(base).Q for base in bases]
        for left, right, base in zip(self.left, self.shared, bases, strict=True):
            torch.matmul(left.mT, base, out=right)
            left -= base @ right.mT
        allreduce(self.shared, "factors")
        for i, right, base in zip(self.low, self.shared, bases, strict=True):
            torch.matmul(base, right.mT, out=gradients[i])


def _area(parameter: Tensor) -> int:
    return parameter.shape[-2] * parameter.shape[-1]


def make(name: str, parameters: Sequence[Tensor], seed: int) -> Compressor:
    """The compressor of a recipe's `compression`: none, fp16 or powersgd:RANK."""
    if name == "none":
        return Plain()
    if name == "fp16":
        return Half(parameters)
    return PowerSGD(parameters, int(name.removeprefix("powersgd:")), seed)
