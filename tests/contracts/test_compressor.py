"""What every compressor of gradients must do, on ranks that are threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from pipelines.compression import Compressor, make

SHAPES = [(64, 8), (4, 20, 12), (4, 1, 12), (30,)]  # a table, a stack of matrices, two biases
PLAIN_BYTES = 4 * sum(torch.Size(shape).numel() for shape in SHAPES)
BYTES = {
    "none": PLAIN_BYTES,
    "fp16": PLAIN_BYTES // 2,
    "powersgd:1": 4 * (64 + 8 + 4 * (20 + 12) + 4 * 12 + 30),
    "powersgd:4": 4 * (4 * (64 + 8) + 4 * 4 * (20 + 12) + 4 * 12 + 30),
}
Gradients = list[Tensor]

pytestmark = pytest.mark.parametrize("name", BYTES)


class Ranks:
    """Compressors of one kind, with an exchange between them that counts what the first one hands over."""

    def __init__(self, name: str, ranks: int) -> None:
        self.name, self.sent = name, 0
        self.compressors = [self.make() for _ in range(ranks)]

    def make(self) -> Compressor:
        return make(self.name, [torch.zeros(s) for s in SHAPES], 7)

    def become(self, count: int) -> None:
        """Ranks are killed, or join."""
        self.compressors = [*self.compressors[:count], *(self.make() for _ in range(count - len(self.compressors)))]
        for compressor in self.compressors:
            for tensor in compressor.left:
                tensor.zero_()
            for tensor, of_rank_0 in zip(compressor.shared, self.compressors[0].shared, strict=True):
                tensor.copy_(of_rank_0)

    def step(self, gradients: Sequence[Gradients]) -> Gradients:
        """One step; what it gives is checked to be the same on all ranks."""
        barrier, handed = Barrier(len(gradients), timeout=30), [[]] * len(gradients)  # type: ignore[var-annotated]

        def allreduce(rank: int) -> Callable[[Sequence[Tensor], str], None]:
            def reduce(tensors: Sequence[Tensor], name: str) -> None:
                handed[rank] = [t.clone() for t in tensors]
                barrier.wait()
                sums = [torch.stack(of_ranks).sum(0) for of_ranks in zip(*handed, strict=True)]
                barrier.wait()
                for tensor, total in zip(tensors, sums, strict=True):
                    tensor.copy_(total)
                if rank == 0:
                    self.sent += sum(t.numel() * t.element_size() for t in tensors)

            return reduce

        out = [[g.clone() for g in of_rank] for of_rank in gradients]
        with ThreadPoolExecutor(len(out)) as pool:
            calls = [pool.submit(c.reduce, out[r], allreduce(r)) for r, c in enumerate(self.compressors)]
            for call in calls:
                call.result()
        for other in out[1:]:
            assert all(map(torch.equal, out[0], other))
        return out[0]


def draw(ranks: int, chance: torch.Generator, scale: float = 1e-3) -> list[Gradients]:
    """Gradients of each rank."""
    return [[torch.randn(s, generator=chance) * scale for s in SHAPES] for _ in range(ranks)]


def total(gradients: Sequence[Gradients]) -> Tensor:
    """The ranks' sum as one vector."""
    return torch.cat([torch.stack(of_ranks).sum(0).flatten() for of_ranks in zip(*gradients, strict=True)])


def flat(gradients: Gradients) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def test_bytes_are_those_of_the_method(name: str) -> None:
    ranks = Ranks(name, 2)
    ranks.step(draw(2, torch.Generator().manual_seed(1)))
    assert ranks.sent == BYTES[name]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_left_out_of_random_gradients_does_not_grow(name: str, count: int) -> None:
    ranks, chance = Ranks(name, count), torch.Generator().manual_seed(2)
    missing, left = torch.zeros(PLAIN_BYTES // 4), []
    for _ in range(120):
        gradients = draw(count, chance)
        missing += total(gradients) - flat(ranks.step(gradients))
        left.append(missing.norm().item() / total(gradients).norm().item())
    assert max(left[60:]) < 1.5 * max(left[20:60]) + 1e-2
    assert max(left) < 30


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_same_gradient_again_and_again_arrives(name: str, count: int) -> None:
    ranks, gradients = Ranks(name, count), draw(count, torch.Generator().manual_seed(3))
    wanted, applied, errors = total(gradients), torch.zeros(PLAIN_BYTES // 4), []
    for step in range(1, 161):
        applied += flat(ranks.step(gradients))
        errors.append(((applied / step - wanted).norm() / wanted.norm()).item())
    assert errors[159] < max(1e-3, errors[19] / 4)


def test_a_run_repeats_itself(name: str) -> None:
    first, second = Ranks(name, 2), Ranks(name, 2)
    chance = torch.Generator().manual_seed(4)
    for _ in range(5):
        gradients = draw(2, chance)
        assert all(map(torch.equal, first.step(gradients), second.step(gradients)))


def test_ranks_come_and_go(name: str) -> None:
    """What has been left out is lost then, and no more."""
    ranks, chance = Ranks(name, 2), torch.Generator().manual_seed(5)
    missing = torch.zeros(PLAIN_BYTES // 4)
    for count in (2, 3, 1, 2):
        ranks.become(count)
        for _ in range(30):
            gradients = draw(count, chance)
            missing += total(gradients) - flat(ranks.step(gradients))
    assert missing.norm() < 60 * total(gradients).norm()


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e6])
def test_gradients_of_any_size_stay_finite(name: str, scale: float) -> None:
    ranks, chance = Ranks(name, 2), torch.Generator().manual_seed(8)
    for _ in range(3):
        assert torch.isfinite(flat(ranks.step(draw(2, chance, scale)))).all()
    after = [ranks.step([[torch.zeros(s) for s in SHAPES]] * 2) for _ in range(3)]
    assert all(torch.isfinite(flat(out)).all() for out in after)
    assert scale or not flat(after[-1]).any()
