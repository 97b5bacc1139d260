"""The mirror of the serving state, against a registry that comes and goes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from features.errors import InputError, UnavailableError
from pipelines.broker import Message
from pipelines.rollout import Command, RolloutPolicy, RolloutState, decide
from services import control, wiring
from services.control import Mirror, mirror
from services.settings import Settings
from tests.memory_broker import MemoryBroker


class RecordingRegistry:
    """Keeps what it is told; away for its first `away` calls, and without version 9."""

    def __init__(self, away: int = 0) -> None:
        self.away, self.calls = away, 0
        self.set: dict[str, str] = {}
        self.tags: dict[tuple[str, str], str] = {}

    def _answer(self, version: str) -> None:
        self.calls += 1
        if self.away > 0:
            self.away -= 1
            raise UnavailableError("away")
        if version == "9":
            raise InputError("no version 9")

    def set_alias(self, name: str, alias: str, version: str) -> None:
        self._answer(version)
        self.set[alias] = version

    def drop_alias(self, name: str, alias: str) -> None:
        self._answer("")
        self.set.pop(alias, None)

    def aliases(self, name: str) -> dict[str, str]:
        return dict(self.set)

    def tag(self, name: str, version: str, key: str, value: str) -> None:
        self._answer(version)
        self.tags[version, key] = value


def state_after(*commands: tuple[str, str | None], policy: RolloutPolicy | None = None) -> dict[str, Any]:
    state = RolloutState()
    for i, (name, version) in enumerate(commands):
        state, _ = decide(state, Command(name, version, id=str(i)), policy or RolloutPolicy.immediate(), i)
    return state.as_json()


def message(state: dict[str, Any]) -> Message:
    return Message("toy.models", json.dumps(state).encode(), b"state")


def until(reached: Callable[[], bool]) -> None:
    deadline, pause = time.monotonic() + 10, threading.Event()
    while not reached():
        pause.wait(0.01)
        assert time.monotonic() < deadline, "waited 10 s for the mirror"


def test_aliases_and_tags_follow_the_state() -> None:
    registry = RecordingRegistry()
    steps = [("consider", "1"), ("promote", "2"), ("consider", "3"), ("promote", "4"), ("rollback", None)]
    state = state_after(*steps)
    mirror(registry, "toy", state)
    assert registry.set == {"champion": "2"}
    roles = {version: value for (version, key), value in registry.tags.items() if key == "role"}
    assert roles == {"1": "retired", "2": "champion", "3": "refused", "4": "rolled_back"}
    assert registry.tags["4", "decision"] == "rolled back version 4 to 2"


def test_a_challenger_has_an_alias_while_its_trial_is_on() -> None:
    registry, done, policy = RecordingRegistry(), set[control.Fact](), RolloutPolicy.standard()
    steps: list[tuple[str, str | None]] = [("consider", "1"), ("consider", "2")]
    mirror(registry, "toy", state_after(*steps, policy=policy), done)
    assert registry.set == {"champion": "1", "challenger": "2"} and registry.tags["2", "role"] == "shadow"
    mirror(registry, "toy", state_after(*steps, ("rollback", None), policy=policy), done)
    assert registry.set == {"champion": "1"} and registry.tags["2", "role"] == "rolled_back"


def test_mirroring_again_asks_for_nothing_new() -> None:
    registry, done = RecordingRegistry(), set[control.Fact]()
    mirror(registry, "toy", state_after(("consider", "1")), done)
    calls = registry.calls
    mirror(registry, "toy", state_after(("consider", "1")), done)
    assert registry.calls == calls
    mirror(registry, "toy", state_after(("consider", "1"), ("promote", "2")), done)
    mirror(registry, "toy", state_after(("consider", "1"), ("promote", "2"), ("rollback", None)), done)
    assert registry.set == {"champion": "1"} and registry.tags["1", "role"] == "champion"


def test_a_version_the_registry_lacks_stops_nothing() -> None:
    registry = RecordingRegistry()
    mirror(registry, "toy", state_after(("promote", "9"), ("promote", "2")))
    assert registry.set == {"champion": "2"}


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> MemoryBroker:
    broker = MemoryBroker()
    broker.create_topics({"toy.models": {}}, 1)
    monkeypatch.setattr(wiring, "broker", lambda settings: broker)
    monkeypatch.setattr(control, "PAUSES_S", (0.01, 0.02))
    return broker


def settings(tmp_path: Path) -> Settings:
    return Settings.load({"PENSTOCK_HOME": str(tmp_path)}, tmp_path / "none.toml")


def test_what_is_there_at_the_start_is_mirrored_until_the_registry_has_it(broker: MemoryBroker, tmp_path: Path) -> None:
    broker.producer().send([message(state_after(("consider", "1"))), message(state_after(("promote", "2")))])
    registry = RecordingRegistry(away=4)
    made = Mirror(settings(tmp_path), "toy", registry)
    until(lambda: registry.set == {"champion": "2"})
    made.close()


def test_a_commit_is_mirrored_without_waiting_for_the_registry(broker: MemoryBroker, tmp_path: Path) -> None:
    registry = RecordingRegistry(away=10**9)
    made = Mirror(settings(tmp_path), "toy", registry)
    began = time.monotonic()
    made([Message("toy.other", b"{}"), message(state_after(("consider", "1")))])
    made([message(state_after(("consider", "1"), ("promote", "2")))])
    assert time.monotonic() - began < 1
    until(lambda: registry.calls > 3)
    registry.away = 0
    until(lambda: registry.set == {"champion": "2"} and registry.tags.get(("2", "role")) == "champion")
    made.close()


def test_an_alias_moved_by_hand_is_a_command(
    broker: MemoryBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(control, "LOOK_S", 0.02)
    registry = RecordingRegistry()
    made = Mirror(settings(tmp_path), "toy", registry)

    def act(*steps: tuple[str, str | None]) -> None:
        done = [message(state_after(*steps))]
        broker.producer().send(done)
        made(done)

    def send(*what: Any, who: str) -> None:
        asked.append((*what[1:4], who))
        act(("consider", "1"), ("promote", "2"))

    monkeypatch.setattr(control.rollout, "send", send)
    act(("consider", "1"))
    until(lambda: registry.set == {"champion": "1"})
    registry.set["champion"] = "2"
    until(lambda: registry.tags.get(("2", "role")) == "champion")
    assert asked == [("toy", "promote", "2", "MLflow")]
    broker.producer().send([message(state_after(("consider", "1"), ("promote", "2"), ("promote", "3")))])
    registry.set["champion"] = "3"  # by another controller, which decided it, too
    until(lambda: registry.tags.get(("3", "role")) == "champion")
    made.close()
    assert len(asked) == 1
