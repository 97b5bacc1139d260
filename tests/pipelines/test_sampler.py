from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sampler import Sampler

samplers = st.builds(
    Sampler, rows=st.integers(1, 200), batch=st.integers(1, 17), epochs=st.integers(1, 3), seed=st.integers(0, 99)
)


def take_step(sampler: Sampler, position: int, world: int) -> tuple[int, int, list[int]]:
    """Epoch, next position and the rows that all ranks together take, after checking each share."""
    epoch, start, end = sampler.step(position, world)
    order = sampler.order(epoch)
    shares = [sampler.share(order, start, end, rank, world) for rank in range(world)]
    assert all(len(s.rows) == len(s.weights) == sampler.batch and s.total == end - start for s in shares)
    assert sum(s.weights.sum() for s in shares) == end - start
    sizes = [int(s.weights.sum()) for s in shares]
    assert max(sizes) - min(sizes) <= 1
    taken = [int(r) for s in shares for r in s.rows[s.weights > 0]]
    return epoch, position + end - start, taken


@given(samplers, st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3)), max_size=30))
def test_each_row_counts_once_per_epoch_whatever_ranks_come_and_go(
    sampler: Sampler, changes: list[tuple[int, int, int]]
) -> None:
    """Each change: so many ranks take so many steps; then the last few of these steps are undone, as after a kill."""
    counted: list[tuple[int, int, list[int]]] = []
    position = 0
    for world, steps, undone in changes:
        committed = len(counted)
        for _ in range(steps):
            if position < sampler.length:
                epoch, after, taken = take_step(sampler, position, world)
                counted.append((epoch, position, taken))
                position = after
        for _ in range(min(undone, len(counted) - committed)):
            _, position, _ = counted.pop()
    while position < sampler.length:
        epoch, after, taken = take_step(sampler, position, 2)
        counted.append((epoch, position, taken))
        position = after
    assert position == sampler.length
    for epoch in range(sampler.epochs):
        assert Counter(r for e, _, taken in counted if e == epoch for r in taken) == Counter(range(sampler.rows))


@given(samplers)
def test_epochs_have_orders_of_their_own_that_a_seed_fixes(sampler: Sampler) -> None:
    again = Sampler(sampler.rows, sampler.batch, sampler.epochs, sampler.seed)
    assert np.array_equal(sampler.order(0), again.order(0))
    if sampler.rows > 20:
        assert not np.array_equal(sampler.order(0), sampler.order(1))


def test_the_last_step_is_shared_evenly_and_padded_with_weight_0() -> None:
    sampler = Sampler(rows=10, batch=4)
    order = sampler.order(0)
    _, start, end = sampler.step(8, 2)
    first, second = (sampler.share(order, start, end, rank, 2) for rank in (0, 1))
    assert first.weights.tolist() == second.weights.tolist() == [1, 0, 0, 0]
    assert {int(first.rows[0]), int(second.rows[0])} == set(order[8:].tolist())
