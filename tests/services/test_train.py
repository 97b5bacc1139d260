"""`penstock train` around the ranks: which cut, which champion, one version per cut."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from features.errors import PenstockError
from features.usecase import UseCase
from pipelines.broker import Message, Position, clock_message
from pipelines.checkpoint import Checkpoints, Plan
from pipelines.job import Job, Recipe
from pipelines.registry import Version
from services import train as service
from services.settings import Settings
from tests import toy
from tests.archive_files import DAY, INPUTS, START, write_archive
from tests.memory_broker import MemoryBroker

CUT = START + 10 * DAY


class MemoryRegistry:
    """Versions in a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.made = root, []  # type: ignore[var-annotated]
        self.found = ""

    def versions(self, name: str) -> list[Version]:
        return list(self.made)

    def settings(self, name: str) -> str:
        return self.found

    def register(self, name: str, folder: Path, metrics: dict[str, float], tags: dict[str, str]) -> str:
        version = str(len(self.made) + 1)
        shutil.copytree(folder, self.root / version)
        self.made.append(Version(version, tags, metrics))
        return version

    def download(self, name: str, version: str, to: Path) -> Path:
        return self.root / version


class World:
    """A use case `toy` with a joiner's committed archive, and all that `train` reaches."""

    def __init__(self, home: Path) -> None:
        self.use_case: UseCase = replace(toy.use_case, inputs=INPUTS, min_examples=500)
        self.settings = Settings(home=home, state_url=str(home / "state"))
        self.broker, self.registry = MemoryBroker(), MemoryRegistry(home / "registry")
        self.broker.create_topics({"toy.cuts": {}, "toy.models": {}, "toy.drift": {}}, 1)
        checkpoints = Checkpoints(f"{home}/state/toy/joiner/0", "owner")
        tables = [pq.read_table(f) for f in write_archive(home / "rows", 2000, days=17)]
        files = [checkpoints.write_table("examples", table, i) for i, table in enumerate(tables)]
        self.snapshot = checkpoints.save_base(Plan("featurizer", {}, {}), b"", files)
        self.advance(START + 20 * DAY)

    def advance(self, watermark: int) -> None:
        """The joiner has committed so far."""
        position = Position(0, f"{self.snapshot}:{watermark}")
        self.broker.groups["toy.joiner"].committed[("toy.predictions", 0)] = position

    def send(self, *messages: Message) -> None:
        producer = self.broker.producer()
        producer.send(messages)
        producer.flush()

    def announce(self, cut: int, total: int) -> None:
        value = json.dumps({"cut": cut, "examples": total, "total": total}).encode()
        self.send(Message("toy.cuts", value, b"cut"), clock_message("toy.cuts", 0, cut))

    def decide(self, version: str, cut: int) -> None:
        state = {"generation": 1, "roles": {"champion": version}, "versions": {version: {"cut": cut}}}
        state["decisions"] = [{"version": version, "action": "promoted"}]
        self.send(Message("toy.models", json.dumps(state).encode(), b"state"))

    def train(self, **how: bool) -> service.TrainResult:
        return service.train(self.settings, "toy", 1, **how)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)
    monkeypatch.setattr(service, "load", lambda name: world.use_case)
    monkeypatch.setattr(service.wiring, "broker", lambda settings: world.broker)
    monkeypatch.setattr(service.wiring, "registry", lambda settings: world.registry)
    return world


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that would have been run; each gets a result at once."""
    ran: list[Job] = []

    def run(module: str, argument: Path, ranks: int, folder: Path, result: Path, timeline: Path | None) -> None:
        job = Job.load(argument)
        ran.append(job)
        version = job.champion.version if job.champion else None
        evaluation = {"log_loss": 0.5, "auc": 0.7, "champion": version}
        (result.parent / "evaluation.json").write_text(json.dumps(evaluation))
        (result.parent / "inputs.json").write_text(json.dumps(job.declaration))
        result.write_text(
            json.dumps({"examples": 9, "range_from": START, "latest_label_time": job.cut - 1, "seconds": 1})
        )

    monkeypatch.setattr(service, "run_ranks", run)
    return ran


def test_without_a_cut_there_is_nothing_to_do(world: World, jobs: list[Job]) -> None:
    world.send(clock_message("toy.cuts", 0, CUT))
    result = world.train()
    assert result.version is None and "no cut" in str(result) and jobs == []


def test_the_first_version_waits_for_enough_examples(world: World, jobs: list[Job]) -> None:
    world.announce(CUT, 499)
    result = world.train()
    assert result.version is None and "499" in str(result) and jobs == []
    world.announce(CUT + 7 * DAY, 500)
    assert world.train().version == "1"


def test_the_newest_cut_is_trained_once_and_handed_on_until_it_is_decided(world: World, jobs: list[Job]) -> None:
    world.announce(CUT - 7 * DAY, 900)
    world.announce(CUT, 2000)
    first = world.train()
    assert first.version == "1" and first.cut == CUT and first.metrics and first.metrics["auc"] == 0.7
    (version,) = world.registry.made
    assert version.tags["cut"] == str(CUT) and version.tags["latest_label_time"] == str(CUT - 1)
    assert version.tags["warm_start"] == "" and version.tags["code_version"]
    again = world.train()
    assert again.version == "1" and "no new cut" in str(again)
    world.decide("1", CUT)
    assert world.train().version is None
    assert len(jobs) == len(world.registry.made) == 1
    assert json.loads(json.dumps(again.as_json()))["version"] == "1"


def test_a_second_version_starts_from_the_champion(world: World, jobs: list[Job]) -> None:
    world.announce(CUT, 2000)
    world.train()
    world.decide("1", CUT)
    world.announce(CUT + 7 * DAY, 3000)
    assert world.train().version == "2"
    first, second = jobs
    assert first.champion is None and first.recipe == Recipe.from_scratch()
    assert second.champion and second.champion.version == "1" and second.champion.cut == CUT
    assert second.warm_start and second.recipe == Recipe().warm() and second.holdout == DAY
    assert world.registry.made[1].tags["warm_start"] == "1"


def test_new_inputs_start_from_scratch_and_are_compared_all_the_same(world: World, jobs: list[Job]) -> None:
    world.announce(CUT, 2000)
    world.train()
    world.decide("1", CUT)
    world.use_case = replace(world.use_case, inputs=replace(INPUTS, numbers=("x",)))
    world.announce(CUT + 7 * DAY, 3000)
    world.train()
    assert jobs[1].champion and not jobs[1].warm_start
    assert world.registry.made[1].tags["warm_start"] == ""


def test_another_shape_of_net_starts_from_scratch(world: World, jobs: list[Job]) -> None:
    world.announce(CUT, 2000)
    world.train()
    world.decide("1", CUT)
    world.use_case = replace(world.use_case, label=replace(world.use_case.label, targets={"strong": lambda event: 1.0}))
    world.announce(CUT + 7 * DAY, 3000)
    world.train()
    assert jobs[1].targets == ("strong",) and jobs[1].champion and not jobs[1].warm_start


def test_settings_that_a_search_found_make_another_version_of_a_cut(world: World, jobs: list[Job]) -> None:
    world.announce(CUT, 2000)
    world.train()
    world.decide("1", CUT - 1)  # decided on, but what serves has not learned up to the cut
    world.registry.found = "rate=0.001,members=2,hidden=16x8"
    assert world.train().version == "2"
    assert (jobs[1].recipe.members, jobs[1].recipe.hidden, jobs[1].recipe.rate) == (2, (16, 8), Recipe().rate)
    assert jobs[1].settings == world.registry.made[1].tags["settings"] == world.registry.found
    assert world.train().version == "2"
    world.decide("2", CUT)
    assert "serves and has learned up to" in str(world.train()) and len(jobs) == 2


def test_up_to_closed_files_what_is_held_out_is_new_to_the_champion(world: World, jobs: list[Job]) -> None:
    world.announce(CUT, 2000)
    world.train()
    world.decide("1", CUT)
    world.advance(CUT + DAY // 2 + 1)
    assert world.train().version is None
    made = world.train(unannounced=True)
    assert made.version == "2" and made.cut == jobs[1].cut == CUT + DAY // 2 and jobs[1].holdout == DAY // 2
    world.decide("2", CUT + DAY // 2)
    assert world.train().version is None and len(jobs) == 2


def test_drift_starts_one_retrain_up_to_closed_files(world: World, jobs: list[Job]) -> None:
    world.announce(CUT, 2000)
    world.train()
    world.decide("1", CUT)
    told = CUT + 2 * DAY
    world.advance(told + 5)
    world.send(Message("toy.drift", json.dumps({"time": told}).encode(), b"drift"))
    made = world.train()
    assert made.version == "2" and made.cut == told and jobs[1].holdout == DAY
    world.advance(told + DAY)
    assert world.train().version == "2" and len(jobs) == 2
    world.decide("2", told)
    assert world.train().version is None and len(jobs) == 2


def test_a_retrain_is_compared_with_the_version_that_is_just_being_considered(
    world: World, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.announce(CUT, 2000)
    world.train()
    world.decide("1", CUT)
    world.announce(CUT + DAY, 2100)
    world.train()
    world.announce(CUT + 2 * DAY, 2200)
    monkeypatch.setattr(service.time, "sleep", lambda s: world.decide("2", CUT + DAY))  # while the retrain waits
    assert world.train().version == "3"
    assert [job.champion and job.champion.version for job in jobs] == [None, "1", "2"]


def test_a_version_that_nobody_considers_holds_nothing_up(
    world: World, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "DECISION_S", 0.0)
    world.announce(CUT, 2000)
    world.train()
    world.announce(CUT + DAY, 2100)
    assert world.train().version == "2"
    assert [job.champion for job in jobs] == [None, None]


def test_a_crash_before_registration_does_not_train_again(
    world: World, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.announce(CUT, 2000)

    def fails(*args: Any) -> str:
        raise PenstockError("MLflow went away")

    with monkeypatch.context() as patch:
        patch.setattr(world.registry, "register", fails)
        with pytest.raises(PenstockError):
            world.train()
    assert world.train().version == "1"
    assert len(jobs) == 1
    assert list((world.settings.home / "train").glob("toy-1*")) == []


@pytest.mark.integration
def test_real_ranks_train_two_cuts_of_a_committed_archive(world: World) -> None:
    world.announce(CUT, 1100)
    first = world.train()
    world.decide("1", CUT)
    world.announce(CUT + 7 * DAY, 2000)
    second = world.train()
    assert [first.version, second.version] == ["1", "2"]
    assert first.metrics and first.metrics["auc"] > 0.7
    assert second.metrics and second.metrics["champion_auc"] > 0.7
    tags = world.registry.made[0].tags
    assert CUT - DAY < int(tags["latest_label_time"]) < CUT and int(tags["range_from"]) >= START
