"""What every learner must do, and what is particular to some."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from features.errors import InputError
from features.usecase import UseCase
from pipelines import archive, baselines, quality
from pipelines.archive import Examples
from pipelines.learner import Learner
from pipelines.learners import Context, parse
from tests.archive_files import DAY, INPUTS, START, TARGETS, write_archive

SMALL_NET = "first=600,last_start=700,members=1,hidden=16,trees=0,rate=0.003,first_rate=0.01"
SPECS = (
    f"online:{SMALL_NET}",
    f"frozen:{SMALL_NET}",
    "lightgbm:every_days=2,rounds=20,least=20",
    "sklearn:every_days=2,rounds=20",
    "river:rate=0.05",
    "rate",
    "constant",
)
LEARNING = SPECS[:5]
CONTEXT = Context(
    cast(UseCase, SimpleNamespace(inputs=INPUTS, prior=0.3, label=SimpleNamespace(targets=TARGETS))), START + 4 * DAY
)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    return archive.load(write_archive(tmp_path_factory.mktemp("archive"), 2000), INPUTS, 0, 2**62, TARGETS)


def follow(learner: Learner, examples: Examples, start: int = 0, every: int = 100) -> Any:
    scores = []
    for at in range(start, len(examples), every):
        batch = examples.take(slice(at, at + every))
        scores.append(learner.score(batch.inputs))
        learner.update(batch)
    return np.concatenate(scores)


@pytest.mark.parametrize("text", SPECS)
def test_it_starts_with_the_prior_and_gives_probabilities(text: str, examples: Examples) -> None:
    scores = follow(parse(text).make(CONTEXT), examples)
    assert scores[:100] == pytest.approx(np.full(100, 0.3), abs=1e-6)
    assert scores.shape == (2000,) and ((scores > 0) & (scores < 1)).all()


@pytest.mark.parametrize("text", LEARNING)
def test_it_learns(text: str, examples: Examples) -> None:
    scores = follow(parse(text).make(CONTEXT), examples)
    assert (quality.auc(examples.label[1400:], scores[1400:]) or 0) > 0.75


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("at", [0, 500, 1500])
def test_a_restored_one_goes_on_as_the_first(text: str, at: int, examples: Examples) -> None:
    one, other = parse(text).make(CONTEXT), parse(text).make(CONTEXT)
    if at:
        one.update(examples.take(slice(at)))
    other.restore(one.snapshot())
    rest = examples.take(slice(2000))
    assert np.array_equal(follow(one, rest, at), follow(other, rest, at))


def test_a_refit_sees_what_came_before_its_instant(examples: Examples) -> None:
    fits: list[int] = []

    def count(rows: Any, label: Any, categories: Any) -> Any:
        fits.append(len(label))
        return lambda asked: np.full(len(asked), len(label) / 1e4)

    anchor = START + 4 * DAY
    learner = baselines.Refit(count, INPUTS, 0.3, 3 * DAY, anchor)
    follow(learner, examples, every=300)
    due = [anchor - 3 * DAY, anchor, anchor + 3 * DAY]
    assert fits == [int((examples.label_time < at).sum()) for at in due]
    assert learner.score(examples.inputs.take(slice(1)))[0] == pytest.approx(fits[-1] / 1e4)


def test_a_frozen_one_stops_learning(examples: Examples) -> None:
    learner = baselines.Frozen(baselines.Constant(0.3), CONTEXT.score_from)
    learner.update(examples)
    early = examples.label[examples.label_time < CONTEXT.score_from]
    assert learner.score(examples.inputs.take(slice(1)))[0] == pytest.approx(early.mean())


def test_a_rolling_rate_forgets(examples: Examples) -> None:
    learner = baselines.RollingRate(0.3, DAY)
    learner.update(examples)
    newest = examples.label[examples.label_time >= examples.label_time[-1] - DAY]
    assert learner.score(examples.inputs.take(slice(1)))[0] == pytest.approx(newest.mean())


def test_labels_of_one_class_leave_the_prior(examples: Examples) -> None:
    learner = parse("lightgbm:every_days=1").make(CONTEXT)
    learner.update(replace(examples, label=np.zeros_like(examples.label)))
    assert learner.score(examples.inputs.take(slice(1)))[0] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("text", "said"), [("nothing", "known are online"), ("rate:days=1", "it has hours"), ("rate:hours=x", "like 24")]
)
def test_a_name_that_is_wrong_is_told(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse(text)


def test_settings_keep_their_types() -> None:
    settings = parse("online:hidden=64x32,rate=1e-3,replay=2").settings
    assert (settings["hidden"], settings["rate"], settings["replay"]) == ((64, 32), 0.001, 2)
