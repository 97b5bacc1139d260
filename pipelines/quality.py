"""How good scores are: log loss, Brier score, AUC and the paired difference by block of time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]
CLIP = 1e-6  # of a probability: keeps one confident mistake finite
LOSS_CAP = 4.0  # of one example's loss in a paired comparison: no single row decides it


def losses(label: Floats, score: Floats) -> Floats:
    """Log loss of each example, in nats."""
    p = np.clip(np.asarray(score, np.float64), CLIP, 1 - CLIP)
    return np.asarray(-(label * np.log(p) + (1 - label) * np.log1p(-p)))


def log_loss(label: Floats, score: Floats) -> float:
    """Mean log loss in nats."""
    return float(losses(label, score).mean())


def brier(label: Floats, score: Floats) -> float:
    """Mean squared distance between score and label."""
    return float(np.mean((np.asarray(score, np.float64) - label) ** 2))


def auc(label: Floats, score: Floats) -> float | None:
    """Area under the ROC curve: the Mann-Whitney statistic with midranks for ties. None when one class is missing.

    >>> auc(np.array([0, 0, 1, 1]), np.array([.1, .4, .35, .8]))
    0.75
    """
    positive = np.asarray(label) > 0.5
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if not n1 or not n0:
        return None
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    midrank = np.cumsum(counts) - (counts - 1) / 2
    return float((midrank[inverse][positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def paired_blocks(
    event_time: npt.NDArray[np.int64], label: Floats, challenger: Floats, champion: Floats, block_ms: int = 3_600_000
) -> list[dict[str, Any]]:
    """Challenger's minus champion's clipped loss, averaged by block of event time (rows of one block correlate).

    Returns
    -------
    one dict per block that has examples: `start` (epoch ms), `n`, `difference` (nats; negative: challenger better)
    """
    difference = np.minimum(losses(label, challenger), LOSS_CAP) - np.minimum(losses(label, champion), LOSS_CAP)
    starts, index, n = np.unique(event_time // block_ms * block_ms, return_inverse=True, return_counts=True)
    means = np.bincount(index, weights=difference) / n
    return [{"start": int(s), "n": int(k), "difference": float(d)} for s, k, d in zip(starts, n, means, strict=True)]


def splittable(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows [n, F] for scikit-learn's histogram boosting, which fails on a column that is null throughout: it gets a 0,
    on which nothing is split."""
    return np.where(np.isnan(numbers).all(axis=0), np.float32(0), numbers)
