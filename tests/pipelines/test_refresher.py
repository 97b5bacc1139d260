"""A version's net, continued: the same graph with other weights, and back to where it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import archive, net
from pipelines.archive import Examples
from pipelines.job import Job, Recipe
from pipelines.onnx_model import OnnxModel
from pipelines.refresher import Refresher, write_version
from tests.archive_files import TARGETS, write_archive
from tests.pipelines.test_online import DECLARED


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    return archive.load(write_archive(tmp_path_factory.mktemp("archive"), 1500), DECLARED, 0, 2**62, TARGETS)


@pytest.fixture
def version(tmp_path: Path, examples: Examples) -> Path:
    """A version's files: an untrained net, its trees grown."""
    recipe = Recipe(members=2, hidden=(16,), trees=20)
    job = Job((), DECLARED, "", 0, TARGETS, recipe=recipe)
    torch.manual_seed(0)
    model = net.Net(DECLARED, len(TARGETS), recipe.members, recipe.hidden, recipe.trees)
    model.normalise(examples.inputs)
    model.start_at(np.column_stack([examples.label, examples.targets]))
    model.trees.fit(examples.inputs.numbers, examples.label, 0)
    net.export(model, tmp_path / "1", job.declaration, examples.inputs)
    return tmp_path / "1"


def test_it_starts_as_the_version_and_its_graph_follows_its_weights(
    tmp_path: Path, version: Path, examples: Examples
) -> None:
    it, served = Refresher(version), OnnxModel.load(version, "1")
    assert np.abs(it.score(examples.inputs) - served.score(examples.inputs)).max() < 1e-5
    it.update(examples)
    assert np.abs(it.score(examples.inputs) - served.score(examples.inputs)).max() > 1e-3
    graph, score = it.graph(), it.score(it.example).tolist()
    write_version(version, graph, score, tmp_path / "2")
    refreshed = OnnxModel.load(tmp_path / "2", "2")
    assert np.abs(it.score(examples.inputs) - refreshed.score(examples.inputs)).max() < 1e-5
    again = Refresher(tmp_path / "2")
    assert again.score(examples.inputs).tolist() == it.score(examples.inputs).tolist()
    assert json.loads((tmp_path / "2" / "inputs.json").read_bytes())["targets"] == list(TARGETS)


def test_an_attempt_that_is_undone_leaves_no_trace(version: Path, examples: Examples) -> None:
    it = Refresher(version)
    it.remember(examples.take(slice(300)))
    before, known = it.snapshot(), len(it.replay)
    undo = it.attempt(examples.take(slice(300, 900)))
    assert it.snapshot() != before and len(it.replay) == 900
    undo()
    assert it.snapshot() == before and len(it.replay) == known
    recent = it.recent(100)
    assert recent and recent[1].tolist() == examples.label[200:300].tolist()


def test_a_snapshot_and_the_same_memory_go_on_alike(version: Path, examples: Examples) -> None:
    one, other = Refresher(version), Refresher(version)
    one.attempt(examples.take(slice(600)))
    other.restore(one.snapshot())
    other.remember(examples.take(slice(600)))
    for it in (one, other):
        it.attempt(examples.take(slice(600, None)))
    assert one.snapshot() == other.snapshot()


def test_a_weight_that_is_no_number_is_seen(version: Path) -> None:
    it = Refresher(version)
    it.model.state_dict()["trees.threshold"][0, 0] = float("inf")  # nulls to one side, all numbers to the other
    assert it.is_finite()
    with torch.no_grad():
        it.model.head.bias[0, 0, 0] = torch.nan
    assert not it.is_finite()
