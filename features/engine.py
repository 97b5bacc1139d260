"""All views of a use case as one engine: events in, changed rows out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.columns import Coder, Prepared, Source, Udf, kind_of
from features.contracts import Contract, Field
from features.errors import ConfigError, StateError
from features.kernel import INTEGER, Input, Ints, rehash, rehash_known
from features.texts import encoded
from features.timers import DUE, KEY, UNTIL, Derived, Operations, TimerRule, Timers
from features.usecase import UseCase
from features.values import Structs, Values, read_values
from features.vectors import join_keys
from features.windows import Aggregate, ViewRows, ViewWindows, compile_view, pack, unpack

MIXABLE = ("count", "sum", "mean", "std")  # what a row taken back can leave again


class Applied(NamedTuple):
    """An event whose time has come: its contract's name, its struct, event time and the instant it counts from."""

    contract: str
    value: Any
    time: int
    applied: int


@dataclass(slots=True)
class Events:
    """Events in the order they count.

    names : of contracts; kind : [n] which of them each event is of; rows : [n] its place among the contract's values
    values : of each contract; times, applied : [n] epoch ms
    """

    names: tuple[str, ...]
    kind: Ints
    rows: Ints
    values: Sequence[Values]
    times: Ints
    applied: Ints

    @classmethod
    def of(cls, events: Sequence[Applied]) -> Events:
        names = tuple(sorted({e.contract for e in events}))
        kind = np.array([names.index(e.contract) for e in events], np.int64)
        times, applied = (np.array([e[i] for e in events], np.int64) for i in (2, 3))
        values = [Structs([e.value for e in events if e.contract == name]) for name in names]
        return cls(names, kind, places_among(kind), values, times, applied)

    def __len__(self) -> int:
        return len(self.kind)

    def where(self, name: str) -> Ints:
        """Positions of a contract's events."""
        return np.flatnonzero(self.kind == self.names.index(name)) if name in self.names else np.zeros(0, np.int64)

    def take(self, keep: NDArray[np.bool_]) -> Events:
        return Events(self.names, self.kind[keep], self.rows[keep], self.values, self.times[keep], self.applied[keep])

    def values_at(self, name: str, at: Ints) -> Values:
        """Values of a contract's events at these positions."""
        return self.values[self.names.index(name)].take(self.rows[at])


def places_among(kind: Ints) -> Ints:
    """The place of each among those of its kind."""
    places = np.zeros(len(kind), np.int64)
    for one in np.unique(kind):
        places[kind == one] = np.arange(np.count_nonzero(kind == one))
    return places


class Refusal(NamedTuple):
    """An event the engine can't use: its position, and why."""

    position: int
    reason: str
    detail: str


class Part(NamedTuple):
    """One contract's events: their positions among all, and their columns."""

    positions: Ints
    source: Source


class Batch(NamedTuple):
    """Events in columns: what each view's kernel takes, and each timer rule."""

    inputs: dict[str, Input]
    operations: list[Operations]


class _View(NamedTuple):
    name: str
    contract: Contract
    udf: Udf | None
    keys: tuple[str, ...]
    windows: ViewWindows
    rule: int | None


class Engine:
    """The stream feature views of a use case, executed.

    `advance` gets events in order and the watermark up to which everything is known; it returns the rows that events
    and time changed. The result does not depend on how the events are cut into batches.
    """

    def __init__(self, use_case: UseCase) -> None:
        self.contracts = {c.name: c for c in use_case.contracts}
        self.coder = Coder()
        self.rules = list({id(rule): rule for rule in use_case.timers.values()}.values())
        self.views = [self._view(view, use_case) for view in use_case.views]
        self.row_of = [self._row_of(i) for i in range(len(self.rules))]
        self.timers = [Timers(rule, len(row)) for rule, row in zip(self.rules, self.row_of, strict=True)]

    def _view(self, view: Any, use_case: UseCase) -> _View:
        contract, keys = _contract_of(view, use_case.event_topics), join_keys(view)
        aggregates, rule = compile_view(view), use_case.timers.get(view.name)
        udf = view.udf
        if rule:
            contract, udf = next((self.contracts[name], at) for name, at in rule.at.items())
            if wrong := [a.name for a in aggregates if a.function not in MIXABLE]:
                raise ConfigError(
                    f"view {view.name}: {wrong[0]!r}: of rows that timers take back only {', '.join(MIXABLE)}"
                )
        columns = Prepared(Source(contract, Structs([])), udf, Coder(), {})
        kinds = {a.column: kind_of(columns.column(a.column)) for a in aggregates}
        decimals = _decimals(contract)
        windows = ViewWindows(aggregates, len(keys), kinds, decimals)
        for f in contract.fields:
            if f.name in windows.summed and f.type is float and f.decimals is None and f.name not in columns.derived:
                raise ConfigError(f"view {view.name} sums {f.name!r}: give that field of {contract.name} `decimals`")
        return _View(view.name, contract, udf, keys, windows, self.rules.index(rule) if rule else None)

    def _row_of(self, rule: int) -> list[tuple[str, str]]:
        """What a timer's row holds: entity codes and columns of every view it feeds."""
        views = [v for v in self.views if v.rule == rule]
        return sorted({*((k, KEY) for v in views for k in v.keys), *(read for v in views for read in v.windows.reads)})

    @property
    def windows(self) -> dict[str, ViewWindows]:
        return {view.name: view.windows for view in self.views}

    @property
    def plan(self) -> dict[str, Any]:
        """View name -> its aggregations; a stored state of another plan of the view can't be read."""
        return {view.name: [repr(a) for a in view.windows.aggregates] for view in self.views}

    def advance(self, events: Events, watermark: int) -> tuple[dict[str, ViewRows], list[Refusal]]:
        """Apply events with `applied` < watermark, and time up to it.

        Returns
        -------
        view name -> changed rows in time order; the events that could not be used
        """
        batch, refused = self.columns(events)
        return self.apply(batch, watermark), refused

    def columns(self, events: Events) -> tuple[Batch, list[Refusal]]:
        """What `apply` takes, made of decoded events; and those that could not be used."""
        if self.coder.full:
            self.coder.sweep(self._codes())
        refused = self._too_late(events)
        kept, positions = self._without(events, refused)
        parts, prepared = self._prepare(kept)
        if bad := self._unusable(parts, prepared):
            refused += [Refusal(int(positions[i]), "invalid", detail) for i, detail in bad.items()]
            kept, _ = self._without(events, refused)
            parts, prepared = self._prepare(kept)
        inputs = {
            view.name: self._input(view, kept, parts[view.contract.name], prepared[view.contract.name, view.udf])
            for view in self.views
            if view.rule is None and view.contract.name in parts
        }
        return Batch(inputs, [self._operations(i, kept, parts, prepared) for i in range(len(self.rules))]), refused

    def apply(self, batch: Batch, watermark: int) -> dict[str, ViewRows]:
        """Apply a batch and move time up to the watermark: view name -> changed rows in time order."""
        derived = [
            timers.run(operations, watermark, self.coder.used)
            for timers, operations in zip(self.timers, batch.operations, strict=True)
        ]
        changed = {}
        for view in self.views:
            own = batch.inputs.get(view.name) if view.rule is None else self._derived_input(view, derived[view.rule])
            rows = view.windows.advance(own, watermark, self.coder.decode)
            if rows is not None:
                changed[view.name] = rows
        return changed

    def current(self) -> dict[str, ViewRows]:
        """View name -> the row of every key that has one, as of the watermark."""
        found = {view.name: view.windows.current(self.coder.decode) for view in self.views}
        return {name: rows for name, rows in found.items() if rows is not None}

    def _too_late(self, events: Events) -> list[Refusal]:
        """Late events that lie outside every window that could count them."""
        late = events.applied != events.times
        if not late.any():
            return []
        gone = np.zeros(len(events), bool)
        for name, contract in self.contracts.items():
            at = np.intersect1d(events.where(name), np.flatnonzero(late))
            reading = [v for v in self.views if contract.name in self._heard_by(v)]
            if len(at) and reading:
                leaves = np.max([v.windows.expiry(events.times[at]) for v in reading], axis=0)
                gone[at] = leaves <= events.applied[at] + 1
        return [Refusal(i, "late", "older than every window") for i in np.flatnonzero(gone).tolist()]

    def _heard_by(self, view: _View) -> tuple[str, ...]:
        return (view.contract.name,) if view.rule is None else self.rules[view.rule].events

    @staticmethod
    def _without(events: Events, refused: Sequence[Refusal]) -> tuple[Events, Ints]:
        """The other events, and their positions."""
        if not refused:
            return events, np.arange(len(events))
        keep = np.ones(len(events), bool)
        keep[[r.position for r in refused]] = False
        return events.take(keep), np.flatnonzero(keep)

    def _prepare(self, events: Events) -> tuple[dict[str, Part], dict[tuple[str, Udf | None], Prepared]]:
        """Columns by contract, and by (contract, function of its columns)."""
        parts = {}
        for name, contract in self.contracts.items():
            at = events.where(name)
            if len(at):
                parts[name] = Part(at, Source(contract, events.values_at(name, at)))
        wanted = dict.fromkeys((v.contract.name, v.udf) for v in self.views if v.rule is None)
        wanted |= dict.fromkeys((name, at) for rule in self.rules for name, at in rule.at.items())
        prepared = {
            (name, udf): Prepared(parts[name].source, udf, self.coder, _decimals(self.contracts[name]))
            for name, udf in wanted
            if name in parts
        }
        return parts, prepared

    def _unusable(self, parts: dict[str, Part], prepared: dict[tuple[str, Udf | None], Prepared]) -> dict[int, str]:
        """Position -> why, of events with numbers that can't be summed."""
        for view in self.views:
            if made := prepared.get((view.contract.name, view.udf)):
                for name, mode in view.windows.reads:
                    made.read(name, mode)
        bad: dict[int, str] = {}
        for (name, _), made in prepared.items():
            bad |= {int(parts[name].positions[i]): why for i, why in made.refused.items()}
        return bad

    @staticmethod
    def _input(view: _View, events: Events, part: Part, made: Prepared) -> Input:
        columns = [made.read(name, mode) for name, mode in view.windows.reads]
        come, ones = events.applied[part.positions] + 1, np.ones(len(part.positions), np.int64)
        return Input(made.matrix(view.keys), come, events.times[part.positions], ones, np.array(columns))

    def _derived_input(self, view: _View, made: Derived) -> Input | None:
        if not len(made.times):
            return None
        assert view.rule is not None
        row = self.row_of[view.rule]
        codes = made.rows[:, [row.index((k, KEY)) for k in view.keys]]
        columns = made.rows[:, [row.index(read) for read in view.windows.reads]].T
        return Input(
            np.ascontiguousarray(codes), made.applied + 1, made.times, made.sign, np.ascontiguousarray(columns)
        )

    def _operations(
        self, i: int, events: Events, parts: dict[str, Part], prepared: dict[tuple[str, Udf | None], Prepared]
    ) -> Operations:
        """What the events do to a rule's timers, in order."""
        rule, row = self.rules[i], self.row_of[i]
        none = np.zeros(0, np.int64)
        found = [(none, Operations(none, none, none, none, np.zeros((0, len(row)), np.int64)))]
        for name, field in rule.cancel.items():
            if part := parts.get(name):
                found.append((part.positions, self._cancels(part, field, len(row), events)))
        for name, at in rule.at.items():
            if part := parts.get(name):
                found.append((part.positions, self._sets(part, prepared[name, at], row, events)))
        order = np.argsort(np.concatenate([positions for positions, _ in found]), kind="stable")
        return Operations(*(np.concatenate([op[k] for _, op in found])[order] for k in range(5)))

    def _cancels(self, part: Part, field: str, width: int, events: Events) -> Operations:
        keys = Prepared(part.source, None, self.coder, {}).codes(field)
        none = np.full(len(keys), -1, np.int64)
        return Operations(keys, events.applied[part.positions], none, none, np.zeros((len(keys), width), np.int64))

    def _sets(self, part: Part, made: Prepared, row: Sequence[tuple[str, str]], events: Events) -> Operations:
        due, until = (made.column(name).astype(np.int64) for name in (DUE, UNTIL))
        columns = [made.codes(name) if mode == KEY else made.read(name, mode) for name, mode in row]
        return Operations(made.codes(KEY), events.applied[part.positions], due, until, np.array(columns).T)

    def _codes(self) -> Iterator[Ints]:
        """Every code the state refers to."""
        for view in self.views:
            yield view.windows.texts
        for timers, row in zip(self.timers, self.row_of, strict=True):
            yield timers.codes(_coded(row))

    def _fed_by(self, rule: int) -> list[str]:
        return [view.name for view in self.views if view.rule == rule]

    def snapshot(self) -> bytes:
        """The whole state; `restore` of an engine with the same views reads it."""
        views = {view.name: view.windows.snapshot() for view in self.views}
        timers = [
            {"views": self._fed_by(i), "row": row, "state": self.timers[i].snapshot()}
            for i, row in enumerate(self.row_of)
        ]
        return pack({"plan": self.plan, "views": views, "timers": timers, "codes": self.coder.snapshot()})

    def restore(self, data: bytes) -> None:
        """Continue from a snapshot; a view that it does not have, or has with other windows, starts empty.

        Raises StateError when a view has come to share the timers of others, whose rows lack what it needs.
        """
        state, plan = unpack(data), self.plan
        self.coder.restore(state["codes"])
        for view in self.views:
            if state["plan"].get(view.name) == plan[view.name]:
                view.windows.restore(state["views"][view.name])
        for i, timers in enumerate(self.timers):
            for saved in state["timers"]:
                if set(saved["views"]) & set(self._fed_by(i)):
                    if [tuple(c) for c in saved["row"]] != self.row_of[i]:
                        shared = ", ".join(self._fed_by(i))
                        raise StateError(f"{shared} share a TimerRule: give a view that is new a rule of its own")
                    timers.restore(saved["state"])

    def adopt(self, name: str, data: bytes) -> None:
        """Take a view's state over from the snapshot of an engine that has it alone, at the same watermark."""
        state, view = unpack(data), next(v for v in self.views if v.name == name)
        coder = Coder()
        coder.restore(state["codes"])

        def translate(codes: Ints) -> Ints:
            return self.coder.encode(coder.decode(codes.ravel()).tolist()).reshape(codes.shape)

        view.windows.restore(state["views"][name])
        view.windows.recode(translate)
        if view.rule is not None:
            if self._fed_by(view.rule) != [name]:
                raise StateError(f"view {name} shares a TimerRule with others: give it a rule of its own")
            self.timers[view.rule].restore(state["timers"][0]["state"])
            self.timers[view.rule].recode(translate, _coded(self.row_of[view.rule]))


def _coded(row: Sequence[tuple[str, str]]) -> list[int]:
    """The columns of a timer's row that hold codes."""
    return [i for i, (_, mode) in enumerate(row) if mode == KEY]


def compile_kernels() -> None:
    """Compile what engines run, once per machine: seconds, and a moment when numba has it on disk."""
    none, rows = np.zeros(0, np.int64), np.zeros((0, 0), np.int64)
    plan = (Aggregate("n", "n", "count_distinct", 2, 1, 1, INTEGER),)
    windows, coder = ViewWindows(plan, 0, {"n": INTEGER}), Coder()
    coder.encode_integers(none)
    coder.encode_texts(*encoded(["a"]))
    coder.texts.make_room(len(coder.texts.table), 0)
    read_values(Contract("nothing", (Field("time", "time"),), "time"), [b""])
    windows.advance(Input(rows, none, none, none, np.zeros((1, 0), np.int64)), 0, coder.decode)
    windows.current(coder.decode)
    rehash(windows.plan, windows.state, none)
    rehash_known(windows.state, none)
    Timers(TimerRule({}), 0).run(Operations(none, none, none, none, rows), 0, 0)


def _decimals(contract: Contract) -> dict[str, int]:
    return {f.name: f.decimals for f in contract.fields if f.decimals is not None}


def _contract_of(view: Any, contracts: dict[str, Contract]) -> Contract:
    topic = view.stream_source.kafka_options.topic
    if topic not in contracts:
        raise ConfigError(f"view {view.name} reads topic {topic!r}, which no contract of the use case has")
    return contracts[topic]
