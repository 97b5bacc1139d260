"""`penstock bench training`: Horovod beside torch's DDP, two ranks beside one, compressors beside none."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.link import slow_link
from benchmarks.rig import DAY_MS, measured, say
from features.errors import UnavailableError
from features.usecase import Category, ModelInputs
from pipelines.job import Job, Recipe
from services.ranks import run_ranks

CATEGORIES = {"place": (512, 12), "hour": (64, 8), "route": (8192, 8), "vehicle": (8192, 8), "line": (8192, 8)}
INPUTS = ModelInputs(
    tuple(f"n{i}" for i in range(145)), tuple(Category(name, *size) for name, size in CATEGORIES.items())
)
TARGETS = tuple(f"t{i}" for i in range(7))
ROWS = 24_000
DAYS = 10
COMPRESSIONS = ("none", "fp16", "powersgd:1", "powersgd:4")
ROUNDS = 3  # of the figures whose median counts, and seeds of the losses
STEPS, LINK_STEPS = 150, 40
LINK_MBIT = 100


def bench() -> dict[str, Any]:
    """All figures; ROUNDS of them are taken in turns, so that what else the machine does meets all alike."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        job = write_job(Path(folder))
        loopback = steps_in_turns(job, [[], []], ROUNDS, STEPS)
        link = on_link(job)
        losses = {case: [loss(job, *case, seed) for seed in range(ROUNDS)] for case in loss_cases()}
    return as_result(loopback, link, losses)


def write_job(folder: Path) -> Job:
    """Examples shaped like the flights', with labels that can be learned in part; the last fifth is held out."""
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(ROWS, len(INPUTS.numbers))).astype(np.float32)
    ids = {c.name: rng.zipf(1.3, ROWS) % c.buckets for c in INPUTS.categories}
    effects = sum(rng.normal(size=c.buckets)[ids[c.name]] for c in INPUTS.categories)
    hidden = np.tanh(numbers @ rng.normal(size=(len(INPUTS.numbers), 16)) / 4)
    logit = hidden @ rng.normal(size=16) / 2 + effects / 2
    times = np.sort(rng.integers(0, DAYS * DAY_MS, ROWS))
    columns: dict[str, Any] = {
        "request_id": [f"r{i:06d}" for i in range(ROWS)],
        "event_time": times,
        "label_time": times,
    }
    columns |= {"label": drawn(rng, logit), "score": np.zeros(ROWS), "version": ["prior"] * ROWS}
    columns |= {name: numbers[:, i] for i, name in enumerate(INPUTS.numbers)} | ids
    columns |= {name: drawn(rng, logit - i) for i, name in enumerate(TARGETS)}
    pq.write_table(pa.table(columns), folder / "examples.parquet")
    files, held = (str(folder / "examples.parquet"),), DAYS * DAY_MS // 5
    return Job(files, INPUTS, str(folder / "result"), DAYS * DAY_MS, TARGETS, holdout=held, recipe=Recipe(trees=0))


def drawn(rng: np.random.Generator, logit: Any) -> Any:
    """0 or 1 with these log odds."""
    return (rng.random(len(logit)) < 1 / (1 + np.exp(-logit))).astype(float)


def steps_in_turns(job: Job, ends: Sequence[list[str]], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Seconds, examples and bytes of each peer in each round: ddp, and Horovod with each compression."""
    found = []
    for turn in range(rounds):
        say(f"{steps} steps on two ranks, turn {turn + 1} of {rounds}: ddp, {', '.join(COMPRESSIONS)}")
        found.append({"ddp": take_steps(job, "ddp", "none", ends, steps)})
        found[-1] |= {name: take_steps(job, "horovod", name, ends, steps) for name in COMPRESSIONS}
    return found


def take_steps(job: Job, peer: str, compression: str, ends: Sequence[list[str]], steps: int) -> dict[str, Any]:
    """What the first of two ranks measured; `ends` run a command at either end of the link between them."""
    file = Path(job.result).with_suffix(".json")
    replace(job, recipe=replace(job.recipe, compression=compression)).save(file)
    command = [*ends[0], sys.executable, "-m", "benchmarks.ranks", peer, str(file), str(steps), *ends[1]]
    return measured(command, all_cores=True)


def on_link(job: Job) -> dict[str, Any] | None:
    """The same once, on a slow link; None, with a word why, where none can be made."""
    try:
        with slow_link(LINK_MBIT) as ends:
            say(f"a link of {LINK_MBIT} Mbit/s between two network namespaces")
            return steps_in_turns(job, ends, 1, LINK_STEPS)[0]
    except UnavailableError as error:
        say(f"skipped: the slow link, which needs root and iproute2: {error}")
        return None


def loss_cases() -> list[tuple[int, str]]:
    """Ranks and compression of the jobs whose losses are compared."""
    return [(1, "none"), *((2, name) for name in COMPRESSIONS)]


def loss(job: Job, ranks: int, compression: str, seed: int) -> float:
    """Held-out log loss of a whole job."""
    say(f"a whole job, {job.recipe.epochs} epochs: {ranks} ranks, compression {compression}, seed {seed}")
    with tempfile.TemporaryDirectory(dir=Path(job.result).parent) as name:
        folder = Path(name)
        recipe = replace(job.recipe, compression=compression)
        file, done = folder / "job.json", folder / "result" / "result.json"
        replace(job, recipe=recipe, seed=seed, result=str(done.parent)).save(file)
        run_ranks("pipelines.training", file, ranks, folder, done)
        return float(json.loads((done.parent / "evaluation.json").read_bytes())["log_loss"])


def as_result(
    loopback: Sequence[dict[str, Any]], link: dict[str, Any] | None, losses: dict[tuple[int, str], list[float]]
) -> dict[str, Any]:
    """The bench's JSON object: medians over rounds, means over seeds, and the spread of the plain jobs' losses."""
    plain, one = losses[2, "none"], losses[1, "none"]
    compressions = {}
    for name in COMPRESSIONS:
        compressions[name] = {
            "bytes_per_step": loopback[0][name]["bytes"],
            "loopback_ms_per_step": round(statistics.median(map(ms_per_step, (r[name] for r in loopback))), 1),
            **({"link_ms_per_step": round(ms_per_step(link[name]), 1)} if link else {}),
            "log_loss": round(statistics.mean(losses[2, name]), 4),
        }
    return {
        "horovod_examples_per_s": round(statistics.median(rate(r["none"]) for r in loopback)),
        "ddp_examples_per_s": round(statistics.median(rate(r["ddp"]) for r in loopback)),
        "ddp_ratio": round(statistics.median(rate(r["none"]) / rate(r["ddp"]) for r in loopback), 3),
        "log_loss_1_rank": round(statistics.mean(one), 4),
        "log_loss_2_ranks": round(statistics.mean(plain), 4),
        "log_loss_spread": round(max(max(one) - min(one), max(plain) - min(plain)), 4),
        "link_mbit_per_s": LINK_MBIT if link else 0,
        **({"link_ddp_ms_per_step": round(ms_per_step(link["ddp"]), 1)} if link else {}),
        "compression": compressions,
    }


def rate(found: dict[str, Any]) -> float:
    """Examples a second."""
    return float(found["examples"] / found["seconds"])


def ms_per_step(found: dict[str, Any]) -> float:
    return float(1000 * found["seconds"] / found["steps"])
