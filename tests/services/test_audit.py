"""The audit on a small loop: right vectors pass, every planted leak and error is noticed."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from services import audit
from services.audit import auditable, causality, examples_complete, leak_caught, permuted, suspicion, vectors_equal
from services.lockstep import Lockstep
from services.recompute import Recomputation, differences, read_events
from services.served import Examples, Prediction, count_events, read_examples, read_predictions
from tests.memory_broker import MemoryBroker
from tests.replay_rig import START, TICK, loop, session
from tests.toy import use_case

END = START + 24 * TICK


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What six hours of lockstep left on the broker: (broker, oracle, predictions, examples)."""
    broker = MemoryBroker()
    with loop(broker, tmp_path_factory.mktemp("loop")) as (settings, _):
        s = session(broker, settings, END)
        Lockstep(s).run()
        s.close()
    oracle = Recomputation(use_case, read_events(broker, use_case))
    return broker, oracle, read_predictions(broker, use_case), read_examples(broker, use_case)


def held(predictions: list[Prediction], tick: int = TICK) -> list[tuple[Prediction, int]]:
    return [(p, p.event_time // tick * tick) for p in predictions]


def changed(prediction: Prediction, **features: Any) -> Prediction:
    vector = prediction.vector() | features
    return msgspec.structs.replace(prediction, features=msgspec.Raw(msgspec.json.encode(vector)))


def test_what_the_loop_left(served: Any) -> None:
    broker, _, predictions, examples = served
    assert len(predictions) == 90
    assert 20 <= len(examples) <= 90
    assert count_events(broker, use_case)["ordered"] == 72


def test_served_vectors_are_right(served: Any) -> None:
    _, oracle, predictions, _ = served
    found = vectors_equal(oracle, held(predictions))
    assert found["ok"], found["detail"]
    assert "90 vectors" in found["detail"]


def test_vectors_of_other_features_are_left_out(served: Any) -> None:
    _, oracle, predictions, _ = served
    of_before = [msgspec.structs.replace(p, schema="before") for p in predictions[:9]]
    known = auditable([*of_before, *predictions[9:]], lambda time: time // TICK * TICK, oracle.vectorizer.schema_id)
    assert known == held(predictions)[9:]


@pytest.mark.parametrize("features", [{"all_mean": 1e-3}, {"si_last": None}, {"more": 1}, {"si_whos": ["o1"]}])
def test_a_wrong_value_is_found(served: Any, features: dict[str, Any]) -> None:
    _, oracle, predictions, _ = served
    wrong = changed(predictions[50], **features)
    found = vectors_equal(oracle, held([*predictions[:3], wrong]))
    assert not found["ok"]
    assert next(iter(features)) in found["detail"]


def test_other_windows_are_found(served: Any) -> None:
    _, oracle, predictions, _ = served
    assert not vectors_equal(oracle, held(predictions, 1))["ok"]  # windows as of the request, not of the tick


def test_planted_leaks_are_noticed(served: Any) -> None:
    _, oracle, predictions, examples = served
    truth = {r.request_id: (r.label, r.label_time) for r in examples.records}
    assert causality([msgspec.structs.replace(p, version="1") for p in predictions], {"1": START - 1})["ok"]
    found = leak_caught(oracle, held(predictions), truth, predictions)
    assert len(found) == 3 and all(v["ok"] for v in found)


def test_examples_are_complete(served: Any) -> None:
    broker, _, predictions, examples = served
    events = read_events(broker, use_case)

    def check(records: list[Prediction]) -> bool:
        return bool(examples_complete(use_case, events, predictions, Examples.of(records), END)["ok"])

    records = examples.records
    assert {r.label for r in records} == {0.0, 1.0}  # waits that ended, and labels
    assert check(records)
    assert not check(records[1:])
    assert not check([*records, records[0]])
    assert not check([msgspec.structs.replace(records[0], label=1 - records[0].label), *records[1:]])
    assert not check([msgspec.structs.replace(records[0], request_id="other"), *records[1:]])


def test_causality() -> None:
    raw = msgspec.Raw(b"{}")

    def at(time: int, version: str) -> Prediction:
        return Prediction("r", time, version, "champion", 0.5, raw, raw, raw)

    assert causality([at(5, "prior"), at(11, "1")], {"1": 10})["ok"]
    assert not causality([at(10, "1")], {"1": 10})["ok"]
    assert not causality([at(11, "2")], {"1": 10})["ok"]  # a version nobody knows
    assert not causality([], {})["ok"]


@pytest.mark.parametrize("name", ["permuted", "suspicion"])
def test_chance_and_suspicion(name: str) -> None:
    rng = np.random.default_rng(1)
    numbers = rng.normal(size=(8000, 4)).astype(np.float32)
    label = (rng.random(8000) < 1 / (1 + np.exp(-numbers[:, 0]))).astype(float)
    raw = msgspec.Raw(b"{}")
    rows = [
        Prediction(str(i), i, "1", "c", float(x[0]), raw, raw, raw, y, i)
        for i, (x, y) in enumerate(zip(numbers, label, strict=True))
    ]
    if name == "permuted":
        assert all(v["ok"] for v in permuted(numbers, Examples.of(rows), rng))
    else:
        assert all(v["ok"] for v in suspicion(numbers, label))


def test_chance_is_not_taken_for_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "trained_auc", lambda *_: 0.53)
    raw = msgspec.Raw(b"{}")
    rows = [Prediction(str(i), i, "1", "c", i / 100, raw, raw, raw, float(i % 2), i) for i in range(100)]
    found = permuted(np.zeros((100, 1), np.float32), Examples.of(rows), np.random.default_rng(0))
    assert not found[0]["ok"]


def test_a_feature_that_is_always_null_stops_no_audit() -> None:
    label = np.tile([0.0, 1.0, 0.0], 500)
    numbers = np.column_stack([np.full(1500, np.nan), label]).astype(np.float32)
    assert [v["ok"] for v in suspicion(numbers, label)] == [False, True]


def test_suspiciously_good_features_are_noticed() -> None:
    label = np.tile([0.0, 1.0, 0.0], 500)
    honest, _ = suspicion(label[:, None].astype(np.float32), label)
    assert not honest["ok"]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [(1.0, 1.0 + 5e-7, True), (1.0, 1.00001, False), (1e9, 1e9 + 100, True), (None, 0, False), (None, None, True),
     ("x", "x", True), ([1.0, 2.0], [1.0, 2.0], True), ([1.0], [1.0, 2.0], False), (True, 1, True), ("1", 1, False)],
)  # fmt: skip
def test_differences(a: Any, b: Any, same: bool) -> None:
    assert differences({"f": a}, {"f": b}) == ([] if same else ["f"])
    assert differences({"f": a}, {}) == ["f"]
