"""Events made by time passing: a state that begins unless something happens first.

A rule sees events in order and sets timers: `at(due, key, row)` puts `row` into the view at `due`, `cancel(key)`
stops that, or takes the row back when it is already there. A row taken back leaves every total it entered.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Row = dict[str, Any]


@dataclass(frozen=True)
class TimerRule:
    """events : names of the contracts it listens to; on_event : (event name, struct, timers) -> None, pure."""

    events: tuple[str, ...]
    on_event: Callable[[str, Any, Timers], None]


class Derived(NamedTuple):
    """An event a timer made: counts from `applied`, has event time `time`; sign -1 takes it back."""

    time: int
    applied: int
    sign: int
    row: Row


class Timers:
    """The timers of one rule. `horizon` (ms): a row leaves by itself so long after it began."""

    def __init__(self, rule: TimerRule) -> None:
        self.rule = rule
        self.now = 0
        self.queue: list[tuple[int, int, str]] = []
        self.rows: dict[str, tuple[int, int, int, bool, Row]] = {}
        self.made: list[Derived] = []
        self.sequence = 0

    def at(self, due: int, key: str, row: Row, until: int) -> None:
        """Put `row` into the view at `due` (epoch ms) and take it back at `until`; replaces the key's timer."""
        self.cancel(key)
        self.sequence += 1
        self.rows[key] = (self.sequence, max(due, self.now), until, False, row)
        heapq.heappush(self.queue, (max(due, self.now), self.sequence, key))

    def cancel(self, key: str) -> None:
        """Drop the key's timer; a row that is already in the view is taken back now."""
        timer = self.rows.pop(key, None)
        if timer and timer[3]:
            self.made.append(Derived(timer[1], self.now, -1, timer[4]))

    def run(self, events: Sequence[tuple[int, str, Any]], watermark: int) -> list[Derived]:
        """Derived events of (applied, contract name, struct) in order; timers due at t fire after t's events."""
        self.made = []
        for applied, name, value in events:
            self._fire(applied)
            self.now = applied
            self.rule.on_event(name, value, self)
        self._fire(watermark)
        self.now = max(self.now, watermark)
        return self.made

    def _fire(self, before: int) -> None:
        while self.queue and self.queue[0][0] < before:
            due, sequence, key = heapq.heappop(self.queue)
            timer = self.rows.get(key)
            if timer is None or timer[0] != sequence:
                continue
            _, start, until, inside, row = timer
            if inside:
                del self.rows[key]
                self.made.append(Derived(start, due, -1, row))
            else:
                self.rows[key] = (sequence, start, until, True, row)
                self.made.append(Derived(due, due, 1, row))
                heapq.heappush(self.queue, (max(until, due + 1), sequence, key))

    def snapshot(self) -> Any:
        return {"now": self.now, "sequence": self.sequence, "queue": self.queue, "rows": self.rows}

    def restore(self, data: Any) -> None:
        self.now, self.sequence = data["now"], data["sequence"]
        self.queue = [tuple(item) for item in data["queue"]]
        self.rows = {key: tuple(timer) for key, timer in data["rows"].items()}
