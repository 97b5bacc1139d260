"""`penstock audit`: was anything served that could not have been known, or that is not what the events say?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from features.engine import Applied
from features.errors import InputError
from features.usecase import UseCase
from pipelines.quality import auc, splittable
from services import ledger
from services.recompute import Recomputation, differences, read_events
from services.replay_log import as_of, log_path, read_log
from services.report import verdict
from services.served import Examples, Floats, Prediction, read_examples, read_predictions
from services.settings import Settings
from services.topic_reader import tails

PRIOR = "prior"
SUSPICIOUS_AUC = 0.82  # above it the label itself is looking through: no honest model of these flights gets there
CHANCE, MARGIN, ROUNDS = 0.5, 0.02, 5
LEAKS = 100  # vectors into which a leak is planted
Verdict = dict[str, Any]
Held = tuple[Prediction, int]  # and the instant (epoch ms) its windows were held to by a lockstep
Numbers = npt.NDArray[np.float32]


def audit(settings: Settings, use_case: UseCase, *, sample: int = 500, seed: int = 0) -> list[Verdict]:
    """All checks of what was served, from Kafka and the registry; each a dict with `check`, `ok`, `detail`."""
    from pipelines.registry import Registry
    from services.wiring import broker as connect

    broker, rng = connect(settings), np.random.default_rng(seed)
    predictions, examples = read_predictions(broker, use_case), read_examples(broker, use_case)
    if not predictions:
        raise InputError(f"{use_case.topic('predictions')} is empty: nothing was served that could be checked")
    versions = Registry(settings.mlflow_url).versions(use_case.name)
    learned = {v.version: int(v.tags.get("latest_label_time") or 0) for v in versions}
    held = as_of(read_log(log_path(settings, use_case.name)))
    events = read_events(broker, use_case)
    oracle = Recomputation(use_case, events)
    clocks = [tail.clock for tail in tails(broker, [label_topic(use_case), use_case.topic("predictions")]).values()]
    known = auditable(predictions, held, oracle.vectorizer.schema_id)
    chosen = [known[i] for i in rng.choice(len(known), min(sample, len(known)), replace=False)]
    truth = {r.request_id: (r.label, r.label_time) for r in examples.records}
    numbers = examples.inputs(use_case.inputs, np.arange(len(examples))).numbers
    return [
        vectors_equal(oracle, chosen),
        causality(predictions, learned),
        examples_complete(use_case, events, predictions, examples, min(clock or 0 for clock in clocks)),
        *permuted(numbers, examples, rng),
        *leak_caught(oracle, chosen, truth, predictions),
        *suspicion(numbers, examples.label),
        *filter(None, [ledger.check(broker, use_case)]),
    ]


def as_text(verdicts: Sequence[Verdict]) -> str:
    """One line a check."""
    return "\n".join(f"{'ok    ' if v['ok'] else 'FAILED'} {v['check']}: {v['detail']}" for v in verdicts)


def auditable(predictions: Sequence[Prediction], held: Callable[[int], int | None], schema_id: str) -> list[Held]:
    """The predictions whose windows' instant is known and whose vectors are of today's features."""
    today = [p for p in predictions if p.schema == schema_id]
    return [(p, at) for p in today if (at := held(p.event_time)) is not None]


def vectors_equal(oracle: Recomputation, chosen: Sequence[Held]) -> Verdict:
    """Whether the vectors served are those that brute force over the raw events gives as of the instant held to."""
    wrong, values, shown = 0, 0, ""
    for p, as_of_ms in chosen:
        served = p.vector()
        values += len(served)
        expected = oracle.vector(p, as_of_ms)
        if names := differences(served, expected):
            wrong += 1
            name = names[0]
            shown = shown or f"; {p.request_id}: {name} was {served.get(name)!r}, should be {expected.get(name)!r}"
    detail = f"{len(chosen)} vectors with {values:,} values, {wrong} differ by more than 1e-6{shown}"
    return verdict("served vectors equal brute force over the raw events", bool(chosen) and not wrong, detail)


def causality(predictions: Sequence[Prediction], learned: Mapping[str, int]) -> Verdict:
    """Whether every answer came from a version whose latest label lay before the request."""
    answered = [p for p in predictions if p.version != PRIOR]
    wrong = [p for p in answered if not learned.get(p.version, p.event_time) < p.event_time]
    versions = len({p.version for p in answered})
    detail = (
        f"{len(predictions):,} predictions, {len(answered):,} by {versions} versions, {len(wrong)} of them too early"
    )
    return verdict(
        "every version had learned only from labels before the request", bool(predictions) and not wrong, detail
    )


def label_topic(use_case: UseCase) -> str:
    """The topic that carries the labels."""
    return next(topic for topic, c in use_case.event_topics.items() if c.name == use_case.label.event)


def examples_complete(
    use_case: UseCase, events: Sequence[Applied], predictions: Sequence[Prediction], examples: Examples, until: int
) -> Verdict:
    """Whether there is exactly one example, with the right label, for each prediction whose label came in time.

    until : epoch ms up to which predictions and labels are complete
    """
    label, wait = use_case.label, use_case.label.wait // timedelta(milliseconds=1)
    came = {getattr(e.value, label.key): e for e in events if e.contract == label.event and e.time < until}
    expected = {}
    for p in predictions:
        event = came.get(p.request_id)
        value = label.value(event.value) if event else None
        if event is not None and value is not None and abs(event.time - p.event_time) <= wait:
            expected[p.request_id] = value
        elif label.on_expiry is not None and p.event_time + wait < until:
            expected[p.request_id] = label.on_expiry
    found = {r.request_id: r.label for r in examples.records}
    wrong = sum(found.get(key) != value for key, value in expected.items()) + len(found.keys() - expected.keys())
    doubled = len(examples) - len(found)
    detail = f"{len(examples):,} examples of {len(expected):,} expected, {wrong} missing or wrong, {doubled} doubled"
    return verdict("every label that came in time made one example", not wrong and not doubled, detail)


def permuted(numbers: Numbers, examples: Examples, rng: np.random.Generator) -> list[Verdict]:
    """Whether labels dealt out at random can be predicted: by a model trained on them, or by the served scores."""
    trained, served = [], []
    for _ in range(ROUNDS):
        label = rng.permutation(examples.label)
        trained.append(trained_auc(numbers, label))
        served.append(auc(label, examples.score))
    return [
        _chance("labels permuted, model trained and scored on them", trained, len(examples)),
        _chance("labels permuted, the served scores", served, len(examples)),
    ]


def _chance(check: str, found: Sequence[float | None], n: int) -> Verdict:
    mean = float(np.mean([CHANCE + 1 if a is None else a for a in found]))
    detail = f"mean AUC {mean:.4f} of {len(found)} permutations of {n:,} labels, expected {CHANCE} ± {MARGIN}"
    return verdict(check, abs(mean - CHANCE) <= MARGIN, detail)


def trained_auc(numbers: Numbers, label: Floats) -> float | None:
    """AUC on the last 40% of the examples (in time order) of boosted trees fitted on the ones before."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from threadpoolctl import threadpool_limits

    cut = len(label) * 3 // 5
    if len(np.unique(label[:cut])) < 2:
        return None
    trees = HistGradientBoostingClassifier(max_iter=30, max_leaf_nodes=15, early_stopping=False, random_state=0)
    with threadpool_limits(1):  # its threads spin while they wait: on a busy machine one is the quickest
        trees.fit(splittable(numbers[:cut]), label[:cut])
        scores = trees.predict_proba(numbers[cut:])[:, 1]
    return auc(label[cut:], scores)


def suspicion(numbers: Numbers, label: Floats) -> list[Verdict]:
    """Whether the features predict no better than is honest, and whether a planted label would be noticed."""
    honest, leaking = trained_auc(numbers, label), trained_auc(np.column_stack([numbers, label]), label)
    return [
        _limit("features are not suspiciously good", honest, suspicious(honest) is False),
        _limit("planted leak is noticed: the label among the features", leaking, suspicious(leaking) is True),
    ]


def suspicious(found: float | None) -> bool | None:
    """Whether an AUC is better than any honest one; None without an AUC."""
    return None if found is None else found > SUSPICIOUS_AUC


def _limit(check: str, found: float | None, ok: bool) -> Verdict:
    return verdict(check, ok, f"AUC {'-' if found is None else f'{found:.4f}'}, suspicious above {SUSPICIOUS_AUC}")


def leak_caught(
    oracle: Recomputation,
    chosen: Sequence[Held],
    truth: Mapping[str, tuple[float | None, int | None]],
    predictions: Sequence[Prediction],
) -> list[Verdict]:
    """Whether the same checks notice planted leaks: the label in the vector, windows that run up to the label's
    arrival, and a version that has learned up to the last label of all."""
    labelled = [(p, at) for p, at in chosen if p.request_id in truth][:LEAKS]
    joined = [(_planted(p, {**p.vector(), "label": truth[p.request_id][0]}), at) for p, at in labelled]
    ahead = [(_planted(p, oracle.vector(p, (truth[p.request_id][1] or 0) + 1)), at) for p, at in labelled]
    last = max((known or 0 for _, known in truth.values()), default=0)
    late = causality([msgspec.structs.replace(p, version="planted") for p in predictions], {"planted": last})
    return [
        _caught("a label joined into the vector", vectors_equal(oracle, joined)),
        _caught("windows that run up to the label", vectors_equal(oracle, ahead)),
        _caught("a version that knows later labels", late),
    ]


def _planted(prediction: Prediction, vector: dict[str, Any]) -> Prediction:
    return msgspec.structs.replace(prediction, features=msgspec.Raw(msgspec.json.encode(vector, enc_hook=float)))


def _caught(leak: str, found: Verdict) -> Verdict:
    return verdict(f"planted leak is noticed: {leak}", not found["ok"], found["detail"])
