"""A learner: what the backtest compares, and what the continuous learner keeps up to date."""

from __future__ import annotations

from typing import Protocol

from features.inputs import Floats, Inputs
from pipelines.archive import Examples


class Learner(Protocol):
    """Scores rows, and learns from examples in the order in which their labels come.

    The same calls on the same snapshot give the same state and scores: it reads no clock and draws no randomness but
    from a seed.
    """

    def update(self, examples: Examples) -> None:
        """Learn from examples whose labels have just come, ordered by (label_time, request_id)."""

    def score(self, inputs: Inputs) -> Floats:
        """Probabilities [n]; before anything was learned, a prior."""

    def snapshot(self) -> bytes:
        """Everything that later updates and scores depend on; no pickle."""

    def restore(self, data: bytes) -> None:
        """Go back to a snapshot of a learner that was made with the same arguments."""
