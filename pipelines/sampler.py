"""Which rows a rank trains on next: a permutation per epoch, shared out in step, each row exactly once.

All ranks take from one permutation in lockstep, so how far an epoch has come is one number. Ranks may come and go
between two steps: the rows that remain are shared out anew from that number on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of one step.

    rows : [batch] row indices; padding repeats row 0 of the step
    weights : [batch], 1 for a row that counts, 0 for padding
    total : rows that count in this step, over all ranks
    """

    rows: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    total: int


@dataclass(frozen=True, slots=True)
class Sampler:
    """Shares `rows` rows out for some epochs.

    rows : row indices 0 .. rows-1
    batch : rows per rank and step
    epochs : how often each row counts
    seed : of the permutations
    """

    rows: int
    batch: int
    epochs: int = 1
    seed: int = 0

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The epoch's permutation, the same on every rank."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.rows)

    def step(self, position: int, world: int) -> tuple[int, int, int]:
        """Epoch, first and past-the-last place in its permutation of the step at `position`.

        `position` counts rows done since the start of the first epoch. A step never crosses an epoch's end.
        """
        epoch, start = divmod(position, self.rows)
        return epoch, start, min(start + self.batch * world, self.rows)

    def share(self, order: npt.NDArray[np.int64], start: int, end: int, rank: int, world: int) -> Share:
        """What `rank` of `world` ranks takes of the places [start, end); the last step of an epoch is shared evenly."""
        mine = order[start + rank : end : world]
        weights = np.zeros(self.batch, np.float32)
        weights[: len(mine)] = 1.0
        rows = np.full(self.batch, order[start], np.int64)
        rows[: len(mine)] = mine
        return Share(rows, weights, end - start)

    @property
    def length(self) -> int:
        """The position at which all epochs are done."""
        return self.rows * self.epochs
