"""The loop: nothing is scored by what was learned from a label that came later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.engine import Applied
from features.inputs import Floats, Inputs
from pipelines import archive
from pipelines.archive import Examples
from pipelines.asof import Asked
from pipelines.backtest import Progress, blended, run, truths, turns
from tests import toy
from tests.archive_files import INPUTS, write_archive

HOUR = 3_600_000
T = 1_767_225_600_000


class Newest:
    """Answers with the newest label time it has learned."""

    def __init__(self) -> None:
        self.newest, self.sizes = 0, list[int]()

    def update(self, examples: Examples) -> None:
        self.newest = int(examples.label_time[-1])
        self.sizes.append(len(examples))

    def score(self, inputs: Inputs) -> Floats:
        return np.full(len(inputs), self.newest, np.float64).astype(np.float32)

    def snapshot(self) -> bytes:
        return b""

    def restore(self, data: bytes) -> None:
        raise NotImplementedError


@given(st.lists(st.integers(0, 40), max_size=30), st.lists(st.integers(0, 40), max_size=30), st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_each_turn_asks_before_it_learns_what_those_asked_could_not_know(
    asked: list[int], labels: list[int], every: int
) -> None:
    seen, known = np.sort(np.array(asked, np.int64)), np.sort(np.array(labels, np.int64))
    learned = answered = 0
    for turn in turns(seen, known, every):
        assert (turn.asked.start, turn.labels.start) == (answered, learned)
        for at in seen[turn.asked]:
            assert (known[:learned] < at).all()
            assert (known[learned : turn.labels.stop] >= at).any() or learned == len(known)
        answered, learned = turn.asked.stop, turn.labels.stop
    assert (answered, learned) == (len(seen), len(known))


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    found = archive.load(write_archive(tmp_path, 1000), INPUTS, 0, 2**62)
    start = found.label_time[0] - 10 * HOUR  # small numbers, which float32 holds exactly
    times = [(found.event_time - start) // 60_000, (found.label_time - start) // 60_000]
    return replace(found, event_time=times[0], label_time=times[1])


@pytest.mark.parametrize("tick", [1, 15])
def test_scores_come_from_labels_before_the_request_or_its_tick(examples: Examples, tick: int) -> None:
    learner = Newest()
    scores = run(learner, examples, 20, tick)
    until = examples.event_time // tick * tick
    assert (scores < until).all() and set(learner.sizes) == {20}
    for i in range(0, 1000, 37):
        batches = int((examples.label_time < until[i]).sum()) // 20
        assert scores[i] == (examples.label_time[20 * batches - 1] if batches else 0)


def test_a_run_goes_on_where_it_was_stopped(examples: Examples) -> None:
    class Stopped(Exception):
        pass

    kept: list[Progress] = []

    def stop(progress: Progress, now: int) -> None:
        if progress.turns == 23:
            kept.append(Progress(progress.turns, progress.scores.copy()))
            raise Stopped

    learner = Newest()
    with pytest.raises(Stopped):
        run(learner, examples, 20, done=stop)
    assert np.array_equal(run(learner, examples, 20, progress=kept[0]), run(Newest(), examples, 20))
    assert sum(learner.sizes) == 1000


def label(order: str, at: int) -> Applied:
    return Applied("returned", toy.returned.struct(f"l{at}", at, order, "late"), at, at)


def asked(name: str, at: int) -> Asked:
    return Asked(name, at, {}, {})


def test_labels_are_joined_as_the_joiner_does() -> None:
    wait = 3 * HOUR
    requests = [asked(n, T) for n in ("after", "before", "twice", "never", "too-late", "at-the-end")]
    labels = [label("before", T - 5), label("after", T + 7), label("twice", T + 1), label("twice", T + 2)]
    labels += [label("at-the-end", T + wait), label("too-late", T + wait + 1)]
    found = truths(toy.use_case, requests, labels)
    assert found["after"] == ({"label": 1.0}, T + 7) and found["before"] == ({"label": 1.0}, T)
    assert found["twice"][1] == T + 1 and found["at-the-end"] == ({"label": 1.0}, T + wait)
    assert found["never"] == found["too-late"] == ({"label": 0.0}, T + wait)
    dropping = replace(toy.use_case, label=replace(toy.use_case.label, on_expiry=None))
    assert truths(dropping, requests, labels).keys() == {"after", "before", "twice", "at-the-end"}


def test_a_blend_of_one_is_itself_and_stays_inside() -> None:
    p = np.array([0.0, 0.2, 0.9, 1.0], np.float32)
    assert blended([p]) == pytest.approx(p, abs=1e-5)
    assert ((blended([p, np.full(4, 0.5)]) > 0) & (blended([p, np.full(4, 0.5)]) < 1)).all()
