"""The files that hold the offline rows of a view: which ones count, how small ones become large, what may go.

The list in the featurizer's committed snapshot is the truth, and only the featurizer changes it. A merged file stands
for a run of listed files and says so in its name: ``merged/<view>/<first>-<last>-<digest>-<since>.parquet`` has the
rows of the listed files with these numbers, whose names have this digest. So a file that appears whole is all that a
merge commits, no index of replacements can disagree with it, and one made from another history counts for nothing.
With `since`, only what is needed to answer from that instant on (epoch ms) is left in it.
"""

from __future__ import annotations

import hashlib
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from features.errors import StateError
from features.vectors import empty_row, join_keys
from pipelines.broker import Broker
from pipelines.checkpoint import parse_metadata, read_snapshot

FAN, LEVELS = 8, 4  # so many neighbours of a level make one of the next; a row is written again LEVELS times at most
BLOCK = 100_000  # rows in memory, and of a row group


class File(NamedTuple):
    """One file to read: `path` below the partition's root, the listed files it stands for, from when it answers."""

    path: str
    listed: tuple[str, ...]
    since: int = 0


@dataclass(frozen=True)
class Partition:
    """One partition's offline rows; `listed` are the names in its committed snapshot, `defined` its views' plans."""

    fs: Any
    root: str
    listed: tuple[str, ...]
    defined: Mapping[str, Any] = field(default_factory=dict)

    def files(self, view: str) -> list[File]:
        """What to read for all rows of a view, oldest first."""
        names = sorted((n for n in self.listed if n.startswith(f"{view}/")), key=_number)
        numbers = [_number(name) for name in names]
        files: list[File] = []
        done = 0
        for path, first, last, digest, since in self._merged(view):
            a, b = bisect_left(numbers, first), bisect_right(numbers, last)
            if a >= done and b > a and digest == _digest(names[a:b]):
                files += [File(name, (name,)) for name in names[done:a]] + [File(path, tuple(names[a:b]), since)]
                done = b
        return files + [File(name, (name,)) for name in names[done:]]

    def _merged(self, view: str) -> list[tuple[str, int, int, str, int]]:
        """Merged files as (path, first, last, digest, since), the widest and newest of a start first."""
        found = []
        for path in self.paths(f"merged/{view}"):
            if path.endswith(".parquet"):
                first, last, digest, since = path.rsplit("/", 1)[1].removesuffix(".parquet").split("-")
                found.append((path, int(first), int(last), digest, int(since)))
        return sorted(found, key=lambda f: (f[1], -f[2], -f[4]))

    def paths(self, folder: str) -> list[str]:
        """Files of a folder, below the root."""
        if not self.fs.exists(f"{self.root}/{folder}"):
            return []
        return [f"{folder}/{p.rsplit('/', 1)[1]}" for p in self.fs.ls(f"{self.root}/{folder}", detail=False)]

    def url(self, file: File) -> str:
        """For DuckDB, which reads this machine's files by itself."""
        path = f"{self.root}/{file.path}"
        return path if self.local else str(self.fs.unstrip_protocol(path))

    @property
    def local(self) -> bool:
        return "file" in self.fs.protocol

    def merge(self, view: str) -> int:
        """Write larger files that stand for runs of small ones; returns how many."""
        files = self.files(view)
        runs = merge_plan([len(f.listed) for f in files])
        for a, b in runs:
            self._write(view, files[a:b], max(f.since for f in files[a:b]), self._blocks(files[a:b]))
        return len(runs)

    def retain(self, view: Any, since: int) -> int:
        """Leave away the rows that no question at or after `since` needs; returns how many files it took them from.

        A key's newest row before `since` still holds at `since` and stays, unless it is the empty window, which a key
        without a row reads as too.
        """
        past: list[File] = []
        fresh = 0
        for file in self.files(view.name):
            newest = self._newest(file)
            if newest >= since:
                break
            past.append(file)
            fresh += newest >= file.since
        if fresh:
            kept = None
            for block in self._blocks(past):
                kept = _newest_rows(block if kept is None else pa.concat_tables([kept, block]), join_keys(view))
            self._write(view.name, past, since, iter([_without_empty(kept, empty_row(view))]))
        return fresh

    def _newest(self, file: File) -> int:
        with self.fs.open(f"{self.root}/{file.path}", "rb") as opened:
            found = pq.ParquetFile(opened).metadata
            at = found.schema.names.index("event_timestamp")
            groups = [found.row_group(i) for i in range(found.num_row_groups)]
            times = [group.column(at).statistics.max for group in groups if group.num_rows]
        return max((round(time.timestamp() * 1000) for time in times), default=0)

    def _blocks(self, files: Sequence[File]) -> Iterator[pa.Table]:
        """The rows of files in order, about BLOCK at a time; a last block may be empty."""
        waiting: list[pa.Table] = []
        for file in files:
            with self.fs.open(f"{self.root}/{file.path}", "rb") as opened:
                parquet = pq.ParquetFile(opened)
                waiting.append(parquet.schema_arrow.empty_table())
                for batch in parquet.iter_batches(BLOCK):
                    waiting.append(pa.Table.from_batches([batch]))
                    if sum(map(len, waiting)) >= BLOCK:
                        yield pa.concat_tables(waiting).combine_chunks()
                        waiting = waiting[:1]
        yield pa.concat_tables(waiting).combine_chunks()

    def _write(self, view: str, files: Sequence[File], since: int, blocks: Iterator[pa.Table]) -> None:
        """All or nothing: until the last step nobody reads the new file."""
        names = [name for file in files for name in file.listed]
        folder = f"{self.root}/merged/{view}"
        self.fs.makedirs(folder, exist_ok=True)
        path = f"{folder}/{_number(names[0])}-{_number(names[-1])}-{_digest(names)}-{since}.parquet"
        temporary = f"{path}.{secrets.token_hex(4)}"
        first = next(blocks)
        with (
            self.fs.open(temporary, "wb") as opened,
            pq.ParquetWriter(opened, first.schema, compression="zstd") as writer,
        ):
            for block in chain([first], blocks):
                writer.write_table(block)
        self.fs.mv(temporary, path)

    def remove(self, view: str, before: float) -> int:
        """Delete what a merged file has stood for since before `before` (epoch seconds), so that nobody reads it now.

        Unlisted files are the featurizer's own affair; it deletes them when it starts.
        """
        merged = [f for f in self.files(view) if f.path.startswith("merged/") and self._modified(f.path) < before]
        gone = {name for file in merged for name in file.listed}
        keep = {f.path for f in self.files(view)}
        others = [p for p in self.paths(f"merged/{view}") if p not in keep and self._modified(p) < before]
        found = [p for p in self.paths(view) if p in gone] + others
        for path in found:
            self.fs.rm_file(f"{self.root}/{path}")
        return len(found)

    def _modified(self, path: str) -> float:
        return float(self.fs.modified(f"{self.root}/{path}").timestamp())


def partitions(state_url: str, use_case: str, broker: Broker) -> list[Partition]:
    """The offline rows of a use case, as the featurizer's committed snapshots have them."""
    for last_try in (False, False, True):
        committed = broker.committed(f"{use_case}.featurizer")
        names = {tp[1]: parse_metadata(p.metadata)[0] for tp, p in committed.items()}
        try:
            return [_partition(f"{state_url}/{use_case}/featurizer/{i}", name) for i, name in sorted(names.items())]
        except StateError:  # the featurizer may have gone on and removed this snapshot since
            if last_try:
                raise
    raise AssertionError


def _partition(url: str, snapshot: str) -> Partition:
    fs, root = url_to_fs(url)
    loaded = read_snapshot(fs, root, snapshot)
    return Partition(fs, root, tuple(loaded.files), loaded.plan.parts)


def merge_plan(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Runs [a, b) of neighbours to merge; `sizes` are counts of listed files, oldest first.

    >>> merge_plan([1] * 9)
    [(0, 8)]
    >>> merge_plan([8] * 7 + [1] * 8)
    [(0, 15)]
    >>> merge_plan([64, 8, 1, 1])
    []
    """
    stack: list[tuple[int, int, int]] = []
    for i, size in enumerate(sizes):
        stack.append((i, i + 1, (size.bit_length() - 1) // (FAN.bit_length() - 1)))
        while len(stack) >= FAN and len({level for *_, level in stack[-FAN:]}) == 1 and stack[-1][2] < LEVELS:
            level = stack[-1][2] + 1
            stack[-FAN:] = [(stack[-FAN][0], i + 1, level)]
    return [(a, b) for a, b, _ in stack if b - a > 1]


def _number(name: str) -> int:
    return int(name.rsplit("/", 1)[1].split("-")[0])


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _newest_rows(rows: pa.Table, keys: Sequence[str]) -> pa.Table:
    """The last row of each key; rows are in order of time."""
    at = rows.append_column("row ", pa.array(np.arange(len(rows))))
    last = at.group_by(list(keys)).aggregate([("row ", "max")])["row _max"]
    return rows.take(pc.take(last, pc.sort_indices(last)))


def _without_empty(rows: pa.Table, empty: dict[str, Any]) -> pa.Table:
    alive = pa.array([False] * len(rows))
    for name, value in empty.items():
        column = rows[name]
        if value is None:
            changed = pc.is_valid(column)
        elif value == []:
            changed = pc.greater(pc.list_value_length(column), 0)
        else:
            changed = pc.not_equal(column, value)
        alive = pc.or_(alive, pc.fill_null(changed, True))
    return rows.filter(alive)
