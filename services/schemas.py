"""`penstock schemas`: every topic of a use case, its key and its records, as an AsyncAPI 3 document.

Event topics are described by their contracts, the others by what their steps write; clock records (key `clock`, no
value) are in none of them.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from features.contracts import Contract
from features.usecase import UseCase
from features.vectors import schema_id
from pipelines.control import commands_contract
from pipelines.drift import Moved
from pipelines.joiner import Kept, predictions_contract
from pipelines.learning import Refresh
from pipelines.rollout import Command, Decision
from pipelines.scorer import requests_contract
from pipelines.trial import evidence_contract


class Example(Kept, kw_only=True):
    """A prediction with its label, and the instant (epoch ms) from which the label is known."""

    label: float
    label_time: int
    targets: dict[str, float | None] = msgspec.field(default_factory=dict)


class Cut(msgspec.Struct):
    """Every example with a label time before `cut` is in closed archive files; how many since the last one, in all."""

    cut: int
    examples: int
    total: int


class Rejected(msgspec.Struct):
    """A record that `step` could not use; `raw` in base64, cut off past 64 KiB."""

    topic: str
    partition: int
    offset: int
    step: str
    reason: str
    detail: str
    raw: str
    size: int
    sha256: str


class Drift(msgspec.Struct):
    """What has moved over the days up to `time`."""

    time: int
    what: Literal["loss", "inputs"]
    features: list[Moved]
    sentence: str


class State(msgspec.Struct):
    """What serves, which share of the callers each version answers, and the newest decisions. Key `state`."""

    generation: int
    roles: dict[str, str | None]
    phase: str | None
    shares: dict[str, float]
    versions: dict[str, dict[str, Any]]
    trial: dict[str, Any] | None
    waiting: Command | None
    decisions: list[Decision]


def document(use_case: UseCase) -> dict[str, Any]:
    """The document: channels are topics; `receive` is what Penstock reads of others, `send` what it writes."""
    asked = [*use_case.contracts, requests_contract(use_case), commands_contract(use_case)]
    read = {c.topic or use_case.topic(c.name): [c.struct] for c in asked}
    about = {c.topic or use_case.topic(c.name): c for c in asked}
    written: dict[str, list[Any]] = {
        predictions_contract(use_case).topic: [predictions_contract(use_case).struct],
        evidence_contract(use_case).topic: [evidence_contract(use_case).struct],
        **{use_case.topic(name): [kind] for name, kind in (("examples", Example), ("cuts", Cut), ("drift", Drift))},
        use_case.topic("rejected"): [Rejected],
        use_case.topic("models"): [State, Refresh],
    }
    topics = read | written
    kinds = [kind for of in topics.values() for kind in of]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    payload = dict(zip(kinds, schemas, strict=True))
    messages = {topic: {k.__name__: {"payload": payload[k]} for k in of} for topic, of in topics.items()}
    return {
        "asyncapi": "3.0.0",
        "info": {"title": f"Penstock: {use_case.name}", "version": schema_id(use_case)},
        "defaultContentType": "application/json",
        "channels": {
            t: {"address": t, "messages": m} | _described(use_case, about.get(t)) for t, m in messages.items()
        },
        "operations": {
            f"{action}_{topic}": {"action": action, "channel": {"$ref": f"#/channels/{topic}"}}
            for action, of in (("receive", read), ("send", written))
            for topic in of
        },
        "components": {"schemas": components},
    }


def _described(use_case: UseCase, contract: Contract | None) -> dict[str, Any]:
    """What a producer must know beside the fields."""
    if contract is None:
        return {}
    said = [
        f"Version {contract.version} of the contract.",
        f"Key: the value of {use_case.partition_key}." if use_case.partition_key else "",
        f"Event time: `{contract.time}`, at most {contract.max_ahead} ahead of the record's timestamp.",
        f"`{contract.id}` is unique within {contract.dedupe}." if contract.id else "",
        f"At most {contract.max_bytes:,} bytes. Fields beyond these are ignored.",
    ]
    return {
        "description": " ".join(filter(None, said)),
        "bindings": {"kafka": {"partitions": use_case.partitions}},
    }
