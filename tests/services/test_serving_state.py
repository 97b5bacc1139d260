"""The predictor serves what `<uc>.models` says, or goes on with what it has and says why."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from features.errors import UnavailableError
from features.inputs import Inputs
from features.usecase import ModelInputs
from pipelines.broker import Message
from pipelines.learning import Refresh
from services.serving_state import ModelSlot, Prior, Serving, ServingState
from tests.memory_broker import MemoryBroker
from tests.models import save_model
from tests.toy import use_case


class Registry:
    """Versions in a folder; `away` makes it unreachable."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.away, self.fetched = folder, False, list[str]()

    def __call__(self, version: str) -> Path:
        self.fetched.append(version)
        if self.away:
            raise ConnectionError("connection refused")
        return self.folder / version


class World:
    """A broker with a models topic, a registry with versions 1 to 3 and a slot that follows."""

    def __init__(self, folder: Path) -> None:
        self.broker = MemoryBroker()
        self.broker.create_topics({"toy.models": {}}, 1)
        self.registry = Registry(folder)
        for version in "123":
            save_model(folder / version, bias=float(version))
        self.slot = ModelSlot(Serving(Prior(0.3)))
        self.state: ServingState | None = None

    def follow(self) -> ServingState:
        self.state = ServingState(
            use_case, self.broker, self.slot, self.registry, refreshes=str(self.registry.folder), pauses=(0.01, 0.05)
        ).start()
        return self.state

    def refresh(self, version: str, number: int, bias: float, **wrong: Any) -> None:
        """Publish a refresh of a version: another bias, and what that scores the recorded example."""
        made = save_model(self.registry.folder / f"refresh-{number}", bias=bias)
        graph, score = (made / "model.onnx").read_bytes(), json.loads((made / "example.json").read_bytes())["score"]
        record = Refresh(version, number, f"refresh-{number}/model.onnx", hashlib.sha256(graph).hexdigest(), score)
        self.send(msgspec.json.encode(msgspec.structs.replace(record, **wrong)), f"refresh:{version}".encode())

    def answer(self) -> float:
        """What the model in the slot says to a row of zeros."""
        f, c = len(use_case.inputs.numbers), len(use_case.inputs.categories)
        return float(
            self.slot.serving.champion.score(Inputs(np.zeros((1, f), np.float32), np.zeros((1, c), np.int64)))[0]
        )

    def publish(self, generation: int, champion: str | None, **more: Any) -> None:
        value = {"generation": generation, "roles": {"champion": champion}, "shares": {}, "versions": {}, **more}
        self.send(json.dumps(value).encode())

    def send(self, value: bytes | None, key: bytes = b"state") -> None:
        producer = self.broker.producer()
        producer.send([Message("toy.models", value, key)])
        producer.flush()

    def reports(self, **expected: Any) -> None:
        assert self.state
        eventually(lambda: expected.items() <= self.state.report().items(), self.state.report)  # type: ignore[union-attr]


def eventually(what: Callable[[], bool], describe: Callable[[], Any] = lambda: "", seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"did not come true in time: {describe()}"
        threading.Event().wait(0.005)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    if world.state:
        world.state.stop()


def test_the_prior_serves_before_the_first_state(world: World) -> None:
    world.follow()
    world.reports(ready=True, generation=None, champion="prior", refused={})


def test_a_champion_that_is_there_at_the_start_serves_before_readiness(world: World) -> None:
    world.publish(1, "1")
    world.publish(2, "2")
    state = world.follow()
    assert state.wait_caught_up(5)
    assert (state.report()["generation"], world.slot.serving.champion.version) == (2, "2")
    assert world.registry.fetched == ["2"]


def test_each_new_champion_is_swapped_in(world: World) -> None:
    world.follow()
    for generation, version in ((1, "1"), (2, "2"), (3, "1")):
        world.publish(generation, version)
        world.reports(generation=generation, champion=version)
    world.publish(4, None)
    world.reports(generation=4, champion="prior")


def test_other_keys_and_damaged_states_are_skipped(world: World) -> None:
    world.publish(1, "1")
    world.send(b"{}", b"refresh:1")
    world.send(b"not json")
    world.send(b'{"generation": "x"}')
    world.publish(2, "2", unknown=[1])
    world.follow()
    world.reports(generation=2, champion="2")


def test_the_champions_newest_refresh_serves(world: World) -> None:
    world.publish(1, "1")
    world.refresh("1", 3, bias=-1.0)
    world.refresh("2", 9, bias=4.0)
    state = world.follow()
    assert state.wait_caught_up(5) and state.report()["refresh"] == 3  # before it is ready
    assert world.answer() == pytest.approx(1 / (1 + math.e), abs=1e-6)
    world.refresh("1", 4, bias=-2.0)
    world.reports(champion="1", refresh=4)
    world.publish(2, "2")
    world.reports(champion="2", refresh=9)
    world.publish(3, "3")
    world.reports(champion="3", refresh=0)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"sha256": "0" * 64}, "SHA-256"),
        ({"score": [0.5] * 8}, "scores differently"),
        ({"file": "not/there.onnx"}, "is gone"),
    ],
)
def test_a_refresh_that_is_not_what_its_record_says_is_refused(world: World, wrong: Any, reason: str) -> None:
    world.publish(1, "1")
    world.refresh("1", 1, bias=-1.0)
    world.follow()
    world.reports(refresh=1)
    world.refresh("1", 2, bias=-2.0, **wrong)
    assert world.state
    eventually(lambda: reason in world.state.report()["refused"].get("1 refresh", ""))  # type: ignore[union-attr]
    assert world.state.report()["refresh"] == 1 and world.answer() == pytest.approx(1 / (1 + math.e), abs=1e-6)
    world.refresh("1", 3, bias=0.0)
    world.reports(refresh=3)


def test_a_refresh_that_answers_nan_is_refused(world: World) -> None:
    world.publish(1, "1")
    world.follow()
    world.refresh("1", 1, bias=math.nan, score=[0.5] * 8)
    assert world.state
    eventually(lambda: "1 refresh" in world.state.report()["refused"])  # type: ignore[union-attr]
    assert world.state.report()["refresh"] == 0


def test_a_version_that_does_not_load_is_refused_and_the_old_one_goes_on(world: World) -> None:
    world.publish(1, "1")
    world.follow()
    world.reports(generation=1, champion="1")
    (world.registry.folder / "2" / "model.onnx").write_bytes(b"broken")
    world.publish(2, "2")
    world.reports(generation=2, champion="1", ready=True)
    assert world.state
    assert "version 2" in world.state.report()["refused"]["2"]
    world.publish(3, "3")
    world.reports(generation=3, champion="3")


def test_a_version_that_reads_unknown_features_is_refused(world: World) -> None:
    save_model(world.registry.folder / "4", inputs=ModelInputs(("all_count", "unheard_of")))
    world.publish(1, "4")
    world.follow()
    world.reports(generation=1, champion="prior", ready=True)
    assert world.state
    assert "unheard_of" in world.state.report()["refused"]["4"]


def test_a_registry_that_is_away_is_asked_again(world: World) -> None:
    world.publish(1, "1")
    world.follow()
    world.reports(generation=1)
    world.registry.away = True
    world.publish(2, "2")
    eventually(lambda: world.registry.fetched.count("2") >= 3)
    world.reports(generation=1, champion="1", ready=True, problem="version 2 can't be fetched: connection refused")
    world.registry.away = False
    world.reports(generation=2, champion="2")
    assert world.state
    assert "problem" not in world.state.report()


def test_a_newer_state_ends_the_wait_for_an_older_one(world: World) -> None:
    world.follow()
    world.registry.away = True
    world.publish(1, "1")
    eventually(lambda: "1" in world.registry.fetched)
    world.publish(2, None)
    world.reports(generation=2, champion="prior", ready=True)


def test_a_broker_that_is_away_is_asked_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    consumer, tries = world.broker.consumer, list[int]()

    def away(*args: Any, **options: Any) -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise UnavailableError("no broker")
        return consumer(*args, **options)

    monkeypatch.setattr(world.broker, "consumer", away)
    world.publish(1, "1")
    world.follow()
    world.reports(generation=1, champion="1", ready=True)
    assert "problem" not in world.state.report()  # type: ignore[union-attr]


def roles(champion: str, challenger: str | None, share: float = 0.0) -> dict[str, Any]:
    """What a state says of two arms."""
    return {
        "roles": {"champion": champion, "challenger": challenger},
        "shares": {champion: 1 - share, challenger: share},
    }


def test_a_challenger_is_loaded_beside_the_champion_promoted_and_dropped(world: World) -> None:
    world.follow()
    world.publish(1, "1")
    world.publish(2, "1", **roles("1", "2"))
    world.reports(generation=2, champion="1", challenger="2", share=0.0)
    challenger = world.slot.serving.challenger
    world.publish(3, "1", **roles("1", "2", 0.25))
    world.reports(generation=3, share=0.25)
    world.refresh("1", 1, bias=-1.0)
    world.reports(refresh=1, challenger="2")
    world.publish(4, "2", **roles("2", None))
    world.reports(generation=4, champion="2")
    assert world.slot.serving == (challenger, None, 0.0)
    assert world.registry.fetched.count("2") == 1


def test_a_challenger_that_is_refused_leaves_the_champion_alone(world: World) -> None:
    world.follow()
    (world.registry.folder / "2" / "model.onnx").write_bytes(b"broken")
    world.publish(1, "1", **roles("1", "2", 0.5))
    world.reports(generation=1, champion="1", ready=True)
    assert world.slot.serving.challenger is None
    assert "version 2" in world.state.report()["refused"]["2"]  # type: ignore[union-attr]


def test_a_challenger_that_can_not_be_fetched_does_not_hold_up_the_champion(world: World) -> None:
    world.follow()
    world.publish(1, "1", **roles("1", "missing"))
    world.reports(champion="1", ready=True, generation=1)
    world.registry.away = True
    world.publish(2, "1", **roles("1", "2"))
    world.reports(champion="1", generation=1, problem="version 2 can't be fetched: connection refused")
    world.registry.away = False
    world.reports(generation=2, champion="1", challenger="2")


def test_a_challenger_waits_for_the_backfill_of_a_view_that_it_reads(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = frozenset({"shop_item"})
    monkeypatch.setattr("services.serving_state.UNSERVED_S", 0.0)
    monkeypatch.setattr("services.serving_state.unserved_views", lambda broker, topic: waiting)
    world.publish(1, "1", **roles("1", "2"))
    world.follow()
    world.reports(generation=1, champion="1")
    assert "shop_item" in world.state.report()["refused"]["2"]  # type: ignore[union-attr]
    waiting = frozenset()
    world.reports(champion="1", challenger="2", refused={})


def test_no_batch_sees_two_models(world: World) -> None:
    """A scoring thread that never stops sees every version whole while they are swapped under it."""
    world.follow()
    seen: dict[str, set[float]] = {}
    stop = threading.Event()

    def score() -> None:
        while not stop.is_set():
            model = world.slot.serving.champion
            f, c = len(use_case.inputs.numbers), len(use_case.inputs.categories)
            values = model.score(Inputs(np.zeros((3, f), np.float32), np.zeros((3, c), np.int64)))
            seen.setdefault(model.version, set()).update(np.round(values, 4).tolist())

    thread = threading.Thread(target=score)
    thread.start()
    try:
        for generation in range(1, 13):
            version = str(generation % 3 + 1)
            world.publish(generation, version)
            eventually(lambda v=version: v in seen)  # type: ignore[misc]
            world.reports(generation=generation, champion=version)
    finally:
        stop.set()
        thread.join()
    assert all(len(values) == 1 for values in seen.values())
    assert len(seen) >= 3
