"""The report as one HTML page: no scripts, no network, charts drawn here; light and dark, phone and desk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from services.progress import iso

Point = tuple[float, float]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 240, 44, 10, 12, 30
COLOURS = 6
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5c6878; --line: #d9dfe7; --page: #fff; --card: #f6f8fa;
  --c0: #0b62c4; --c1: #c2571a; --c2: #3d8a4e; --c3: #8a8f98; --c4: #8446b8; --c5: #a3821a;
  --bad: #b3261e; --good: #1e7a3c }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --soft: #9aa6b5; --line: #303946; --page: #11151b; --card: #191f27;
    --c0: #6cb0ff; --c1: #f09a5d; --c2: #7fce8f; --c3: #8a93a0; --c4: #c79bf0; --c5: #d9be63;
    --bad: #ff8a80; --good: #7fce8f } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 64rem; margin: 0 auto; padding: 1.5rem 1rem 3rem }
h1 { font-size: 1.5rem; margin: 0 0 .2rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem }
p { margin: .3rem 0 }
.soft { color: var(--soft) }
.tiles { display: grid; grid-template-columns: repeat(2, 1fr); gap: .6rem; margin: 1rem 0 }
@media (min-width: 44rem) { .tiles { grid-template-columns: repeat(4, 1fr) } }
.tile, figure { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .8rem }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums }
.tile span { color: var(--soft); font-size: .85rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .8rem }
figure { margin: 0 }
figcaption { font-weight: 600; margin-bottom: .3rem }
svg { width: 100%; height: auto; display: block }
svg text { fill: var(--soft); font-size: 12px }
.legend { display: flex; flex-wrap: wrap; gap: .2rem .9rem; font-size: .85rem; color: var(--soft) }
.c0 { background: var(--c0) } .c1 { background: var(--c1) } .c2 { background: var(--c2) }
.c3 { background: var(--c3) } .c4 { background: var(--c4) } .c5 { background: var(--c5) }
.legend i { display: inline-block; width: 1.1em; height: 3px; vertical-align: middle; margin-right: .35em }
.scroll { overflow-x: auto }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { padding: .35rem .7rem .35rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--soft); font-weight: 500; white-space: normal; vertical-align: bottom }
th:first-child, td:first-child, td.text { text-align: left }
td.text { white-space: normal; min-width: 14rem }
.ok { color: var(--good) }
.bad { color: var(--bad) }
a { color: var(--c0) }
"""
SERIES = {
    "model": "served",
    "first_model": "first model, frozen",
    "rate_24h": "rate of the last 24 h",
    "constant": "constant",
}


def page(report: Mapping[str, Any]) -> str:
    """The whole page."""
    scored = report["scored"]
    body = [
        "<h1>What was served, and how good it was</h1>",
        f"<p class=soft>{day(scored['from'])} to {day(scored['until'])}, {scored['examples']:,} labelled requests</p>",
        _tiles(report),
        f"<div class=charts>{''.join(_charts(report))}</div>",
        "<h2>Beside the baselines, on the same examples</h2>",
        _baselines(report),
        "<h2>Week by week</h2>",
        _weeks(report),
        "<h2>By the version that answered</h2>",
        _versions(report),
        "<h2>Why each version was promoted or not</h2>",
        _decisions(report),
        "<h2>Checks</h2>",
        _checks(report),
        "<h2>Where the wall time of a tick went</h2>",
        _ticks(report),
        "<p class=soft>" + " · ".join(_link(name, url) for name, url in report["urls"].items()) + "</p>",
    ]
    return document("Penstock report", body)


def document(title: str, body: Sequence[str]) -> str:
    """A page of these parts."""
    view = '<meta name=viewport content="width=device-width,initial-scale=1">'
    head = f"<meta charset=utf-8>{view}<title>{escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body><main>{''.join(body)}</main></body></html>\n"


def _tiles(report: Mapping[str, Any]) -> str:
    shown = {
        "AUC": figure(report["auc"]),
        "log loss": figure(report["log_loss"]),
        "events": f"{report['events']:,}",
        "predictions": f"{report['predictions']:,}",
        "examples": f"{report['examples']:,}",
        "retrains": str(report["retrains"]),
        "event sent to readable, p50": wall(report["freshness_ms"]["p50"], "ms"),
        "label known to serving, p50": wall(report["label_to_serving_s"]["p50"], "s"),
    }
    tiles = "".join(f"<div class=tile><b>{v}</b><span>{k}</span></div>" for k, v in shown.items())
    return f"<div class=tiles>{tiles}</div>"


def _charts(report: Mapping[str, Any]) -> list[str]:
    weeks = report["by_week"]
    marks = _marks(report)
    labels = [day(w["week"])[5:] for w in weeks]
    out = []
    for what, title in (("auc", "AUC by week"), ("log_loss", "Log loss by week")):
        series = {said: _points(weeks, name, what) for name, said in SERIES.items()}
        note = "dotted: a new version began to serve" if marks else ""
        out.append(panel(title, lines(series, labels, marks), legend(series), note))
    groups = report["calibration"]
    pairs = {"served": [(g["score"], g["label"]) for g in groups], "perfect": [(0.0, 0.0), (1.0, 1.0)]}
    out.append(panel("Calibration: share late, by score", square(pairs), legend(pairs), "ten groups of equal size"))
    counts = report["freshness_histogram"]["counts"]
    ms = [
        wall(edge, "ms") if edge < 1000 else wall(edge / 1000, "s")
        for edge in report["freshness_histogram"]["edges_ms"]
    ]
    out.append(panel("Event sent to readable online", bars(counts, ms), "", "events, on a logarithmic scale of time"))
    waits = {f"v{v['version']}": v["label_to_serving_s"] for v in report["versions"] if v["label_to_serving_s"]}
    if waits:
        seconds = bars(list(waits.values()), list(waits), every=1)
        out.append(panel("Last label to serving", seconds, "", "seconds: training, comparison, swap"))
    return out


def _marks(report: Mapping[str, Any]) -> list[float]:
    """Where versions were promoted, as positions between the weeks' points."""
    starts = [w["start"] for w in report["by_week"]]
    cuts = [v["cut"] for v in report["versions"] if v["action"] == "promoted" and v["cut"]]
    return [(cut - starts[0]) / (starts[1] - starts[0]) - 0.5 for cut in cuts] if len(starts) > 1 else []


def _points(weeks: Sequence[Mapping[str, Any]], name: str, what: str) -> list[Point]:
    return [(i, w[name][what]) for i, w in enumerate(weeks) if w[name][what] is not None]


def panel(title: str, svg: str, below: str, note: str) -> str:
    """A chart with its title, legend and note."""
    return f"<figure><figcaption>{title}</figcaption>{svg}{below}<p class='soft legend'>{note}</p></figure>"


def legend(series: Mapping[str, Sequence[Point]]) -> str:
    """Names beside their colours; a series without points is left out."""
    named = [(i, name) for i, (name, points) in enumerate(series.items()) if points]
    items = [f"<span><i class=c{i % COLOURS}></i>{escape(name)}</span>" for i, name in named]
    return f"<div class=legend>{''.join(items)}</div>"


def lines(series: Mapping[str, Sequence[Point]], labels: Sequence[str], marks: Sequence[float]) -> str:
    """Series over positions 0 .. len(labels) - 1; `marks` are vertical lines at such positions."""
    values = [y for points in series.values() for _, y in points] or [0.0, 1.0]
    low, high = nice(min(values), max(values))
    last = max(1, len(labels) - 1)
    x, y = _scale(-0.3, last + 0.3, LEFT, WIDTH - RIGHT), _scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [_grid(low, high, y)]
    parts += [_dotted(x(m)) for m in marks]
    parts += [_text(x(i), HEIGHT - 10, label, "middle") for i, label in enumerate(labels)]
    parts += [_series(points, i, x, y) for i, points in enumerate(series.values())]
    return _svg(parts)


def square(series: Mapping[str, Sequence[Point]]) -> str:
    """Series over [0, 1] x [0, 1]."""
    x, y = _scale(0, 1, LEFT, WIDTH - RIGHT), _scale(0, 1, HEIGHT - BOTTOM, TOP)
    ticks = [_text(x(v), HEIGHT - 10, f"{v:g}", "middle") for v in (0, 0.25, 0.5, 0.75, 1)]
    return _svg([_grid(0, 1, y), *ticks, *(_series(p, i, x, y) for i, p in enumerate(series.values()))])


def bars(values: Sequence[float], labels: Sequence[str], every: int = 6) -> str:
    """One bar per value; every so many are labelled."""
    _, high = nice(0, max([*values, 1e-9]))
    x, y = _scale(0, len(values), LEFT, WIDTH - RIGHT), _scale(0, high, HEIGHT - BOTTOM, TOP)
    parts = [_grid(0, high, y)]
    for i, value in enumerate(values):
        top, width = y(value), (x(1) - x(0)) * 0.85
        box = f'x="{x(i) + 0.7:.1f}" y="{top:.1f}" width="{width:.1f}" height="{y(0) - top:.1f}"'
        parts.append(f'<rect {box} fill="var(--c0)"><title>{escape(labels[i])}: {value:,}</title></rect>')
        if i % every == 0:
            parts.append(_text(x(i) + width / 2, HEIGHT - 10, labels[i], "middle"))
    return _svg(parts)


def nice(low: float, high: float) -> tuple[float, float]:
    """A range a little wider, at round numbers.

    >>> nice(0.513, 0.748)
    (0.5, 0.8)
    >>> nice(1.0, 1.0) == (1.0, 1.0)
    False
    """
    step = _step(low, high)
    bottom = math.floor(low / step)
    return round(bottom * step, 9), round(max(math.ceil(high / step), bottom + 1) * step, 9)


def _step(low: float, high: float) -> float:
    rough = max(high - low, 1e-3) / 4
    size: float = 10.0 ** math.floor(math.log10(rough))
    return next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _grid(low: float, high: float, y: Callable[[float], float]) -> str:
    step, parts, value = _step(low, high), [], low
    while value <= high + step / 1000:
        at = y(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="var(--line)"/>')
        parts.append(_text(LEFT - 6, at + 4, short(value), "end"))
        value += step
    return "".join(parts)


def short(value: float) -> str:
    """An axis label.

    >>> short(60_000), short(0.25)
    ('60k', '0.25')
    """
    return f"{value / 1000:g}k" if value >= 10_000 else f"{round(value, 9):g}"


def _series(points: Sequence[Point], colour: int, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in points)
    dots = "".join(
        f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="3"><title>{py:.4f}</title></circle>' for px, py in points
    )
    line = f'<polyline points="{path}" fill="none" stroke="var(--c{colour % COLOURS})" stroke-width="2"/>'
    return f'{line}<g fill="var(--c{colour % COLOURS})">{dots}</g>'


def _dotted(x: float) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--c3)" stroke-dasharray="2 4"/>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">{"".join(parts)}</svg>'


def _baselines(report: Mapping[str, Any]) -> str:
    rows = [("served", report), *((SERIES[n], report["baselines"][n]) for n in ("first_model", "rate_24h", "constant"))]
    return table(("", "AUC", "log loss"), [(name, figure(q["auc"]), figure(q["log_loss"])) for name, q in rows])


def _weeks(report: Mapping[str, Any]) -> str:
    names = ("model", "first_model", "rate_24h")
    head = (
        "week of",
        "examples",
        "late",
        *(f"AUC {SERIES[n]}" for n in names),
        *(f"log loss {SERIES[n]}" for n in names),
    )
    rows = []
    for w in report["by_week"]:
        figures = [figure(w[n][what]) for what in ("auc", "log_loss") for n in names]
        rows.append((day(w["week"]), f"{w['examples']:,}", figure(w["rate"]), *figures))
    return table(head, rows)


def _versions(report: Mapping[str, Any]) -> str:
    rows = [
        (v, f"{q['examples']:,}", figure(q["auc"]), figure(q["log_loss"]), q["from"], q["until"])
        for v, q in report["by_version"].items()
    ]
    return table(("version", "examples", "AUC", "log loss", "first", "last"), rows)


def _decisions(report: Mapping[str, Any]) -> str:
    rows = [
        (
            v["version"],
            iso(v["cut"]) if v["cut"] else "–",
            v["action"],
            wall(v["training_s"], "s"),
            wall(v["label_to_serving_s"], "s"),
            v["sentence"],
        )
        for v in report["versions"]
    ]
    return table(("version", "cut", "decision", "training", "to serving", "why"), rows)


def _checks(report: Mapping[str, Any]) -> str:
    mark = {True: "<b class=ok>ok</b>", False: "<b class=bad>failed</b>"}
    text = "<td class=text>"
    rows = "".join(
        f"<tr><td>{mark[c['ok']]}{text}{escape(c['check'])}{text}{escape(c['detail'])}" for c in report["checks"]
    )
    return f"<div class=scroll><table>{rows}</table></div>"


def _ticks(report: Mapping[str, Any]) -> str:
    rows = [(n, wall(q["p50"], "ms"), wall(q["p95"], "ms")) for n, q in report["tick_ms"].items() if q["n"]]
    return table(("phase", "p50", "p95"), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; a cell with a sentence may wrap."""

    def cell(value: Any) -> str:
        text = str(value)
        return f"<td{' class=text' if len(text) > 40 else ''}>{escape(text)}"

    body = "".join("<tr>" + "".join(map(cell, row)) for row in rows)
    heads, about = "".join(f"<th>{escape(h)}" for h in head), escape(", ".join(filter(None, head)))
    return f'<div class=scroll tabindex=0 role=region aria-label="{about}"><table><tr>{heads}{body}</table></div>'


def _link(name: str, url: str) -> str:
    return f'{escape(name)} <a href="{escape(url)}">{escape(url)}</a>'


def day(time: str) -> str:
    """The date of an RFC 3339 time."""
    return time[:10]


def figure(value: float | None) -> str:
    """A figure between 0 and 1, to three digits."""
    return "–" if value is None else f"{value:.3f}"


def wall(value: float | None, unit: str) -> str:
    """A wall time."""
    return "–" if value is None else f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
