"""The parts of `penstock bench training` that decide what its figures mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import training
from pipelines import archive
from pipelines.job import Recipe


def test_the_examples_are_as_the_job_declares_them_and_can_be_learned(tmp_path: Path) -> None:
    job = training.write_job(tmp_path)
    examples = archive.load(job.files, job.inputs, job.range_from, job.cut, job.targets)
    assert len(examples) == training.ROWS and examples.targets.shape[1] == len(training.TARGETS)
    held = examples.between(job.cut - job.holdout, job.cut)
    assert len(held) / len(examples) == pytest.approx(0.2, abs=0.02)
    assert 0.3 < examples.label.mean() < 0.7


@pytest.mark.integration
def test_both_peers_take_the_same_steps(tmp_path: Path) -> None:
    """Else their rates would be no comparison."""
    job = training.write_job(tmp_path)
    job = replace(job, recipe=Recipe(batch=64, members=1, hidden=(16,), trees=0))
    ours = training.take_steps(job, "horovod", "none", [[], []], 5)
    ddp = training.take_steps(job, "ddp", "none", [[], []], 5)
    assert ours["weights"] == pytest.approx(ddp["weights"], rel=1e-6)
    assert (ours["steps"], ours["examples"], ours["bytes"]) == (5, 640, ddp["bytes"])
    assert training.take_steps(job, "horovod", "fp16", [[], []], 5)["bytes"] == ours["bytes"] // 2


def test_figures_are_medians_of_rounds_and_means_of_seeds() -> None:
    def round_of(seconds: float, ddp: float) -> dict[str, dict[str, float]]:
        one = {"steps": 10, "examples": 1000, "bytes": 40, "weights": 1.0}
        return {"ddp": one | {"seconds": ddp}} | {n: one | {"seconds": seconds} for n in training.COMPRESSIONS}

    rounds = [round_of(1.0, 1.0), round_of(2.0, 1.0), round_of(9.0, 18.0)]
    losses = {case: [0.5, 0.6, 0.7] for case in training.loss_cases()}
    found = training.as_result(rounds, None, losses | {(1, "none"): [0.4, 0.5, 0.6]})
    assert (found["horovod_examples_per_s"], found["ddp_examples_per_s"], found["ddp_ratio"]) == (500, 1000, 1.0)
    assert (found["log_loss_1_rank"], found["log_loss_2_ranks"], found["log_loss_spread"]) == (0.5, 0.6, 0.2)
    assert found["link_mbit_per_s"] == 0 and "link_ms_per_step" not in found["compression"]["none"]
    found = training.as_result(rounds, round_of(3.0, 4.0), losses)
    assert found["compression"]["fp16"]["link_ms_per_step"] == 300 and found["link_ddp_ms_per_step"] == 400
    assert found["compression"]["fp16"]["loopback_ms_per_step"] == 200
