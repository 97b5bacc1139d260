"""Live and backtest are the same thing: a lockstep replay, with its retrains by Airflow, and the backtest of the same
days give every request the same score, and decide the same on every version at the same event time.

PENSTOCK_AGREEMENT_DAYS (default 14) from 7 January on.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.flights import use_case
from pipelines.backtest import run
from pipelines.learners import parse
from services import rollout, stack, wiring
from services.backtest import MS, Backtest, Plan
from services.backtest_data import Range
from services.replay import replay
from services.replay_session import to_ms
from services.retrain_wait import RetrainWait
from services.served import read_predictions
from services.settings import Settings
from services.source import source_of
from tests.conftest import free_ports

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]
FROM, TICK = datetime(2013, 1, 7, tzinfo=UTC), timedelta(minutes=15)
UNTIL = FROM + timedelta(days=int(os.environ.get("PENSTOCK_AGREEMENT_DAYS", "14")))
Decided = list[tuple[str, str, int]]  # version, action, cut


def live(home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, float], Decided]:
    """Scores by request id, and what was decided."""
    place = {"PENSTOCK_HOME": str(home), "PENSTOCK_PORT_BASE": str(free_ports()), "PENSTOCK_ALLOW_EVENT_TIME": "true"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with stack.running(Settings.load(), ("flights",)) as settings:
        waits = RetrainWait(settings, use_case, wiring.broker(settings), to_ms(FROM))
        replay(settings, use_case, source_of("flights"), FROM, UNTIL, tick=TICK, at_tick=waits, progress=False)
        waits.close()
        scores = {p.request_id: p.score for p in read_predictions(wiring.broker(settings), use_case)}
        return scores, decided(rollout.status(settings, "flights"))


def decided(state: dict[str, Any]) -> Decided:
    return [(d["version"], d["action"], d["cut"]) for d in state["decisions"]]


def backtested(home: Path) -> tuple[dict[str, float], Decided]:
    """The same from the backtest; Airflow's DAG trains on two ranks."""
    plan = Plan("flights", Range(to_ms(FROM), to_ms(UNTIL), TICK // MS), to_ms(FROM), ("retrain:ranks=2",))
    test = Backtest(home, plan, shown=False)
    learner: Any = parse(plan.learners[0]).make(test.context(home / "versions"))
    period = use_case.retrain_every // MS
    scores = run(learner, test.examples, 0, plan.over.tick, period)
    ids = test.examples.request_id.tolist()
    return dict(zip(ids, scores.tolist(), strict=True)), decided(learner.state.as_json())


def test_scores_and_promotions_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served, decisions = live(tmp_path / "live", monkeypatch)
    expected, foretold = backtested(tmp_path / "backtest")
    assert foretold == decisions and len(decisions) >= 1
    assert expected.keys() <= served.keys() and len(expected) > 2000
    difference = np.array([abs(served[key] - score) for key, score in expected.items()])
    assert difference.max() < 1e-5, f"{(difference >= 1e-5).sum()} of {len(difference)} scores differ"
