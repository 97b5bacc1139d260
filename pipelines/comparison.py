"""How good a learner's scores are, by month, and how certain one is better than another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.quality import Floats, auc, brier, log_loss, losses

DAY_MS = 86_400_000
ROUNDS, LEVEL = 2000, 0.95
BINS = 10
Times = npt.NDArray[np.int64]


def quality(label: Floats, score: Floats) -> dict[str, Any]:
    """`examples`, `rate`, `auc`, `log_loss` and `brier`; None where there is nothing to measure."""
    n = len(label)
    measured = (auc(label, score), log_loss(label, score), brier(label, score)) if n else (None, None, None)
    rate = float(np.mean(label)) if n else None
    names = ("rate", "auc", "log_loss", "brier")
    return {"examples": n} | {k: _rounded(v) for k, v in zip(names, (rate, *measured), strict=True)}


def by_month(label: Floats, score: Floats, time: Times) -> list[dict[str, Any]]:
    """`quality` of each month (UTC) of event time (epoch ms)."""
    month = time.astype("datetime64[ms]").astype("datetime64[M]")
    return [{"month": str(m)} | quality(label[month == m], score[month == m]) for m in np.unique(month)]


def calibration(label: Floats, score: Floats) -> dict[str, Any]:
    """Ten groups of equal size by score, and `error`, the mean distance between their mean score and mean label
    (expected calibration error, Naeini et al. 2015)."""
    groups = [g for g in np.array_split(np.argsort(score, kind="stable"), BINS) if len(g)]
    found = [{"score": float(np.mean(score[g])), "label": float(np.mean(label[g])), "examples": len(g)} for g in groups]
    error = sum(g["examples"] * abs(g["score"] - g["label"]) for g in found) / max(1, len(label))
    rounded = [{**g, "score": _rounded(g["score"]), "label": _rounded(g["label"])} for g in found]
    return {"error": _rounded(error), "groups": rounded}


@dataclass(frozen=True)
class Blocks:
    """What a learner's AUC and log loss are made of, day by day, so that days can be drawn again.

    wins : [D, D] over positives of one day and negatives of another, how often the positive scores higher (a tie is a
        half)
    positives, negatives : [D] of each day; loss : [D] summed over each day
    """

    wins: Floats
    positives: Floats
    negatives: Floats
    loss: Floats

    @classmethod
    def of(cls, label: Floats, score: Floats, time: Times) -> Blocks:
        days, day = np.unique(time // DAY_MS, return_inverse=True)
        hit, count = label > 0.5, len(days)
        order = np.argsort(score[hit], kind="stable")
        up, up_day = score[hit][order], day[hit][order]
        wins = np.zeros((count, count))
        for d in range(count):
            down = np.sort(score[~hit & (day == d)])
            half = (np.searchsorted(down, up, "left") + np.searchsorted(down, up, "right")) / 2
            wins[:, d] = np.bincount(up_day, weights=half, minlength=count)
        positives, negatives = (np.bincount(day[which], minlength=count).astype(float) for which in (hit, ~hit))
        return cls(wins, positives, negatives, np.bincount(day, weights=losses(label, score), minlength=count))

    def figures(self, weights: Floats) -> tuple[Floats, Floats]:
        """AUC and log loss [R] when each day counts as often as weights [R, D] say."""
        pairs = (weights @ self.positives) * (weights @ self.negatives)
        area = np.einsum("rd,de,re->r", weights, self.wins, weights, optimize=True)
        return area / pairs, weights @ self.loss / (weights @ (self.positives + self.negatives))


def differences(learners: Mapping[str, Blocks], seed: int = 0) -> list[dict[str, Any]]:
    """Each learner less each later one, in AUC and log loss, with 95% intervals: whole days are drawn with replacement,
    the same for both (rows of one day are alike)."""
    names, blocks = list(learners), list(learners.values())
    if len(names) < 2:
        return []
    count = len(blocks[0].loss)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=ROUNDS).astype(float)
    weights = np.concatenate([np.ones((1, count)), drawn])
    found = [block.figures(weights) for block in blocks]
    return [
        {"learner": names[i], "against": names[j]}
        | {what: _interval(found[i][k] - found[j][k]) for k, what in enumerate(("auc", "log_loss"))}
        for i in range(len(names))
        for j in range(i + 1, len(names))
    ]


def _interval(found: Floats) -> dict[str, float | None]:
    """The first is the difference itself, the rest are those of drawn days."""
    low, high = np.quantile(found[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"difference": _rounded(found[0]), "low": _rounded(low), "high": _rounded(high)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 5)
