"""Drift on real flights: January is calm, and what is planted in it is named within a week."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.usecase import load
from pipelines.drift import DAY_MS, Drift
from pipelines.step import Event
from services import backtest_data, timetable
from services.backtest_data import Range
from services.progress import Progress

FLIGHTS = load("flights")
START = 1_356_998_400_000  # 1 January 2013
PLANTED = START + 25 * DAY_MS
Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    over = Range(START, START + 33 * DAY_MS)
    progress = Progress(over.from_ms, over.until_ms, out=io.StringIO())
    made = backtest_data.examples(tmp_path_factory.mktemp("home"), FLIGHTS, timetable, over, progress)
    table = pa.concat_tables([pq.read_table(f) for f in made.files])
    columns = ["label", "label_time", "request_id", *FLIGHTS.inputs.columns]
    order = [("label_time", "ascending"), ("request_id", "ascending")]
    return list(table.select(columns).sort_by(order).to_pylist())


def told(rows: list[dict[str, Any]], change: Change = dict) -> list[dict[str, Any]]:
    step, found = Drift(FLIGHTS), []
    for row in rows:
        vector = change(row) if row["label_time"] >= PLANTED else row
        value = SimpleNamespace(features=vector, label=row["label"], score=0.24)
        event = Event(Any, value, row["label_time"], row["label_time"])  # type: ignore[arg-type]
        found += step.process([event], row["label_time"]).messages
    return [json.loads(m.value or b"") for m in found]


def odd(row: dict[str, Any]) -> bool:
    return bool(zlib.crc32(row["request_id"].encode()) % 2)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda v: v | {"distance": 1.609344 * v["distance"]}, "distance"),
        (lambda v: v | {"dep_all_dep_delay_count_24h": None} if odd(v) else v, "dep_all_dep_delay_count_24h is null"),
        (lambda v: v | {"carrier": "9E"} if v["carrier"] == "UA" else v, "carrier=UA"),
        (dict, None),
    ],
)
def test_what_is_planted_is_named_within_a_week(rows: list[dict[str, Any]], change: Change, name: str | None) -> None:
    found = told(rows, change)
    if name is None:
        assert found == []
        return
    assert len(found) == 1 and PLANTED < found[0]["time"] <= PLANTED + 7 * DAY_MS
    assert name in {f["name"] for f in found[0]["features"][:2]} and found[0]["what"] == "inputs"
