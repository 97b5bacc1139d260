"""The report of a replay: how good the served predictions were, beside baselines, and how quickly things happened."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from features.usecase import UseCase
from pipelines.broker import Broker
from pipelines.comparison import calibration
from services.baselines import DAY_MS, Scores, constant_before, quality, rate_before
from services.progress import iso
from services.replay_log import Entry, freshness, log_path, quantiles, read_log, tick_times
from services.served import Examples, Floats, Prediction, count_events, read_examples, read_predictions
from services.settings import Settings
from services.topic_reader import Newest, read_all

Report = dict[str, Any]
TIGHTEST, WIDEST, BINS = 1.0, 100_000.0, 30  # ms: the freshness histogram's bins are even in the logarithm
BASELINES = {"constant": "constant", "rate_24h": "rate of the last 24 h", "first_model": "first model, frozen"}


def build(settings: Settings, use_case: UseCase, score_from: int, score_until: int) -> Report:
    """The report of what the topics hold; AUC and log loss of requests with score_from <= time < score_until (ms)."""
    from services.wiring import broker as connect

    broker = connect(settings)
    entries = read_log(log_path(settings, use_case.name))
    predictions, examples = read_predictions(broker, use_case), read_examples(broker, use_case)
    state = _state(broker, use_case)
    first = first_model(settings, use_case, state, examples)
    scores = Scores(
        examples.score,
        rate_before(examples.event_time, examples.label, examples.label_time, DAY_MS, use_case.prior),
        first,
    )
    cuts = [msgspec.json.decode(r.value) for r in read_all(broker, use_case.topic("cuts")) if r.value]
    counted = {"events": sum(count_events(broker, use_case).values()), "predictions": len(predictions)}
    report = counted | {"examples": len(examples), "cuts": cuts}
    report |= measured(use_case, examples, scores, score_from, score_until) | observed(entries)
    report["versions"] = versions(state, entries)
    report["retrains"] = len(report["versions"])
    report["checks"] = checks(report, predictions, entries)
    report["urls"] = {"MLflow": settings.mlflow_url, "Airflow": settings.airflow_url}
    report["urls"]["predictor"] = f"{settings.predictor_url}/docs"
    return report


def _state(broker: Broker, use_case: UseCase) -> dict[str, Any]:
    models = Newest(broker, use_case.topic("models"))
    try:
        return dict(models.read().get(b"state") or {})
    finally:
        models.close()


def first_model(settings: Settings, use_case: UseCase, state: Mapping[str, Any], examples: Examples) -> Floats:
    """The first version's scores of all that was asked after it had learned; NaN before, or without a version."""
    scores = np.full(len(examples), np.nan)
    promoted = [d["version"] for d in state.get("decisions", []) if d["action"] == "promoted"]
    if not promoted:
        return scores
    from pipelines.onnx_model import OnnxModel
    from pipelines.registry import Registry

    with tempfile.TemporaryDirectory() as folder:
        path = Registry(settings.mlflow_url).download(use_case.name, promoted[0], Path(folder))
        model = OnnxModel.load(path, promoted[0])
    learned = int(state["versions"][promoted[0]]["latest_label_time"] or 0)
    rows = np.flatnonzero(examples.event_time > learned)
    if len(rows):
        scores[rows] = model.score(examples.inputs(model.inputs, rows))
    return scores


def measured(use_case: UseCase, examples: Examples, scores: Scores, score_from: int, score_until: int) -> Report:
    """Quality of the scored range, by week (as retrains count them) and by version."""
    week = round(use_case.retrain_every.total_seconds() * 1000)
    scored = (examples.event_time >= score_from) & (examples.event_time < score_until)
    best = scores.quality(examples, scored, constant_before(examples, score_from, use_case.prior))
    by_week = []
    for start in np.unique(examples.event_time // week * week).tolist():
        rows = (examples.event_time >= start) & (examples.event_time < start + week)
        constant = constant_before(examples, start, use_case.prior)
        row = {"week": iso(start), "start": start, "examples": int(rows.sum()), "rate": _mean(examples.label[rows])}
        by_week.append(row | scores.quality(examples, rows, constant))
    return {
        **best["model"],
        "scored": {"from": iso(score_from), "until": iso(score_until), "examples": int(scored.sum())},
        "rate": _mean(examples.label[scored]),
        "baselines": {name: best[name] for name in BASELINES},
        "by_week": by_week,
        "by_version": by_version(examples),
        "calibration": calibration(examples.label[scored], examples.score[scored])["groups"],
    }


def by_version(examples: Examples) -> dict[str, Report]:
    """Examples, AUC and log loss of what each version answered, in the order of their first answer."""
    found = {}
    for version in dict.fromkeys(examples.version.tolist()):
        rows = examples.version == version
        times = examples.event_time[rows]
        span = {"from": iso(int(times.min())), "until": iso(int(times.max())), "examples": int(rows.sum())}
        found[version] = span | quality(examples.label[rows], examples.score[rows])
    return found


def observed(entries: Sequence[Entry]) -> Report:
    """What the replay saw by the wall clock."""
    retrains = [e for e in entries if e["kind"] == "retrain"]
    fresh = [ms for e in entries if e["kind"] == "tick" for ms in e["freshness"]]
    edges = np.geomspace(TIGHTEST, WIDEST, BINS + 1)
    counts, _ = np.histogram(np.clip(fresh, TIGHTEST, WIDEST), edges)
    return {
        "freshness_ms": freshness(entries),
        "freshness_histogram": {"edges_ms": edges.round(2).tolist(), "counts": counts.tolist()},
        "label_to_serving_s": quantiles([e["label_to_serving_s"] for e in retrains]),
        "training_s": quantiles([e["training_s"] for e in retrains if e["training_s"] is not None]),
        "tick_ms": tick_times(entries),
    }


def versions(state: Mapping[str, Any], entries: Sequence[Entry]) -> list[Report]:
    """Every decision of control, with the wall times of the retrain that led to it."""
    times = {e["version"]: e for e in entries if e["kind"] == "retrain"}
    out = []
    for decision in state.get("decisions", []):
        seen = times.get(decision["version"], {})
        row = {name: decision.get(name) for name in ("version", "action", "sentence", "cut")}
        out.append(row | {name: seen.get(name) for name in ("label_to_serving_s", "training_s")})
    return out


def checks(report: Report, predictions: Sequence[Prediction], entries: Sequence[Entry]) -> list[Report]:
    """What must hold of any replay, and of learned models if they answered all that is scored; with verdicts."""
    logged = {p.request_id: (p.version, p.score) for p in predictions}
    answers = [a for e in entries if e["kind"] == "tick" for a in e["answers"]]
    other = sum(logged.get(a[0]) != (a[3], a[2]) for a in answers)
    found = [
        verdict("answers are logged", not other, f"{len(answers):,} answers, {other} differ from what is on Kafka")
    ]
    if report["baselines"]["first_model"]["auc"] is None:
        return found
    for name, said in BASELINES.items():
        theirs, ours = report["baselines"][name]["auc"], report["auc"]
        found.append(verdict(f"AUC above: {said}", ours > theirs, f"{_figure(ours)} against {_figure(theirs)}"))
    return found


def verdict(check: str, ok: bool, detail: str) -> Report:
    """One check's outcome."""
    return {"check": check, "ok": bool(ok), "detail": detail}


def as_text(report: Report) -> str:
    """The report as a table for a terminal."""
    scored, fresh, serving = report["scored"], report["freshness_ms"], report["label_to_serving_s"]
    tick = report["tick_ms"]["tick"]
    lines = [
        "   ".join(f"{n} {report[n]:,}" for n in ("events", "predictions", "examples", "retrains")),
        "",
        f"{scored['from']} to {scored['until']}, {scored['examples']:,} labelled  AUC    log loss",
        _row("served", report),
        *(_row(said, report["baselines"][name]) for name, said in BASELINES.items()),
        "",
        "week of            examples   rate   AUC served  24 h   first   log loss served  24 h   first",
        *(_week(week) for week in report["by_week"]),
        "",
        "version  examples   AUC     log loss  answered",
        *(_version(name, q) for name, q in report["by_version"].items()),
        "",
        *(f"{v['action'] or '?':<12} {v['sentence']}" for v in report["versions"]),
        "",
        f"event sent to readable online: p50 {_wall(fresh['p50'], 'ms')}, p95 {_wall(fresh['p95'], 'ms')}",
        f"label known to model serving: p50 {_wall(serving['p50'], 's')}, p95 {_wall(serving['p95'], 's')}",
        f"one tick: p50 {_wall(tick['p50'], 'ms')}, p95 {_wall(tick['p95'], 'ms')}",
        "",
        *(f"{'ok    ' if c['ok'] else 'FAILED'} {c['check']}: {c['detail']}" for c in report["checks"]),
        "",
        *(f"{name:<10} {url}" for name, url in report["urls"].items()),
    ]
    return "\n".join(lines)


def write(report: Report, home: Path) -> tuple[Path, Path]:
    """report.html and report.json in `home`; returns their paths."""
    from services.report_page import page

    html, data = home / "report.html", home / "report.json"
    home.mkdir(parents=True, exist_ok=True)
    html.write_text(page(report))
    data.write_text(json.dumps(report, indent=1) + "\n")
    return html, data


def _row(name: str, q: Mapping[str, Any]) -> str:
    return f"  {name:<52} {_figure(q['auc'])}  {_figure(q['log_loss'])}"


def _version(name: str, q: Mapping[str, Any]) -> str:
    quality = f"{_figure(q['auc'])}   {_figure(q['log_loss'])}"
    return f"{name:<8} {q['examples']:>8,}   {quality}    {q['from']} to {q['until']}"


def _week(week: Mapping[str, Any]) -> str:
    shown = [_figure(week[name][what]) for what in ("auc", "log_loss") for name in ("model", "rate_24h", "first_model")]
    start = f"{week['week']}  {week['examples']:>8,}   {_figure(week['rate'])}"
    return f"{start}   {shown[0]}      {shown[1]}  {shown[2]}   {shown[3]}            {shown[4]}  {shown[5]}"


def _figure(value: float | None) -> str:
    return "  -  " if value is None else f"{value:.4f}".removeprefix("0").ljust(5)


def _wall(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:,.0f} {unit}" if unit == "ms" else f"{value:,.1f} {unit}"


def _mean(values: Floats) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None
