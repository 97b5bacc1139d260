"""Snapshots and table files of a step's partition, under `state_url` (a path or any fsspec URL).

A snapshot is a base (the whole state) or a delta: the input taken in since the snapshot before it. Steps are
deterministic, so a base and its deltas give the state again, and the cost of a commit follows what changed. Names are
``<number>-<owner>``, the owner drawn once per ownership, so that a paused old owner overwrites nothing. Each lists the
table files it vouches for: readers and the next owner ignore every other file.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from features.errors import StateError
from features.windows import pack, unpack
from pipelines.broker import Broker, Position, Record, TopicPartition
from pipelines.step import Step

FORMAT = 2
COMMIT_HEADER = "commit"
Positions = Mapping[TopicPartition, Position]


@dataclass(frozen=True)
class Plan:
    """What a stored state depends on.

    parts : what the step computes; a view by its name, with its aggregations
    contracts : topic -> name and version
    """

    step: str
    parts: Mapping[str, Any]
    contracts: Mapping[str, Sequence[Any]]

    @classmethod
    def of(cls, step: Step) -> Plan:
        contracts = {topic: [c.name, c.version] for topic, c in step.inputs.items()}
        return cls(**unpack(pack({"step": step.name, "parts": step.plan, "contracts": contracts})))

    def added(self, stored: Plan, accepted: Callable[[str], bool] = lambda view: False) -> list[str] | None:
        """The views that are new, have new windows or, if `accepted`, other ones; None when anything else differs."""
        if self.step != stored.step or not stored.contracts.items() <= self.contracts.items():
            return None
        before = {name: stored.parts.get(name, []) for name in self.parts}
        more = sorted(name for name, part in self.parts.items() if part != before[name])
        views = all(isinstance(self.parts[n], list) for n in more) and stored.parts.keys() <= self.parts.keys()
        fine = views and all(set(before[n]) <= set(self.parts[n]) or accepted(n) for n in more)
        return more if fine else None


@dataclass
class Loaded:
    """A snapshot read back: the base's state, then the input to take in again; and the plan that made it."""

    plan: Plan
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

    def save_base(self, plan: Plan, state: bytes, files: Sequence[str]) -> str:
        """Write the whole state; returns the snapshot's name."""
        self.number += 1
        self.base, self.delta_bytes = self.number, 0
        data = pack({"format": FORMAT, "plan": asdict(plan), "state": state, "files": list(files)})
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

    def has(self, name: str) -> bool:
        """Whether there is a snapshot of that name."""
        return bool(self.fs.exists(self._path(name)))

    def read(self, name: str) -> Loaded:
        """The snapshot of that name."""
        return read_snapshot(self.fs, self.root, name)

    def copy(self, other: Checkpoints, file: str) -> None:
        """Bring a table file here from another partition's root."""
        self.fs.makedirs(f"{self.root}/{file.rsplit('/', 1)[0]}", exist_ok=True)
        self.fs.cp_file(f"{other.root}/{file}", f"{self.root}/{file}")

    def load(
        self, name: str, plan: Plan, accepted: Callable[[str], bool] = lambda view: False
    ) -> tuple[Loaded, list[str]]:
        """The snapshot of that name, and the views that it lacks or has with fewer windows: they start empty.

        accepted : whether a view may have changed altogether, because there is a backfill of it as it is now

        StateError when it is missing or was made by a plan that differs in anything else.
        """
        loaded = self.read(name)
        added = plan.added(loaded.plan, accepted)
        if added is None:
            raise StateError(
                f"{self.root}: the checkpoint was made by other views, windows or contracts than the use case has now: "
                "run the definition that made it, or compute the features again with `penstock backfill`"
            )
        self.number = int(name.split("-")[0])
        return loaded, added

    def newest(self) -> int:
        """The highest snapshot number there is; 0 without any."""
        names = [path.rsplit("/", 1)[1] for path in self.fs.ls(f"{self.root}/snapshots", detail=False)]
        return max((int(n[:10]) for n in names if n[:10].isdigit()), default=0)

    def clean(self, keep_files: Sequence[str]) -> None:
        """Delete the table files, and those of the step's own, that aren't listed."""
        keep = {f"{self.root}/{f}" for f in keep_files}
        for path in (p for kind in ("parquet", "onnx") for p in self.fs.glob(f"{self.root}/*/*.{kind}*")):
            if self.fs._strip_protocol(path) not in keep:
                self.fs.rm_file(path)

    def clean_snapshots(self, before: int) -> None:
        """Delete the snapshots that a newer base has made useless."""
        for path in self.fs.ls(f"{self.root}/snapshots", detail=False):
            match = re.search(r"/(\d{10})-\w+(\.new)?$", path)
            if match and (int(match[1]) < before or match[2]):
                self.fs.rm_file(path)

    def write_file(self, name: str, data: bytes) -> None:
        """One file of the step's own, by its path below the root."""
        self.fs.makedirs(f"{self.root}/{name.rsplit('/', 1)[0]}", exist_ok=True)
        self._write(f"{self.root}/{name}", data)

    def remove(self, names: Sequence[str]) -> None:
        """Delete files by their paths below the root."""
        for name in names:
            self.fs.rm_file(f"{self.root}/{name}")

    def write_tables(self, tables: Sequence[tuple[str, pa.Table]]) -> list[str]:
        """A Parquet file for each of some tables' rows, on all cores; returns their paths."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda i: self.write_table(*tables[i], self.number * 1000 + i), range(len(tables))))

    def write_table(self, table: str, rows: pa.Table, number: int) -> str:
        """One Parquet file; returns its path below the root."""
        self.fs.makedirs(f"{self.root}/{table}", exist_ok=True)
        name = f"{table}/{number:010d}-{self.owner}.parquet"
        buffer = io.BytesIO()
        pq.write_table(rows, buffer, compression="zstd")
        self._write(f"{self.root}/{name}", buffer.getvalue())
        return name


def read_snapshot(fs: Any, root: str, name: str) -> Loaded:
    """Base and deltas of a snapshot; StateError when one is missing."""

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
    loaded = Loaded(Plan(**base["plan"]), base["state"], files=list(base["files"]))
    for number in range(base_number + 1, last + 1):
        delta = newest if number == last else read(number)
        loaded.deltas.append((delta["calls"], delta["files"]))
        loaded.files += delta["files"]
    return loaded


class Committed(NamedTuple):
    """What the metadata of a committed position says: the snapshot's name, the watermark (epoch ms), and the views
    that started empty and are not to be served until they are backfilled."""

    snapshot: str
    watermark: int
    unserved: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ":".join([self.snapshot, str(self.watermark), *self.unserved])


def parse_metadata(metadata: str) -> Committed:
    """Committed metadata, `<snapshot>:<watermark>[:<view>...]`, read back."""
    name, _, rest = metadata.partition(":")
    watermark, *unserved = rest.split(":")
    if not name or not watermark.isdigit():
        raise StateError(f"committed offsets carry {metadata!r}, not a snapshot: another program commits to this group")
    return Committed(name, int(watermark), tuple(unserved))


def newest_of(positions: Positions) -> Committed | None:
    """The commit that these positions are of."""
    return max((parse_metadata(p.metadata) for p in positions.values()), default=None)


def commit_header(positions: Positions) -> tuple[str, bytes]:
    """What tells on an output partition, in the same transaction, what the commit's positions are."""
    told = [[topic, partition, p.offset, p.metadata] for (topic, partition), p in positions.items()]
    return COMMIT_HEADER, json.dumps(told).encode()


def _told(record: Record) -> dict[TopicPartition, Position]:
    told: list[list[Any]] = next((json.loads(v) for name, v in record.headers if name == COMMIT_HEADER), [])
    return {(topic, partition): Position(offset, metadata) for topic, partition, offset, metadata in told}


def told_positions(broker: Broker, output: TopicPartition) -> dict[TopicPartition, Position]:
    """The positions of the newest commit that can be read on an output partition; none without any."""
    with closing(broker.consumer([output[0]])) as consumer:
        consumer.pause([tp for tp in consumer.assignment() if tp != output])
        end, back = consumer.end_offsets([output])[output], 1_000
        while True:
            consumer.seek(output, max(0, end - back))
            told: dict[TopicPartition, Position] = {}
            while consumer.position(output) < end:
                for record in consumer.poll(0.2):
                    told = _told(record) or told
            if told or back >= end:
                return told
            back *= 10


def committed_of(broker: Broker, group: str) -> dict[int, Committed]:
    """What each partition of a step has committed last."""
    return {tp[1]: parse_metadata(p.metadata) for tp, p in broker.committed(group).items()}


def watermark_of(broker: Broker, group: str, partitions: int = 1) -> int | None:
    """The committed watermark of a step (epoch ms): the lowest of its partitions; None until each has committed."""
    marks = committed_of(broker, group)
    return min(c.watermark for c in marks.values()) if len(marks) >= partitions else None


def unserved_views(broker: Broker, group: str) -> frozenset[str]:
    """Views of a step that are not to be served before `penstock backfill` has filled them."""
    return frozenset(view for committed in committed_of(broker, group).values() for view in committed.unserved)


def listed_files(state_url: str, use_case: str, step: str, table: str, broker: Broker) -> list[str]:
    """URLs of the table files that a step's committed snapshots vouch for, over all its partitions."""
    out = []
    for partition, committed in sorted(committed_of(broker, f"{use_case}.{step}").items()):
        fs, root = url_to_fs(f"{state_url}/{use_case}/{step}/{partition}")
        files = read_snapshot(fs, root, committed.snapshot).files
        out += [fs.unstrip_protocol(f"{root}/{f}") for f in files if f.startswith(f"{table}/")]
    return out
