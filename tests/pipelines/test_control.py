"""The controller as a step, under the runner."""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from features.contracts import Invalid
from pipelines.broker import Message
from pipelines.control import STATE_KEY, ControlStep, commands_contract
from pipelines.rollout import RolloutPolicy
from pipelines.runner import CommitPolicy, Runner
from pipelines.step import Event
from pipelines.trial import evidence_contract
from tests.memory_broker import MemoryBroker
from tests.toy import use_case

CONTRACT = commands_contract(use_case)


def record(command: str, version: str | None = None, id: str = "1", **more: Any) -> bytes:
    return json.dumps(
        {"command": command, "version": version, "who": "a", "id": id, "time": 1_000 * int(id), **more}
    ).encode()


def event(raw: bytes) -> Event:
    value = CONTRACT.decode(raw)
    return Event(CONTRACT, value, value.time, value.time)


def state_of(messages: list[Message]) -> dict[str, Any]:
    assert [(m.topic, m.key) for m in messages] == [("toy.models", STATE_KEY)]
    return dict(json.loads(messages[0].value or b""))


def test_a_command_becomes_one_state() -> None:
    step = ControlStep(use_case)
    assert step.inputs == {"toy.commands": CONTRACT, "toy.evidence": evidence_contract(use_case)}
    state = state_of(step.process([event(record("consider", "1", tags={"cut": "5"}))], 2_000).messages)
    assert (
        state["roles"] == {"champion": "1", "challenger": None}
        and state["generation"] == 1
        and state["shares"] == {"1": 1.0}
    )
    assert state["versions"]["1"] == {"cut": 5, "latest_label_time": None, "since": 1_000}
    assert [(d["command"], d["action"], d["cut"]) for d in state["decisions"]] == [("1", "promoted", 5)]


def test_nothing_is_written_when_nothing_was_asked_or_asked_again() -> None:
    step = ControlStep(use_case)
    assert step.process([], 1).messages == []
    step.process([event(record("consider", "1"))], 2)
    assert step.process([event(record("promote", "2"))], 3).messages == []


def test_a_snapshot_restores_it_all() -> None:
    step = ControlStep(use_case, RolloutPolicy.cautious())
    step.process([event(record("promote", v, id=v)) for v in "123"], 9_000)
    other = ControlStep(use_case, RolloutPolicy.cautious())
    other.restore(step.snapshot())
    assert other.state == step.state
    state = state_of(other.process([event(record("rollback", id="4"))], 10_000).messages)
    assert state["roles"]["champion"] == "2" and state["generation"] == 4


def test_a_malformed_command_is_the_contracts_to_refuse() -> None:
    for raw in (b"{", b"[]", record("promote", "1").replace(b'"who"', b'"whom"')):
        with pytest.raises(Invalid):
            CONTRACT.decode(raw)


def test_under_the_runner_with_a_broken_command_between(tmp_path: Path) -> None:
    broker = MemoryBroker()
    broker.create_topics({f"toy.{name}": {} for name in ("commands", "evidence", "models", "rejected")}, 1)
    committed: list[Message] = []

    def work(values: list[bytes], wanted: int, lost: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """States in `toy.models` once a fresh runner has acted on these commands."""
        runner = Runner(
            broker,
            use_case,
            lambda partition: ControlStep(use_case),
            str(tmp_path),
            recover=lambda: json.dumps(lost).encode(),
            on_commit=committed.extend,
            policy=replace(CommitPolicy(), seconds=0.02),
            idle_timeout=0.01,
        )
        stop = threading.Event()
        thread = threading.Thread(target=runner.run, args=(stop,))
        thread.start()
        producer = broker.producer()
        producer.send([Message("toy.commands", value) for value in values])
        follower = broker.consumer(["toy.models"])
        states: list[dict[str, Any]] = []
        deadline = time.monotonic() + 10
        while len(states) < wanted and time.monotonic() < deadline:
            states += [json.loads(r.value or b"") for r in follower.poll(0.1)]
        stop.set()
        thread.join(10)
        assert not thread.is_alive()
        return states

    now = time.time_ns() // 1_000_000
    at = {"time": now - 5_000}
    states = work([record("consider", "1", **at), b"nonsense"], 1)
    assert [s["roles"]["champion"] for s in states] == ["1"]
    states = work([record("promote", "2", id="2", **at | {"time": now - 4_000})], 2)
    assert [s["roles"]["champion"] for s in states] == ["1", "2"] and states[-1]["generation"] == 2
    shutil.rmtree(tmp_path / "toy")  # all that is local
    states = work([record("rollback", id="3", **at | {"time": now - 3_000})], 3, states[-1])
    assert [s["roles"]["champion"] for s in states] == ["1", "2", "1"] and states[-1]["generation"] == 3
    rejected = broker.consumer(["toy.rejected"]).poll(0.1)
    assert [json.loads(r.value or b"")["reason"] for r in rejected] == ["malformed"]
    assert [m.topic for m in committed if m.key == STATE_KEY] == ["toy.models"] * 3
