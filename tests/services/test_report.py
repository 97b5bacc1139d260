"""The report: figures on small examples, and the page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from services import report
from services.baselines import Scores, constant_before, rate_before
from services.replay_log import ReplayLog, as_of, freshness, quantiles, read_log, tick_times
from services.report_page import nice, page
from services.served import Examples, Prediction
from tests.toy import use_case

HOUR, WEEK = 3_600_000, 604_800_000
START = 1_357_171_200_000  # 2013-01-03T00:00Z, where a week begins


def prediction(i: int, at: int, label: float, label_time: int, score: float, version: str = "1") -> Prediction:
    raw = msgspec.Raw(b"{}")
    return Prediction(f"r{i}", at, version, "champion", score, raw, raw, raw, label, label_time)


def examples(n: int = 400, signal: float = 2.0) -> Examples:
    rng = np.random.default_rng(0)
    times = np.sort(rng.integers(START, START + 2 * WEEK, n))
    logits = rng.normal(size=n)
    labels = rng.random(n) < 1 / (1 + np.exp(-signal * logits))
    scores = 1 / (1 + np.exp(-logits))
    rows = zip(times.tolist(), labels.tolist(), scores.tolist(), strict=True)
    return Examples.of(
        [
            prediction(i, t, float(y), t + 2 * HOUR, s, "1" if t < START + WEEK else "2")
            for i, (t, y, s) in enumerate(rows)
        ]
    )


def whole(n: int = 400) -> dict[str, Any]:
    """A report with all its parts, from made-up examples."""
    e = examples(n)
    first = np.where(e.event_time < START + HOUR, np.nan, np.full(len(e), 0.4))
    scores = Scores(e.score, rate_before(e.event_time, e.label, e.label_time, 24 * HOUR, 0.3), first)
    entries = [
        {
            "kind": "tick",
            "tick": START,
            "phases": {"produce": 2.0, "steps": 20.0},
            "freshness": [12, 14, 900],
            "answers": [],
        },
        {"kind": "retrain", "cut": START + WEEK, "version": "1", "label_to_serving_s": 21.5, "training_s": 11.0},
    ]
    decision = {"version": "1", "action": "promoted", "sentence": "it is the <first>", "cut": START + WEEK}
    found = {"events": 900, "predictions": 410, "examples": len(e)}
    found |= report.measured(use_case, e, scores, START + WEEK, START + 2 * WEEK) | report.observed(entries)
    found["versions"] = report.versions({"decisions": [decision]}, entries)
    found["retrains"] = len(found["versions"])
    found["checks"] = report.checks(found, e.records, entries)
    found["urls"] = {"MLflow": "http://127.0.0.1:1"}
    return found


def test_rate_before_uses_only_what_is_known() -> None:
    labels, known = np.array([1.0, 0.0, 1.0, 1.0]), np.array([10, 20, 30, 40])
    asked = np.array([5, 10, 11, 21, 31, 100])
    assert rate_before(asked, labels, known, None, 0.3).tolist() == [0.3, 0.3, 1.0, 0.5, 2 / 3, 0.75]
    assert rate_before(asked, labels, known, 15, 0.3).tolist() == [0.3, 0.3, 1.0, 0.5, 0.5, 0.3]


def test_constant_before() -> None:
    e = Examples.of([prediction(0, 1, 1.0, 10, 0.5), prediction(1, 2, 0.0, 20, 0.5)])
    assert [constant_before(e, at, 0.3) for at in (5, 15, 25)] == [0.3, 1.0, 0.5]


def test_figures_of_a_report() -> None:
    found, e = whole(), examples()
    from sklearn.metrics import log_loss, roc_auc_score

    rows = e.event_time >= START + WEEK
    assert found["auc"] == pytest.approx(roc_auc_score(e.label[rows], e.score[rows]), abs=1e-4)
    assert found["log_loss"] == pytest.approx(log_loss(e.label[rows], e.score[rows]), abs=1e-4)
    assert found["baselines"]["constant"]["auc"] == found["baselines"]["first_model"]["auc"] == 0.5
    assert found["scored"]["examples"] == rows.sum() == found["by_version"]["2"]["examples"]
    assert [w["examples"] for w in found["by_week"]] == [len(e) - rows.sum(), rows.sum()]
    assert found["by_week"][0]["first_model"] == {"auc": None, "log_loss": None}  # it had not learned by then
    assert found["by_week"][0]["constant"]["log_loss"] == pytest.approx(
        log_loss(e.label[~rows], np.full((~rows).sum(), 0.3)), abs=1e-4
    )
    assert sum(g["examples"] for g in found["calibration"]) == rows.sum()
    assert found["label_to_serving_s"]["p50"] == 21.5
    assert sum(found["freshness_histogram"]["counts"]) == 3


def test_checks_find_what_is_wrong() -> None:
    e = examples(50)
    logged = [[r.request_id, r.event_time, r.score, r.version, r.arm, 0, 0] for r in e.records]
    found = {"auc": 0.7, "baselines": {name: {"auc": 0.6} for name in report.BASELINES}}
    fine = report.checks(found, e.records, [{"kind": "tick", "answers": logged}])
    assert all(c["ok"] for c in fine)
    logged[3][2] += 0.1
    found["baselines"]["first_model"]["auc"] = 0.71
    wrong = [c["check"] for c in report.checks(found, e.records, [{"kind": "tick", "answers": logged}]) if not c["ok"]]
    assert wrong == ["answers are logged", "AUC above: first model, frozen"]
    found["baselines"]["first_model"]["auc"] = None
    assert len(report.checks(found, e.records, [])) == 1  # the prior answered some: nothing to compare


def test_text_has_the_figures() -> None:
    found = whole()
    text = report.as_text(found)
    assert f"{found['auc']:.4f}"[1:] in text
    assert "it is the <first>" in text
    assert "events 900" in text


class Page(HTMLParser):
    """Collects what a page opens without closing, and what it fetches."""

    VOID = ("meta", "td", "tr", "th", "line", "circle", "rect", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [v or "" for k, v in attrs if k == "src" or (k == "href" and tag == "link")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    html, data = report.write(whole(), tmp_path)
    text = html.read_text()
    parsed = Page()
    parsed.feed(text)
    assert (parsed.open, parsed.fetched) == ([], [])
    assert "<script" not in text
    assert "&lt;first&gt;" in text
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S)
    assert len(text) < 200_000
    assert json.loads(data.read_text())["events"] == 900


def test_a_page_without_examples() -> None:
    e = Examples.of([])
    none = np.zeros(0)
    found = {"events": 0, "predictions": 0, "examples": 0, "versions": [], "retrains": 0, "urls": {}, "checks": []}
    found |= report.measured(use_case, e, Scores(none, none, none), START, START + WEEK) | report.observed([])
    assert found["auc"] is None
    assert "–" in page(found)
    assert "events 0" in report.as_text(found)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.513, 0.748), (0.0, 130_000.0), (0.5, 0.5)])
def test_nice_covers(low: float, high: float) -> None:
    a, b = nice(low, high)
    assert a <= low <= high <= b


def test_as_of_tells_what_the_windows_were_held_to() -> None:
    ticks = [(0, 10, "tick"), (10, 20, ""), (20, 30, "request")]
    instant = as_of([{"kind": "tick", "tick": a, "until": b, "held": held} for a, b, held in ticks])
    assert [instant(t) for t in (-1, 0, 9, 10, 25, 30)] == [None, 0, 0, None, 25, None]


def test_the_log_drops_a_line_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = ReplayLog(path)
    log.add("tick", tick=1, phases={"a": 1.0, "b": 3.0}, freshness=[5, 7])
    log.close()
    path.write_bytes(path.read_bytes() + b'{"kind": "ti')
    assert len(read_log(path)) == 1
    again = ReplayLog(path)
    again.add("tick", tick=2, phases={"a": 3.0}, freshness=[])
    again.close()
    entries = read_log(path)
    assert [e["tick"] for e in entries] == [1, 2]
    assert tick_times(entries)["a"]["p50"] == 2.0
    assert tick_times(entries)["tick"]["n"] == 2
    assert freshness(entries)["p50"] == 6
    assert quantiles([])["p50"] is None
