"""A step: a pure function over batches of events, with a snapshot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from features.contracts import Contract
from pipelines.broker import Headers, Message, Record


@dataclass(slots=True)
class Event:
    """A valid record whose time has come.

    `time` is the event time (epoch ms); `applied` is the instant from which it counts: the same, or for a late
    event the watermark it met. `value` is the contract's decoded struct.
    """

    contract: Contract
    value: Any
    time: int
    applied: int
    partition: int = 0
    offset: int = -1
    headers: Headers = ()
    record: Record | None = None


@dataclass(slots=True)
class Rows:
    """Rows of one view for the stores, in columns, ordered by (time within key).

    keys : list of entity-key tuples, one per row (in the view's entity order)
    times : epoch ms from which the row holds, one per row
    columns : feature name -> values, one per row (None where null)
    """

    view: str
    keys: list[tuple[Any, ...]]
    times: list[int]
    columns: dict[str, list[Any]]


@dataclass(slots=True)
class Rejection:
    """An event a step can't use (a label after its wait, say); the runner sends it to `<uc>.rejected`."""

    event: Event
    reason: str
    detail: str


@dataclass(slots=True)
class Outputs:
    """What one `process` call produced.

    messages : records for Kafka, sent in the commit's transaction
    online : last row per changed key, for the online store
    offline : every changed row, for the offline store
    rows : table name -> records, for tables that are not views
    rejected : events that the step can't use
    close : open files must close with this call (a cut)
    """

    messages: list[Message] = field(default_factory=list)
    online: list[Rows] = field(default_factory=list)
    offline: list[Rows] = field(default_factory=list)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rejected: list[Rejection] = field(default_factory=list)
    close: bool = False


class Step(Protocol):
    """One partition's worth of a step.

    `process` gets the events with `applied` < `watermark`, in (applied, topic, partition, offset) order, each
    exactly once. It does no I/O, reads no clock and draws no unseeded randomness, so that replaying the same
    calls on a restored snapshot gives the same state and outputs.
    """

    name: str
    inputs: Mapping[str, Contract]  # topic -> contract
    outputs: Sequence[str]  # topics that carry its clock records
    plan: Mapping[str, Any]

    def process(self, events: Sequence[Event], watermark: int) -> Outputs: ...

    def snapshot(self) -> bytes: ...

    def restore(self, data: bytes) -> None: ...
