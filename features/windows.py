"""The window engine: event-time aggregations over sliding windows, compiled from Feast views.

The value at time t covers ``floor_h(t - W) <= event time < t``: W the window, h the slide, tiles aligned to the epoch
(the sawtooth window of Chronon and of Feast's tiling: an exact head, a tail that moves in steps of h). So an event
counts from the millisecond after its own until the tile boundary ``floor_h(event time) + h + W``. Both are signed
changes of a running integer total, which makes a batch one sort and one segmented cumulative sum, whatever W.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.errors import ConfigError

Ints = NDArray[np.int64]
Columns = dict[str, NDArray[Any]]
FUNCTIONS = ("count", "sum", "mean", "std", "last", "last_n")
NO_KEY: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Aggregate:
    """One aggregation of a view; window and slide in ms. `depth` is the n of last_n."""

    name: str
    column: str
    function: str
    window: int
    slide: int
    depth: int
    integer: bool

    @property
    def group(self) -> tuple[int, int]:
        return self.window, self.slide


@dataclass(slots=True)
class Batch:
    """Events of one view in processing order, in columns.

    times, applied : epoch ms; sign : +1, or -1 takes back an earlier event of the same time
    """

    keys: list[tuple[Any, ...]]
    times: Ints
    applied: Ints
    sign: Ints
    columns: Columns


@dataclass(slots=True)
class ViewRows:
    """Rows of one view ordered by (key, time); `last[i]` marks the newest row of its key."""

    keys: list[tuple[Any, ...]]
    times: Ints
    last: NDArray[np.bool_]
    columns: dict[str, list[Any]]


def compile_view(view: Any) -> tuple[Aggregate, ...]:
    """The aggregations of a Feast StreamFeatureView; raises ConfigError naming the one that can't be executed."""
    types = {f.name: str(f.dtype) for f in view.features}
    plan = []
    for a in view.aggregations:
        where = f"view {view.name}, aggregation {a.name!r}"
        window, slide = (round(d.total_seconds() * 1000) if d else 0 for d in (a.time_window, a.slide_interval))
        function, _, depth = a.function.partition("last_") if a.function.startswith("last_") else (a.function, "", "1")
        function = function or "last_n"
        if function not in FUNCTIONS or not depth.isdigit() or int(depth) < 1:
            raise ConfigError(f"{where}: function {a.function!r} is none of {', '.join(FUNCTIONS)}")
        if a.name not in types:
            raise ConfigError(f"{where}: the view's schema has no field of that name")
        if not 0 < slide < window or window % slide:
            raise ConfigError(f"{where}: slide_interval must be given, shorter than time_window and divide it")
        plan.append(Aggregate(a.name, a.column, function, window, slide, int(depth), "Int" in types[a.name]))
    if not plan:
        raise ConfigError(f"view {view.name} has no aggregations")
    return tuple(plan)


class ViewWindows:
    """The windows of one view: totals per key and group, and the events that still have to leave.

    Parameters
    ----------
    aggregates : the compiled aggregations
    decimals : digits kept of a float column; columns not named must hold whole numbers where they are summed
    """

    def __init__(self, aggregates: Sequence[Aggregate], decimals: Mapping[str, int] | None = None) -> None:
        self.aggregates = aggregates
        self.groups = sorted({a.group for a in aggregates})
        self.windows = np.array([w for w, _ in self.groups], np.int64)
        self.slides = np.array([h for _, h in self.groups], np.int64)
        self.summed = sorted({a.column for a in aggregates if a.function in ("sum", "mean", "std")})
        self.squared = sorted({a.column for a in aggregates if a.function == "std"})
        self.counted = sorted({a.column for a in aggregates})
        self.listed = {
            c: max(a.depth for a in aggregates if a.column == c and a.function.startswith("last"))
            for c in sorted({a.column for a in aggregates if a.function.startswith("last")})
        }
        names = [*((c, 0) for c in self.counted), *((c, 1) for c in self.summed), *((c, 2) for c in self.squared)]
        self.terms = {name: i for i, name in enumerate(names)}
        self.scale = {c: 10 ** (decimals or {}).get(c, 0) for c in self.summed}
        self.slots: dict[tuple[Any, ...], int] = {}
        self.keys: list[tuple[Any, ...]] = []
        self.free: list[int] = []
        self.live = np.zeros(0, np.int64)
        self.totals = np.zeros((0, len(self.groups), len(self.terms)), np.int64)
        self.log_times = np.zeros(0, np.int64)
        self.log_slots = np.zeros(0, np.int64)
        self.log_values = np.zeros((0, len(self.terms)), np.int64)
        self.history: dict[str, dict[int, list[tuple[int, int, Any]]]] = {c: {} for c in self.listed}
        self.watermark = 0
        self.sequence = 0

    def expiry(self, times: Ints) -> Ints:
        """The instant at which each event leaves each group: [events, groups]."""
        t = times[:, None]
        return np.asarray(t - t % self.slides + self.slides + self.windows)

    def advance(self, batch: Batch | None, watermark: int) -> ViewRows | None:
        """Apply events with `applied` < watermark and move every tail up to it; None when no row changed."""
        start, self.watermark = self.watermark, watermark
        if batch is None or not len(batch.keys):
            nothing = np.zeros(0, np.int64)
            batch = Batch([], nothing, nothing, nothing, {})
        slots = self._slots(batch.keys)
        values = self._values(batch)
        entries = self._entries(batch, slots, values, start)
        self._append(batch.times, slots, values)
        rows = self._rows(*entries, batch, slots) if len(entries[0]) else None
        self._trim(watermark)
        return rows

    def _slots(self, keys: list[tuple[Any, ...]]) -> Ints:
        out = np.empty(len(keys), np.int64)
        for i, key in enumerate(keys):
            slot = self.slots.get(key)
            if slot is None:
                slot = self.free.pop() if self.free else self._grow()
                self.slots[key], self.keys[slot] = slot, key
            out[i] = slot
        return out

    def _grow(self) -> int:
        slot = len(self.keys)
        self.keys.append(NO_KEY)
        if slot == len(self.live):
            more = max(64, slot)
            self.live = np.concatenate([self.live, np.zeros(more, np.int64)])
            self.totals = np.concatenate([self.totals, np.zeros((more, *self.totals.shape[1:]), np.int64)])
        return slot

    def _values(self, batch: Batch) -> Ints:
        """What each event adds to the totals: [events, terms], integers, signed."""
        out = np.zeros((len(batch.keys), len(self.terms)), np.int64)
        if not len(out):
            return out
        for (column, power), i in self.terms.items():
            raw = batch.columns[column]
            valid = ~is_null(raw)
            if power == 0:
                out[:, i] = valid
                continue
            scaled = np.where(valid, raw, 0).astype(np.float64) * self.scale[column]
            whole = np.rint(scaled)
            if self.scale[column] == 1 and not np.array_equal(whole, scaled):
                raise ConfigError(f"column {column!r} is summed but not whole: give its contract field `decimals`")
            out[:, i] = whole.astype(np.int64) ** power
        return np.asarray(out * batch.sign[:, None])

    def _entries(self, batch: Batch, slots: Ints, values: Ints, start: int) -> tuple[Ints, Ints, Ints, Ints]:
        """Signed changes as (slot, instant, group, values): events that come and events that leave."""
        out_slot, out_time, out_group, out_values = [], [], [], []
        comes = batch.applied + 1
        expiry = self.expiry(batch.times)
        for g, (window, slide) in enumerate(self.groups):
            low, high = (t - t % slide - window for t in (start, self.watermark))
            old = slice(*np.searchsorted(self.log_times, (low, high)))
            counts = expiry[:, g] > comes
            leaves = counts & (expiry[:, g] <= self.watermark)
            out_slot += [self.log_slots[old], slots[counts], slots[leaves]]
            log_times = self.log_times[old]
            out_time += [log_times - log_times % slide + slide + window, comes[counts], expiry[leaves, g]]
            out_values += [-self.log_values[old], values[counts], -values[leaves]]
            out_group.append(np.full(len(log_times) + counts.sum() + leaves.sum(), g, np.int64))
        parts = (np.concatenate(p) for p in (out_slot, out_time, out_group))
        return *parts, np.concatenate(out_values)  # type: ignore[return-value]

    def _append(self, times: Ints, slots: Ints, values: Ints) -> None:
        if not len(times):
            return
        np.add.at(self.live, slots, 1)
        late = len(self.log_times) and times.min() < self.log_times[-1]
        self.log_times = np.concatenate([self.log_times, times])
        self.log_slots = np.concatenate([self.log_slots, slots])
        self.log_values = np.concatenate([self.log_values, values])
        if late or np.any(np.diff(times) < 0):
            order = np.argsort(self.log_times, kind="stable")
            self.log_times, self.log_slots = self.log_times[order], self.log_slots[order]
            self.log_values = self.log_values[order]

    def _rows(self, slot: Ints, time: Ints, group: Ints, values: Ints, batch: Batch, batch_slots: Ints) -> ViewRows:
        order = np.lexsort((time, slot))
        slot, time = slot[order], time[order]
        starts = np.flatnonzero(np.r_[True, (np.diff(slot) != 0) | (np.diff(time) != 0)])
        change = np.zeros((len(slot), len(self.groups), len(self.terms)), np.int64)
        change[np.arange(len(slot)), group[order]] = values[order]
        totals = np.add.reduceat(change, starts, axis=0)
        slot, time = slot[starts], time[starts]
        first = np.r_[True, np.diff(slot) != 0]
        last = np.r_[first[1:], True]
        np.cumsum(totals, axis=0, out=totals)
        head = np.flatnonzero(first)
        before = np.where((head > 0)[:, None, None], totals[head - 1], 0)
        totals += (self.totals[slot[head]] - before)[np.cumsum(first) - 1]
        self.totals[slot[last]] = totals[last]
        lists = self._lists(slot, time, batch, batch_slots)
        columns = {a.name: lists[a.name] if a.name in lists else self._column(a, totals) for a in self.aggregates}
        return ViewRows([self.keys[s] for s in slot.tolist()], time, last, columns)

    def _column(self, a: Aggregate, totals: Ints) -> list[Any]:
        out: list[Any]
        g = self.groups.index(a.group)
        count = totals[:, g, self.terms[a.column, 0]]
        if a.function == "count":
            out = count.tolist()
            return out
        scale = self.scale[a.column]
        total = totals[:, g, self.terms[a.column, 1]]
        if a.function == "sum":
            out = (total // scale if a.integer else total / scale).tolist()
            return out
        n = np.maximum(count, 1)
        if a.function == "mean":
            return _nulled(total / n / scale, count < 1)
        squares = totals[:, g, self.terms[a.column, 2]]
        variance = (squares - total / n * total) / np.maximum(count - 1, 1)
        return _nulled(np.sqrt(np.maximum(variance, 0)) / scale, count < 2)

    def _lists(self, slot: Ints, time: Ints, batch: Batch, batch_slots: Ints) -> dict[str, list[Any]]:
        """The `last` and `last_n` values of each row; their cost follows n, not the window."""
        out: dict[str, list[Any]] = {}
        slots, times = slot.tolist(), time.tolist()
        for column, depth in self.listed.items():
            news = self._news(column, batch, batch_slots)
            reading = [a for a in self.aggregates if a.column == column and a.function.startswith("last")]
            values: dict[str, list[Any]] = {a.name: [] for a in reading}
            oldest = max(a.window + a.slide for a in reading)
            history = self.history[column]
            for s, rows in groupby(range(len(slots)), key=slots.__getitem__):
                seen, pending, at = history.pop(s, []), news.get(s, []), 0
                for row in rows:
                    t = times[row]
                    while at < len(pending) and pending[at][0] <= t:
                        bisect.insort(seen, pending[at][1:])
                        at += 1
                    del seen[: max(len(seen) - depth, bisect.bisect_left(seen, (t - oldest,)))]
                    for a in reading:
                        values[a.name].append(_newest(a, seen, t))
                if seen:
                    history[s] = seen
            out |= values
        return out

    def _news(self, column: str, batch: Batch, slots: Ints) -> dict[int, list[tuple[int, int, int, Any]]]:
        news: dict[int, list[tuple[int, int, int, Any]]] = {}
        if not len(batch.keys):
            return news
        raw = batch.columns[column]
        for i in np.flatnonzero(~is_null(raw)).tolist():
            item = (int(batch.applied[i]) + 1, int(batch.times[i]), self.sequence + i, raw[i])
            news.setdefault(int(slots[i]), []).append(item)
        self.sequence += len(raw)
        return news

    def _trim(self, watermark: int) -> None:
        """Forget events that have left every group, and keys without events."""
        gone = int(np.searchsorted(self.log_times, (watermark - watermark % self.slides - self.windows).min()))
        if not gone:
            return
        slots = self.log_slots[:gone]
        np.add.at(self.live, slots, -1)
        self.log_times, self.log_slots = self.log_times[gone:], self.log_slots[gone:]
        self.log_values = self.log_values[gone:]
        for slot in np.unique(slots[self.live[slots] == 0]).tolist():
            del self.slots[self.keys[slot]]
            self.keys[slot] = NO_KEY
            self.free.append(slot)
            for history in self.history.values():
                history.pop(slot, None)

    def snapshot(self) -> dict[str, Any]:
        """Everything `advance` depends on, as plain values."""
        return {
            "watermark": self.watermark,
            "sequence": self.sequence,
            "keys": [list(k) for k in self.keys],
            "free": self.free,
            "live": self.live.tobytes(),
            "totals": self.totals.tobytes(),
            "log": [self.log_times.tobytes(), self.log_slots.tobytes(), self.log_values.tobytes()],
            "history": {c: [[s, h] for s, h in by_slot.items()] for c, by_slot in self.history.items()},
        }

    def restore(self, data: Mapping[str, Any]) -> None:
        """Continue from a snapshot."""
        self.watermark, self.sequence, self.free = data["watermark"], data["sequence"], list(data["free"])
        self.keys = [tuple(k) for k in data["keys"]]
        freed = set(self.free)
        self.slots = {k: i for i, k in enumerate(self.keys) if i not in freed}
        self.live = _ints(data["live"])
        self.totals = _ints(data["totals"]).reshape(-1, len(self.groups), len(self.terms))
        self.log_times, self.log_slots = _ints(data["log"][0]), _ints(data["log"][1])
        self.log_values = _ints(data["log"][2]).reshape(-1, len(self.terms))
        self.history = {c: {s: [tuple(i) for i in h] for s, h in pairs} for c, pairs in data["history"].items()}


def is_null(raw: NDArray[Any]) -> NDArray[np.bool_]:
    """Which values of a column are null: NaN in numbers, None in objects."""
    if raw.dtype == object:
        return np.array([v is None or v != v for v in raw], bool)
    return np.isnan(raw) if raw.dtype.kind == "f" else np.zeros(len(raw), bool)


def _newest(a: Aggregate, seen: Sequence[tuple[int, int, Any]], t: int) -> Any:
    since = (t - a.window) - (t - a.window) % a.slide
    inside = [_plain(v, a.integer) for time, _, v in seen[-a.depth :] if time >= since]
    if a.function == "last_n":
        return inside
    return inside[-1] if inside else None


def _plain(value: Any, integer: bool) -> Any:
    if isinstance(value, str):
        return value
    return int(value) if integer else float(value)


def _nulled(values: NDArray[np.float64], null: NDArray[np.bool_]) -> list[Any]:
    out: list[Any] = values.tolist()
    for i in np.flatnonzero(null).tolist():
        out[i] = None
    return out


def _ints(data: bytes) -> Ints:
    return np.frombuffer(data, np.int64).copy()


def pack(data: Any) -> bytes:
    """Snapshot values as bytes."""
    return msgspec.msgpack.encode(data, enc_hook=lambda value: value.item())


def unpack(data: bytes) -> Any:
    return msgspec.msgpack.decode(data)
