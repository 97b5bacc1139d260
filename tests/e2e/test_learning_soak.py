"""Kill -9 of the continuous learner under load: every label is learned or skipped once, and served."""

from __future__ import annotations

import os

import pytest

from benchmarks.learning import bench

KILLS = int(os.environ.get("PENSTOCK_SOAK_LEARNER_KILLS", "10"))


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_killed_learners_leave_an_exact_ledger() -> None:
    found = bench(seconds=60, rate=20, kills=KILLS)
    assert found["kills"] == KILLS
    assert found["ledger_is_exact"] and found["never_learned"] == 0, found
