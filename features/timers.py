"""Events made by time passing: a state that begins unless something happens first.

A rule says which events set a key's timer and which cancel it. At `due` the timer's row enters the view, at `until`
or when the key is cancelled or set again it is taken back, and leaves every total it had entered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.kernel import Ints, compiled, inlined
from features.windows import grown

KEY, DUE, UNTIL = "key", "due", "until"
SEQUENCE, START, END, INSIDE, TIMER_KEY, ROW = range(6)  # a timer
COUNTER, NOW, FREE, TIMERS, QUEUED = range(5)  # meta


@dataclass(frozen=True)
class TimerRule:
    """When a view's rows come and go.

    at : contract name -> vectorised function of its columns: `key`, `due` and `until` (epoch ms), and whatever columns
        of the row the contract does not have itself
    cancel : contract name -> the field that holds the key
    """

    at: Mapping[str, Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]]
    cancel: Mapping[str, str] = field(default_factory=dict)

    @property
    def events(self) -> tuple[str, ...]:
        """Names of the contracts it listens to."""
        return tuple(dict.fromkeys((*self.at, *self.cancel)))


class Operations(NamedTuple):
    """What events do to timers, in order: key codes, the instant it happens, and to set one its due, until and row;
    `due` -1 cancels."""

    keys: Ints
    applied: Ints
    due: Ints
    until: Ints
    rows: Ints


class Derived(NamedTuple):
    """Events that timers made: event time, the instant from which they count, +1 or -1 to take one back, rows."""

    times: Ints
    applied: Ints
    sign: Ints
    rows: Ints


class Timers:
    """The timers of one rule; `width` is how many integers a row has."""

    def __init__(self, rule: TimerRule, width: int) -> None:
        self.rule = rule
        self.pool = np.zeros((16, ROW + width), np.int64)
        self.heap = np.zeros((16, 3), np.int64)
        self.by_key = np.full(16, -1, np.int64)
        self.meta = np.array([0, 0, -1, 0, 0], np.int64)

    def run(self, operations: Operations, watermark: int, codes: int) -> Derived:
        """The events made up to `watermark`, in order; timers due at t fire after t's events.

        codes : how many key codes there are
        """
        n = len(operations.keys)
        self.pool = grown(self.pool, int(self.meta[TIMERS]) + n)
        self.heap = grown(self.heap, int(self.meta[QUEUED]) + 2 * n)
        if codes > len(self.by_key):
            more = np.full(2 * codes - len(self.by_key), -1, np.int64)
            self.by_key = np.concatenate([self.by_key, more])
        most = 2 * (n + int(self.meta[QUEUED]))
        times, applied, sign = (np.empty(most, np.int64) for _ in range(3))
        made = Derived(times, applied, sign, np.empty((most, self.pool.shape[1] - ROW), np.int64))
        count = _run(operations, watermark, self.pool, self.heap, self.by_key, self.meta, made)
        return Derived(*(part[:count] for part in made))

    def codes(self, columns: Sequence[int]) -> Ints:
        """Every code that the timers refer to: their keys, and these columns of their rows."""
        return self.pool[self._coded(columns)].ravel()

    def _coded(self, columns: Sequence[int]) -> tuple[Ints, Ints]:
        """Where live timers hold codes."""
        return self.by_key[self.by_key >= 0][:, None], np.array([TIMER_KEY, *(ROW + c for c in columns)], np.int64)

    def recode(self, translate: Callable[[Ints], Ints], columns: Sequence[int]) -> None:
        """Give every key, and these columns of the rows, other codes."""
        live, where = self.by_key[self.by_key >= 0], self._coded(columns)
        self.pool[where] = translate(self.pool[where])
        keys = self.pool[live, TIMER_KEY]
        self.by_key = np.full(2 * int(keys.max(initial=8)), -1, np.int64)
        self.by_key[keys] = live

    def snapshot(self) -> list[bytes]:
        used = self.pool[: self.meta[TIMERS]], self.heap[: self.meta[QUEUED]], self.by_key, self.meta
        return [part.tobytes() for part in used]

    def restore(self, data: Sequence[bytes]) -> None:
        pool, heap, self.by_key, self.meta = (np.frombuffer(raw, np.int64).copy() for raw in data)
        self.pool, self.heap = pool.reshape(-1, self.pool.shape[1]), heap.reshape(-1, 3)


@compiled
def _run(
    operations: Operations, watermark: int, pool: Ints, heap: Ints, by_key: Ints, meta: Ints, made: Derived
) -> int:
    n = 0
    for i in range(len(operations.keys)):
        key, now = operations.keys[i], operations.applied[i]
        n = _fire(now, pool, heap, by_key, meta, made, n)
        meta[NOW] = now
        if key < 0:
            continue
        n = _cancel(key, pool, by_key, meta, made, n)
        if operations.due[i] >= 0:
            _set(operations, i, pool, heap, by_key, meta)
    n = _fire(watermark, pool, heap, by_key, meta, made, n)
    meta[NOW] = max(meta[NOW], watermark)
    return n


@inlined
def _set(operations: Operations, i: int, pool: Ints, heap: Ints, by_key: Ints, meta: Ints) -> None:
    timer = meta[FREE]
    if timer >= 0:
        meta[FREE] = pool[timer, START]
    else:
        timer = meta[TIMERS]
        meta[TIMERS] += 1
    meta[COUNTER] += 1
    due = max(operations.due[i], meta[NOW])
    pool[timer, SEQUENCE], pool[timer, START], pool[timer, END] = meta[COUNTER], due, operations.until[i]
    pool[timer, INSIDE], pool[timer, TIMER_KEY] = 0, operations.keys[i]
    for j in range(operations.rows.shape[1]):
        pool[timer, ROW + j] = operations.rows[i, j]
    by_key[operations.keys[i]] = timer
    _put(heap, meta, due, meta[COUNTER], timer)


@inlined
def _cancel(key: int, pool: Ints, by_key: Ints, meta: Ints, made: Derived, n: int) -> int:
    """Drop the key's timer; a row that is already in the view is taken back now."""
    timer = by_key[key]
    if timer < 0:
        return n
    if pool[timer, INSIDE]:
        n = _make(made, n, pool[timer, START], meta[NOW], -1, pool[timer])
    _drop(timer, pool, by_key, meta)
    return n


@inlined
def _drop(timer: int, pool: Ints, by_key: Ints, meta: Ints) -> None:
    by_key[pool[timer, TIMER_KEY]] = -1
    pool[timer, SEQUENCE] = 0
    pool[timer, START] = meta[FREE]
    meta[FREE] = timer


@inlined
def _fire(before: int, pool: Ints, heap: Ints, by_key: Ints, meta: Ints, made: Derived, n: int) -> int:
    while meta[QUEUED] and heap[0, 0] < before:
        due, sequence, timer = heap[0, 0], heap[0, 1], heap[0, 2]
        _pop(heap, meta)
        if pool[timer, SEQUENCE] != sequence:
            continue
        if pool[timer, INSIDE]:
            n = _make(made, n, pool[timer, START], due, -1, pool[timer])
            _drop(timer, pool, by_key, meta)
        else:
            pool[timer, INSIDE] = 1
            n = _make(made, n, due, due, 1, pool[timer])
            _put(heap, meta, max(pool[timer, END], due + 1), sequence, timer)
    return n


@inlined
def _make(made: Derived, n: int, time: int, applied: int, sign: int, timer: Ints) -> int:
    made.times[n], made.applied[n], made.sign[n] = time, applied, sign
    for j in range(made.rows.shape[1]):
        made.rows[n, j] = timer[ROW + j]
    return n + 1


@inlined
def _before(heap: Ints, a: int, b: int) -> bool:
    return heap[a, 0] < heap[b, 0] or (heap[a, 0] == heap[b, 0] and heap[a, 1] < heap[b, 1])


@inlined
def _swap(heap: Ints, a: int, b: int) -> None:
    for j in range(3):
        heap[a, j], heap[b, j] = heap[b, j], heap[a, j]


@inlined
def _put(heap: Ints, meta: Ints, due: int, sequence: int, timer: int) -> None:
    """Enter into the binary heap by (due, sequence)."""
    at = meta[QUEUED]
    meta[QUEUED] += 1
    heap[at, 0], heap[at, 1], heap[at, 2] = due, sequence, timer
    while at and _before(heap, at, (at - 1) // 2):
        _swap(heap, at, (at - 1) // 2)
        at = (at - 1) // 2


@inlined
def _pop(heap: Ints, meta: Ints) -> None:
    """Drop the first of the heap."""
    meta[QUEUED] -= 1
    size, at = meta[QUEUED], 0
    _swap(heap, 0, size)
    while True:
        least = at
        for child in (2 * at + 1, 2 * at + 2):
            if child < size and _before(heap, child, least):
                least = child
        if least == at:
            return
        _swap(heap, at, least)
        at = least
