"""One partition of a step: intake, step and the table rows that wait for a file to close. Deterministic."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pyarrow as pa

from features.usecase import UseCase
from features.windows import pack, unpack
from pipelines.broker import Message, Record, TopicPartition
from pipelines.intake import Intake, Refused
from pipelines.step import Rows, Step
from pipelines.tables import arrow_table, from_bytes, to_bytes

FILE_ROWS = 50_000


@dataclass(slots=True)
class Produced:
    """What one call of `Task.advance` leaves to do outside."""

    messages: list[Message] = field(default_factory=list)
    online: list[Rows] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    closed: list[tuple[str, pa.Table]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    forget: list[str] = field(default_factory=list)
    keep: bool = False

    def add(self, later: Produced) -> None:
        """Gather what a later call produced; its online rows are the runner's to gather."""
        self.messages += later.messages
        self.refused += later.refused
        self.closed += later.closed
        self.files |= later.files
        self.forget += later.forget
        self.keep |= later.keep


class Task:
    """Drives one step over its partition or partitions. Same calls, same state: a delta snapshot is a list of calls.

    unserved : views whose rows it keeps to itself, as their windows lack history
    """

    def __init__(self, use_case: UseCase, step: Step, *partitions: int) -> None:
        self.use_case = use_case
        self.step = step
        self.intake = Intake({(t, p): contract for t, contract in step.inputs.items() for p in partitions or (0,)})
        self.file_every = round(use_case.file_every.total_seconds() * 1000)
        self.tables: dict[str, list[Any]] = {}
        self.unserved: frozenset[str] = frozenset()

    @property
    def watermark(self) -> int:
        return self.intake.watermark

    def advance(
        self, records: Sequence[Record], idle: Collection[TopicPartition] = (), quiet_ms: int = 0, at_least: int = 0
    ) -> Produced:
        """Take records in and process what is due."""
        before = self.intake.watermark
        events, refused = self.intake.advance(records, idle, quiet_ms, at_least)
        if self.intake.watermark == before:
            return Produced(refused=refused)
        out = self.step.process(events, self.intake.watermark)
        refused += [Refused(r.event.record, r.reason, r.detail) for r in out.rejected if r.event.record]
        self.intake.counts.update(r.reason for r in out.rejected)
        for rows in self.served(out.offline):
            self.tables.setdefault(rows.view, []).append(rows)
        for table, records_of in out.rows.items():
            self.tables.setdefault(table, []).extend(records_of)
        passed = before // self.file_every != self.intake.watermark // self.file_every
        closed = self._close(everything=passed or out.close)
        return Produced(out.messages, self.served(out.online), refused, closed, out.files, out.forget, out.keep)

    def served(self, rows: list[Rows]) -> list[Rows]:
        """Those of views that are served."""
        return [r for r in rows if r.view not in self.unserved] if self.unserved else rows

    def _close(self, everything: bool) -> list[tuple[str, pa.Table]]:
        full = [t for t, rows in self.tables.items() if everything or _length(rows) >= FILE_ROWS]
        return [(table, arrow_table(self.use_case, table, self.tables.pop(table))) for table in sorted(full)]

    def snapshot(self) -> bytes:
        self.tables = {t: [arrow_table(self.use_case, t, rows)] for t, rows in self.tables.items()}  # each row once
        waiting = {table: to_bytes(rows) for table, (rows,) in self.tables.items()}
        return pack({"step": self.step.snapshot(), "intake": self.intake.snapshot(), "tables": waiting})

    def restore(self, state: bytes, deltas: Sequence[Any]) -> None:
        """Load a base and take in again what its deltas hold; what that produces is already out."""
        data = unpack(state)
        self.step.restore(data["step"])
        self.intake.restore(data["intake"])
        self.tables = {table: [from_bytes(raw)] for table, raw in data["tables"].items()}
        for calls, _ in deltas:
            for records, idle, quiet_ms in calls:
                self.advance(msgspec.convert(records, list[Record]), [(t, p) for t, p in idle], quiet_ms)


def pack_call(records: Sequence[Record], idle: Collection[TopicPartition], quiet_ms: int) -> list[Any]:
    """One call of `advance` as plain values, for a delta snapshot."""
    return [records, [list(tp) for tp in sorted(idle)], quiet_ms]


def _length(rows: list[Any]) -> int:
    return sum(len(r.times) if isinstance(r, Rows) else len(r) if isinstance(r, pa.Table) else 1 for r in rows)
