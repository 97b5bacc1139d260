"""A step: a pure function over batches of events, with a snapshot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from features.contracts import Contract
from features.engine import Events
from features.kernel import Ints
from pipelines.broker import Message, Record

NOWHERE = np.zeros((0, 5), np.int64)


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
    record: Record | None = None


class Due(Sequence[Event]):
    """Events in the order they count, one by one or in columns.

    places : [n, 5] of each the instant from which it counts, its topic (by number), partition, offset and event time
    records, values : [n] what was read, and decoded
    """

    def __init__(
        self, contracts: Sequence[Contract], places: Ints = NOWHERE, records: Sequence[Record] = (), values: Any = ()
    ) -> None:
        self._contracts, self.places, self.records, self.values = contracts, places, records, values

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Event]:
        for (applied, topic, partition, _, time), record, value in zip(
            self.places.tolist(), self.records, self.values, strict=True
        ):
            yield Event(self._contracts[topic], value, time, applied, partition, record)

    @overload
    def __getitem__(self, at: int) -> Event: ...

    @overload
    def __getitem__(self, at: slice) -> Due: ...

    def __getitem__(self, at: int | slice) -> Event | Due:
        if isinstance(at, slice):
            return Due(self._contracts, self.places[at], self.records[at], self.values[at])
        return next(iter(self.take(np.array([at]))))

    def take(self, at: Ints) -> Due:
        """Those at these positions."""
        chosen = at.tolist()
        return Due(
            self._contracts, self.places[at], [self.records[i] for i in chosen], [self.values[i] for i in chosen]
        )

    def joined(self, others: Sequence[Due]) -> Due:
        """These and others, in order."""
        parts = [self, *others]
        records, values = [r for p in parts for r in p.records], [v for p in parts for v in p.values]
        together = Due(self._contracts, np.concatenate([p.places for p in parts]), records, values)
        return together.take(np.lexsort(together.places[:, 3::-1].T))

    def since(self, time: int) -> Due:
        """Those of event time `time` (epoch ms) or later."""
        return self.take(np.flatnonzero(self.places[:, 4] >= time)) if time else self

    def columns(self) -> Events:
        """All of them for the engine."""
        applied, topics, _, _, times = self.places.T
        return Events(tuple(c.name for c in self._contracts), topics, list(self.values), times, applied)


@dataclass(slots=True)
class Rows:
    """Rows of one view for the stores, in columns, in time order.

    keys : a column for each entity key, in the view's order
    times : epoch ms from which the row holds, one per row
    columns : feature name -> values, one per row: arrays, NaN or None where null
    """

    view: str
    keys: Sequence[Sequence[Any] | NDArray[Any]]
    times: Sequence[int] | Ints
    columns: dict[str, Sequence[Any] | NDArray[Any]]

    @property
    def entities(self) -> Iterator[tuple[Any, ...]]:
        """The entity key of each row."""
        plain = [column.tolist() if isinstance(column, np.ndarray) else column for column in self.keys]
        return zip(*plain, strict=True) if plain else repeat((), len(self.times))

    def take(self, part: Any) -> Rows:
        """The rows of a slice or a mask; columns must be arrays."""
        columns = {name: np.asarray(column)[part] for name, column in self.columns.items()}
        return Rows(self.view, [np.asarray(k)[part] for k in self.keys], np.asarray(self.times)[part], dict(columns))


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
    files : path -> content, written below the step's folder before the commit
    forget : paths of such files that are not needed after it
    keep : of a step whose state is stored whole: store it now
    """

    messages: list[Message] = field(default_factory=list)
    online: list[Rows] = field(default_factory=list)
    offline: list[Rows] = field(default_factory=list)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rejected: list[Rejection] = field(default_factory=list)
    close: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    forget: list[str] = field(default_factory=list)
    keep: bool = False


class Step(Protocol):
    """One partition's worth of a step.

    `process` gets the events with `applied` < `watermark`, in (applied, topic, partition, offset) order, each
    exactly once. It does no I/O, reads no clock and draws no unseeded randomness, so that replaying the same
    calls on a restored snapshot gives the same state and outputs.
    """

    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> Mapping[str, Contract]:
        """Topic -> contract."""

    @property
    def outputs(self) -> Sequence[str]:
        """Topics it writes to, in its own partition; the first carries its clock records, so it is not compacted."""

    @property
    def plan(self) -> Mapping[str, Any]:
        """What a stored state depends on, by part; a view's part is the list of its aggregations."""

    def process(self, events: Sequence[Event], watermark: int) -> Outputs: ...

    def snapshot(self) -> bytes: ...

    def restore(self, data: bytes) -> None: ...


@runtime_checkable
class Holds(Protocol):
    """A step that tells how much it holds, by name."""

    @property
    def held(self) -> Mapping[str, int]: ...


@runtime_checkable
class Refills(Protocol):
    """A step whose online rows can be written again."""

    def current(self) -> list[Rows]:
        """The row of every key, as of the watermark."""
