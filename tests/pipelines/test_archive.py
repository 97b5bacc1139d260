from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import ConfigError, StateError
from features.inputs import encode
from features.usecase import EventSequence, ModelInputs
from pipelines import archive
from tests.archive_files import DAY, INPUTS, START, write_archive

ALL = (0, 2**62)


def test_load_equals_encoding_the_rows_one_by_one(tmp_path: Path) -> None:
    files = write_archive(tmp_path, 500)
    rows = sorted(
        (r for f in files for r in pq.read_table(f).to_pylist()), key=lambda r: (r["label_time"], r["request_id"])
    )
    inputs = replace(INPUTS, sequences=(EventSequence("both", ("recent", "sizes")), EventSequence("one", ("recent",))))
    examples = archive.load(files, inputs, *ALL)
    found, one_by_one = examples.inputs, encode(inputs, rows)
    assert np.array_equal(found.numbers, one_by_one.numbers, equal_nan=True) and np.isnan(found.numbers).any()
    assert np.array_equal(found.ids, one_by_one.ids)
    for ours, theirs in zip(found.sequences, one_by_one.sequences, strict=True):
        assert np.array_equal(ours.values, theirs.values) and np.array_equal(ours.lengths, theirs.lengths)
        assert len(set(ours.lengths)) > 2 and ours.values.dtype == np.float32
    assert found.numbers.dtype == np.float32 and found.ids.dtype == np.int64
    assert examples.request_id.tolist() == [r["request_id"] for r in rows]
    assert examples.label.tolist() == [r["label"] for r in rows]
    assert examples.event_time.tolist() == [r["event_time"] for r in rows]


def test_targets_are_columns_and_null_where_a_file_has_none(tmp_path: Path) -> None:
    old, new = write_archive(tmp_path, 200)
    pq.write_table(pq.read_table(old).drop_columns(["strong"]), old)
    known = pq.read_table(new)["request_id"].to_pylist()
    examples = archive.load([old, new], INPUTS, *ALL, targets=("seldom", "strong"))
    assert examples.targets.shape == (200, 2)
    assert np.array_equal(~np.isnan(examples.targets[:, 1]), np.isin(examples.request_id.astype(str), known))
    assert 0 < np.isnan(examples.targets[:, 0]).sum() < 200 and np.nanmin(examples.targets[:, 0]) == 1


def test_equal_label_times_are_ordered_by_request_id(tmp_path: Path) -> None:
    (file,) = write_archive(tmp_path, 50, files=1)
    table = pq.read_table(file)
    same = table.set_column(table.schema.get_field_index("label_time"), "label_time", pa.array([START] * 50))
    pq.write_table(same, file)
    assert archive.load([file], INPUTS, *ALL).request_id.tolist() == [f"r{i:06d}" for i in range(50)]


def test_the_range_is_half_open(tmp_path: Path) -> None:
    files = write_archive(tmp_path, 300)
    whole = archive.load(files, INPUTS, *ALL)
    first, last = int(whole.label_time[100]), int(whole.label_time[200])
    part = archive.load(files, INPUTS, first, last)
    assert part.label_time.min() == first and part.label_time.max() < last
    assert part.request_id.tolist() == whole.between(first, last).request_id.tolist()


def test_integers_hash_as_integers_in_every_file(tmp_path: Path) -> None:
    """A null in one file must not turn its integers into floats, whose text is another."""
    files = write_archive(tmp_path, 100)
    table = pq.read_table(files[0])
    places = table["place"].to_pylist()
    at = table.schema.get_field_index("place")
    pq.write_table(table.set_column(at, "place", pa.array([None, *places[1:]], pa.int64())), files[0])
    examples = archive.load(files, INPUTS, *ALL)
    place = INPUTS.categories[1]
    expected = {
        encode(replace(INPUTS, numbers=(), categories=(place,)), [{"place": v}]).ids[0, 0] for v in (None, *range(5))
    }
    assert set(examples.inputs.ids[:, 1]) == expected


def test_no_examples_is_empty_arrays(tmp_path: Path) -> None:
    for files in ([], write_archive(tmp_path, 10)):
        examples = archive.load(files, INPUTS, START + 99 * DAY, START + 100 * DAY)
        assert len(examples) == 0 and examples.inputs.numbers.shape == (0, 3) and examples.inputs.ids.shape == (0, 2)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    files = write_archive(tmp_path, 10)
    with pytest.raises(ConfigError, match="colour"):
        archive.load(files, ModelInputs(("x", "colour")), *ALL)
    with pytest.raises(StateError, match="gone"):
        archive.load([str(tmp_path / "gone.parquet")], INPUTS, *ALL)
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(Path(files[0]).read_bytes()[:500])
    with pytest.raises(StateError, match="damaged"):
        archive.load([str(damaged)], INPUTS, *ALL)
