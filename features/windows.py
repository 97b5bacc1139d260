"""The windows of a view: compiled from Feast's aggregations, executed by `features.kernel`.

The value at time t covers ``floor_h(t - W) <= event time < t``: W the window, h the slide, tiles aligned to the epoch
(the sawtooth window of Chronon and of Feast's tiling: an exact head, a tail that moves in steps of h). So an event
counts from the millisecond after its own until the tile boundary ``floor_h(event time) + h + W``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from features import kernel
from features.errors import ConfigError
from features.kernel import FLOAT, INTEGER, NULL, TEXT, Ints

FUNCTIONS = ("count", "sum", "mean", "std", "last", "last_n", "min", "max", "count_distinct")
CODES = {
    "count": kernel.COUNT,
    "count_distinct": kernel.COUNT,
    "sum": kernel.SUM,
    "mean": kernel.MEAN,
    "std": kernel.STD,
    "last": kernel.LAST,
    "last_n": kernel.LAST_N,
    "min": kernel.MIN,
    "max": kernel.MAX,
}
SUMMED = ("sum", "mean", "std")
SCALED, RAW, VALID = "scaled", "raw", "valid"
TERMS = {
    "count": (kernel.VALID,),
    "sum": (kernel.VALUE,),
    "mean": (kernel.VALID, kernel.VALUE),
    "std": (kernel.VALID, kernel.VALUE, kernel.SQUARE_HIGH, kernel.SQUARE_LOW),
}


@dataclass(frozen=True)
class Aggregate:
    """One aggregation of a view; window and slide in ms. `depth` is the n of last_n, `kind` the feature's type."""

    name: str
    column: str
    function: str
    window: int
    slide: int
    depth: int
    kind: int

    @property
    def group(self) -> tuple[int, int]:
        return self.window, self.slide


@dataclass(slots=True)
class ViewRows:
    """Rows of one view in time order.

    codes : [rows, keys] the entity keys' codes; `keys` reads them, column by column, until the next batch is applied
    times : epoch ms from which each row holds
    newest : which rows are their keys' newest
    columns : feature -> float64 with NaN for null, int64, or objects with None for null and lists
    """

    codes: Ints
    times: Ints
    newest: NDArray[np.bool_]
    columns: dict[str, NDArray[Any]]
    decode: Callable[[Ints], NDArray[Any]]

    @property
    def keys(self) -> list[NDArray[Any]]:
        """A column for each entity key."""
        return [self.decode(codes) for codes in self.codes.T]


def compile_view(view: Any) -> tuple[Aggregate, ...]:
    """The aggregations of a Feast StreamFeatureView; raises ConfigError naming the one that can't be executed."""
    types = {f.name: str(f.dtype) for f in view.features}
    plan = []
    for a in view.aggregations:
        where = f"view {view.name}, aggregation {a.name!r}"
        window, slide = (round(d.total_seconds() * 1000) if d else 0 for d in (a.time_window, a.slide_interval))
        listed = a.function.startswith("last_")
        function, depth = ("last_n", a.function.removeprefix("last_")) if listed else (a.function, "1")
        if function not in FUNCTIONS or not depth.isdigit() or int(depth) < 1:
            raise ConfigError(f"{where}: function {a.function!r} is none of {', '.join(FUNCTIONS)}")
        if a.name not in types:
            raise ConfigError(f"{where}: the view's schema has no field of that name")
        if not 0 < slide < window or window % slide:
            raise ConfigError(f"{where}: slide_interval must be given, shorter than time_window and divide it")
        kind = INTEGER if "Int" in types[a.name] else TEXT if "String" in types[a.name] else FLOAT
        if kind == TEXT and not function.startswith("last"):
            raise ConfigError(f"{where}: {a.function} of text makes no sense, only last and last_n keep it")
        plan.append(Aggregate(a.name, a.column, function, window, slide, int(depth), kind))
    if not plan:
        raise ConfigError(f"view {view.name} has no aggregations")
    return tuple(plan)


class ViewWindows:
    """The windows of one view.

    Parameters
    ----------
    aggregates : the compiled aggregations
    keys : how many entity keys a row has
    kinds : column -> INTEGER, FLOAT or TEXT
    decimals : digits kept of a summed float column

    Attributes
    ----------
    reads : the columns that `advance` expects, in order: (name, SCALED to a whole number, RAW or VALID: 0 or null)
    """

    def __init__(
        self,
        aggregates: Sequence[Aggregate],
        keys: int,
        kinds: Mapping[str, int],
        decimals: Mapping[str, int] | None = None,
    ) -> None:
        self.aggregates, self.decimals = aggregates, decimals or {}
        self.groups = sorted({a.group for a in aggregates})
        self.summed = {a.column for a in aggregates if a.function in SUMMED}
        self.reads = sorted({(a.column, self._mode(a)) for a in aggregates})
        self.kinds = kinds
        self.longest = [a.depth for a in aggregates if a.function == "last_n"]
        self.plan = self._compile(keys)
        self.watermark = 0
        self.state = self._empty()
        none, rows = np.empty(0, np.int64), np.empty((0, 0), np.int64)
        self._out = kernel.Output(none, rows, none, none.astype(bool), rows, rows.view(float), rows, none, none, none)

    def _mode(self, a: Aggregate) -> str:
        if a.function not in TERMS:
            return RAW
        return SCALED if a.column in self.summed else VALID

    def _compile(self, keys: int) -> kernel.Plan:
        place = {read: i for i, read in enumerate(self.reads)}
        terms: list[tuple[int, int]] = []
        first: dict[tuple[str, str], int] = {}
        for column in sorted({a.column for a in self.aggregates}):
            functions = {a.function for a in self.aggregates if a.column == column}
            kinds = sorted(set(chain.from_iterable(TERMS.get(f, ()) for f in functions)))
            first |= {(column, f): len(terms) + kinds.index(TERMS[f][0]) for f in functions & TERMS.keys()}
            added = SCALED if column in self.summed else VALID
            terms += [(place[column, added], kind) for kind in kinds]
        raw = {f: sorted({a.column for a in self.aggregates if a.function == f}) for f in CODES}
        extremes = [(c, f) for f in ("min", "max") for c in raw[f]]
        distinct = [(place[c, RAW], len(terms) + i) for i, c in enumerate(raw["count_distinct"])]
        first |= {(c, "count_distinct"): len(terms) + i for i, c in enumerate(raw["count_distinct"])}
        terms += [(column, kernel.DISTINCT) for column, _ in distinct]
        rings = [1 << (window // slide + 1).bit_length() for window, slide in self.groups]
        open_at = kernel.KEYS + keys
        totals_at = open_at + 2 * len(self.groups)
        queues_at = totals_at + len(self.groups) * len(terms)
        listed, at = {}, queues_at + 2 * len(self.groups) * len(extremes)
        for column in sorted({*raw["last"], *raw["last_n"]}):
            depth = max(a.depth for a in self.aggregates if a.column == column and a.function.startswith("last"))
            listed[column] = (place[column, RAW], depth, at)
            at += 1 + 2 * depth
        self.width = at
        which = first | {(c, f): i for i, (c, f) in enumerate(extremes)}
        which |= {(c, f): i for i, c in enumerate(listed) for f in ("last", "last_n")}
        features = [
            (CODES[a.function], self.groups.index(a.group), which[a.column, a.function], self._held(a), a.kind)
            for a in self.aggregates
        ]
        return kernel.Plan(
            _table([(*g, sum(rings[:i]), rings[i] - 1) for i, g in enumerate(self.groups)], 4),
            _table(terms, 2),
            _table([(place[c, RAW], 1 if f == "min" else -1) for c, f in extremes], 2),
            _table(distinct, 2),
            _table(list(listed.values()), 3),
            _table(features, 5),
            np.array([a.depth if a.function == "last_n" else self.scale(a.column) for a in self.aggregates], float),
            keys,
            open_at,
            totals_at,
            queues_at,
        )

    def _held(self, a: Aggregate) -> int:
        held = self.kinds.get(a.column, FLOAT)
        if a.function in ("min", "max", "last", "last_n") and (held == TEXT) != (a.kind == TEXT):
            raise ConfigError(
                f"aggregation {a.name!r}: column {a.column!r} and the feature's type do not fit: one is text"
            )
        return held

    def scale(self, column: str) -> int:
        """What a summed column is multiplied by, so that it is whole."""
        return int(10 ** self.decimals.get(column, 0))

    def _empty(self) -> kernel.State:
        meta = np.zeros(kernel.GROUPS + 2 * len(self.groups), np.int64)
        meta[[kernel.FREE_SLOT, kernel.FREE_ENTRY, kernel.FREE_NODE]] = -1
        meta[kernel.GROUPS :: 2] = kernel.NEVER
        ring = np.full((self.plan.groups[:, 3] + 1).sum(), -1, np.int64)
        none = np.full(16, -1, np.int64)
        return kernel.State(
            np.zeros((16, self.width), np.int64),
            np.zeros((16, kernel.VALUES + len(self.plan.terms)), np.int64),
            np.zeros((16, 4), np.int64),
            ring,
            ring.copy(),
            none,
            none.copy(),
            meta,
        )

    def expiry(self, times: Ints) -> Ints:
        """The instant at which each event has left every window."""
        slides = self.plan.groups[:, 1]
        t = times[:, None]
        return np.asarray((t - t % slides + slides + self.plan.groups[:, 0]).max(axis=1))

    def advance(
        self, events: kernel.Input | None, watermark: int, decode: Callable[[Ints], NDArray[Any]]
    ) -> ViewRows | None:
        """Apply events and move every tail up to `watermark`; None when no row changed.

        decode : codes -> an object array of what they stand for; -1 and NULL are None
        """
        self.watermark = watermark
        meta = self.state.meta
        if events is None:
            if meta[kernel.GROUPS :: 2].min() > watermark:
                return None
            nothing = np.zeros(0, np.int64)
            codes, columns = np.zeros((0, self.plan.keys), np.int64), np.zeros((len(self.reads), 0), np.int64)
            events = kernel.Input(codes, nothing, nothing, nothing, columns)
        self._reserve(len(events.come))
        out = self._room(len(events.come) * (1 + len(self.groups)) + int(meta[kernel.GROUPS + 1 :: 2].sum()))
        n = kernel.advance(self.plan, self.state, events, watermark, out)
        return self._rows(out, n, decode) if n else None

    def current(self, decode: Callable[[Ints], NDArray[Any]]) -> ViewRows | None:
        """The row of every key with an event in some window, as of the watermark; None when there is none."""
        out = self._room(int(self.state.meta[kernel.SLOTS]))
        n = kernel.current(self.plan, self.state, self.watermark, out)
        return self._rows(out, n, decode) if n else None

    def _reserve(self, n: int) -> None:
        """Make room for what `n` events can need."""
        s, windows = self.state, len(self.groups)
        values = n * windows * len(self.plan.distinct)
        s = s._replace(
            slots=grown(s.slots, int(s.meta[kernel.SLOTS]) + n),
            entries=grown(s.entries, int(s.meta[kernel.ENTRIES]) + n * windows),
            nodes=grown(s.nodes, int(s.meta[kernel.NODES]) + n * windows * len(self.plan.extremes) + 2 * values),
        )
        if 2 * (s.meta[kernel.TABLED] + n) > len(s.table):
            table = _hash_table(int(s.meta[kernel.SLOTS]) + n)
            kernel.rehash(self.plan, s, table)
            s = s._replace(table=table)
        if 2 * (s.meta[kernel.KNOWN] + values) > len(s.known):
            known = _hash_table(int((s.known >= 0).sum()) + values)
            kernel.rehash_known(s, known)
            s = s._replace(known=known)
        self.state = s

    def _room(self, rows: int) -> kernel.Output:
        """The output, kept from call to call: fresh memory would cost more than what is written to it."""
        if rows > len(self._out.times):
            rows = max(rows, 2 * len(self._out.times))
            integers = np.empty((len(self.aggregates), rows), np.int64)
            codes = np.empty((rows, self.plan.keys), np.int64)
            lists = np.empty((rows, sum(self.longest)), np.int64)
            slots, times, touched, found = (np.empty(rows, np.int64) for _ in range(4))
            newest, terms, floats = np.empty(rows, bool), np.empty(len(self.plan.terms), np.int64), integers.view(float)
            self._out = kernel.Output(slots, codes, times, newest, integers, floats, lists, touched, found, terms)
        if len(self.state.slots) > len(self._out.touched):
            self._out = self._out._replace(touched=np.empty(len(self.state.slots), np.int64))
        return self._out

    def _rows(self, out: kernel.Output, n: int, decode: Callable[[Ints], NDArray[Any]]) -> ViewRows:
        columns: dict[str, NDArray[Any]] = {}
        block = out.integers[:, :n].copy()
        floats, at = block.view(np.float64), 0
        for f, a in enumerate(self.aggregates):
            if a.function == "last_n":
                columns[a.name] = self._lists(a, out.lists[:n, at : at + a.depth], block[f], decode)
                at += a.depth
            elif a.kind == TEXT:
                columns[a.name] = decode(block[f])
            elif a.kind == FLOAT:
                columns[a.name] = floats[f]
            else:
                columns[a.name] = block[f] if a.function in TERMS else _nullable(block[f])
        return ViewRows(out.codes[:n].copy(), out.times[:n].copy(), out.newest[:n].copy(), columns, decode)

    def _lists(self, a: Aggregate, values: Ints, lengths: Ints, decode: Callable[[Ints], NDArray[Any]]) -> NDArray[Any]:
        if a.kind == TEXT:
            used = np.where(np.arange(a.depth) < lengths[:, None], values, -1)
            plain = decode(used.ravel()).reshape(used.shape).tolist()
        elif self.kinds.get(a.column, FLOAT) == FLOAT:
            floats = as_float(values)
            plain = (floats if a.kind == FLOAT else floats.astype(np.int64)).tolist()
        else:
            plain = (values.astype(np.float64) if a.kind == FLOAT else values).tolist()
        out = np.empty(len(plain), object)
        out[:] = [row[:n] for row, n in zip(plain, lengths.tolist(), strict=True)]
        return out

    @property
    def keys_alive(self) -> int:
        """How many keys have an event in some window."""
        return int((self.state.slots[: self.state.meta[kernel.SLOTS], kernel.LIVE] > 0).sum())

    def _code_places(self) -> Iterator[tuple[Ints, Any]]:
        """Where the state holds codes: an array, and an index into it."""
        s, kinds = self.state, [self.kinds.get(name, FLOAT) for name, _ in self.reads]
        live = np.flatnonzero(s.slots[: s.meta[kernel.SLOTS], kernel.LIVE] >= 0)
        yield s.slots, (live[:, None], np.arange(kernel.KEYS, kernel.KEYS + self.plan.keys))
        for column, depth, at in self.plan.listed.tolist():
            if kinds[column] == TEXT:
                rows, used = np.nonzero(np.arange(depth) < s.slots[live, at][:, None])
                yield s.slots, (live[rows], at + 1 + depth + used)
        nodes = s.known[s.known >= 0]
        for d, (column, _) in enumerate(self.plan.distinct.tolist()):
            if kinds[column] == TEXT:
                yield s.nodes, (nodes[s.nodes[nodes, 1] % len(self.plan.distinct) == d], 2)

    @property
    def texts(self) -> Ints:
        """Every code that the state refers to."""
        return np.concatenate([array[where].ravel() for array, where in self._code_places()])

    def recode(self, translate: Callable[[Ints], Ints]) -> None:
        """Give every value another code."""
        for array, where in self._code_places():
            array[where] = translate(array[where])
        s = self.state
        table, known = np.full_like(s.table, -1), np.full_like(s.known, -1)
        kernel.rehash(self.plan, s, table)
        kernel.rehash_known(s, known)
        self.state = s._replace(table=table, known=known)

    def snapshot(self) -> dict[str, Any]:
        """Everything `advance` depends on, as plain values."""
        s, m = self.state, self.state.meta
        used = s._replace(
            slots=s.slots[: m[kernel.SLOTS]], entries=s.entries[: m[kernel.ENTRIES]], nodes=s.nodes[: m[kernel.NODES]]
        )
        return {"watermark": self.watermark, "state": [a.data for a in used]}

    def restore(self, data: Mapping[str, Any]) -> None:
        """Continue from a snapshot."""
        self.watermark = data["watermark"]
        loaded = [np.frombuffer(raw, np.int64).copy() for raw in data["state"]]
        self.state = kernel.State(
            *(new.reshape(-1, *old.shape[1:]) for new, old in zip(loaded, self.state, strict=True))
        )


def _table(rows: Sequence[Sequence[int]], width: int) -> Ints:
    return np.array(rows, np.int64).reshape(-1, width)


def grown(pool: Ints, needed: int) -> Ints:
    """The pool, with room for `needed` rows."""
    if needed <= len(pool):
        return pool
    bigger = np.empty((max(needed, 2 * len(pool)), *pool.shape[1:]), np.int64)
    bigger[: len(pool)] = pool
    return bigger


def _hash_table(entries: int) -> Ints:
    return np.full(1 << (4 * entries + 15).bit_length(), -1, np.int64)


def _nullable(values: Ints) -> NDArray[Any]:
    null = values == NULL
    if not null.any():
        return values
    out = values.astype(object)
    out[null] = None
    return out


def as_ordered(values: NDArray[np.float64]) -> Ints:
    """Floats as integers of the same order; both zeros are one. `as_float` undoes it."""
    bits = (values + 0.0).view(np.int64)
    return np.asarray(bits ^ ((bits >> 63) & np.int64(0x7FFFFFFFFFFFFFFF)))


def as_float(ordered: Ints) -> NDArray[np.float64]:
    return np.asarray((ordered ^ ((ordered >> 63) & np.int64(0x7FFFFFFFFFFFFFFF))).view(np.float64))


def is_null(raw: NDArray[Any]) -> NDArray[np.bool_]:
    """Which values of a column are null: NaN in numbers, None in objects."""
    if raw.dtype == object:
        return np.array([v is None or v != v for v in raw], bool)
    return np.isnan(raw) if raw.dtype.kind == "f" else np.zeros(len(raw), bool)


def pack(data: Any) -> bytes:
    """Snapshot values as bytes."""
    return msgspec.msgpack.encode(data, enc_hook=lambda value: value.item())


def unpack(data: bytes) -> Any:
    return msgspec.msgpack.decode(data)
