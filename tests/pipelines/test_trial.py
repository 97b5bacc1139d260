"""Trials: what joiners add up, what control makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines.rollout import Command, RolloutPolicy, RolloutState, decide, judge
from pipelines.sequential import Sequence
from pipelines.trial import BLOCK_MS, Tally, evidence_contract
from tests.toy import use_case

DAY = BLOCK_MS
WAIT = DAY // 2
POLICY = RolloutPolicy.standard()


def prediction(day: float, champion: float = 0.3, challenger: float | None = 0.3, **more: Any) -> Any:
    """As the contract decodes it: a request `day` days after the epoch."""
    about = {"version": "1", "arm": "champion", "score": champion, "shadow": {"2": challenger}}
    return SimpleNamespace(**{"event_time": int(day * DAY), "score_ms": {"1": 1.0, "2": 1.0}} | about | more)


def record(tally: Tally, watermark: float) -> Any:
    """The evidence as control gets it."""
    value = tally.take(int(watermark * DAY))
    return evidence_contract(use_case).decode(json.dumps(value).encode())


def trial(policy: RolloutPolicy = POLICY) -> RolloutState:
    """Version 2 beside 1, in shadow."""
    state, _ = decide(RolloutState(), Command("promote", "1", id="a"), policy, 0)
    return decide(state, Command("consider", "2", id="b", tags={"cut": "7"}), policy, 0)[0]


def days(differences: Any, n: int = 300, first: int = 0, **requests: float) -> Any:
    """Evidence of whole days; negative: the challenger is better."""
    counts = {"requests": float(n), "canary": n / 10} | requests
    for day, difference in enumerate(differences, first):
        block = {"start": day * DAY, "n": n, "difference": float(difference) * n, "gap": 0.0, "champion_gap": 0.0}
        about = {"time": day * DAY, "partition": 0, "closed": (day + 1) * DAY, "champion": "1", "challenger": "2"}
        yield SimpleNamespace(**about, requests=counts, blocks=[block])


def judged(state: RolloutState, evidence: Any, policy: RolloutPolicy = POLICY) -> RolloutState:
    for one in evidence:
        state, _ = judge(state, one, policy, 5)
        assert RolloutState.from_json(json.loads(json.dumps(state.as_json(), allow_nan=False))) == state
    return state


def test_requests_count_at_once_and_labels_when_all_of_their_day_are_known() -> None:
    tally = Tally(0, WAIT)
    asked = [prediction(0.1), prediction(0.9, 0.2, 0.4), prediction(0.95, 0.2, None)]
    for one in asked:
        tally.predicted(one)
    tally.labelled(asked[0], 1.0)
    first = record(tally, 1.0)
    assert first.requests["requests"] == 3 and first.requests["errors"] == 1 and first.blocks == []
    assert first.requests["shift"] == pytest.approx(0.2) and first.requests["distance"] == pytest.approx(0.2)
    tally.labelled(asked[1], 0.0)
    tally.labelled(asked[2], 0.0)
    assert tally.take(int(1.4 * DAY)) is None
    [block] = record(tally, 1.5).blocks
    assert (block["start"], block["n"]) == (0, 2)
    assert block["difference"] == pytest.approx(np.log(0.8) - np.log(0.6)) and block["gap"] == pytest.approx(-0.3)
    tally.labelled(asked[0], 1.0)
    assert record(tally, 2.6).blocks == []


def test_fast_labels_would_have_told_otherwise() -> None:
    """Positives come at once, negatives when the wait is over: a model that says yes to all looks better meanwhile."""
    rng, tally, fast = np.random.default_rng(0), Tally(0, WAIT), Sequence()
    waiting, state, policy = [], trial(), replace(POLICY, max_gap=1.0, max_loss=1.0)
    for day in range(40):
        for _ in range(50):
            positive = bool(rng.random() < 0.2)
            one = prediction(day + rng.random(), 0.2, 0.4)
            tally.predicted(one)
            if positive:
                tally.labelled(one, 1.0)
                fast = fast.add(np.log(0.2) - np.log(0.4))
            else:
                waiting.append(one)
        for one in [w for w in waiting if w.event_time + WAIT <= (day + 1) * DAY]:
            tally.labelled(one, 0.0)
            waiting.remove(one)
        state, _ = judge(state, record(tally, day + 1), policy, 5)
    assert fast.is_below(0.05)
    assert state.trial is None and state.champion == "1" and "it is worse" in state.decisions[-1].sentence


def test_a_canary_is_the_same_pair_of_versions() -> None:
    tally = Tally(0, WAIT)
    tally.predicted(prediction(0.1))
    tally.predicted(prediction(0.2, arm="canary", version="2", score=0.5, shadow={"1": 0.3}))
    seen = record(tally, 0.3).requests
    assert (seen["requests"], seen["canary"]) == (2, 1) and seen["shift"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "more", [{"shadow": {"2": "x"}}, {"shadow": {"2": float("nan")}}, {"shadow": {"2": True}}, {"score_ms": {"1": "a"}}]
)
def test_whatever_a_record_holds_is_counted(more: Any) -> None:
    tally = Tally(0, WAIT)
    tally.predicted(prediction(0.1, **more))
    tally.labelled(prediction(0.1, **more), 1.0)
    seen = record(tally, 0.2).requests
    assert seen["requests"] == 1 and seen["errors"] == ("shadow" in more) and ("slowness" in seen) == ("shadow" in more)


def test_another_pair_starts_anew_and_a_snapshot_goes_on() -> None:
    tally = Tally(0, WAIT)
    tally.predicted(prediction(0.1))
    tally.labelled(prediction(0.1), 1.0)
    restored = Tally(0, WAIT)
    restored.restore(json.loads(json.dumps(tally.snapshot())))
    assert restored.take(2 * DAY) == tally.take(2 * DAY)
    tally.predicted(prediction(2.1, shadow={"3": 0.1}))
    found = record(tally, 2.2)
    assert (found.challenger, found.requests["requests"]) == ("3", 1)
    tally.predicted(prediction(2.3, shadow=None))
    assert tally.pair is None


def test_shadow_then_canary_then_champion() -> None:
    state = trial()
    assert state.as_json()["roles"] == {"champion": "1", "challenger": "2"} and state.as_json()["phase"] == "shadow"
    assert state.as_json()["shares"] == {"1": 1.0, "2": 0.0}
    noise = np.random.default_rng(1).normal(-0.01, 0.01, 100)
    state = judged(state, days(noise[:2]))
    assert state.as_json()["phase"] == "canary" and state.as_json()["shares"] == {"1": 0.9, "2": 0.1}
    state = judged(state, days(noise[2:], first=2))
    assert state.champion == "2" and state.trial is None and state.share == 0.0
    assert state.decisions[-1].sentence.startswith("promoted version 2 over 1: log loss -.0")
    assert state.decisions[-1].cut == 7 and state.versions["2"]["cut"] == 7


@pytest.mark.parametrize(
    ("evidence", "says"),
    [
        (days([0], n=3, errors=3.0), "3 of 3 answers were no number"),
        (days([0], n=200, distance=60.0), "its scores lie .3000 from the champion's on average of 200 requests"),
        (days([0], n=200, slowness=320.0), "it takes 5.0 times as long as the champion on average of 200 requests"),
        (days(np.linspace(0.01, 0.02, 30)), "it is worse, log loss .0"),
        (days([0.01, -0.01] * 125), "it is not proven better, log loss .0000 a day over 250 days"),
    ],
)
def test_what_ends_a_trial(evidence: Any, says: str) -> None:
    state = judged(trial(), evidence)
    assert state.champion == "1" and state.trial is None
    assert state.decisions[-1].action == "rolled_back" and says in state.decisions[-1].sentence
    again, refusal = decide(state, Command("consider", "2", id="c"), POLICY, 9)
    assert refusal.action == "refused" and "compared with version 1 already" in refusal.sentence and again.trial is None


def test_a_mean_score_far_from_the_mean_label_ends_it() -> None:
    evidence = list(days([0.0, 0.001, -0.001]))
    for one in evidence:
        one.blocks[0] |= {"gap": 24.0, "champion_gap": -3.0}
    state = judged(trial(), evidence)
    assert "its mean score lies .0800 from the mean label, the champion's -.0100" in state.decisions[-1].sentence


def test_a_few_errors_in_many_requests_are_no_reason() -> None:
    assert judged(trial(), days([0], n=10_000, errors=5.0)).trial is not None


def test_a_version_waits_for_the_trial_before_it() -> None:
    state, waits = decide(trial(), Command("consider", "3", id="c"), POLICY, 1)
    assert waits.action == "waits" and waits.sentence == "version 3 waits: the trial of version 2 is on"
    state, waits = decide(state, Command("consider", "4", id="d"), POLICY, 1)
    assert waits.sentence == "version 4 waits in place of version 3: the trial of version 2 is on"
    state, _ = decide(state, Command("rollback", id="e", why="I say so"), POLICY, 2)
    assert [d.sentence for d in state.decisions[-2:]] == [
        "rolled back version 2, 1 stays: I say so",
        "version 4 scores beside 1, unseen by callers",
    ]
    assert state.trial and state.trial.version == "4" and state.waiting is None


def test_a_promotion_by_hand_ends_a_trial() -> None:
    state, decision = decide(trial(), Command("promote", "9", id="c"), POLICY, 1)
    assert decision.sentence == "promoted version 9 over 1 by hand; the trial of version 2 ends"
    assert state.champion == "9" and state.trial is None


def test_evidence_of_other_versions_and_of_no_numbers_does_not_count() -> None:
    state, [one] = trial(), days([-1])
    assert judge(state, SimpleNamespace(**vars(one) | {"challenger": "5"}), POLICY, 0) == (state, False)
    one.requests, one.blocks = (
        {"requests": "many", "errors": float("inf")},
        [7, {"start": "x"}, {"start": 0, "n": None}],
    )
    state, _ = judge(state, one, POLICY, 0)
    assert state.trial and not state.trial.difference.n and state.trial.mean("errors") == 0


def test_a_day_counts_when_every_partition_has_told_its_part() -> None:
    state, [one] = trial(), days([-0.5])
    other = SimpleNamespace(**vars(one) | {"partition": 1, "closed": 0, "blocks": []})
    state = judged(state, [other, one])
    assert state.trial and state.trial.difference.n == 0
    [more] = days([0.5])
    state = judged(state, [SimpleNamespace(**vars(more) | {"partition": 1})])
    assert state.trial and state.trial.difference.n == 1 and state.trial.difference.total == pytest.approx(0)


def test_an_equal_challenger_is_promoted_seldom_whenever_one_looks() -> None:
    """400 sequences of 200 days with heavy tails: at most one in twenty and what chance adds to that."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(400):
        seen, below = Sequence(), False
        for mean in rng.standard_t(4, 200):
            seen = seen.add(mean)
            below = below or seen.is_below(0.05)
        found += below
    assert 0 < found <= 20 + 2 * 4.4
