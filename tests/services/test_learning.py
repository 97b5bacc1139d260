"""What the learner is told of a champion, and the versions that are made of its refreshes."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from features.errors import UnavailableError
from pipelines.broker import Message
from pipelines.learning import Champion, Refresh
from pipelines.onnx_model import OnnxModel
from pipelines.refresher import Refresher
from pipelines.registry import Version
from services.learning import Followed, Registrar, learned_until
from services.settings import Settings
from tests.memory_broker import MemoryBroker
from tests.pipelines.test_refresher import examples, version
from tests.toy import use_case

__all__ = ["examples", "version"]  # fixtures


class Registry:
    """Version 1 in a folder, and what was registered beside it; `away` makes it fail."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.away = folder, 0
        self.there = [Version("1", {"cut": "70"}, {})]

    def versions(self, name: str) -> list[Version]:
        return list(self.there)

    def download(self, name: str, version: str, to: Path) -> Path:
        return self.folder

    def register(self, name: str, folder: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> str:
        if self.away:
            self.away -= 1
            raise UnavailableError("no MLflow")
        number = str(len(self.there) + 1)
        OnnxModel.load(folder, number)
        self.there.append(Version(number, dict(tags), dict(metrics)))
        return number


def wait(reached: Any) -> None:
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def refresh(settings: Settings, folder: Path, version: str, number: int) -> list[Message]:
    """The messages of a commit with a refresh, its file written."""
    it = Refresher(folder)
    graph, name = it.graph(), f"toy/learner/0/refreshes/{version}-{number}.onnx"
    file = Path(settings.state_url, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(graph)
    record = Refresh(version, number, name, hashlib.sha256(graph).hexdigest(), it.score(it.example).tolist(), 99, 5)
    return [Message("toy.models", msgspec.json.encode(record), f"refresh:{version}".encode())]


def test_a_refresh_is_registered_when_it_is_time_and_the_last_one_when_the_champion_changes(
    tmp_path: Path, version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.learning.PAUSES_S", (0.01, 0.02))
    settings = Settings(home=tmp_path, state_url=str(tmp_path / "state"), register_every_s=0)
    registry = Registry(version)
    registry.away = 2
    registrar = Registrar(settings, use_case, registry)  # type: ignore[arg-type]
    registrar(refresh(settings, version, "1", 7))
    wait(lambda: len(registry.there) == 2)
    made = registry.there[1]
    assert made.tags.items() >= {"refresh_of": "1", "refresh": "7", "cut": "70", "latest_label_time": "99"}.items()
    assert made.metrics == {"learned": 5.0, "skipped": 0.0}

    seldom = replace(settings, register_every_s=3600.0)
    later = Registrar(seldom, use_case, registry)  # type: ignore[arg-type]
    later(refresh(settings, version, "1", 8))
    later.register_due(time.time())
    assert len(registry.there) == 2
    later.register_due(time.time() + 3601)
    wait(lambda: [v.tags.get("refresh") for v in registry.there] == [None, "7", "8"])


def test_a_former_champions_last_refresh_is_registered_at_once(tmp_path: Path, version: Path) -> None:
    settings = Settings(home=tmp_path, state_url=str(tmp_path / "state"), register_every_s=3600.0)
    registry = Registry(version)
    registry.there.append(Version("2", {"cut": "80"}, {}))
    registrar = Registrar(settings, use_case, registry)  # type: ignore[arg-type]
    registrar(refresh(settings, version, "1", 3))
    registrar(refresh(settings, version, "2", 1))
    wait(lambda: [(v.tags.get("refresh_of"), v.tags.get("refresh")) for v in registry.there[2:]] == [("1", "3")])


def test_the_champion_is_followed_once_its_files_are_here(tmp_path: Path) -> None:
    broker, away = MemoryBroker(), list[str]()
    broker.create_topics({"toy.models": {}, "toy.examples": {}}, 1)

    def fetch(version: str) -> Path:
        if version in away:
            raise UnavailableError("no MLflow")
        return tmp_path / ("foreign" if version == "3" else "ours")

    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/weights.pt").touch()

    def publish(champion: str, **facts: Any) -> None:
        state = {"generation": 1, "roles": {"champion": champion}, "versions": {champion: facts}}
        broker.producer().send([Message("toy.models", json.dumps(state).encode(), b"state")])

    world = Followed(use_case, broker, fetch)
    assert world.champion() is None
    publish("1", cut=70, latest_label_time=69)
    assert world.champion() == Champion("1", 70)
    away.append("2")
    publish("2", cut=80, latest_label_time=85)
    assert world.champion() == Champion("1", 70)
    away.clear()
    assert world.champion() == Champion("2", 86)
    publish("3", cut=90)  # a model of the user's own: there is nothing to learn on from
    assert world.champion() == Champion("2", 86)


def test_a_version_without_facts_has_learned_nothing() -> None:
    assert learned_until({"cut": None, "latest_label_time": None}) == 0
    assert learned_until({"cut": 5, "latest_label_time": 0}) == 5
