"""All views of a use case as one engine: events in, changed rows out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.contracts import Contract
from features.errors import ConfigError
from features.timers import Derived, Timers
from features.usecase import UseCase
from features.vectors import join_keys
from features.windows import Batch, Columns, Ints, ViewRows, ViewWindows, compile_view, pack, unpack


class Applied(NamedTuple):
    """An event whose time has come: its contract's name, its struct, event time and the instant it counts from."""

    contract: str
    value: Any
    time: int
    applied: int


class Engine:
    """The stream feature views of a use case, executed.

    `advance` gets events in order and the watermark up to which everything is known; it returns the rows that events
    and time changed. The result does not depend on how the events are cut into batches.
    """

    def __init__(self, use_case: UseCase) -> None:
        self.views = {view.name: view for view in use_case.views}
        self.source = {name: _contract_of(view, use_case.event_topics) for name, view in self.views.items()}
        self.contracts = {c.name: c for c in use_case.contracts}
        self.windows = {
            name: ViewWindows(compile_view(view), {f.name: f.decimals or 0 for f in self.source[name].fields})
            for name, view in self.views.items()
        }
        rules = {id(rule): rule for rule in use_case.timers.values()}
        self.timers = {key: Timers(rule) for key, rule in rules.items()}
        self.timer_of = {name: id(rule) for name, rule in use_case.timers.items()}
        self.entities = {name: join_keys(view) for name, view in self.views.items()}

    @property
    def plan(self) -> dict[str, Any]:
        """What a snapshot's arrays mean; another plan can't read them."""
        return {name: [repr(a) for a in w.aggregates] for name, w in sorted(self.windows.items())}

    def too_late(self, event: Applied) -> bool:
        """Whether a late event lies outside every window that could count it."""
        if event.applied == event.time:
            return False
        times = np.array([event.time], np.int64)
        reading = [w for name, w in self.windows.items() if event.contract in self._read_by(name)]
        return all(w.expiry(times).max() <= event.applied + 1 for w in reading)

    def _read_by(self, view: str) -> tuple[str, ...]:
        """Names of the contracts whose events reach a view."""
        return self.timers[self.timer_of[view]].rule.events if view in self.timer_of else (self.source[view].name,)

    def advance(self, events: Sequence[Applied], watermark: int) -> dict[str, ViewRows]:
        """View name -> changed rows, ordered by (key, time)."""
        columns = {
            name: self._columns(c, [e for e in events if e.contract == name]) for name, c in self.contracts.items()
        }
        derived = {key: self._derived(timers, events, watermark) for key, timers in self.timers.items()}
        changed = {}
        for name, windows in self.windows.items():
            if name in self.timer_of:
                batch = self._timer_batch(name, derived[self.timer_of[name]])
            else:
                batch = self._batch(name, *columns[self.source[name].name])
            rows = windows.advance(batch, watermark)
            if rows is not None:
                changed[name] = rows
        return changed

    def _columns(self, contract: Contract, events: Sequence[Applied]) -> tuple[Columns, Ints, Ints]:
        columns: Columns = {}
        for f in contract.fields if events else ():
            values = [getattr(e.value, f.name) for e in events]
            columns[f.name] = column(values, f.type, f.optional)
        times = np.array([e.time for e in events], np.int64)
        return columns, times, np.array([e.applied for e in events], np.int64)

    def _batch(self, name: str, columns: Columns, times: Ints, applied: Ints) -> Batch | None:
        if not len(times):
            return None
        udf = self.views[name].udf
        if udf:
            columns = columns | {k: np.asarray(v) for k, v in udf(columns).items()}
        sign = np.ones(len(times), np.int64)
        return _keyed(self.entities[name], Batch([], times, applied, sign, columns))

    def _derived(self, timers: Timers, events: Sequence[Applied], watermark: int) -> list[Derived]:
        heard = [(e.applied, e.contract, e.value) for e in events if e.contract in timers.rule.events]
        return timers.run(heard, watermark)

    def _timer_batch(self, name: str, made: Sequence[Derived]) -> Batch | None:
        if not made:
            return None
        columns = {k: column([d.row[k] for d in made], object, True) for k in made[0].row}
        times, applied, sign = (np.array([d[i] for d in made], np.int64) for i in range(3))
        return _keyed(self.entities[name], Batch([], times, applied, sign, columns))

    def snapshot(self) -> bytes:
        """The whole state; only `restore` of an engine with the same plan reads it."""
        timers = [t.snapshot() for t in self.timers.values()]
        return pack({"views": {name: w.snapshot() for name, w in self.windows.items()}, "timers": timers})

    def restore(self, data: bytes) -> None:
        state = unpack(data)
        for name, windows in self.windows.items():
            windows.restore(state["views"][name])
        for timers, saved in zip(self.timers.values(), state["timers"], strict=True):
            timers.restore(saved)


def column(values: list[Any], kind: Any, optional: bool) -> NDArray[Any]:
    """Values of one field as an array: int64, float64 with NaN for null, or objects with None."""
    if kind in (int, bool, "time", float):
        if not optional:
            return np.array(values, np.float64 if kind is float else np.int64)
        return np.array([np.nan if v is None else v for v in values], np.float64)
    out = np.empty(len(values), object)
    out[:] = values
    return out


def _keyed(entities: Sequence[str], batch: Batch) -> Batch | None:
    """The batch with its entity keys; events with a null key belong to no entity and are left out."""
    columns = [batch.columns[e].tolist() for e in entities]
    batch.keys = list(zip(*columns, strict=True)) if columns else [()] * len(batch.times)
    keep = [None not in key for key in batch.keys]
    if all(keep):
        return batch
    mask = np.array(keep)
    keys = [k for k, ok in zip(batch.keys, keep, strict=True) if ok]
    columns_left = {n: c[mask] for n, c in batch.columns.items()}
    return Batch(keys, batch.times[mask], batch.applied[mask], batch.sign[mask], columns_left)


def _contract_of(view: Any, contracts: dict[str, Contract]) -> Contract:
    topic = view.stream_source.kafka_options.topic
    if topic not in contracts:
        raise ConfigError(f"view {view.name} reads topic {topic!r}, which no contract of the use case has")
    return contracts[topic]
