"""The controller: acts on commands and on the evidence of trials, alone; writes what serves to `<uc>.models`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from features.contracts import Contract, Field
from features.usecase import UseCase
from pipelines.broker import Message
from pipelines.rollout import Command, RolloutPolicy, RolloutState, decide, judge
from pipelines.step import Event, Outputs
from pipelines.trial import evidence_contract

STATE_KEY = b"state"


def commands_contract(use_case: UseCase) -> Contract:
    """What the CLI, a DAG or a program may ask."""
    return Contract(
        "commands",
        (
            Field("command", str),
            Field("version", str, optional=True),
            Field("who", str),
            Field("why", str, optional=True),
            Field("id", str),
            Field("time", "time"),
            Field("evidence", dict, optional=True),
            Field("tags", dict, optional=True),
        ),
        time="time",
        id="id",
        topic=use_case.topic("commands"),
        max_bytes=1 << 20,
        by_arrival=True,
    )


class ControlStep:
    """Commands and evidence in, the serving state out: a record when one was acted on, and with each day of labels."""

    name = "control"
    outputs: Sequence[str] = ()  # `<uc>.models` is compacted: no clock records in it

    def __init__(self, use_case: UseCase, policy: RolloutPolicy | None = None) -> None:
        self.inputs = {c.topic: c for c in (commands_contract(use_case), evidence_contract(use_case))}
        self.plan: dict[str, Any] = {"state": 1}
        self.policy = policy or RolloutPolicy.immediate()
        self.state = RolloutState()
        self._models = use_case.topic("models")

    def process(self, events: Sequence[Event], watermark: int) -> Outputs:
        told = False
        for event in events:
            value, before = event.value, self.state
            if event.contract.name == "evidence":
                self.state, acted = judge(self.state, value, self.policy, event.time)
            else:
                command = Command(
                    value.command, value.version, value.who, value.why or "", value.id, value.evidence, value.tags
                )
                self.state, _ = decide(self.state, command, self.policy, event.time)
                acted = self.state is not before
            told = told or acted
        return Outputs(messages=[self._record()] if told else [])

    def _record(self) -> Message:
        return Message(self._models, json.dumps(self.state.as_json()).encode(), STATE_KEY)

    def snapshot(self) -> bytes:
        return json.dumps(self.state.as_json()).encode()

    def restore(self, data: bytes) -> None:
        self.state = RolloutState.from_json(json.loads(data))
