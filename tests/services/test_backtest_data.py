"""The examples a backtest makes in columns are those that scorer and joiner make one by one."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.usecase import UseCase, load
from pipelines.joiner import Joiner, predictions_contract
from pipelines.prediction import Choice
from pipelines.scorer import Scorer
from pipelines.step import Event
from services import backtest_data, clickstream, source, timetable
from services.backtest_data import DAY_MS, Range
from services.progress import Progress
from services.source import Source
from tests.due import due
from tests.replay_rig import START, Orders
from tests.toy import use_case as toy

HOUR = 3_600_000
SPRING = 1_767_225_600_000  # 2026-01-01, when the clicks begin


def one_by_one(use_case: UseCase, events: Source, over: Range) -> dict[str, dict[str, Any]]:
    """Request id -> example, by the steps that live runs."""
    scorer = Scorer(
        use_case,
        lambda entities, fields: (entities, fields),
        lambda entities, vectors: [Choice("", 0, "champion", 0.5, {}, {})] * len(vectors),
    )
    decoder = backtest_data.RequestDecoder(use_case, allow_event_time=True, new_id=str)
    contracts, items = list(scorer.inputs.values()), []
    names = [c.name for c in contracts]
    for i, event in enumerate(events.events(over.from_ms, over.until_ms)):
        value = use_case.contract(event.event).decode(event.value)
        items.append((event.time, names.index(event.event), 0, i, event.time, value))
    ask = scorer.inputs[use_case.topic("requests")]
    for i, request in enumerate(events.requests(over.from_ms, over.until_ms)):
        (asked,) = decoder.decode(msgspec.json.encode(request.row))
        value = ask.decode(msgspec.json.encode(request.row))
        value.entities, value.fields = asked.entities, asked.fields
        items.append((request.time, names.index("requests"), 0, i, request.time, value))
    items.sort(key=lambda item: item[:4])
    given = due(contracts, [item[:5] for item in items], [item[5] for item in items])
    messages = scorer.process(given, over.until_ms).messages
    predicted, wait = predictions_contract(use_case), use_case.label.wait.total_seconds() * 1000
    values = [predicted.decode(m.value) for m in messages]
    heard = [Event(predicted, v, v.event_time, v.event_time) for v in values]
    label = use_case.contract(use_case.label.event)
    for event in events.events(over.from_ms, over.until_ms + int(wait) + 1):
        if event.event == label.name:
            heard.append(Event(label, label.decode(event.value), event.time, event.time))
    heard.sort(key=lambda e: (e.time, e.contract.name))
    rows = Joiner(use_case).process(heard, over.until_ms + 3 * int(wait)).rows["examples"]
    return {row["request_id"]: row for row in rows}


def in_columns(use_case: UseCase, events: Source, over: Range, home: Path) -> dict[str, dict[str, Any]]:
    progress = Progress(over.from_ms, over.until_ms, out=io.StringIO())
    made = backtest_data.examples(home, use_case, events, over, progress)
    rows = pa.concat_tables([pq.read_table(f) for f in made.files]).to_pylist()
    assert len({r["request_id"] for r in rows}) == len(rows)
    assert backtest_data.examples(home, use_case, events, over, progress) == made
    return {row["request_id"]: row for row in rows}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and isinstance(b, int | float) and math.isclose(a, b, rel_tol=1e-12))


CASES = {
    "toy": (toy, Orders(), Range(START, START + 3 * DAY_MS // 2), 500),
    "clicks": (load("clicks"), clickstream, Range(SPRING, SPRING + DAY_MS + 5 * HOUR), 2000),
    "flights": (load("flights"), timetable, Range(timetable.OPENING - 5 * HOUR, timetable.OPENING + 40 * HOUR), 1400),
}


@pytest.mark.parametrize("name", CASES)
def test_vectors_and_labels_equal_those_of_scorer_and_joiner(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_case, events, over, least = CASES[name]
    monkeypatch.setitem(source.SOURCES, "toy", "tests.replay_rig")
    expected, found = one_by_one(use_case, events, over), in_columns(use_case, events, over, tmp_path)
    assert found.keys() == expected.keys() and len(found) >= least
    for key, row in expected.items():
        for column in found[key].keys() - {"score", "version", "arm"}:
            assert same(found[key][column], row.get(column)), f"{key}: {column}"


@pytest.mark.parametrize(("tick", "stale"), [(HOUR // 4, 0), (1, HOUR), (HOUR // 4, 7 * HOUR)])
def test_windows_as_of_a_tick_or_an_earlier_time(tick: int, stale: int, tmp_path: Path) -> None:
    """Served as of an earlier instant: the windows are those of a request at that instant, the rest its own."""
    over = Range(SPRING, SPRING + DAY_MS, tick, stale)
    clicks = load("clicks")
    found = in_columns(clicks, clickstream, over, tmp_path)
    assert len(found) > 1500
    before = sorted(clickstream.events(over.from_ms, over.until_ms), key=lambda e: e.time)
    shown = [(json.loads(e.value)["user"], e.time) for e in before if e.event == "shown"]
    for row in list(found.values())[::40]:
        at = row["event_time"] // tick * tick - stale
        since = max(SPRING, (at - 24 * HOUR) // HOUR * HOUR)
        assert row["user_shown_time_count_24h"] == sum(u == row["user"] and since <= t < at for u, t in shown)
        assert row["hour_cos"] == pytest.approx(math.cos(2 * math.pi * (row["event_time"] / HOUR % 24) / 24))
