"""How good what was served is, by day of event time and by version, from sums and histograms: it grows with days alone.

A score falls into a bin of 1/32 of its logit, so the AUC of bins differs from the exact one by less than .001.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec

from pipelines.broker import Record
from pipelines.comparison import DAY_MS
from pipelines.quality import CLIP

KEPT_DAYS = 400
RECENT_DAYS = 7
BINS = 32  # of a nat
State = dict[str, Any]


class Scored(msgspec.Struct):
    """What is read of an example."""

    event_time: int
    version: str
    score: float
    label: float


_decode = msgspec.json.Decoder(Scored).decode


class Cell(msgspec.Struct, array_like=True):
    """Examples of a day and version: sums of labels, scores and losses; by bin of the score, labels 0 and 1."""

    n: int = 0
    positive: int = 0
    score: float = 0.0
    loss: float = 0.0
    bins: dict[int, list[int]] = msgspec.field(default_factory=dict)

    def add(self, score: float, label: bool) -> None:
        """Count an example."""
        p = min(max(score, CLIP), 1 - CLIP)
        logit = math.log(p) - math.log1p(-p)
        self.n += 1
        self.positive += label
        self.score += score
        self.loss -= math.log(p) if label else math.log1p(-p)
        self.bins.setdefault(math.floor(logit * BINS), [0, 0])[label] += 1

    def join(self, other: Cell) -> None:
        """Add another cell's examples."""
        self.n, self.positive = self.n + other.n, self.positive + other.positive
        self.score, self.loss = self.score + other.score, self.loss + other.loss
        for at, counts in other.bins.items():
            mine = self.bins.setdefault(at, [0, 0])
            mine[0], mine[1] = mine[0] + counts[0], mine[1] + counts[1]

    def quality(self) -> dict[str, Any]:
        """{"examples", "auc", "log_loss", "rate", "score"}: rate and score are means; auc None without both labels."""
        n = max(1, self.n)
        means = {"log_loss": self.loss / n, "rate": self.positive / n, "score": self.score / n}
        return {"examples": self.n, "auc": self._auc(), **{name: round(value, 4) for name, value in means.items()}}

    def _auc(self) -> float | None:
        pairs, below = 0.0, 0
        for _, (negative, positive) in sorted(self.bins.items()):
            pairs += positive * (below + negative / 2)
            below += negative
        return round(pairs / (self.positive * below), 4) if self.positive and below else None


def fold(state: State, record: Record) -> None:
    """Take in an example. `state` is {day since 1970: {version: cell}}."""
    if record.value is None:
        return
    row = _decode(record.value)
    of_day = state.setdefault(str(row.event_time // DAY_MS), {})
    cell = of_day[row.version] = _cell(of_day.get(row.version))
    cell.add(row.score, row.label > 0.5)
    if len(state) > KEPT_DAYS:
        del state[min(state, key=int)]


def _cell(kept: Any) -> Cell:
    """A cell, as it is or as it was read from a file."""
    return kept if isinstance(kept, Cell) else msgspec.convert(kept or [], Cell, strict=False)


def joined(cells: Iterable[Any]) -> Cell:
    """One cell of many."""
    total = Cell()
    for cell in cells:
        total.join(_cell(cell))
    return total


def by_day(state: State) -> list[dict[str, Any]]:
    """{"day", "version", ...quality} of each day, oldest first; `version` answered most of it."""
    rows = []
    for day in sorted(state, key=int):
        cells = {version: _cell(cell) for version, cell in state[day].items()}
        about = {"day": _date(day), "version": max(cells, key=lambda version: cells[version].n)}
        rows.append(about | joined(cells.values()).quality())
    return rows


def by_version(state: State) -> list[dict[str, Any]]:
    """{"version", "from", "until", ...quality} of each version, in the order of their first days."""
    found: dict[str, list[str]] = {}
    for day in sorted(state, key=int):
        for version in state[day]:
            found.setdefault(version, []).append(day)
    return [
        {"version": version, "from": _date(days[0]), "until": _date(days[-1])}
        | joined(state[day][version] for day in days).quality()
        for version, days in found.items()
    ]


def recent_loss(state: State, version: str) -> float | None:
    """A version's log loss over its newest days; None without examples."""
    days = [day for day in sorted(state, key=int) if version in state[day]][-RECENT_DAYS:]
    return float(joined(state[day][version] for day in days).quality()["log_loss"]) if days else None


def _date(day: str) -> str:
    return datetime.fromtimestamp(int(day) * DAY_MS / 1000, UTC).date().isoformat()
