"""The Horovod worker: `python -m pipelines.training JOB.json`, one process per rank, started by `penstock train`.

Elastic: weights, optimizer and position are committed every few steps. When a rank dies or joins, all go back to the
last commit, take rank 0's state, and share the rows that remain out anew.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from features.errors import PenstockError
from pipelines import archive, compression, net, quality
from pipelines.job import Job, Recipe
from pipelines.onnx_model import OnnxModel
from pipelines.sampler import Sampler, Share

COMMIT_STEPS = 25
FIT, FINISH, DONE = "fit", "finish", "done"


class Data:
    """The examples a rank trains on: in the first phase those before the held-out part, in the last one all."""

    def __init__(self, job: Job, device: torch.device) -> None:
        examples = archive.load(job.files, job.inputs, job.range_from, job.cut, job.targets)
        self.examples = examples.take(slice(max(0, len(examples) - job.max_examples), None))
        held_from = int(np.searchsorted(self.examples.label_time, job.cut - job.holdout))
        self.fit, self.held = self.examples.take(slice(held_from)), self.examples.take(slice(held_from, None))
        truth = np.column_stack([self.examples.label, self.examples.targets])
        self.truth = torch.from_numpy(truth).to(device)
        self.samplers = {
            FIT: Sampler(held_from, job.recipe.batch, job.recipe.epochs, job.seed),
            FINISH: Sampler(len(self.examples), job.recipe.batch, 1, job.seed + 1),
        }


def learning_rate(recipe: Recipe, base: float, progress: float, world: int) -> float:
    """Rate of a step: warm-up to `base` times the ranks (linear scaling, Goyal et al. 2017, section 2), then a cosine.

    `progress` (0 .. 1) counts examples, so ranks that come or go change the scale and nothing else.
    """
    rise = min(1.0, 0.1 + progress / recipe.warm_up)
    return base * world * rise * 0.5 * (1 + math.cos(math.pi * progress))


class State(hvd.elastic.TorchState):  # type: ignore[misc]
    """What is committed; and what the compressor keeps, which is not, is put right when ranks come or go."""

    def __init__(self, compressor: compression.Compressor, **values: Any) -> None:
        super().__init__(**values)
        self._compressor = compressor

    def reset(self) -> None:
        for tensor in self._compressor.left:
            tensor.zero_()

    def sync(self) -> None:
        super().sync()
        hvd.broadcast_parameters([(f"shared{i}", t) for i, t in enumerate(self._compressor.shared)], root_rank=0)


class Worker:
    """One rank of a job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        cuda = hvd.nccl_built() and hvd.size() <= torch.cuda.device_count()  # NCCL refuses two ranks on one GPU
        self.device = torch.device("cuda", hvd.rank()) if cuda else torch.device("cpu")
        torch.manual_seed(job.seed)
        recipe = job.recipe
        model = net.Net(job.inputs, len(job.targets), recipe.members, recipe.hidden, recipe.trees)
        self.model = model.to(self.device)
        self.optimizer = net.make_optimizer(self.model, job.recipe.weight_decay)
        self.started = time.monotonic()
        self.compressor = compression.make(recipe.compression, list(self.model.parameters()), job.seed)
        self.state = State(
            self.compressor,
            model=self.model,
            optimizer=self.optimizer,
            files=job.files,
            phase=FIT,
            position=0,
            prepared=False,
            evaluation={},
            steps=(),
        )
        self._data: Data | None = None
        self._log = open(Path(job.row_log) / f"{os.getpid()}.jsonl", "w", buffering=1) if job.row_log else None

    @property
    def data(self) -> Data:
        """Read once, by rank 0's list of files."""
        if self._data is None:
            self._data = Data(replace(self.job, files=self.state.files), self.device)
        return self._data

    def train(self, state: Any) -> None:
        """From the synchronised state to the end; Horovod calls it again after ranks came or went."""
        self.run = hvd.broadcast_object(uuid.uuid4().hex[:8], name="run")
        if not state.prepared:
            self._prepare()
            state.prepared = True
            state.commit()
        if state.phase == FIT:
            self._pass(FIT, self.job.recipe.rate)
            self._grow(self.data.fit)
            state.evaluation = hvd.broadcast_object(self._evaluate() if hvd.rank() == 0 else None, name="evaluation")
            state.phase, state.position = FINISH, 0
            state.commit()
        if state.phase == FINISH:
            self._pass(FINISH, self.job.recipe.finish_rate)
            self._grow(self.data.examples)
            state.phase = DONE
            state.commit()
        if hvd.rank() == 0:
            self._write_result()
        hvd.broadcast_object(None, name="written")  # notices a rank 0 that died writing: then another one writes

    def _prepare(self) -> None:
        """The weights and the normaliser to start from, the same on every rank."""
        champion = self.job.champion
        if champion and self.job.warm_start:
            net.load_weights(self.model, Path(champion.folder))
            newer = self.data.examples.between(champion.cut, self.job.cut - self.job.holdout).inputs
            self.model.normalise(newer, 1 - 0.5 ** (len(newer) / net.HALF_LIFE))
        else:
            self.model.normalise(self.data.fit.inputs)
            self.model.start_at(np.column_stack([self.data.fit.label, self.data.fit.targets]))

    def _pass(self, phase: str, base: float) -> None:
        """The steps of a phase that are left."""
        state, sampler = self.state, self.data.samplers[phase]
        rank, world = hvd.rank(), hvd.size()
        epoch, steps = -1, 0
        self.model.train()
        while state.position < sampler.length:
            at, start, end = sampler.step(state.position, world)
            if at != epoch:
                epoch, order = at, sampler.order(at)
                if rank == 0:
                    left = len(order) - start
                    say(f"{phase}, epoch {epoch + 1} of {sampler.epochs}: {left:,} examples on {world} ranks")
            share = sampler.share(order, start, end, rank, world)
            torch.manual_seed(hash((sampler.seed, state.position, rank)))
            self.step(share, learning_rate(self.job.recipe, base, state.position / sampler.length, world))
            self._record(f"{self.run} {phase} {epoch} {start}", share)
            state.position += end - start
            steps += 1
            if steps % COMMIT_STEPS == 0:
                state.commit()

    def _grow(self, examples: archive.Examples) -> None:
        """New trees from these examples; rank 0 grows them for all."""
        trees = self.model.trees
        if hvd.rank() == 0 and trees.count:
            say(f"{trees.count} trees of {len(examples):,} examples")
            self.model.grow(examples.inputs, examples.label, self.job.seed)
        hvd.broadcast_parameters(trees.state_dict() | {"blend": self.model.blend}, root_rank=0)

    def step(self, share: Share, rate: float) -> None:
        """One update by the mean gradient over the rows that count, of all ranks."""
        tensors = self.model.tensors(self.data.examples.inputs.take(share.rows))
        truth = self.data.truth[torch.from_numpy(share.rows).to(self.device)]
        weights = torch.from_numpy(share.weights).to(self.device)
        self.optimizer.zero_grad()
        loss = net.losses(self.model.foretell(*tensors), truth, self.job.recipe.target_weight) @ weights
        torch.autograd.backward(loss / share.total)
        self.compressor.reduce([p.grad for p in self.model.parameters()], allreduce)  # type: ignore[misc]
        net.step(self.model, self.optimizer, rate)

    def _record(self, step: str, share: Share) -> None:
        """Note this rank's rows of a step, and in the committed state that the step counts."""
        if self._log:
            taken = share.rows[share.weights > 0]
            self._log.write(json.dumps({"step": step, "rows": self.data.examples.request_id[taken].tolist()}) + "\n")
            self.state.steps = (*self.state.steps, step)

    def _evaluate(self) -> dict[str, Any]:
        """Challenger and champion on the held-out part, which neither has trained on."""
        held, champion = self.data.held, self.job.champion
        score = self.model.score(held.inputs)
        version = champion.version if champion else None
        found: dict[str, Any] = {"examples": len(held), "champion": version, "blocks": []}
        found |= _measures("", held.label, score)
        if champion:
            model = OnnxModel.load(Path(champion.folder), champion.version)
            same = archive.load(self.state.files, model.inputs, self.job.cut - self.job.holdout, self.job.cut)
            same = same.take(slice(len(same) - len(held), None))
            other = model.score(same.inputs)
            found |= _measures("champion_", held.label, other)
            found["blocks"] = quality.paired_blocks(held.event_time, held.label, score, other)
        return found

    def _write_result(self) -> None:
        """The version's files; result.json last, so that it vouches for the others."""
        folder, examples = Path(self.job.result), self.data.examples
        example = examples.inputs.take(slice(-net.EXAMPLE_ROWS, None))
        net.export(self.model, folder, self.job.declaration | {"settings": self.job.settings}, example)
        net.write(folder / "evaluation.json", json.dumps(self.state.evaluation).encode())
        result = {
            "examples": len(examples),
            "range_from": int(examples.label_time[0]),
            "latest_label_time": int(examples.label_time[-1]),
            "seconds": round(time.monotonic() - self.started, 2),
            "ranks": hvd.size(),
            "steps": list(self.state.steps),
        }
        net.write(folder / "result.json", json.dumps(result).encode())


def allreduce(tensors: Sequence[torch.Tensor], name: str) -> None:
    """Sum in place over the ranks, all tensors in one exchange."""
    hvd.grouped_allreduce_(list(tensors), op=hvd.Sum, name=name)


def _measures(prefix: str, label: archive.Floats, score: archive.Floats) -> dict[str, float | None]:
    """Log loss and AUC; None where there is nothing to measure."""
    return {
        f"{prefix}log_loss": quality.log_loss(label, score) if len(label) else None,
        f"{prefix}auc": quality.auc(label, score),
    }


def say(text: str) -> None:
    """A progress line of rank 0."""
    print(f"train: {text}", flush=True)


def main() -> None:
    """Entry point of a rank."""
    torch.set_num_threads(1)
    hvd.init()
    try:
        worker = Worker(Job.load(Path(sys.argv[1])))
        hvd.elastic.run(lambda state: worker.train(state))(worker.state)
    except PenstockError as error:
        sys.exit(f"penstock: {error}")


if __name__ == "__main__":
    main()
