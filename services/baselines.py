"""What a report holds the model against, on the same examples and with what was known at the time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.quality import auc, log_loss
from services.served import Examples, Floats, Ints

DAY_MS = 86_400_000


@dataclass(frozen=True)
class Scores:
    """The model's and the baselines' scores of the same n examples; NaN where there is none."""

    model: Floats
    rate_24h: Floats
    first_model: Floats

    def quality(self, examples: Examples, rows: npt.NDArray[np.bool_], constant: float) -> dict[str, dict[str, Any]]:
        """`auc` and `log_loss` by predictor, over these rows."""
        label = examples.label[rows]
        by_name = {"model": self.model[rows], "rate_24h": self.rate_24h[rows], "first_model": self.first_model[rows]}
        by_name["constant"] = np.full(len(label), constant)
        return {name: quality(label, scores) for name, scores in by_name.items()}


def quality(label: Floats, scores: Floats) -> dict[str, Any]:
    """`auc` and `log_loss`, to four digits; null when a score is missing or there are no examples."""
    if not len(label) or np.isnan(scores).any():
        return {"auc": None, "log_loss": None}
    area = auc(label, scores)
    return {"auc": None if area is None else round(area, 4), "log_loss": round(log_loss(label, scores), 4)}


def rate_before(asked: Ints, labels: Floats, label_times: Ints, window_ms: int | None, empty: float) -> Floats:
    """For each instant of `asked` (epoch ms), the mean of the labels known before it.

    window_ms : only labels that became known in so many milliseconds before it; None is all
    empty : the value where there is no label
    """
    order = np.argsort(label_times, kind="stable")
    times, sums = label_times[order], np.concatenate([[0.0], np.cumsum(labels[order])])
    last = np.searchsorted(times, asked)
    first = np.zeros_like(last) if window_ms is None else np.searchsorted(times, asked - window_ms)
    count = last - first
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), empty)


def constant_before(examples: Examples, at: int, prior: float) -> float:
    """The mean of all labels known before an instant; the prior without any."""
    found = rate_before(np.array([at]), examples.label, examples.label_time, None, prior)
    return float(found[0])
