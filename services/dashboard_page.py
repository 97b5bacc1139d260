"""The dashboard's page, made of what the monitor has seen. Charts are the report's; all text from data is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from services import rollout
from services.monitor import Seen, Trouble
from services.progress import iso
from services.report_page import STYLE, figure, legend, lines, panel, table

LABELS = 6  # dates below a chart
DECISIONS = 10
MORE_STYLE = """
.good, .broken { border-left: 4px solid; padding: .5rem .8rem; margin: .8rem 0; background: var(--card) }
.good { border-color: var(--good) }
.broken, #silent { border-color: var(--bad) }
.broken ul { margin: 0; padding-left: 1.1rem }
.broken b, #silent { color: var(--bad) }
.charts + .scroll { margin-top: 1rem }
#now .tile b { font-size: 1.05rem }
summary { cursor: pointer; margin: .5rem 0 }
td.text { overflow-wrap: anywhere }
"""
NAMES = ("broken", "now", "flow", "quality", "rollout", "drift", "runs", "services")


def style() -> str:
    """The stylesheet."""
    return STYLE + MORE_STYLE


def page(use_case: str, seen: Seen | None) -> str:
    """The whole page with what is known; its script brings the rest and what is new."""
    parts = sections(seen)
    title = f"Penstock · {escape(use_case)}"
    head = (
        f'<meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1"><title>{title}</title>'
        "<link rel=icon href=data:,><link rel=stylesheet href=style.css><script src=dashboard.js defer></script>"
    )
    body = [f"<h1>{title}</h1>", "<p id=silent class=broken role=alert hidden></p>"]
    body += [f"<section id={name}{_spoken(name)}>{parts.get(name, '')}</section>" for name in NAMES]
    return f"<!doctype html><html lang=en><head>{head}</head><body><main>{''.join(body)}</main></body></html>\n"


def _spoken(name: str) -> str:
    return " role=status" if name == "broken" else ""


def sections(seen: Seen | None) -> dict[str, str]:
    """Section -> HTML."""
    if seen is None:
        return {"broken": "<p class=soft>The first look is under way.</p>"}
    status = seen.status
    found = {"broken": _broken(seen.broken), "services": _services(status), "runs": _runs(seen.runs)}
    if "problem" not in status:
        found |= {"now": _now(seen), "flow": _flow(seen), "rollout": _rollout(status["serving"])}
        found |= {"quality": _quality(seen), "drift": _drift(status["drift"])}
    return found


def _broken(troubles: Sequence[Trouble]) -> str:
    if not troubles:
        return "<p class=good>Nothing is broken.</p>"
    items = (f"<li><b>{escape(t.what)}</b>: {escape(t.why)}, since {_clock(t.since)}" for t in troubles)
    return f"<div class=broken><ul>{''.join(items)}</ul></div>"


def _now(seen: Seen) -> str:
    status, newest = seen.status, seen.days[-1] if seen.days else {}
    champion, learner = status["serving"]["roles"]["champion"], status["learner"]
    mark = status["steps"]["featurizer"]["watermark"]
    tiles = {
        "serving": f"version {champion}" if champion else "the prior",
        "refresh of it": f"{learner['number']:,}" if learner else "–",
        "features are of": iso(mark) if mark else "–",
        "learned labels up to": iso(learner["latest_label_time"]) if learner else "–",
        f"AUC, {newest.get('day', 'newest day')}": figure(newest.get("auc")),
        "log loss, same day": figure(newest.get("log_loss")),
        "labelled answers": f"{sum(v['examples'] for v in seen.versions):,}",
        "rejected": f"{sum(status['rejected'].values()):,}",
    }
    shown = (f"<div class=tile><b>{escape(str(v))}</b><span>{escape(k)}</span></div>" for k, v in tiles.items())
    return f"<div class=tiles>{''.join(shown)}</div>"


def _flow(seen: Seen) -> str:
    rows = []
    for name, step in seen.status["steps"].items():
        mark, rate = step["watermark"], seen.rates.get(name)
        at = iso(mark) if mark else "nothing yet"
        speed = "–" if rate is None else f"{rate:,.1f}"
        rows.append((name, step["members"], at, f"{step['position']:,}", f"{step['lag']:,}", speed))
    rejected = ", ".join(f"{n:,} {reason}" for reason, n in sorted(seen.status["rejected"].items()))
    head = ("step", "running", "complete up to", "records read", "behind", "records/s")
    return f"<h2>Flow</h2>{table(head, rows)}<p class=soft>Rejected: {escape(rejected or 'none')}</p>"


def _quality(seen: Seen) -> str:
    days = seen.days
    if not days:
        return "<h2>Quality of what was served</h2><p class=soft>No labels yet.</p>"
    every = -(-len(days) // LABELS)
    labels = [d["day"][5:] if i % every == 0 else "" for i, d in enumerate(days)]
    marks = [i - 0.5 for i in range(1, len(days)) if days[i]["version"] != days[i - 1]["version"]]
    note = "dotted: another version answered most from here on" if marks else ""
    charts = {
        "AUC by day": {"served": "auc"},
        "Log loss by day": {"served": "log_loss"},
        "Calibration by day": {"mean score": "score", "mean label": "rate"},
    }
    panels = []
    for title, names in charts.items():
        series = {said: [(i, d[n]) for i, d in enumerate(days) if d[n] is not None] for said, n in names.items()}
        panels.append(panel(title, lines(series, labels, marks), legend(series), note))
    head = ("examples", "AUC", "log loss", "mean score", "mean label")
    rows = [_row(v, "version", "from", "until") for v in seen.versions]
    versions = table(("version", "first day", "last day", *head), rows)
    by_day = table(("day", "version", *head), [_row(d, "day", "version") for d in reversed(days)])
    figures = f"<details id=days><summary>The figures by day</summary>{by_day}</details>"
    return f"<h2>Quality of what was served</h2><div class=charts>{''.join(panels)}</div>{versions}{figures}"


def _row(found: Mapping[str, Any], *names: str) -> tuple[Any, ...]:
    figures = (figure(found[name]) for name in ("auc", "log_loss", "score", "rate"))
    return (*(found[name] for name in names), f"{found['examples']:,}", *figures)


def _rollout(serving: Mapping[str, Any]) -> str:
    trial = rollout.trial_sentence(serving)
    shown = f"<p>On trial: {escape(trial)}</p>" if trial else "<p class=soft>No trial runs.</p>"
    newest = reversed(serving["decisions"][-DECISIONS:])
    rows = [(_clock(d["time"] / 1000), d["version"] or "–", d["action"], d["sentence"]) for d in newest]
    return f"<h2>Versions</h2>{shown}{table(('at', 'version', 'decision', 'why'), rows)}"


def _drift(drift: Mapping[str, Any] | None) -> str:
    if drift is None:
        return "<h2>Drift</h2><p class=soft>Nothing has moved.</p>"
    rows = [(f["name"], f"{f['before']:g}", f"{f['after']:g}", f"{f['score']:+.1f}") for f in drift["features"]]
    told = f"<p>Up to {iso(drift['time'])}, {escape(drift['what'])}:</p>"
    return f"<h2>Drift</h2>{told}{table(('feature', 'before', 'after', 'deviations'), rows)}"


def _runs(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = [(r["dag"], r["state"], (r["start"] or "–")[:19], (r["end"] or "–")[:19]) for r in runs]
    shown = table(("DAG", "state", "started", "ended"), rows) if rows else "<p class=soft>None known.</p>"
    return f"<h2>Last DAG runs</h2>{shown}"


def _services(status: Mapping[str, Any]) -> str:
    rows = [(n, s["state"], s["restarts"], _clock(s["since"])) for n, s in status["services"].items()]
    rows = rows or [(part, "answers" if there else "no answer", "", "") for part, there in status["reachable"].items()]
    return f"<h2>Services</h2>{table(('service', 'state', 'restarts', 'since'), rows)}"


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
