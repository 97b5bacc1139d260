"""`penstock backtest --check`: would a backtest notice that it is fooled? Runs one learner as it is and spoiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.engine import Applied
from features.vectors import Vectorizer
from pipelines import comparison
from services import audit, backtest_data
from services.audit import CHANCE, MARGIN, Verdict
from services.backtest import Backtest, Plan, Result
from services.recompute import Recomputation
from services.report import verdict
from services.served import Prediction
from services.settings import Settings
from services.source import source_of

DELAY_MS, STALE_MS = 86_400_000, 3_600_000
SAMPLE, LAST_DAYS, REACH_DAYS = 40, 7, 66  # requests recomputed, of the last days; the longest window and timers


def check(settings: Settings, plan: Plan) -> Result:
    """All checks of the first learner; each a dict with `check`, `ok`, `detail`."""
    learner = plan.learners[0]
    spoiled = {
        "as it is": plan,
        "labels permuted": replace(plan, permute=True),
        "labels 24 h later": replace(plan, delay=plan.delay + DELAY_MS),
        "features 60 min stale": replace(plan, over=replace(plan.over, stale=plan.over.stale + STALE_MS)),
        "the label among the inputs": replace(plan, leak=True),
    }
    tests = {name: Backtest(settings.home, changed) for name, changed in spoiled.items()}
    blocks = {name: _blocks(test, learner) for name, test in tests.items()}
    areas = {name: float(b.figures(np.ones((1, len(b.loss))))[0][0]) for name, b in blocks.items()}
    honest, chance, leak = (areas[n] for n in ("as it is", "labels permuted", "the label among the inputs"))
    return {
        "learner": learner,
        "auc": {name: round(area, 5) for name, area in areas.items()},
        "checks": [
            verdict("labels permuted: nothing to learn", abs(chance - CHANCE) <= MARGIN, f"AUC {chance:.4f}"),
            _worse("labels 24 h later", blocks),
            _worse("features 60 min stale", blocks),
            verdict("not suspiciously good", not audit.suspicious(honest), f"AUC {honest:.4f}"),
            verdict("planted leak is noticed: the label", bool(audit.suspicious(leak)), f"AUC {leak:.4f}"),
            *recomputed(tests["as it is"]),
        ],
    }


def _blocks(test: Backtest, learner: str) -> comparison.Blocks:
    scores, _ = test.scores(learner)
    rows = test.scored
    return comparison.Blocks.of(test.examples.label[rows], scores[rows], test.examples.event_time[rows])


def _worse(name: str, blocks: Mapping[str, comparison.Blocks]) -> Verdict:
    """Whether a spoiled run is worse than the plain one, pair by pair."""
    (found,) = comparison.differences({name: blocks[name], "as it is": blocks["as it is"]})
    area = found["auc"]
    detail = f"AUC {area['difference']:+.4f} ({area['low']:+.4f} to {area['high']:+.4f})"
    return verdict(f"{name}: worse", area["high"] < 0, detail)


def recomputed(test: Backtest) -> list[Verdict]:
    """Whether sampled vectors are what brute force makes of the raw events, and whether one would notice windows that
    run up to the label."""
    over, use_case = test.plan.over, test.use_case
    since = max(over.from_ms, over.until_ms - LAST_DAYS * backtest_data.DAY_MS)
    rows = pa.concat_tables([pq.read_table(f, filters=[("event_time", ">=", since)]) for f in test.made.files])
    chosen = np.sort(np.random.default_rng(0).permutation(rows.num_rows)[:SAMPLE])
    served, vectorizer = rows.take(chosen).to_pylist(), Vectorizer(use_case)
    oracle = Recomputation(use_case, _events(test, since - REACH_DAYS * backtest_data.DAY_MS))
    as_of = over.as_of([r["event_time"] for r in served]).tolist()
    held = [(_prediction(vectorizer, row, row), at) for row, at in zip(served, as_of, strict=True)]
    ahead = [
        (_prediction(vectorizer, row, oracle.vector(p, row["label_time"] + 1)), at)
        for row, (p, at) in zip(served, held, strict=True)
    ]
    leaked = audit.vectors_equal(oracle, ahead)
    return [
        audit.vectors_equal(oracle, held),
        verdict("planted leak is noticed: windows that run up to the label", not leaked["ok"], leaked["detail"]),
    ]


def _events(test: Backtest, since: int) -> list[Applied]:
    until = test.plan.over.until_ms + test.use_case.label.wait // timedelta(milliseconds=1)
    events = source_of(test.use_case.name).events(max(since, test.plan.over.from_ms), until)
    decoders = {c.name: c.decode for c in test.use_case.contracts}
    return [Applied(e.event, decoders[e.event](e.value), e.time, e.time) for e in events]


def _prediction(vectorizer: Vectorizer, row: Mapping[str, Any], vector: Mapping[str, Any]) -> Prediction:
    """A row of the examples as a logged prediction with that vector."""
    entities = {name: row[name] for name in vectorizer.use_case.entities}
    fields = {name: row[name] for name in vectorizer.fields}
    whole = {**vectorizer.entity_keys(entities, fields), **vector}
    served = {name: whole[name] for name in vectorizer.types}
    raw = [msgspec.Raw(msgspec.json.encode(part, enc_hook=float)) for part in (entities, fields, served)]
    return Prediction(row["request_id"], row["event_time"], "", "", 0.0, *raw)


def as_text(result: Result) -> str:
    """One line a check."""
    return f"learner {result['learner']}\n" + audit.as_text(result["checks"])
