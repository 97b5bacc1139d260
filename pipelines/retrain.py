"""What live does at each cut, as a learner: the same job with one rank, the same comparison, the same decision."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np

from features.inputs import Floats, Inputs
from features.usecase import UseCase
from pipelines.archive import Examples
from pipelines.job import Champion, Job, Recipe
from pipelines.learners import online_recipe
from pipelines.onnx_model import OnnxModel
from pipelines.rollout import Command, RolloutPolicy, RolloutState, decide

MS = timedelta(milliseconds=1)
LONGEST_HOLDOUT = timedelta(days=1)


def make_job(
    use_case: UseCase, files: Sequence[str], champion: Champion | None, cut: int, folder: Path, settings: str = ""
) -> Job:
    """The job of a cut; it starts from the champion where that is the same kind of net. What is held out, at most a
    day, the champion has not learned either."""
    holdout = min(LONGEST_HOLDOUT, use_case.retrain_every) // MS
    job = Job(
        files=tuple(files),
        inputs=use_case.inputs,
        targets=tuple(use_case.label.targets),
        result=str(folder / "result"),
        cut=cut,
        holdout=min(holdout, cut - champion.cut) if champion else holdout,
        champion=champion,
        recipe=Recipe.from_scratch(online_recipe(settings)),
        seed=cut // 1000 % 2**31,
        settings=settings,
    )
    warm = replace(job, warm_start=True, recipe=job.recipe.warm())
    if champion is None:
        return job
    declared = json.loads((Path(champion.folder) / "inputs.json").read_bytes())
    declared.pop("settings", None)
    return warm if declared == warm.declaration else job


class Retrain:
    """Trains a version from each update, which holds the examples up to a cut, and scores with what was promoted.

    Parameters
    ----------
    files : the archive that holds the examples
    folder : for the versions' files; they stay there
    train : runs a job, given it and a folder of its own
    """

    def __init__(
        self, use_case: UseCase, files: Sequence[str], folder: Path, train: Callable[[Job, Path], object]
    ) -> None:
        self.use_case, self.files, self.folder, self.train = use_case, files, folder, train
        self.every = use_case.retrain_every // MS
        self.state, self.total, self.trained = RolloutState(), 0, 0
        self.model: OnnxModel | None = None

    def update(self, examples: Examples) -> None:
        self.total += len(examples)
        cut = (int(examples.label_time[-1]) // self.every + 1) * self.every
        if not self.trained and self.total < self.use_case.min_examples:
            return
        version, place = str(self.trained + 1), self.folder / str(cut)
        job = make_job(self.use_case, self.files, self._champion(), cut, place)
        self.train(job, place)
        self.trained += 1
        result = Path(job.result)
        tags = {"cut": cut, "latest_label_time": json.loads((result / "result.json").read_bytes())["latest_label_time"]}
        evidence = json.loads((result / "evaluation.json").read_bytes())
        command = Command("consider", version, id=version, evidence=evidence, tags=tags)
        self.state, decision = decide(self.state, command, RolloutPolicy.immediate(), cut)
        print(decision.sentence, flush=True)
        self._load()

    def _champion(self) -> Champion | None:
        version = self.state.champion
        if version is None:
            return None
        cut = int(self.state.versions[version]["cut"])
        return Champion(version, str(self.folder / str(cut) / "result"), cut)

    def _load(self) -> None:
        champion = self._champion()
        if champion and (self.model is None or self.model.version != champion.version):
            self.model = OnnxModel.load(Path(champion.folder), champion.version)

    def score(self, inputs: Inputs) -> Floats:
        if self.model is None:
            return np.full(len(inputs), self.use_case.prior, np.float32)
        return self.model.score(inputs)

    def snapshot(self) -> bytes:
        """What was decided; the versions' files stay where they are."""
        return json.dumps([self.state.as_json(), self.total, self.trained]).encode()

    def restore(self, data: bytes) -> None:
        state, self.total, self.trained = json.loads(data)
        self.state, self.model = RolloutState.from_json(state), None
        self._load()
