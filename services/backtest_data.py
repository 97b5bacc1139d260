"""Examples for backtests: the vectors of a source's requests with their labels, computed once and kept as Parquet."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.engine import Applied, Events
from features.usecase import UseCase
from pipelines.asof import Asked, AsOf
from pipelines.backtest import truths
from pipelines.tables import examples_schema
from services.predict_request import RequestDecoder
from services.progress import Progress
from services.source import SOURCES, Source

DAY_MS = 86_400_000
FILE_ROWS = 50_000
ROOT = Path(__file__).parent.parent
ENGINE_CODE = ("features/*.py", "pipelines/asof.py", "pipelines/backtest.py", "pipelines/tables.py")


@dataclass(frozen=True)
class Range:
    """What is replayed; epoch ms, half-open.

    tick : windows as of the start of a request's tick, as a lockstep has them; 1 is the request's own time
    stale : windows as of so much before that
    """

    from_ms: int
    until_ms: int
    tick: int = 1
    stale: int = 0

    def as_of(self, times: Sequence[int]) -> Any:
        """[n] the instants whose rows requests at `times` read, none before the range."""
        asked = np.asarray(times, np.int64)
        return np.maximum(asked // self.tick * self.tick - self.stale, self.from_ms)


@dataclass(frozen=True)
class Made:
    """Examples on disk: their files, and what each day took.

    days : [start (epoch ms), events and requests, seconds]
    refused : events that the engine could not use
    name : stands for the examples in what is kept of them
    """

    files: tuple[str, ...]
    name: str
    days: tuple[tuple[int, int, float], ...] = ()
    refused: int = 0
    seconds: float = 0.0


def code_hash(patterns: Sequence[str]) -> str:
    """Short hash of the project's files of these patterns."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in patterns for p in ROOT.glob(pattern)}):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def examples(home: Path, use_case: UseCase, source: Source, over: Range, progress: Progress) -> Made:
    """The examples of a range, from the cache below `home` when the same code has made them before."""
    code = code_hash((*ENGINE_CODE, SOURCES[use_case.name].replace(".", "/") + ".py"))
    name = f"{over.from_ms}-{over.until_ms}-{over.tick}-{over.stale}-{code}"
    folder = home / "examples" / name
    if not folder.exists():
        temporary = folder.with_name(f".{name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _make(temporary, use_case, source, over, progress)
        temporary.rename(folder)
    made = json.loads((folder / "made.json").read_text())
    files = tuple(str(p) for p in sorted(folder.glob("*.parquet")))
    return Made(files, name, tuple(map(tuple, made["days"])), made["refused"], made["seconds"])


def _make(folder: Path, use_case: UseCase, source: Source, over: Range, progress: Progress) -> None:
    began, days = time.monotonic(), list[tuple[int, int, float]]()
    maker, held, files = Maker(use_case, source, over), list[pa.Table](), 0
    wait = use_case.label.wait // timedelta(milliseconds=1)
    starts = range(over.from_ms // DAY_MS * DAY_MS, over.until_ms + wait + 2 * DAY_MS, DAY_MS)
    for day in starts:
        since = time.monotonic()
        count, table = maker.day(day)
        days.append((day, count, round(time.monotonic() - since, 4)))
        held.append(table)
        last = day == starts[-1]
        if sum(map(len, held)) >= FILE_ROWS or last:
            pq.write_table(pa.concat_tables(held), folder / f"{files:04d}.parquet")
            held, files = [], files + 1
        if day < over.until_ms:
            progress.update(min(day + DAY_MS, over.until_ms))
    seconds = time.monotonic() - began
    (folder / "made.json").write_text(
        json.dumps({"days": days, "refused": maker.asof.refused, "seconds": round(seconds, 2)})
    )


class Maker:
    """Makes examples day by day; requests wait for their labels."""

    def __init__(self, use_case: UseCase, source: Source, over: Range) -> None:
        self.use_case, self.source, self.over = use_case, source, over
        self.asof, self.schema = AsOf(use_case), examples_schema(use_case)
        self.wait = use_case.label.wait // timedelta(milliseconds=1)
        self.decoder = RequestDecoder(use_case, allow_event_time=True, new_id=str)
        self.waiting: list[tuple[int, list[Asked], dict[str, list[Any]]]] = []
        self.labels: list[Applied] = []

    def day(self, start: int) -> tuple[int, pa.Table]:
        """Events and requests whose windows are as of a day: their number, and the examples that are complete by its
        end."""
        end = start + DAY_MS
        events = list(self._events(start, end))
        self.labels += [e for e in events if e.contract == self.use_case.label.event]
        asked = self._asked(start, end)
        if start < self.over.until_ms:
            features = self.asof.advance(Events.of(events), end, asked, self.over.as_of([a.time for a in asked]))
            self.waiting.append((max([end, *(a.time for a in asked)]), asked, features))
        complete = [w for w in self.waiting if w[0] + self.wait < end]
        self.waiting = self.waiting[len(complete) :]
        tables = [self._table(asked, features) for _, asked, features in complete]
        self._forget()
        return len(events) + len(asked), pa.concat_tables([self.schema.empty_table(), *tables])

    def _events(self, start: int, end: int) -> Iterator[Applied]:
        contracts = {c.name: c for c in self.use_case.contracts}
        for event in self.source.events(max(start, self.over.from_ms), end):
            yield Applied(event.event, contracts[event.event].decode(event.value), event.time, event.time)

    def _asked(self, start: int, end: int) -> list[Asked]:
        """Requests that read windows as of an instant of [start, end)."""
        over = self.over
        first = max(over.from_ms, start + over.stale if start > over.from_ms else 0)
        last = min(end + over.stale + over.tick, over.until_ms)
        found = self.source.requests(first, last) if first < last else []
        as_of = over.as_of([r.time for r in found])
        chosen = [r for r, at in zip(found, as_of.tolist(), strict=True) if start <= at < end]
        decoded = [self.decoder.decode(msgspec.json.encode(r.row))[0] for r in chosen]
        return [Asked(d.request_id, d.event_time or 0, d.entities, d.fields) for d in decoded]

    def _forget(self) -> None:
        """Labels that no waiting request can be joined with any more."""
        oldest = min((a.time for _, asked, _ in self.waiting for a in asked), default=None)
        if oldest is not None:
            self.labels = [e for e in self.labels if e.time >= oldest - self.wait]

    def _table(self, asked: Sequence[Asked], features: dict[str, list[Any]]) -> pa.Table:
        """The requests that have labels, as the archive holds them."""
        known = truths(self.use_case, asked, self.labels)
        columns = features | {
            "request_id": [a.id for a in asked],
            "event_time": [a.time for a in asked],
            "label_time": [known[a.id][1] if a.id in known else None for a in asked],
            "version": ["backtest"] * len(asked),
            "arm": ["champion"] * len(asked),
        }
        for name in ("label", *self.use_case.label.targets):
            columns[name] = [known[a.id][0].get(name) if a.id in known else None for a in asked]
        columns["score"] = [None] * len(asked)
        arrays = [pa.array(columns[f.name], f.type, from_pandas=True) for f in self.schema]
        table = pa.Table.from_arrays(arrays, schema=self.schema)
        return table.filter(pa.array([a.id in known for a in asked], pa.bool_()))


def only(use_case: UseCase, leak: bool) -> UseCase:
    """The use case, its model also reading the label when a leak is to be planted."""
    inputs = use_case.inputs
    return replace(use_case, inputs=replace(inputs, numbers=(*inputs.numbers, "label"))) if leak else use_case
