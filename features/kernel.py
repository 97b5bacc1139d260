"""The inner loop of the window engine: the events and the moving tails of one view, in time order.

Plain Python on int64 arrays, compiled by numba; `advance.py_func` is the same function uncompiled, and equal bit for
bit. Every event costs one step per window, whatever the window's length:

- a *slot* per key holds its totals, one *entry* per key, window and non-empty tile holds what the tile contributed;
  a ring of tiles per window lists the entries that leave together when their tile leaves the window;
- minimum and maximum are monotonic queues of tiles (Lemire 2006, "Streaming maximum-minimum filter"), a distinct
  value is a node that remembers the newest tile it was seen in, `last` keeps the newest n values by event time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

Ints = NDArray[np.int64]
NULL = -(2**63)
NEVER = 2**63 - 1
COUNT, SUM, MEAN, STD, LAST, LAST_N, MIN, MAX = range(8)  # count_distinct reads a counter, like COUNT
VALID, VALUE, SQUARE_HIGH, SQUARE_LOW, DISTINCT = range(5)  # what a term adds up
INTEGER, FLOAT, TEXT = range(3)  # what a column holds, and what a feature is
LIVE, MARK, ROW, CALL, KEYS = range(5)  # a slot: entries alive, last instant touched, last row and its call, key codes
SLOT, NEXT, VALUES = range(3)  # an entry
STAMP, CALLS, FREE_SLOT, SLOTS, FREE_ENTRY, ENTRIES, FREE_NODE, NODES, TABLED, KNOWN, GROUPS = range(11)  # meta
HALF = 20  # bits: a square is kept in two words, so that it is exact
LOW = (1 << HALF) - 1
OPTIONS: Any = {"cache": True, "error_model": "numpy", "_nrt": False}
Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compiled once and kept on disk. Without numba's reference counts, which cost more than the work itself: so the
    function may not allocate."""
    return cast(Function, njit(**OPTIONS)(function))


def inlined(function: Function) -> Function:
    """Compiled into its caller: passing the state's arrays on costs more than most of these functions."""
    return cast(Function, njit(**OPTIONS, inline="always")(function))


class Plan(NamedTuple):
    """What to compute; offsets are places in a slot.

    groups : [G, 4] window, slide, first place in the ring, ring size less one (a power of two)
    terms : [T, 2] column, what to add up
    extremes : [M, 2] column, 1 for min and -1 for max
    distinct : [D, 2] column, its counter among the terms
    listed : [L, 3] column, depth, offset of its length, times and values
    features : [F, 5] function, group, term or extreme or listed, column kind, feature kind
    scales : [F] what a summed column was multiplied by
    """

    groups: Ints
    terms: Ints
    extremes: Ints
    distinct: Ints
    listed: Ints
    features: Ints
    scales: NDArray[np.float64]
    keys: int
    open_at: int
    totals_at: int
    queues_at: int


class State(NamedTuple):
    """Everything `advance` depends on besides its input; arrays grow before a call, never in it."""

    slots: Ints
    entries: Ints
    nodes: Ints
    ring: Ints
    marks: Ints
    table: Ints
    known: Ints
    meta: Ints


class Input(NamedTuple):
    """Events in the order they count: key codes [n, K] (-1: null), the instant from which each counts, event time,
    sign, and columns [C, n] with NULL for null."""

    codes: Ints
    come: Ints
    times: Ints
    sign: Ints
    columns: Ints


class Output(NamedTuple):
    """Rows in time order: slot, key codes [R, K], time, whether it is its key's newest, features [F, R] as integers and
    the same memory as floats, lists [R, depths]; and room to note the slots of one instant, those of the events if they
    have one, and the terms of one event.
    """

    slots: Ints
    codes: Ints
    times: Ints
    newest: NDArray[np.bool_]
    integers: Ints
    floats: NDArray[np.float64]
    lists: Ints
    touched: Ints
    found: Ints
    terms: Ints


@compiled
def advance(plan: Plan, state: State, events: Input, watermark: int, out: Output) -> int:
    """Apply the events and move every tail up to `watermark`; returns how many rows were written."""
    meta, n, groups = state.meta, len(events.come), len(plan.groups)
    i = rows = 0
    meta[CALLS] += 1
    for j in range(n):  # at once, so that the memory's answers overlap
        out.found[j] = _find(plan, state, events.codes[j])
    while True:
        t = NEVER
        for g in range(groups):
            t = min(t, meta[GROUPS + 2 * g])
        if i < n:
            t = min(t, events.come[i])
        if t > watermark:
            break
        meta[STAMP] += 1
        touched = 0
        for g in range(groups):
            if meta[GROUPS + 2 * g] == t:
                touched = _expire(plan, state, g, out.touched, touched)
        while i < n and events.come[i] == t:
            touched = _apply(plan, state, events, i, out, touched)
            i += 1
        for j in range(touched):
            slot = out.touched[j]
            _emit(plan, state.slots[slot], t, rows, out, state.nodes)
            if state.slots[slot, CALL] == meta[CALLS]:
                out.newest[state.slots[slot, ROW]] = False
            out.slots[rows], out.newest[rows] = slot, True
            state.slots[slot, ROW], state.slots[slot, CALL] = rows, meta[CALLS]
            rows += 1
    for row in range(rows):
        if out.newest[row] and state.slots[out.slots[row], LIVE] == 0:
            _free_slot(plan, state, out.slots[row])
    return rows


@compiled
def current(plan: Plan, state: State, watermark: int, out: Output) -> int:
    """The row of every key as of the watermark; returns how many."""
    rows = 0
    for slot in range(state.meta[SLOTS]):
        if state.slots[slot, LIVE] > 0:
            _emit(plan, state.slots[slot], watermark, rows, out, state.nodes)
            out.newest[rows] = True
            rows += 1
    return rows


@inlined
def _touch(state: State, slot: int, touched: Ints, n: int) -> int:
    if state.slots[slot, MARK] == state.meta[STAMP]:
        return n
    state.slots[slot, MARK] = state.meta[STAMP]
    touched[n] = slot
    return n + 1


@inlined
def _expire(plan: Plan, state: State, g: int, touched: Ints, n: int) -> int:
    """Let the oldest tile of a window leave it."""
    slots, entries, meta = state.slots, state.entries, state.meta
    window, slide, first, mask = plan.groups[g, 0], plan.groups[g, 1], plan.groups[g, 2], plan.groups[g, 3]
    tile = (meta[GROUPS + 2 * g] - window) // slide - 1
    place = first + (tile & mask)
    terms, extremes = len(plan.terms), len(plan.extremes)
    totals, opened = plan.totals_at + g * terms, plan.open_at + 2 * g
    _forget_values(plan, state, g, tile, place)
    e = state.ring[place]
    state.ring[place] = -1
    while e >= 0:
        slot = entries[e, SLOT]
        for j in range(terms):
            slots[slot, totals + j] -= entries[e, VALUES + j]
        if slots[slot, opened + 1] == e:
            slots[slot, opened] = slots[slot, opened + 1] = -1
        for m in range(extremes):
            _pop_front(slots[slot], plan.queues_at + 2 * (g * extremes + m), tile, state)
        slots[slot, LIVE] -= 1
        n = _touch(state, slot, touched, n)
        after = entries[e, NEXT]
        entries[e, NEXT] = meta[FREE_ENTRY]
        meta[FREE_ENTRY] = e
        meta[GROUPS + 2 * g + 1] -= 1
        e = after
    meta[GROUPS + 2 * g] = NEVER
    if meta[GROUPS + 2 * g + 1]:
        while state.ring[first + ((tile + 1) & mask)] < 0:
            tile += 1
        meta[GROUPS + 2 * g] = (tile + 2) * slide + window
    return n


@inlined
def _apply(plan: Plan, state: State, events: Input, i: int, out: Output, n: int) -> int:
    """Let one event count in every window that still covers it."""
    for k in range(plan.keys):
        if events.codes[i, k] < 0:
            return n
    slot, time, come = -1, events.times[i], events.come[i]
    terms = len(plan.terms)
    for j in range(terms):
        out.terms[j] = events.sign[i] * _term(events.columns[plan.terms[j, 0], i], plan.terms[j, 1])
    for g in range(len(plan.groups)):
        tile = _tile(time, plan.groups[g, 1])
        leaves = (tile + 1) * plan.groups[g, 1] + plan.groups[g, 0]
        if leaves <= come:
            continue
        if slot < 0:
            slot = out.found[i]
            if slot < 0:
                slot = _slot_of(plan, state, events.codes[i])
        place = plan.groups[g, 2] + (tile & plan.groups[g, 3])
        e = _entry(plan, state, slot, g, tile, place)
        state.meta[GROUPS + 2 * g] = min(state.meta[GROUPS + 2 * g], leaves)
        totals = plan.totals_at + g * terms
        for j in range(terms):
            state.entries[e, VALUES + j] += out.terms[j]
            state.slots[slot, totals + j] += out.terms[j]
        for m in range(len(plan.extremes)):
            value = events.columns[plan.extremes[m, 0], i]
            if value != NULL:
                at = plan.queues_at + 2 * (g * len(plan.extremes) + m)
                _push(state.slots[slot], at, tile, value * plan.extremes[m, 1], state)
        for d in range(len(plan.distinct)):
            value = events.columns[plan.distinct[d, 0], i]
            if value != NULL and _meet(state, slot, g * len(plan.distinct) + d, value, tile, place):
                state.slots[slot, plan.totals_at + g * len(plan.terms) + plan.distinct[d, 1]] += 1
    if slot < 0:
        return n
    for j in range(len(plan.listed)):
        value = events.columns[plan.listed[j, 0], i]
        if value != NULL:
            _list(state.slots[slot], plan.listed[j, 2], plan.listed[j, 1], time, value)
    return _touch(state, slot, out.touched, n)


@inlined
def _term(value: int, kind: int) -> int:
    """What a value adds to a term."""
    if value == NULL or kind == DISTINCT:
        return 0
    if kind == VALID:
        return 1
    if kind == VALUE:
        return value
    high, low = value >> HALF, value & LOW
    cross = 2 * high * low
    return high * high + (cross >> HALF) if kind == SQUARE_HIGH else ((cross & LOW) << HALF) + low * low


@inlined
def _tile(time: int, slide: int) -> int:
    """Floor division of times below 2**53 ms, which floats do exactly, and faster."""
    return np.int64(time / slide)  # type: ignore[return-value]  # an int to numba


@inlined
def _entry(plan: Plan, state: State, slot: int, g: int, tile: int, place: int) -> int:
    """The entry of (key, window, tile). A late event may get one of its own beside it: they leave together."""
    opened = plan.open_at + 2 * g
    if state.slots[slot, opened] == tile:
        return state.slots[slot, opened + 1]
    e = _take(state.entries, state.meta, FREE_ENTRY, ENTRIES, NEXT)
    for j in range(len(plan.terms)):
        state.entries[e, VALUES + j] = 0
    state.entries[e, SLOT] = slot
    state.entries[e, NEXT] = state.ring[place]
    state.ring[place] = e
    state.slots[slot, LIVE] += 1
    state.meta[GROUPS + 2 * g + 1] += 1
    if tile > state.slots[slot, opened]:
        state.slots[slot, opened] = tile
        state.slots[slot, opened + 1] = e
    return e


@inlined
def _take(pool: Ints, meta: Ints, free: int, top: int, link: int) -> int:
    """A free row of a pool."""
    row = meta[free]
    if row >= 0:
        meta[free] = pool[row, link]
    else:
        row = meta[top]
        meta[top] += 1
    return row


@inlined
def _hash(hashed: int, value: int) -> int:
    """Mix a value in; never negative, no overflow."""
    hashed = ((hashed ^ value ^ (value >> 31)) & 0x7FFFFFFF) * 0x9E3779B1
    return hashed ^ (hashed >> 29)


@inlined
def _place(plan: Plan, table: Ints, keys: Ints) -> int:
    """Where the probe for a key begins."""
    hashed = 0
    for k in range(plan.keys):
        hashed = _hash(hashed, keys[k])
    return hashed & (len(table) - 1)


@inlined
def _find(plan: Plan, state: State, codes: Ints) -> int:
    """The slot of a key, -1 if it has none."""
    place = _place(plan, state.table, codes)
    while state.table[place] != -1:
        slot = state.table[place]
        same = slot >= 0
        for k in range(plan.keys):
            same = same and state.slots[slot, KEYS + k] == codes[k]
        if same:
            return slot
        place = (place + 1) & (len(state.table) - 1)
    return -1


@inlined
def _slot_of(plan: Plan, state: State, codes: Ints) -> int:
    """The slot of a key, a new one if it has none."""
    slot = _find(plan, state, codes)
    if slot >= 0:
        return slot
    slot = _take(state.slots, state.meta, FREE_SLOT, SLOTS, ROW)
    state.slots[slot] = 0
    state.slots[slot, plan.open_at : plan.totals_at] = -1
    state.slots[slot, plan.queues_at : plan.queues_at + 2 * len(plan.groups) * len(plan.extremes)] = -1
    for k in range(plan.keys):
        state.slots[slot, KEYS + k] = codes[k]
    place = _place(plan, state.table, codes)
    while state.table[place] >= 0:
        place = (place + 1) & (len(state.table) - 1)
    state.meta[TABLED] += state.table[place] == -1
    state.table[place] = slot
    return slot


@inlined
def _free_slot(plan: Plan, state: State, slot: int) -> None:
    """Forget a key whose windows are all empty; its codes stay readable until the next call."""
    place = _place(plan, state.table, state.slots[slot, KEYS:])
    while state.table[place] != slot:
        place = (place + 1) & (len(state.table) - 1)
    state.table[place] = -2
    state.slots[slot, LIVE] = -1
    state.slots[slot, ROW] = state.meta[FREE_SLOT]
    state.meta[FREE_SLOT] = slot


@inlined
def _list(slot: Ints, at: int, depth: int, time: int, value: int) -> None:
    """Keep the newest values by event time; of equal times the later in the log is newer."""
    n, times, values = slot[at], at + 1, at + 1 + depth
    j = n
    while j > 0 and slot[times + j - 1] > time:
        j -= 1
    if n < depth:
        for k in range(n, j, -1):
            slot[times + k], slot[values + k] = slot[times + k - 1], slot[values + k - 1]
        slot[at] = n + 1
    elif j == 0:
        return
    else:
        j -= 1
        for k in range(j):
            slot[times + k], slot[values + k] = slot[times + k + 1], slot[values + k + 1]
    slot[times + j], slot[values + j] = time, value


@inlined
def _push(slot: Ints, at: int, tile: int, value: int, state: State) -> None:
    """Enter a value into a queue of (tile, value), both rising from front to back: the front is the minimum."""
    nodes = state.nodes
    after, before = -1, slot[at + 1]
    while before >= 0 and nodes[before, 0] > tile:
        after, before = before, nodes[before, 2]
    if after >= 0 and nodes[after, 1] <= value:
        return
    if before >= 0 and nodes[before, 0] == tile and nodes[before, 1] <= value:
        return
    while before >= 0 and nodes[before, 1] >= value:
        gone, before = before, nodes[before, 2]
        _free_node(state, gone)
    node = _take(nodes, state.meta, FREE_NODE, NODES, 0)
    nodes[node, 0], nodes[node, 1], nodes[node, 2], nodes[node, 3] = tile, value, before, after
    if before >= 0:
        nodes[before, 3] = node
    else:
        slot[at] = node
    if after >= 0:
        nodes[after, 2] = node
    else:
        slot[at + 1] = node


@inlined
def _pop_front(slot: Ints, at: int, tile: int, state: State) -> None:
    """Drop what a queue holds of tiles up to `tile`."""
    while slot[at] >= 0 and state.nodes[slot[at], 0] <= tile:
        gone = slot[at]
        slot[at] = state.nodes[gone, 3]
        if slot[at] >= 0:
            state.nodes[slot[at], 2] = -1
        else:
            slot[at + 1] = -1
        _free_node(state, gone)


@inlined
def _free_node(state: State, node: int) -> None:
    state.nodes[node, 0] = state.meta[FREE_NODE]
    state.meta[FREE_NODE] = node


@inlined
def _place_of(state: State, slot: int, which: int, value: int) -> int:
    """Where a distinct value's node is in the hash table, or the end of its probe."""
    place = _hash(_hash(_hash(0, slot), which), value) & (len(state.known) - 1)
    while state.known[place] != -1:
        node = state.known[place]
        if node >= 0 and (
            state.nodes[node, 0] == slot and state.nodes[node, 1] == which and state.nodes[node, 2] == value
        ):
            return place
        place = (place + 1) & (len(state.known) - 1)
    return place


@inlined
def _meet(state: State, slot: int, which: int, value: int, tile: int, bucket: int) -> bool:
    """Note that a value was seen in a tile; whether it is new to the window."""
    nodes = state.nodes
    place = _place_of(state, slot, which, value)
    node = state.known[place]
    new = node < 0
    if new:
        node = _take(nodes, state.meta, FREE_NODE, NODES, 0)
        nodes[node, 0], nodes[node, 1], nodes[node, 2], nodes[node, 3] = slot, which, value, -1
        state.known[place] = node
        state.meta[KNOWN] += 1
    if tile > nodes[node, 3]:
        nodes[node, 3] = tile
        mark = _take(nodes, state.meta, FREE_NODE, NODES, 0)
        nodes[mark, 1], nodes[mark, 2] = node, state.marks[bucket]
        state.marks[bucket] = mark
    return new


@inlined
def _forget_values(plan: Plan, state: State, g: int, tile: int, place: int) -> None:
    """Distinct values whose newest tile leaves are gone from the window."""
    nodes = state.nodes
    distinct = len(plan.distinct)
    mark = state.marks[place]
    state.marks[place] = -1
    while mark >= 0:
        node, after = nodes[mark, 1], nodes[mark, 2]
        _free_node(state, mark)
        if nodes[node, 3] == tile:
            slot, which = nodes[node, 0], nodes[node, 1]
            state.known[_place_of(state, slot, which, nodes[node, 2])] = -2
            counter = plan.distinct[which - g * distinct, 1]
            state.slots[slot, plan.totals_at + g * len(plan.terms) + counter] -= 1
            _free_node(state, node)
        mark = after


@inlined
def _emit(plan: Plan, slot: Ints, t: int, row: int, out: Output, nodes: Ints) -> None:
    """Write one row of features."""
    out.times[row] = t
    for k in range(plan.keys):
        out.codes[row, k] = slot[KEYS + k]
    terms, extremes = len(plan.terms), len(plan.extremes)
    filled = 0
    for f in range(len(plan.features)):
        function, g, which = plan.features[f, 0], plan.features[f, 1], plan.features[f, 2]
        held, wanted = plan.features[f, 3], plan.features[f, 4]
        at = plan.totals_at + g * terms + which
        if function == COUNT:
            out.integers[f, row] = slot[at]
        elif function == SUM:
            if wanted == INTEGER:
                out.integers[f, row] = slot[at] // np.int64(plan.scales[f])
            else:
                out.floats[f, row] = slot[at] / plan.scales[f]
        elif function == MEAN:
            n = slot[at]
            out.floats[f, row] = slot[at + 1] / (n * plan.scales[f]) if n else np.nan
        elif function == STD:
            out.floats[f, row] = _std(slot[at], slot[at + 1], slot[at + 2], slot[at + 3], plan.scales[f])
        elif function <= LAST_N:
            depth, place = plan.listed[which, 1], plan.listed[which, 2]
            since = _tile(t - plan.groups[g, 0], plan.groups[g, 1]) * plan.groups[g, 1]
            n = slot[place]
            if function == LAST:
                found = n > 0 and slot[place + n] >= since
                _value(slot[place + depth + n] if found else NULL, held, wanted, row, f, out)
                continue
            longest = np.int64(plan.scales[f])
            start = max(0, n - longest)
            while start < n and slot[place + 1 + start] < since:
                start += 1
            for j in range(start, n):
                out.lists[row, filled + j - start] = slot[place + 1 + depth + j]
            out.integers[f, row] = n - start
            filled += longest
        else:
            front = slot[plan.queues_at + 2 * (g * extremes + which)]
            value = nodes[front, 1] * plan.extremes[which, 1] if front >= 0 else NULL
            _value(value, held, wanted, row, f, out)


@inlined
def _std(n: int, total: int, high: int, low: int, scale: float) -> float:
    if n < 2:
        return np.nan
    squares = np.float64(high) * 2.0 ** (2 * HALF) + low
    return float(np.sqrt(max((squares - total / n * total) / (n - 1), 0.0)) / scale)


@inlined
def _value(value: int, held: int, wanted: int, row: int, f: int, out: Output) -> None:
    """A single value as the feature's type; floats are held as integers of the same order."""
    if held == FLOAT and value != NULL:
        out.integers[f, row] = value ^ ((value >> 63) & 0x7FFFFFFFFFFFFFFF)
        if wanted == INTEGER:
            out.integers[f, row] = np.int64(out.floats[f, row])
    elif held == INTEGER and wanted == FLOAT:
        out.floats[f, row] = np.nan if value == NULL else value
    elif wanted == FLOAT:
        out.floats[f, row] = np.nan
    else:
        out.integers[f, row] = value


@compiled
def rehash(plan: Plan, state: State, table: Ints) -> None:
    """Enter every slot in use into a new, empty table."""
    state.meta[TABLED] = 0
    for slot in range(state.meta[SLOTS]):
        if state.slots[slot, LIVE] < 0:
            continue
        place = _place(plan, table, state.slots[slot, KEYS:])
        while table[place] != -1:
            place = (place + 1) & (len(table) - 1)
        table[place] = slot
        state.meta[TABLED] += 1


@compiled
def rehash_known(state: State, known: Ints) -> None:
    """Enter every distinct value into a new, empty table."""
    state.meta[KNOWN] = 0
    for old in state.known:
        if old < 0:
            continue
        n = state.nodes[old]
        place = _hash(_hash(_hash(0, n[0]), n[1]), n[2]) & (len(known) - 1)
        while known[place] != -1:
            place = (place + 1) & (len(known) - 1)
        known[place] = old
        state.meta[KNOWN] += 1


@inlined
def _integer_place(table: Ints, value: int) -> int:
    """Where an integer is in a table of integers and codes [n, 2], or would be; free places have the code -1."""
    place = _hash(0, value) & (len(table) - 1)
    while table[place, 1] >= 0 and table[place, 0] != value:
        place = (place + 1) & (len(table) - 1)
    return place


@compiled
def look_up(table: Ints, values: Ints, codes: Ints) -> None:
    """The codes of integers, -1 of those that the table doesn't have."""
    for i in range(len(values)):
        codes[i] = table[_integer_place(table, values[i]), 1]


@compiled
def enter(table: Ints, values: Ints, codes: Ints) -> None:
    """Enter integers and their codes."""
    for i in range(len(values)):
        place = _integer_place(table, values[i])
        table[place, 0], table[place, 1] = values[i], codes[i]
