"""What a replay observed, kept beside the stack's state as one JSON line per tick and per retrain."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import msgspec
import numpy as np

from services.settings import Settings

Entry = dict[str, Any]


class ReplayLog:
    """Appends entries; a line cut off by a crash is dropped when the log is opened again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.exists() else b""
        if not whole.endswith(b"\n"):
            path.write_bytes(whole[: whole.rfind(b"\n") + 1])
        self._file: TextIO = path.open("a")

    def add(self, kind: str, **entry: Any) -> None:
        """Append one entry; it is on its way to the disk when this returns."""
        self._file.write(msgspec.json.encode({"kind": kind, **entry}).decode() + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def log_path(settings: Settings, use_case: str) -> Path:
    """Where a use case's replays are recorded."""
    return settings.home / "replay" / f"{use_case}.jsonl"


def read_log(path: Path) -> list[Entry]:
    """The whole entries of a log, oldest first; none when there is no log."""
    if not path.exists():
        return []
    whole = path.read_bytes()
    return [msgspec.json.decode(line) for line in whole[: whole.rfind(b"\n") + 1].splitlines()]


def quantiles(values: Sequence[float]) -> dict[str, float | int | None]:
    """p50, p95, p99 and n; null without values."""
    if not len(values):
        return {"p50": None, "p95": None, "p99": None, "n": 0}
    p50, p95, p99 = np.percentile(np.asarray(values, float), (50, 95, 99))
    return {"p50": round(float(p50), 2), "p95": round(float(p95), 2), "p99": round(float(p99), 2), "n": len(values)}


def tick_times(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """Wall milliseconds of each phase of a tick and of the whole."""
    ticks = [e["phases"] for e in entries if e["kind"] == "tick"]
    names = list(dict.fromkeys(name for phases in ticks for name in phases))
    phases = {name: quantiles([p[name] for p in ticks if name in p]) for name in names}
    return phases | {"tick": quantiles([sum(p.values()) for p in ticks])}


def as_of(entries: Sequence[Mapping[str, Any]]) -> Callable[[int], int | None]:
    """Request time -> the instant its windows were held to (epoch ms), None where no lockstep tells."""
    ticks = sorted((e["tick"], e["until"], e["held"]) for e in entries if e["kind"] == "tick")

    def instant(time: int) -> int | None:
        i = bisect_right(ticks, time, key=lambda tick: tick[0]) - 1
        if i < 0 or time >= ticks[i][1] or not ticks[i][2]:
            return None
        return ticks[i][0] if ticks[i][2] == "tick" else time

    return instant


def freshness(entries: Sequence[Mapping[str, Any]]) -> dict[str, float | int | None]:
    """Milliseconds from an event's `sent` until it was readable online."""
    return quantiles([ms for e in entries if e["kind"] == "tick" for ms in e["freshness"]])
