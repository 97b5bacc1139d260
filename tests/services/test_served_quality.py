"""Sums and bins against the exact figures, and across a file."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest

from pipelines import quality
from pipelines.broker import Record
from pipelines.comparison import DAY_MS
from services import served_quality


def example(day: int, version: str, score: float, label: float) -> Record:
    value = {"event_time": day * DAY_MS + 5, "version": version, "score": score, "label": label, "features": {}}
    return Record("toy.examples", 0, 0, 0, b"k", json.dumps(value).encode())


@pytest.mark.parametrize("centre", [0.0, -5.0])  # half of the labels, one in two hundred
def test_the_auc_of_bins_is_exact_to_three_digits_and_the_rest_exact(centre: float) -> None:
    rng = np.random.default_rng(1)
    logit = rng.normal(centre, 1.0, 20_000)
    score = 1 / (1 + np.exp(-logit))
    label = (rng.random(len(score)) < score).astype(float)
    state: dict[str, Any] = {}
    for s, y in zip(score.tolist(), label.tolist(), strict=True):
        served_quality.fold(state, example(1, "1", s, y))
    found = served_quality.by_day(state)[0]
    assert found["auc"] == pytest.approx(quality.auc(label, score), abs=5e-4)
    assert found["log_loss"] == pytest.approx(quality.log_loss(label, score), abs=1e-4)
    assert (found["rate"], found["score"]) == pytest.approx((label.mean(), score.mean()), abs=1e-4)


def test_days_and_versions_are_kept_apart_across_a_file_and_old_days_dropped() -> None:
    state: dict[str, Any] = {}
    for day, version, score, label in ((1, "1", 0.2, 0.0), (2, "1", 0.8, 1.0), (2, "2", 0.4, 1.0), (2, "2", 0.6, 0.0)):
        served_quality.fold(state, example(day, version, score, label))
        state = msgspec.json.decode(msgspec.json.encode(state))
    days, versions = served_quality.by_day(state), served_quality.by_version(state)
    assert [(d["day"], d["version"], d["examples"], d["auc"]) for d in days] == [
        ("1970-01-02", "1", 1, None),
        ("1970-01-03", "2", 3, 0.5),
    ]
    assert [(v["version"], v["from"], v["until"], v["examples"], v["auc"]) for v in versions] == [
        ("1", "1970-01-02", "1970-01-03", 2, 1.0),
        ("2", "1970-01-03", "1970-01-03", 2, 0.0),
    ]
    assert served_quality.recent_loss(state, "3") is None
    for day in range(3, 500):
        served_quality.fold(state, example(day, "2", 0.5, 1.0))
    assert len(state) == served_quality.KEPT_DAYS and min(map(int, state)) == 100
