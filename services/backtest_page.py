"""A backtest's result as one HTML page, in the style of the replay's report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.backtest import difference
from services.report_page import document, figure, legend, lines, panel, square, table


def page(result: Mapping[str, Any]) -> str:
    """The whole page."""
    until = f"{result['score_from'][:10]} to {result['until'][:10]}"
    body = [
        f"<h1>Backtest of {result['use_case']}</h1>",
        f"<p class=soft>{until}, {result['scored']:,} labelled requests, code {result['code_version']}</p>",
        _learners(result, None),
        f"<div class=charts>{''.join(_charts(result))}</div>",
    ]
    if any("held_out" in q for q in result["learners"].values()):
        since, tried = result["settings_chosen_before"][:10], result["configurations_tried"]
        body.append(f"<h2>From {since} on, on which no setting was chosen ({tried} configurations tried)</h2>")
        body.append(_learners(result, "held_out"))
    for part, found in result["differences"].items():
        body.append(f"<h2>Paired differences, 95% intervals by day: {part.replace('_', ' ')}</h2>")
        body.append(table(("", "against", ""), [(d["learner"], d["against"], difference(d)) for d in found]))
    return document(f"Backtest of {result['use_case']}", [*body, "<h2>Month by month</h2>", _months(result)])


def _learners(result: Mapping[str, Any], part: str | None) -> str:
    names = ("examples", "auc", "log_loss", "brier")
    rows = []
    for text, figures in result["learners"].items():
        q = figures if part is None else figures[part]
        rows.append((text, f"{q['examples']:,}", *(_four(q[n]) for n in names[1:])))
    return table(("learner", "examples", "AUC", "log loss", "Brier"), rows)


def _charts(result: Mapping[str, Any]) -> list[str]:
    labels, out = [m["month"][5:] for m in result["months"]], []
    for what, title in (("auc", "AUC by month"), ("log_loss", "Log loss by month")):
        series = {
            text: [(i, m[what]) for i, m in enumerate(q["months"]) if m[what] is not None]
            for text, q in result["learners"].items()
        }
        out.append(panel(title, lines(series, labels, []), legend(series), ""))
    pairs = {
        text: [(g["score"], g["label"]) for g in q["calibration"]["groups"]] for text, q in result["learners"].items()
    }
    out.append(panel("Calibration: mean label, by score", square(pairs), legend(pairs), "ten groups of equal size"))
    return out


def _months(result: Mapping[str, Any]) -> str:
    head = ("month", "examples", "rate", *(f"{n} {t}" for t in result["learners"] for n in ("AUC", "log loss")))
    rows = []
    for i, month in enumerate(result["months"]):
        each = [q["months"][i] for q in result["learners"].values()]
        shown = [_four(m[n]) for m in each for n in ("auc", "log_loss")]
        rows.append((month["month"], f"{month['examples']:,}", figure(month["rate"]), *shown))
    return table(head, rows)


def _four(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
