"""Rollout decisions, by example and by property."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.rollout import DECISIONS_KEPT, Command, Decision, RolloutPolicy, RolloutState, decide, weighted

POLICY = RolloutPolicy.immediate()
TAGS = {"cut": "1357776000000", "latest_label_time": "1357775000000"}


def consider(version: str, id: str = "", **evidence: Any) -> Command:
    return Command("consider", version, "a", "", id or f"consider {version}", evidence or None, TAGS)


def evidence(champion: str | None, *differences: float, n: int = 500, **more: Any) -> dict[str, Any]:
    blocks = [{"start": 3_600_000 * i, "n": n, "difference": d} for i, d in enumerate(differences)]
    return {"champion": champion, "log_loss": 0.43, "champion_log_loss": 0.44, "blocks": blocks} | more


def run(*commands: Command, state: RolloutState | None = None) -> tuple[RolloutState, list[Decision]]:
    state, decisions = state or RolloutState(), []
    for i, command in enumerate(commands):
        state, decision = decide(state, command, POLICY, 1000 + i)
        decisions.append(decision)
    return state, decisions


def serving(*versions: str) -> RolloutState:
    """Versions promoted by hand, one after the other."""
    return run(*(Command("promote", v, id=f"p{v}", tags=TAGS) for v in versions))[0]


def test_the_first_version_serves_without_a_comparison() -> None:
    state, [decision] = run(consider("1"))
    assert (state.champion, state.generation, decision.action, decision.cut) == ("1", 1, "promoted", 1357776000000)
    assert state.versions == {"1": {"cut": 1357776000000, "latest_label_time": 1357775000000, "since": 1000}}


def test_a_better_challenger_is_promoted_and_the_sentence_says_why() -> None:
    command = consider("2", **evidence("1", -0.01, -0.02, log_loss=0.4312, champion_log_loss=0.4391))
    state, [decision] = run(command, state=serving("1"))
    assert state.champion == "2" and decision.action == "promoted" and decision.against == "1"
    assert decision.sentence == (
        "promoted version 2 over 1: log loss .4312 against .4391 on 1000 newest examples"
        " (difference -.0150 +- .0050 over 2 hourly blocks)"
    )


@pytest.mark.parametrize("difference", [0.0, 0.001])
def test_a_challenger_that_is_not_better_is_refused(difference: float) -> None:
    state, [decision] = run(consider("2", **evidence("1", difference)), state=serving("1"))
    assert state.champion == "1" and decision.action == "refused"
    assert decision.sentence.startswith("refused version 2, 1 stays: log loss")
    assert state.generation == 2


def test_blocks_count_by_their_examples() -> None:
    blocks = [{"start": 0, "n": 900, "difference": -0.01}, {"start": 1, "n": 100, "difference": 0.08}]
    _, [decision] = run(consider("2", **evidence("1") | {"blocks": blocks}), state=serving("1"))
    assert decision.action == "promoted"


def test_a_comparison_with_an_older_champion_must_be_made_again() -> None:
    state, [decision] = run(consider("5", **evidence("3", -1)), state=serving("3", "4"))
    assert decision.sentence == "refused version 5: compared with version 3 but 4 serves now: consider it again"
    state, [decision] = run(consider("5", "again", **evidence("4", -1)), state=state)
    assert state.champion == "5"


def test_too_few_examples() -> None:
    _, [few] = run(consider("2", **evidence("1", -1, n=199)), state=serving("1"))
    assert few.sentence == "refused version 2: 199 newest examples are too few, 200 are needed"
    _, [enough] = run(consider("2", **evidence("1", -1, n=200)), state=serving("1"))
    assert enough.action == "promoted"


def test_what_is_settled_is_not_considered_again() -> None:
    state = serving("1", "2")
    _, [decision] = run(consider("2", "x"), state=state)
    assert decision.sentence == "refused version 2: it serves already"
    _, [decision] = run(consider("1", "x", **evidence("2", -1)), state=state)
    assert "it has served before" in decision.sentence
    state, _ = run(consider("3", "first", **evidence("2", 1)), state=state)
    _, [decision] = run(consider("3", "second", **evidence("2", -1)), state=state)
    assert decision.action == "refused" and "compared with version 2 already" in decision.sentence


def test_a_repeated_command_changes_nothing() -> None:
    state, [first] = run(consider("1", "same"))
    again, [second] = run(replace(consider("9", "same"), command="promote"), state=state)
    assert again is state and second == first


def test_promotion_by_hand_and_rollback() -> None:
    state, [decision] = run(Command("promote", "3", why="asked for", id="x"), state=serving("1", "2"))
    assert (state.champion, decision.sentence) == ("3", "promoted version 3 over 2 by hand: asked for")
    state, [back] = run(Command("rollback", why="it errs", id="y"), state=state)
    assert (state.champion, back.version, back.action) == ("2", "3", "rolled_back")
    assert back.sentence == "rolled back version 3 to 2: it errs"
    state, [further] = run(Command("rollback", id="z"), state=state)
    assert state.champion == "1" and further.version == "2"
    state, [end] = run(Command("rollback", id="w"), state=state)
    assert state.champion == "1" and end.sentence == "refused to roll back: no version served before this one"


def test_rollback_skips_what_was_rolled_back_before() -> None:
    state, _ = run(Command("rollback", id="r1"), state=serving("1", "2"))
    state, _ = run(Command("promote", "3", id="p3b"), Command("rollback", id="r2"), state=state)
    assert state.champion == "1"
    state, _ = run(Command("promote", "2", id="p2b"), Command("promote", "4", id="p4"), state=state)
    state, _ = run(Command("rollback", id="r3"), state=state)
    assert state.champion == "2"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (Command("rollback", id="x"), "no version served before"),
        (Command("destroy", "1", id="x"), "refused 'destroy': the commands are consider, promote and rollback"),
        (Command("promote", None, id="x"), "names no version"),
        (Command("promote", "1", id="x"), "it serves already"),
        (Command("consider", None, id="x"), "names no version"),
        (consider("2"), "carries no evidence"),
        (consider("2", **evidence(None)), "evaluated without a champion but 1 serves now"),
        (consider("2", **evidence("1")), "has no blocks"),
        (consider("2", **evidence("1", math.nan)), "difference = nan"),
        (consider("2", **evidence("1", -math.inf)), "difference = -inf"),
        (consider("2", **evidence("1", -5.0)), "were not clipped"),
        (consider("2", **evidence("1", -1, log_loss=None)), "log_loss = None"),
        (consider("2", **evidence("1", -1, log_loss=math.nan)), "log_loss = nan"),
        (consider("2", **evidence("1", -1, n=0)), "a block with n = 0"),
        (consider("2", **evidence("1", -1, n=True)), "a block with n = True"),
        (consider("2", champion="1", blocks=[7]), "has no blocks"),
        (consider("2", champion="1", blocks="blocks"), "has no blocks"),
    ],
)
def test_refusals_name_their_reason(command: Command, says: str) -> None:
    state, [decision] = run(command, state=serving("1"))
    assert decision.action == "refused" and says in decision.sentence
    assert state.champion == "1" and state.decisions[-1] == decision


def test_a_policy_may_want_a_gain_that_is_worth_a_change() -> None:
    command = consider("2", **evidence("1", -0.0005, n=2000))
    assert decide(serving("1"), command, POLICY, 0)[1].action == "promoted"
    assert decide(serving("1"), command, replace(POLICY, margin=-0.001), 0)[1].action == "refused"


def test_the_standard_error_is_that_of_the_mean_over_equal_blocks() -> None:
    means = np.random.default_rng(3).normal(size=24)
    mean, error = weighted([50] * 24, list(means))
    assert mean == pytest.approx(means.mean())
    assert error == pytest.approx(means.std(ddof=1) / math.sqrt(24))
    assert weighted([7], [0.5]) == (0.5, None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["n", "difference"]), inner),
    max_leaves=8,
)
EVIDENCE = st.none() | st.dictionaries(st.sampled_from(["champion", "log_loss", "champion_log_loss", "blocks"]), JSON)
GOOD = st.builds(
    lambda champion, differences, n: evidence(champion, *differences, n=n),
    st.sampled_from([*"1234"]) | st.none(),
    st.lists(st.floats(-4, 4), min_size=1, max_size=4),
    st.integers(1, 400),
)
COMMANDS = st.builds(
    Command,
    st.sampled_from(["consider", "consider", "promote", "rollback", "other", ""]),
    st.sampled_from([*"1234"]) | st.none(),
    id=st.integers(0, 60).map(str),
    evidence=EVIDENCE | GOOD,
    tags=st.none() | st.dictionaries(st.sampled_from(["cut", "latest_label_time"]), JSON),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(COMMANDS, max_size=30))
def test_any_sequence_of_commands_keeps_the_state_sound(commands: list[Command]) -> None:
    state = RolloutState()
    for now, command in enumerate(commands):
        before = state
        state, decision = decide(state, command, POLICY, now)
        assert decision.sentence and decision.action in ("promoted", "refused", "rolled_back")
        if decision in before.decisions:
            assert state is before
            continue
        assert state.generation == before.generation + 1
        assert len(state.decisions) <= DECISIONS_KEPT and state.decisions[-1] == decision
        assert (state.champion != before.champion) is (decision.action != "refused")
        assert state.champion is None or state.champion in state.versions
        if decision.action == "refused":
            assert state.versions == before.versions
        assert RolloutState.from_json(json.loads(json.dumps(state.as_json(), allow_nan=False))) == state
