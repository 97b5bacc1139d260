from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from features.usecase import EventSequence
from pipelines import archive, quality
from pipelines.archive import Examples
from pipelines.job import OnlineRecipe
from pipelines.learner import Learner
from pipelines.online import OnlineNet, Replay
from tests.archive_files import INPUTS, TARGETS, write_archive

DECLARED = replace(INPUTS, sequences=(EventSequence("both", ("recent", "sizes")),))
RECIPE = OnlineRecipe(first=600, last_start=1000, memory=2500, refit=1000, hidden=(16,), members=2, trees=20)
RECIPE = replace(RECIPE, first_rate=1e-2, rate=3e-3)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    files = write_archive(tmp_path_factory.mktemp("archive"), 4000)
    return archive.load(files, DECLARED, 0, 2**62, TARGETS)


def learner(**changes: object) -> OnlineNet:
    return OnlineNet(DECLARED, len(TARGETS), 0.3, replace(RECIPE, **changes))


def test_it_answers_with_the_prior_then_learns(examples: Examples) -> None:
    it: Learner = learner()
    scores = []
    for at in range(0, len(examples), 200):
        batch = examples.take(slice(at, at + 200))
        scores.append(it.score(batch.inputs))
        it.update(batch)
    assert scores[0].tolist() == pytest.approx([0.3] * 200)
    early, late = (np.concatenate(part) for part in (scores[4:8], scores[14:]))
    assert (quality.auc(examples.label[800:1600], early) or 0) > 0.7
    truth = examples.label[2800:]
    assert (quality.auc(truth, late) or 0) > 0.75
    assert quality.log_loss(truth, late) < quality.log_loss(truth, np.full(1200, truth.mean())) - 0.08


def test_a_restored_learner_goes_on_as_the_first_would(examples: Examples) -> None:
    one, other = learner(), learner()
    one.update(examples.take(slice(1700)))
    other.restore(one.snapshot())
    for at in (1700, 2200):
        for it in (one, other):
            it.update(examples.take(slice(at, at + 500)))
    rest = examples.take(slice(2700, None)).inputs
    assert np.array_equal(one.score(rest), other.score(rest)) and one.snapshot() == other.snapshot()


def test_a_learner_that_has_seen_nothing_is_restored_too() -> None:
    it = learner()
    it.restore(learner().snapshot())
    assert it.seen == 0


def test_replay_keeps_the_newest_and_takes_any_rows(examples: Examples) -> None:
    replay, truth = Replay(9000), np.column_stack([examples.label, examples.targets])
    for _ in range(6):
        replay.add(examples.inputs, truth)
    assert 9000 <= len(replay) < 9000 + Replay.BLOCK + len(examples)
    rows = np.random.default_rng(0).integers(len(replay), size=500)
    inputs, found = replay.take(np.sort(rows))
    which = (np.sort(rows) + 6 * len(examples) - len(replay)) % len(examples)
    assert np.array_equal(inputs.numbers, examples.inputs.numbers[which], equal_nan=True)
    assert np.array_equal(inputs.sequences[0].values, examples.inputs.sequences[0].take(which).values)
    assert np.array_equal(found, truth[which], equal_nan=True)


def test_a_large_update_is_learned_in_the_same_batches_as_small_ones(examples: Examples, tmp_path: Path) -> None:
    one, other = learner(), learner()
    one.update(examples.take(slice(1536)))
    for at in range(0, 1536, 256):
        other.update(examples.take(slice(at, at + 256)))
    assert one.snapshot() == other.snapshot()
