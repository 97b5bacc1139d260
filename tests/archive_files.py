"""A synthetic examples archive: labels that follow from one number and one id, with noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.usecase import Category, ModelInputs

TARGETS = ("strong", "seldom")
INPUTS = ModelInputs(("x", "y", "late"), (Category("kind", 64, 4), Category("place", 32, 2)))
DAY = 86_400_000
START = 15_000 * DAY


def write_archive(folder: Path, rows: int, days: int = 10, files: int = 2, seed: int = 0) -> list[str]:
    """Parquet files of `rows` examples whose labels come in the `days` days from START on."""
    rng = np.random.default_rng(seed)
    x, kind = rng.normal(size=rows), rng.integers(0, 8, rows)
    logit = 1.5 * x + np.where(kind < 4, 1.0, -1.0)
    times = START + np.sort(rng.integers(0, days * DAY, rows))
    table = pa.table(
        {
            "request_id": [f"r{i:06d}" for i in range(rows)],
            "event_time": times - 3_600_000,
            "label": (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(float),
            "label_time": times,
            "score": np.full(rows, 0.3),
            "version": ["prior"] * rows,
            "arm": ["champion"] * rows,
            "x": pa.array(np.where(rng.random(rows) < 0.1, np.nan, x), from_pandas=True),
            "y": pa.array(rng.integers(0, 10, rows)),
            "late": pa.array(rng.random(rows) < 0.5),
            "kind": [None if k == 7 else f"k{k}" for k in kind],
            "place": pa.array(rng.integers(0, 5, rows)),
            "strong": (logit > 1).astype(float),
            "seldom": pa.array(np.where(rng.random(rows) < 0.9, np.nan, 1.0), from_pandas=True),
            "recent": [rng.normal(size=k).tolist() for k in rng.integers(0, 4, rows)],
            "sizes": [None if k == 3 else list(range(k)) for k in rng.integers(0, 4, rows)],
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    shuffled = rng.permutation(rows)
    paths = [folder / f"{i}.parquet" for i in range(files)]
    for path, part in zip(paths, np.array_split(shuffled, files), strict=True):
        pq.write_table(table.take(part), path)
    return [str(path) for path in paths]
