from __future__ import annotations

import numpy as np
import pytest

from pipelines import quality
from pipelines.comparison import DAY_MS, Blocks, by_month, calibration, differences

DAYS, PER_DAY = 60, 50
RNG = np.random.default_rng(3)
LABEL = (RNG.random(DAYS * PER_DAY) < 0.3).astype(float)
TIME = np.repeat(np.arange(DAYS), PER_DAY) * DAY_MS + 1_356_998_400_000
GOOD = 1 / (1 + np.exp(-(LABEL - 0.5 + RNG.normal(size=len(LABEL)))))
ROUGH = np.round(GOOD, 1).clip(0.05, 0.95)  # full of ties
NOISE = RNG.random(len(LABEL)).clip(0.1, 0.9)


@pytest.mark.parametrize("score", [GOOD, ROUGH, NOISE])
def test_days_put_together_give_the_whole(score: np.ndarray) -> None:
    blocks = Blocks.of(LABEL, score, TIME)
    area, loss = blocks.figures(np.ones((1, DAYS)))
    assert area[0] == pytest.approx(quality.auc(LABEL, score)) and loss[0] == pytest.approx(
        quality.log_loss(LABEL, score)
    )


def test_a_day_drawn_twice_counts_twice() -> None:
    weights = np.zeros((1, DAYS))
    weights[0, [4, 9]] = 2, 1
    rows = np.concatenate([np.arange(d * PER_DAY, (d + 1) * PER_DAY) for d in (4, 4, 9)])
    area, loss = Blocks.of(LABEL, ROUGH, TIME).figures(weights)
    assert area[0] == pytest.approx(quality.auc(LABEL[rows], ROUGH[rows]))
    assert loss[0] == pytest.approx(quality.log_loss(LABEL[rows], ROUGH[rows]))


def test_an_interval_tells_a_difference_from_none() -> None:
    shuffled = RNG.permutation(NOISE)
    blocks = {n: Blocks.of(LABEL, s, TIME) for n, s in (("good", GOOD), ("noise", NOISE), ("shuffled", shuffled))}
    found = {(d["learner"], d["against"]): d for d in differences(blocks)}
    assert len(found) == 3
    better, same = found["good", "noise"], found["noise", "shuffled"]
    assert 0 < better["auc"]["low"] < better["auc"]["difference"] < better["auc"]["high"]
    assert better["log_loss"]["high"] < 0
    assert same["auc"]["low"] < 0 < same["auc"]["high"]


def test_pairing_takes_away_what_both_share() -> None:
    """Days differ a lot; a small constant edge is seen all the same."""
    level = np.repeat(RNG.normal(0, 2, DAYS), PER_DAY)
    label = (RNG.random(len(level)) < 1 / (1 + np.exp(-level))).astype(float)
    one, other = (1 / (1 + np.exp(-level * k)) for k in (1.0, 0.7))
    (found,) = differences({k: Blocks.of(label, s, TIME) for k, s in (("one", one), ("other", other))})
    assert found["log_loss"]["high"] < 0


def test_calibration_of_honest_scores_is_close() -> None:
    score = RNG.random(20_000)
    honest, bold = (calibration((RNG.random(20_000) < p).astype(float), score)["error"] for p in (score, score**3))
    assert honest < 0.015 < 0.1 < bold


def test_months_are_those_of_the_calendar() -> None:
    months = by_month(LABEL, GOOD, TIME)
    found = [(m["month"], m["examples"] // PER_DAY) for m in months]
    assert found == [("2013-01", 31), ("2013-02", 28), ("2013-03", 1)]
    assert quality.brier(LABEL, GOOD) == pytest.approx(np.mean((LABEL - GOOD) ** 2))
