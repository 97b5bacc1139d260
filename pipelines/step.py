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
from features.values import Values
from pipelines.broker import Message, Record

APPLIED, TOPIC, PARTITION, OFFSET, TIME, ROW = range(6)  # a place
NOWHERE = np.zeros((0, 6), np.int64)


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


@dataclass(slots=True)
class Table:
    """What was read of one topic: records, and what they carry."""

    records: Sequence[Record]
    values: Values

    def take(self, rows: Ints) -> Table:
        """Those of these rows."""
        return Table([self.records[i] for i in rows.tolist()], self.values.take(rows))

    def joined(self, other: Table) -> Table:
        """These and others."""
        if not self.records or not other.records:
            return self if self.records else other
        return Table([*self.records, *other.records], self.values.joined(other.values))


class Due(Sequence[Event]):
    """Events in the order they count, one by one or in columns.

    contracts, tables : of each topic, by number; a table may hold more than is due
    places : [n, 6] of each the instant from which it counts, its topic, partition, offset, event time, and its row in
        the topic's table
    """

    def __init__(self, contracts: Sequence[Contract], tables: Sequence[Table], places: Ints = NOWHERE) -> None:
        self._contracts, self._tables, self.places = contracts, tables, places

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Event]:
        values: list[Any] = [None] * len(self)
        for topic, table in enumerate(self._tables):
            own = np.flatnonzero(self.places[:, TOPIC] == topic)
            for i, value in zip(own.tolist(), table.values.take(self.places[own, ROW]).structs(), strict=True):
                values[i] = value
        for place, record, value in zip(self.places.tolist(), self.records, values, strict=True):
            yield Event(self._contracts[place[TOPIC]], value, place[TIME], place[APPLIED], place[PARTITION], record)

    @overload
    def __getitem__(self, at: int) -> Event: ...

    @overload
    def __getitem__(self, at: slice) -> Due: ...

    def __getitem__(self, at: int | slice) -> Event | Due:
        return self.take(at) if isinstance(at, slice) else next(iter(self.take(np.array([at]))))

    def take(self, part: slice | Ints | NDArray[np.bool_]) -> Due:
        """Those at these positions."""
        return Due(self._contracts, self._tables, self.places[part])

    @property
    def records(self) -> Iterator[Record]:
        """The record of each."""
        return (self._tables[topic].records[row] for topic, row in self.places[:, [TOPIC, ROW]].tolist())

    def joined(self, others: Sequence[Due]) -> Due:
        """These and others, in order."""
        parts = [self._compact(), *others]
        places = np.concatenate([p.places for p in parts])
        tables, end = list(parts[0]._tables), len(parts[0])
        for part in parts[1:]:
            begin, end = end, end + len(part)
            shift = np.array([len(table.records) for table in tables])
            places[begin:end, ROW] += shift[places[begin:end, TOPIC]]
            tables = [mine.joined(other) for mine, other in zip(tables, part._tables, strict=True)]
        return Due(self._contracts, tables, places[np.lexsort(places[:, OFFSET::-1].T)])

    def _compact(self) -> Due:
        """Without the rows of tables that are not among them."""
        tables, places = list(self._tables), self.places.copy()
        for topic, table in enumerate(self._tables):
            own = np.flatnonzero(places[:, TOPIC] == topic)
            if len(own) < len(table.records):
                tables[topic], places[own, ROW] = table.take(places[own, ROW]), np.arange(len(own))
        return Due(self._contracts, tables, places)

    def since(self, time: int) -> Due:
        """Those of event time `time` (epoch ms) or later."""
        return self.take(self.places[:, TIME] >= time) if time else self

    def columns(self) -> Events:
        """All of them for the engine."""
        applied, topics, _, _, times, rows = self.places.T
        return Events(
            tuple(c.name for c in self._contracts), topics, rows, [t.values for t in self._tables], times, applied
        )


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
