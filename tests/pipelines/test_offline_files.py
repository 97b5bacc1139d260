"""Merging and retention of offline files: killed at any step, every row is read once, and nobody is disturbed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.checkpoint import Checkpoints
from pipelines.offline_files import FAN, Partition, merge_plan
from tests.toy import all_orders, shop_item

DAY = 86_400_000
NOW = 4e9  # epoch seconds, later than any file of a test


class Killed(BaseException):
    """Stands for kill -9: nothing of the process goes on."""


def table(*rows: tuple[str, int, int]) -> pa.Table:
    """(shop, day, count of si_count); the row of an empty window has count 0 and nothing else."""
    times = pa.array([day * DAY for _, day, _ in rows], pa.timestamp("ms", "UTC"))
    counts = [count for *_, count in rows]
    lists = [[1.0] if count else [] for count in counts]
    return pa.table(
        {
            "shop": [shop for shop, *_ in rows],
            "item": [1] * len(rows),
            "event_timestamp": times,
            "si_count": counts,
            "si_sum": [float(count) for count in counts],
            "si_last": pa.array([1.5 if count else None for count in counts], pa.float64()),
            "si_last_3": pa.array(lists, pa.list_(pa.float64())),
            "si_who": pa.array(["x" if count else None for count in counts], pa.string()),
            "si_whos": pa.array([["x"] if count else [] for count in counts], pa.list_(pa.string())),
        }
    )


class Rig:
    """A featurizer's folder: a file of two rows a day, each closed by a commit, and one that no commit lists."""

    def __init__(self, root: str, days: int = 0) -> None:
        self.checkpoints = Checkpoints(root, "owner")
        self.listed: list[str] = []
        self.schemas: set[str] = set()
        self.checkpoints.write_table("shop_item", table(("lost", 0, 9)), 0)
        for day in range(days):
            self.close(("a", day, day), ("b", day, day + 1))

    def close(self, *rows: tuple[str, int, int]) -> None:
        self.checkpoints.number += 1
        number = self.checkpoints.number * 1000
        self.listed.append(self.checkpoints.write_table("shop_item", table(*rows), number))

    @property
    def partition(self) -> Partition:
        return Partition(self.checkpoints.fs, self.checkpoints.root, tuple(self.listed))

    def read(self) -> list[tuple[str, int, int]]:
        rows = []
        for file in self.partition.files("shop_item"):
            with self.checkpoints.fs.open(f"{self.checkpoints.root}/{file.path}", "rb") as opened:
                found = pq.read_table(opened)
                self.schemas.add(str(found.schema))
                rows += found.select(["shop", "event_timestamp", "si_count"]).to_pylist()
        assert len(self.schemas) == 1
        return [(r["shop"], round(r["event_timestamp"].timestamp() * 1000) // DAY, r["si_count"]) for r in rows]

    @property
    def paths(self) -> list[str]:
        return [f.path for f in self.partition.files("shop_item")]


@pytest.fixture(params=["local", "memory"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "local":
        yield lambda days=0: Rig(str(tmp_path / "state"), days)
        return
    yield lambda days=0: Rig("memory://state/0", days)
    fsspec.filesystem("memory").rm("/state", recursive=True)


def test_many_small_files_become_few_with_the_same_rows_in_the_same_order(make: Callable[..., Rig]) -> None:
    rig = make(FAN * FAN + FAN + 3)
    before = rig.read()
    assert rig.partition.merge("shop_item") == 2
    assert rig.read() == before
    assert [len(f.listed) for f in rig.partition.files("shop_item")] == [FAN * FAN, FAN, 1, 1, 1]
    assert rig.partition.merge("shop_item") == 0


def test_growing_day_by_day_files_stay_few_and_a_row_is_rarely_written_again(make: Callable[..., Rig]) -> None:
    rig, written = make(), 0
    for day in range(200):
        rig.close(("a", day, day))
        before = {f.path: len(f.listed) for f in rig.partition.files("shop_item")}
        rig.partition.merge("shop_item")
        rig.partition.remove("shop_item", before=NOW)
        written += sum(len(f.listed) for f in rig.partition.files("shop_item") if f.path not in before)
    assert [count for *_, count in rig.read()] == list(range(200))
    assert len(rig.paths) <= 3 * FAN and written <= 3 * 200


def test_the_listed_files_go_once_a_merged_one_has_stood_for_them_long_enough(make: Callable[..., Rig]) -> None:
    rig = make(FAN + 1)
    before = rig.read()
    rig.partition.merge("shop_item")
    assert rig.partition.remove("shop_item", before=0.0) == 0
    assert rig.partition.remove("shop_item", before=NOW) == FAN
    assert rig.read() == before
    assert rig.partition.remove("shop_item", before=NOW) == 0


def test_a_new_owner_of_the_featurizer_leaves_merged_files_alone(make: Callable[..., Rig]) -> None:
    rig = make(FAN + 1)
    before = rig.read()
    rig.partition.merge("shop_item")
    rig.partition.remove("shop_item", before=NOW)
    rig.checkpoints.clean(rig.listed)
    assert rig.read() == before and ("lost", 0, 9) not in before


def test_a_merged_file_of_another_history_counts_for_nothing(make: Callable[..., Rig]) -> None:
    """Some commits were taken back and their numbers used again."""
    rig = make(FAN)
    rig.partition.merge("shop_item")
    rig.checkpoints.owner = "other"
    rig.listed = rig.listed[:-1]
    rig.checkpoints.number -= 1
    rig.close(("c", 99, 7))
    assert rig.read()[-1] == ("c", 99, 7) and len(rig.paths) == FAN


def test_another_view_is_left_alone(make: Callable[..., Rig]) -> None:
    rig = make(FAN)
    assert rig.partition.merge(all_orders.name) == 0
    assert rig.partition.remove(all_orders.name, before=NOW) == 0
    assert rig.partition.retain(all_orders, 5 * DAY) == 0
    assert len(rig.paths) == FAN


STEPS = [("makedirs", False), ("open", False), ("mv", False), ("mv", True), ("rm_file", False), ("rm_file", True)]


@pytest.mark.parametrize("when", [1, 2, 9])
@pytest.mark.parametrize(("step", "after"), STEPS)
def test_killed_at_any_step_no_row_is_lost_or_doubled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool, when: int
) -> None:
    rig = Rig(str(tmp_path), FAN * FAN + 2)
    before = rig.read()

    def housekeeping() -> None:
        rig.partition.merge("shop_item")
        rig.partition.remove("shop_item", before=NOW)

    fs = type(rig.checkpoints.fs)
    with monkeypatch.context() as patch:
        original, calls = getattr(fs, step), [0]

        def dying(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == when and not after:
                raise Killed
            result = original(*args, **kwargs)
            if calls[0] == when:
                raise Killed
            return result

        patch.setattr(fs, step, dying)
        try:
            housekeeping()
        except Killed:
            assert calls[0] == when
    assert rig.read() == before
    rig.checkpoints.clean(rig.listed)
    assert rig.read() == before
    housekeeping()
    assert rig.read() == before and len(rig.paths) == 3
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(left) == 3


def test_a_file_half_written_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(str(tmp_path), FAN)
    before = rig.read()

    def full(*args: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(OSError, match="disk full"):
            rig.partition.merge("shop_item")
    assert rig.read() == before
    rig.partition.merge("shop_item")
    assert rig.read() == before and len(rig.paths) == 1


def as_of(rows: list[tuple[str, int, int]], shop: str, day: int) -> int:
    """What a point-in-time read gives, the empty window without a row."""
    return next((count for s, d, count in reversed(rows) if s == shop and d <= day), 0)


@pytest.mark.parametrize("seed", range(4))
def test_retention_changes_no_answer_from_its_instant_on(make: Callable[..., Rig], seed: int) -> None:
    rng = random.Random(seed)
    rig = make()
    for day in range(60):
        shops = [shop for shop in "abcd" if rng.random() < 0.1] or ["d"]
        rig.close(*((shop, day, rng.choice([0, day])) for shop in shops))
        if rng.random() < 0.2:
            rig.partition.merge("shop_item")
    before = rig.read()
    for since in (20, 45):
        taken = rig.partition.retain(shop_item, since * DAY)
        rig.partition.merge("shop_item")
        rig.partition.remove("shop_item", before=NOW)
        rows = rig.read()
        for day in range(since, 60):
            assert [as_of(rows, s, day) for s in "abcd"] == [as_of(before, s, day) for s in "abcd"]
        if taken:
            assert max(f.since for f in rig.partition.files("shop_item")) == since * DAY
            assert sum(day < since for _, day, _ in rows) < sum(day < since for _, day, _ in before)
        assert rig.partition.retain(shop_item, since * DAY) == 0


def test_of_a_global_view_its_last_row_is_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), "owner")
    times = pa.array([DAY, 2 * DAY], pa.timestamp("ms", "UTC"))
    rows = pa.table({"event_timestamp": times, "all_count": [1, 2], "all_mean": [0.5, 1.5]})
    name = checkpoints.write_table("all_orders", rows, 1)
    partition = Partition(checkpoints.fs, checkpoints.root, (name,))
    assert partition.retain(all_orders, 3 * DAY) == 1
    (file,) = partition.files("all_orders")
    assert pq.read_table(tmp_path / file.path).to_pydict()["all_count"] == [2]
    assert os.listdir(tmp_path / "merged") == ["all_orders"]


def test_a_plan_merges_only_neighbours_of_a_level() -> None:
    assert merge_plan([1] * (FAN - 1)) == []
    assert merge_plan([FAN, *[1] * FAN]) == [(1, 1 + FAN)]
    assert merge_plan([FAN**4] * FAN) == []
