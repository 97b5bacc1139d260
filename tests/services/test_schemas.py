"""The document of the topics: whole, and true of the records that the steps write."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from features.usecase import load
from pipelines.broker import Message
from pipelines.drift import Drift
from pipelines.rollout import Command, RolloutPolicy, RolloutState, decide
from services.lockstep import Lockstep
from services.schemas import document
from services.topic_reader import read_all
from tests.memory_broker import MemoryBroker
from tests.pipelines.test_drift import USE_CASE, days, told
from tests.replay_rig import START, TICK, loop, session
from tests.toy import use_case

BAD = b'{"id": 5}'


def validate(described: dict[str, Any], topic: str, value: Any) -> str:
    """The name of the message that a record is of."""
    messages = described["channels"][topic]["messages"]
    for name, message in messages.items():
        schema = {**message["payload"], "components": described["components"]}
        if jsonschema.Draft202012Validator(schema).is_valid(value):
            return str(name)
    (schema, *_) = [{**m["payload"], "components": described["components"]} for m in messages.values()]
    jsonschema.validate(value, schema)
    raise AssertionError(topic)


def test_producers_are_told_what_fields_do_not_say() -> None:
    told = document(load("clicks"))["channels"]["clicks.shown"]["description"]
    assert told.startswith("Version 1 of the contract. Key: the value of user. Event time: `time`, ")
    assert "`id` is unique within 1:00:00. At most 65,536 bytes." in told


@pytest.mark.parametrize("name", ["flights", "clicks"])
def test_every_topic_and_reference_is_there(name: str) -> None:
    described = document(load(name))
    assert {f"{name}.{topic}" for topic in ("requests", "predictions", "examples", "cuts", "models", "commands")} | {
        f"{name}.{topic}" for topic in ("rejected", "evidence", "drift")
    } < set(described["channels"])
    text = json.dumps(described)
    referred = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert referred <= set(described["components"]["schemas"])
    channels = {part.split('"')[0] for part in text.split("#/channels/")[1:]}
    assert channels == set(described["channels"])


def test_what_a_loop_writes_is_as_described(tmp_path: Path) -> None:
    broker, described = MemoryBroker(), document(use_case)
    with loop(broker, tmp_path) as (settings, _):
        lockstep = session(broker, settings, START + 40 * TICK)
        broker.producer().send([Message("toy.ordered", BAD, b"k")])
        Lockstep(lockstep).run()
        lockstep.close()
    records = [r for topic in described["channels"] if topic in broker.topics for r in read_all(broker, topic)]
    values = [(r.topic, json.loads(r.value)) for r in records if r.value not in (None, BAD)]
    seen = Counter(validate(described, topic, value) for topic, value in values)
    assert {"Ordered", "Returned", "Predictions", "Example", "Rejected"} <= set(seen), seen


def test_what_moved_and_what_serves_are_as_described() -> None:
    described, state = document(use_case), RolloutState()
    for version in "12":
        state, _ = decide(state, Command("consider", version, id=version), RolloutPolicy.standard(), START)
    assert validate(described, "toy.models", state.as_json()) == "State" and state.trial
    (moved, *_) = told(Drift(USE_CASE), days(40, change=lambda vector: {**vector, "n0": None}))
    assert validate(described, "toy.drift", moved) == "Drift"
