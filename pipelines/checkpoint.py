"""Snapshots and table files of a step's partition, under `state_url` (a path or any fsspec URL).

A snapshot is a base (the whole state) or a delta: the input taken in since the snapshot before it. Steps are
deterministic, so a base and its deltas give the state again, and the cost of a commit follows what changed. Names are
``<number>-<owner>``, the owner drawn once per ownership, so that a paused old owner overwrites nothing. Each lists the
table files it vouches for: readers and the next owner ignore every other file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from features.errors import StateError
from features.windows import pack, unpack
from pipelines.broker import Broker

FORMAT = 1
Delta = tuple[list[Any], list[Any], int]  # packed records, idle partitions, quiet ms: one call of `Task.advance`


@dataclass
class Loaded:
    """A snapshot read back: the base's state, then the input to take in again."""

    state: bytes
    deltas: list[Any] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class Checkpoints:
    """Snapshots of one partition of one step; `root` is `<state_url>/<uc>/<step>/<partition>`."""

    def __init__(self, root: str, owner: str) -> None:
        self.fs: fsspec.AbstractFileSystem
        self.fs, self.root = url_to_fs(root)
        self.owner = owner
        self.number = 0
        self.base = 0
        self.base_bytes = self.delta_bytes = 0
        self.fs.makedirs(f"{self.root}/snapshots", exist_ok=True)

    def _path(self, name: str) -> str:
        return f"{self.root}/snapshots/{name}"

    def _write(self, path: str, data: bytes) -> None:
        """All or nothing: a reader never sees half a file."""
        self.fs.pipe_file(path + ".new", data)
        self.fs.mv(path + ".new", path)

    @property
    def wants_base(self) -> bool:
        """Whether the deltas have grown past their base, so that a new one pays."""
        grown = self.delta_bytes > max(self.base_bytes, 4 << 20)
        return not self.base or grown or self.number - self.base >= 1000

    def save_base(self, plan: str, state: bytes, files: Sequence[str]) -> str:
        """Write the whole state; returns the snapshot's name."""
        self.number += 1
        self.base, self.delta_bytes = self.number, 0
        data = pack({"format": FORMAT, "plan": plan, "state": state, "files": list(files)})
        self.base_bytes = len(data)
        self._write(self._path(self._name()), data)
        return self._name()

    def save_delta(self, calls: Sequence[Any], files: Sequence[str]) -> str:
        """Write what was taken in, and the files closed, since the last snapshot; returns the snapshot's name."""
        self.number += 1
        data = pack({"format": FORMAT, "base": self.base, "calls": list(calls), "files": list(files)})
        self.delta_bytes += len(data)
        self._write(self._path(self._name()), data)
        return self._name()

    def _name(self) -> str:
        return f"{self.number:010d}-{self.owner}"

    def load(self, name: str, plan: str) -> Loaded:
        """The snapshot of that name; StateError when it is missing or was made by another plan."""
        loaded = read_snapshot(self.fs, self.root, name, plan)
        self.number = int(name.split("-")[0])
        return loaded

    def newest(self) -> int:
        """The highest snapshot number there is; 0 without any."""
        names = [path.rsplit("/", 1)[1] for path in self.fs.ls(f"{self.root}/snapshots", detail=False)]
        return max((int(n[:10]) for n in names if n[:10].isdigit()), default=0)

    def clean(self, keep_files: Sequence[str]) -> None:
        """Delete the table files that aren't listed."""
        keep = {f"{self.root}/{f}" for f in keep_files}
        for path in self.fs.glob(f"{self.root}/*/*.parquet*"):
            if self.fs._strip_protocol(path) not in keep:
                self.fs.rm_file(path)

    def clean_snapshots(self, before: int) -> None:
        """Delete the snapshots that a newer base has made useless."""
        for path in self.fs.ls(f"{self.root}/snapshots", detail=False):
            match = re.search(r"/(\d{10})-\w+(\.new)?$", path)
            if match and (int(match[1]) < before or match[2]):
                self.fs.rm_file(path)

    def write_table(self, table: str, rows: pa.Table, number: int) -> str:
        """One Parquet file; returns its path below the root."""
        self.fs.makedirs(f"{self.root}/{table}", exist_ok=True)
        name = f"{table}/{number:010d}-{self.owner}.parquet"
        buffer = io.BytesIO()
        pq.write_table(rows, buffer, compression="zstd")
        self._write(f"{self.root}/{name}", buffer.getvalue())
        return name


def read_snapshot(fs: Any, root: str, name: str, plan: str | None = None) -> Loaded:
    """Base and deltas of a snapshot; `plan` None reads it only for its file list."""

    def read(number: int) -> dict[str, Any]:
        path = f"{root}/snapshots/{number:010d}-{owner}"
        try:
            data: dict[str, Any] = unpack(fs.cat_file(path))
        except FileNotFoundError:
            raise StateError(
                f"the committed positions name snapshot {path}, which is missing: restore it, "
                "or reset this step's group and compute its features again with `penstock backfill`"
            ) from None
        if data["format"] != FORMAT:
            raise StateError(
                f"{path} has format {data['format']}, this version reads {FORMAT}: run the version that wrote it"
            )
        return data

    last, owner = int(name.split("-")[0]), name.split("-")[1]
    newest = read(last)
    base_number = newest.get("base", last)
    base = newest if base_number == last else read(base_number)
    if plan is not None and base["plan"] != plan:
        raise StateError(
            f"{root}: the checkpoint was made by other views, windows or contracts than the use case has now: "
            "run the definition that made it, or compute the features again with `penstock backfill`"
        )
    loaded = Loaded(base["state"], files=list(base["files"]))
    for number in range(base_number + 1, last + 1):
        delta = newest if number == last else read(number)
        loaded.deltas.append((delta["calls"], delta["files"]))
        loaded.files += delta["files"]
    return loaded


def parse_metadata(metadata: str) -> tuple[str, int]:
    """Snapshot name and watermark (epoch ms) of committed offset metadata."""
    name, _, watermark = metadata.rpartition(":")
    if not name or not watermark.isdigit():
        raise StateError(f"committed offsets carry {metadata!r}, not a snapshot: another program commits to this group")
    return name, int(watermark)


def watermark_of(broker: Broker, group: str) -> int | None:
    """The committed watermark of a step (epoch ms): the lowest over its partitions; None before its first commit."""
    marks = [parse_metadata(p.metadata)[1] for p in broker.committed(group).values() if p.metadata]
    return min(marks, default=None)


def listed_files(state_url: str, use_case: str, step: str, table: str, broker: Broker) -> list[str]:
    """URLs of the table files that a step's committed snapshots vouch for, over all its partitions."""
    snapshots = {tp[1]: parse_metadata(p.metadata)[0] for tp, p in broker.committed(f"{use_case}.{step}").items()}
    out = []
    for partition, name in sorted(snapshots.items()):
        fs, root = url_to_fs(f"{state_url}/{use_case}/{step}/{partition}")
        files = read_snapshot(fs, root, name).files
        out += [fs.unstrip_protocol(f"{root}/{f}") for f in files if f.startswith(f"{table}/")]
    return out
