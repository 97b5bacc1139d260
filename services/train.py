"""`penstock train`: a retrain up to the newest cut, evaluated and registered. What the retrain DAG calls."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from features.usecase import UseCase, load
from pipelines.broker import Broker
from pipelines.checkpoint import listed_files, watermark_of
from pipelines.job import Champion, Job
from pipelines.registry import Registry, Version
from pipelines.retrain import make_job
from services import wiring
from services.cuts import Cuts
from services.progress import iso
from services.ranks import run_ranks
from services.settings import ROOT, Settings
from services.topic_reader import Newest, read_all

MEASURES = ("log_loss", "auc", "champion_log_loss", "champion_auc")
DECISION_S, POLL_S = 60.0, 0.1


@dataclass(frozen=True)
class TrainResult:
    """What a run of `penstock train` led to.

    version : the version of the newest cut that still waits to be considered; None when there is nothing to do
    cut : that cut (epoch ms)
    text : the same for a reader
    metrics : log loss and AUC on the held-out part, examples, seconds
    """

    version: str | None
    cut: int | None
    text: str
    metrics: dict[str, float] | None = None

    def __str__(self) -> str:
        return self.text

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def train(
    settings: Settings, name: str, ranks: int, timeline: Path | None = None, *, unannounced: bool = False
) -> TrainResult:
    """Train, evaluate and register the version of the newest cut, unless it is there or there is too little to learn.

    Any number of calls, after a crash too, register one version per cut and settings; those that the last search found
    better are used. `timeline` is a file that gets Horovod's. It learns up to the newest closed archive files, later
    than the newest cut, when it is to (`unannounced`) or drift was told of that no version has learned past.
    """
    use_case, broker, registry = load(name), wiring.broker(settings), wiring.registry(settings)
    home = settings.home / "train"
    with alone(home, name, "training"):
        with contextlib.closing(Cuts(broker, use_case)) as cuts:
            announced, total = cuts.newest()
        versions = registry.versions(name)
        cut = max([announced, *(int(v.tags.get("cut") or 0) for v in versions)])
        if unannounced or newest_drift(broker, use_case) > cut:
            cut = max(cut, closed_until(broker, use_case))
        if not cut:
            return TrainResult(None, None, f"{name}: no cut has been announced yet, nothing to train")
        state = _state(broker, use_case)
        tuned = registry.settings(name)
        serves = state.get("roles", {}).get("champion")
        if serves and (learned := _learned(state)) >= cut:
            text = f"{name}: no new cut, version {serves} serves and has learned up to {iso(learned)}"
            return TrainResult(None, cut, text)
        if same := [v for v in versions if _is_of(v, cut, tuned)]:
            return _already(name, cut, same[-1], state)
        if not versions and total < use_case.min_examples:
            few = f"{total:,} examples before the cut {iso(cut)}, the first version waits for {use_case.min_examples:,}"
            return TrainResult(None, cut, f"{name}: {few}")
        if waiting := _undecided(versions, state):
            state = _once_decided(broker, use_case, waiting)
        folder = home / f"{name}-{cut}"
        champion = _champion(registry, name, state, settings.home / "models" / name)
        job = _job(settings, use_case, broker, champion, cut, folder, tuned)
        result = run_job(job, folder, ranks, timeline)
        made = _register(registry, use_case, job, result)
        for done in home.glob(f"{name}-*"):  # this one, and what earlier ones that failed have left
            shutil.rmtree(done)
    return made


def newest_drift(broker: Broker, use_case: UseCase) -> int:
    """The time (epoch ms) of the newest drift record; 0 without one."""
    values = [json.loads(r.value) for r in read_all(broker, use_case.topic("drift")) if r.value is not None]
    return max((int(value["time"]) for value in values), default=0)


def closed_until(broker: Broker, use_case: UseCase) -> int:
    """The instant (epoch ms) before which every example is in closed archive files; 0 when there is none."""
    every = use_case.file_every // timedelta(milliseconds=1)
    return (watermark_of(broker, use_case.topic("joiner"), use_case.partitions) or 0) // every * every


def _state(broker: Broker, use_case: UseCase) -> dict[str, Any]:
    """The newest `<uc>.models` state; empty before the first."""
    with contextlib.closing(Newest(broker, use_case.topic("models"))) as models:
        return dict(models.read().get(b"state") or {})


def _undecided(versions: Sequence[Version], state: dict[str, Any]) -> str | None:
    """The newest trained version that has learned more than what serves and on which nothing is decided yet."""
    decided = {d["version"] for d in state.get("decisions", [])}
    trained = [v for v in versions if int(v.tags.get("cut") or 0) > _learned(state) and "refresh_of" not in v.tags]
    return trained[-1].version if trained and trained[-1].version not in decided else None


def _once_decided(broker: Broker, use_case: UseCase, version: str) -> dict[str, Any]:
    """The newest state once a version is decided on: it may be the champion to beat. If nobody has asked, soon."""
    print(f"{use_case.name}: version {version} is being considered, waiting up to {DECISION_S:.0f} s", flush=True)
    give_up = time.monotonic() + DECISION_S
    with contextlib.closing(Newest(broker, use_case.topic("models"))) as models:
        while True:
            state = dict(models.read().get(b"state") or {})
            if time.monotonic() > give_up or any(d["version"] == version for d in state.get("decisions", [])):
                return state
            time.sleep(POLL_S)


def _is_of(version: Version, cut: int, settings: str) -> bool:
    tags = version.tags
    return tags.get("cut") == str(cut) and tags.get("settings", "") == settings and "refresh_of" not in tags


def _already(name: str, cut: int, version: Version, state: dict[str, Any]) -> TrainResult:
    decided = any(d["version"] == version.version for d in state.get("decisions", []))
    waits = "decided on" if decided else "waiting to be considered"
    text = f"{name}: no new cut, version {version.version} has learned up to {iso(cut)} and is {waits}"
    return TrainResult(None if decided else version.version, cut, text)


def _job(
    settings: Settings, use_case: UseCase, broker: Broker, champion: Champion | None, cut: int, folder: Path, tuned: str
) -> Job:
    """The job of a cut; it starts from the champion where that is the same kind of net."""
    files = listed_files(settings.state_url, use_case.name, "joiner", "examples", broker)
    job = make_job(use_case, files, champion, cut, folder, tuned)
    return replace(job, recipe=replace(job.recipe, compression=settings.train_compression))


def _champion(registry: Registry, name: str, state: dict[str, Any], models: Path) -> Champion | None:
    """What serves now, its files downloaded."""
    version = state.get("roles", {}).get("champion")
    if version is None:
        return None
    folder = registry.download(name, version, models)
    return Champion(version, str(folder), _learned(state))


def _learned(state: dict[str, Any]) -> int:
    """The cut (epoch ms) up to which what serves has learned; 0 when nothing serves, or it doesn't say."""
    serves = state.get("roles", {}).get("champion")
    return int(state["versions"][serves].get("cut") or 0) if serves else 0


def run_job(job: Job, folder: Path, ranks: int, timeline: Path | None = None) -> dict[str, Any]:
    """Run the ranks, unless this very job has a complete result from before a crash."""
    file, done = folder / "job.json", Path(job.result) / "result.json"
    if done.exists() and Job.load(file) == job:
        return dict(json.loads(done.read_bytes()))
    shutil.rmtree(folder, ignore_errors=True)
    Path(job.result).mkdir(parents=True)
    job.save(file)
    started = time.monotonic()
    run_ranks("pipelines.training", file, ranks, folder, done, timeline)
    return {**json.loads(done.read_bytes()), "seconds": round(time.monotonic() - started, 1)}


def _register(registry: Registry, use_case: UseCase, job: Job, result: dict[str, Any]) -> TrainResult:
    """Register the job's result as the cut's version."""
    name, folder = use_case.name, Path(job.result)
    evaluation = json.loads((folder / "evaluation.json").read_bytes())
    metrics = {key: float(evaluation[key]) for key in MEASURES if evaluation.get(key) is not None}
    metrics |= {"examples": float(result["examples"]), "training_s": result["seconds"]}
    tags = {key: str(result[key]) for key in ("range_from", "latest_label_time", "examples")}
    tags |= {"cut": str(job.cut), "code_version": code_version(), "settings": job.settings}
    tags["warm_start"] = job.champion.version if job.champion and job.warm_start else ""
    version = registry.register(name, folder, metrics, tags)
    text = f"{name}: version {version} has learned {result['examples']:,} examples up to {iso(job.cut)}"
    if "log_loss" in metrics:
        text += f"; held-out log loss {metrics['log_loss']:.4f}"
    if "champion_log_loss" in metrics:
        text += f" (champion {evaluation['champion']}: {metrics['champion_log_loss']:.4f})"
    return TrainResult(version, job.cut, f"{text}; {result['seconds']:.0f} s", metrics)


def code_version() -> str:
    """The commit this code is of, or the package's version outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--tags"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return importlib.metadata.version("penstock")


@contextlib.contextmanager
def alone(home: Path, name: str, what: str) -> Iterator[None]:
    """One training, or search, of a use case at a time; a second one waits, and then finds what the first has made."""
    home.mkdir(parents=True, exist_ok=True)
    with open(home / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{name}: another {what} runs, waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
