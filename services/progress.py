"""How far a replay is: one line that moves on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from typing import TextIO

TTY_EVERY_S, PLAIN_EVERY_S = 0.2, 5.0


def iso(ms: int) -> str:
    """Epoch ms as RFC 3339 in UTC, to the minute when it is one.

    >>> iso(1357016400000)
    '2013-01-01T05:00Z'
    """
    at = datetime.fromtimestamp(ms / 1000, UTC)
    return at.strftime("%Y-%m-%dT%H:%MZ" if ms % 60_000 == 0 else "%Y-%m-%dT%H:%M:%SZ")


class Progress:
    """Reports simulated time on standard error. `from_ms`, `until_ms`: the range; `start_ms`: where this run begins;
    `unit`: what is counted."""

    def __init__(
        self, from_ms: int, until_ms: int, shown: bool = True, out: TextIO = sys.stderr, unit: str = "ticks"
    ) -> None:
        self.from_ms, self.until_ms, self.start_ms, self.out = from_ms, until_ms, from_ms, out
        self.shown, self.tty, self.unit = shown, out.isatty(), unit
        self.began = time.monotonic()
        self.printed = 0.0
        self.ticks = 0

    def update(self, now_ms: int, *, ticks: int = 1) -> None:
        """A tick that ends at `now_ms` is done."""
        self.ticks += ticks
        now = time.monotonic()
        last = now_ms >= self.until_ms
        if not self.shown or (now - self.printed < (TTY_EVERY_S if self.tty else PLAIN_EVERY_S) and not last):
            return
        self.printed = now
        spent = max(now - self.began, 1e-3)
        done = (now_ms - self.start_ms) / max(1, self.until_ms - self.start_ms)
        left = f"{spent / done * (1 - done):.0f} s left" if done else ""
        percent = 100 * (now_ms - self.from_ms) / (self.until_ms - self.from_ms)
        text = f"{percent:5.1f}%  {iso(now_ms)}  {self.ticks / spent:5.1f} {self.unit}/s  {left}"
        if self.tty:
            print(f"\r\x1b[K{text}", end="\n" if last else "", file=self.out, flush=True)
        else:
            print(text, file=self.out, flush=True)

    def line(self, text: str) -> None:
        """A line of its own between the reports."""
        if self.shown:
            print(f"\r\x1b[K{text}" if self.tty else text, file=self.out, flush=True)
