"""Commands to a controller that is there, and to one that isn't."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from features.errors import InputError, UnavailableError
from pipelines.control import ControlStep
from pipelines.runner import CommitPolicy, Runner
from services import rollout, wiring
from services.settings import Settings
from tests import toy
from tests.memory_broker import MemoryBroker


@dataclass
class FolderRegistry:
    """Versions whose files lie in a folder."""

    root: Path
    numbers: list[str] = field(default_factory=list)

    def versions(self, name: str) -> list[Any]:
        from pipelines.registry import Version

        return [Version(n, {"cut": "7", "latest_label_time": "6", "examples": "9"}, {}) for n in self.numbers]

    def download(self, name: str, version: str, to: Path) -> Path:
        return self.root / version

    def add(self, version: str, evaluation: object) -> None:
        self.numbers.append(version)
        (self.root / version).mkdir()
        if evaluation is not None:
            (self.root / version / "evaluation.json").write_text(json.dumps(evaluation))


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> MemoryBroker:
    broker = MemoryBroker()
    broker.create_topics({f"toy.{name}": {} for name in ("commands", "evidence", "models", "rejected")}, 1)
    monkeypatch.setattr(wiring, "broker", lambda settings: broker)
    monkeypatch.setitem(sys.modules, "features.toy", toy)
    monkeypatch.setenv("PENSTOCK_WHO", "tester")
    return broker


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FolderRegistry:
    registry = FolderRegistry(tmp_path)
    monkeypatch.setattr(wiring, "registry", lambda settings: registry)
    return registry


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.load({"PENSTOCK_HOME": str(tmp_path)}, tmp_path / "none.toml")


@pytest.fixture
def controller(broker: MemoryBroker, tmp_path: Path) -> Iterator[None]:
    runner = Runner(
        broker,
        toy.use_case,
        lambda partition: ControlStep(toy.use_case),
        str(tmp_path / "state"),
        policy=CommitPolicy.every(0.02),
        idle_timeout=0.01,
    )
    stop = threading.Event()
    thread = threading.Thread(target=runner.run, args=(stop,))
    thread.start()
    yield
    stop.set()
    thread.join(10)


@pytest.mark.usefixtures("controller")
def test_consider_promote_and_roll_back(settings: Settings, registry: FolderRegistry) -> None:
    assert rollout.status(settings, "toy")["roles"]["champion"] is None
    registry.add("1", None)
    block = {"start": 0, "n": 300, "difference": -0.1}
    registry.add("2", {"champion": "1", "log_loss": 0.3, "champion_log_loss": 0.4, "auc": 0.7, "blocks": [block]})
    registry.add("3", {"champion": "2", "log_loss": float("nan"), "champion_log_loss": 0.4, "blocks": [block]})
    first = rollout.send(settings, "toy", "consider", "1")
    assert (first["action"], first["who"], first["cut"]) == ("promoted", "tester", 7)
    second = rollout.send(settings, "toy", "consider", "2")
    assert second["sentence"].startswith("promoted version 2 over 1: log loss .3000 against .4000 on 300")
    third = rollout.send(settings, "toy", "consider", "3")
    assert third["action"] == "refused" and "log_loss = None" in third["sentence"]
    back = rollout.send(settings, "toy", "rollback", why="it errs")
    assert back["sentence"] == "rolled back version 2 to 1: it errs"
    state = rollout.status(settings, "toy")
    assert state["roles"] == {"champion": "1", "challenger": None} and state["generation"] == 4
    text = rollout.as_text(state).splitlines()
    assert text[0] == "  serving      version 1, generation 4" and len(text) == 5


def test_a_version_that_is_not_registered_is_named(
    settings: Settings, registry: FolderRegistry, broker: MemoryBroker
) -> None:
    registry.add("1", None)
    with pytest.raises(InputError, match="toy has no version '7' in the registry: there are 1"):
        rollout.send(settings, "toy", "promote", "7")
    assert broker.logs["toy.commands", 0] == []


def test_without_a_controller_the_error_says_how_to_start_one(settings: Settings, broker: MemoryBroker) -> None:
    with pytest.raises(UnavailableError, match="penstock run control toy"):
        rollout.send(settings, "toy", "rollback", timeout=0.2)


def test_status_before_the_first_decision(settings: Settings, broker: MemoryBroker) -> None:
    state = rollout.status(settings, "toy")
    assert state["generation"] == 0 and "declared prior" in rollout.as_text(state)


def test_a_broken_evaluation_is_told(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(InputError, match="can't be read"):
        rollout.read_evaluation(tmp_path)
