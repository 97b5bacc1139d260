from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from pipelines import quality


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=2, max_size=200))
def test_measures_equal_sklearns(rows: list[tuple[bool, int]]) -> None:
    label = np.array([float(r[0]) for r in rows])
    score = np.array([r[1] / 20 for r in rows])
    assert quality.log_loss(label, score) == pytest.approx(
        log_loss(label, np.clip(score, quality.CLIP, 1 - quality.CLIP), labels=[0, 1])
    )
    if 0 < label.sum() < len(label):
        assert quality.auc(label, score) == pytest.approx(roc_auc_score(label, score))
    else:
        assert quality.auc(label, score) is None


def test_blocks_average_the_paired_difference_by_hour() -> None:
    times = np.array([0, 10, 3_600_000, 3_600_001])
    label, half = np.array([1.0, 0.0, 1.0, 1.0]), np.full(4, 0.5)
    better = np.array([0.5, 0.5, 0.9, 0.9])
    blocks = quality.paired_blocks(times, label, better, half)
    assert [(b["start"], b["n"]) for b in blocks] == [(0, 2), (3_600_000, 2)]
    assert blocks[0]["difference"] == 0
    assert blocks[1]["difference"] == pytest.approx(np.log(0.5) - np.log(0.9))


def test_one_hopeless_score_is_clipped() -> None:
    (block,) = quality.paired_blocks(np.array([0]), np.array([1.0]), np.array([0.0]), np.array([1.0 - 1e-9]))
    assert block["difference"] == pytest.approx(quality.LOSS_CAP, abs=1e-5)
