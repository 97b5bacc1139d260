"""Predictions meet labels in any order; waits end, cuts pass, restarts change nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from features.usecase import load
from features.vectors import Vectorizer
from pipelines.joiner import Joiner, predictions_contract
from pipelines.step import Event, Outputs
from pipelines.tables import arrow_table
from tests.toy import use_case

WAIT = round(use_case.label.wait.total_seconds() * 1000)
CUT = round(use_case.retrain_every.total_seconds() * 1000)
START = 100 * CUT
contract = predictions_contract(use_case)
label_contract = use_case.contract(use_case.label.event)


def predicted(id: str, time: int) -> Event:
    value = contract.struct(
        request_id=id, event_time=time, entities={"shop": "s", "item": 1}, fields={"price": 1.0},
        features={"all_count": 3}, schema="x", feature_times={}, version="1", arm="champion", score=0.25,
    )  # fmt: skip
    return Event(contract, value, time, time)


def labelled(id: str, time: int, why: str = "broken") -> Event:
    value = label_contract.struct(id=f"r{id}{time}", time=time, order=id, why=why)
    return Event(label_contract, value, time, time)


def examples(out: Outputs) -> list[tuple[str, float, int]]:
    return [(r["request_id"], r["label"], r["label_time"]) for r in out.rows["examples"]]


def test_an_example_carries_the_other_targets_of_its_label_event() -> None:
    targets = {"wears": lambda event: float(event.why == "worn"), "open": lambda event: None}
    more = replace(use_case, label=replace(use_case.label, targets=targets))
    joiner, restored = Joiner(more), Joiner(more)
    joiner.process([labelled("b", START, why="worn")], START + 1)
    first = joiner.process([predicted("a", START + 1), predicted("b", START + 2), predicted("c", START + 3)], START + 4)
    restored.restore(joiner.snapshot())
    second = restored.process([labelled("a", START + 5)], START + WAIT + 5)
    rows = [*first.rows["examples"], *second.rows["examples"]]
    assert [(r["request_id"], r.get("wears"), r.get("open")) for r in rows] == [
        ("b", 1.0, None), ("a", 0.0, None), ("c", None, None),
    ]  # fmt: skip
    table = arrow_table(more, "examples", rows)
    assert table["wears"].to_pylist() == [1.0, 0.0, None] and joiner.plan != Joiner(use_case).plan


def test_a_shadow_score_that_is_no_number_does_not_stop_an_example() -> None:
    joiner, odd = Joiner(use_case), predicted("a", START)
    odd.value.shadow = {"2": "high"}
    first = joiner.process([odd], START + 1)
    [evidence] = [json.loads(m.value or b"") for m in first.messages if m.topic == "toy.evidence"]
    assert (evidence["challenger"], evidence["requests"]["errors"]) == ("2", 1)
    assert examples(joiner.process([labelled("a", START + 1)], START + 2)) == [("a", 1.0, START + 1)]


def test_either_side_may_come_first() -> None:
    joiner = Joiner(use_case)
    out = joiner.process([predicted("p", START), labelled("p", START + 5), labelled("q", START + 6)], START + 10)
    label = use_case.label.value(labelled("p", START + 5).value)
    assert examples(out) == [("p", label, START + 5)]
    out = joiner.process([predicted("q", START + 10)], START + 20)
    assert examples(out) == [("q", label, START + 10)]
    sent = json.loads(out.messages[0].value or b"")
    assert (sent["request_id"], sent["label"], sent["features"]) == ("q", label, {"all_count": 3})


@pytest.mark.parametrize("name", ["flights", "clicks"])
def test_there_is_a_joiner_for_every_use_case(name: str) -> None:
    case = load(name)
    value = dict.fromkeys(Vectorizer(case).types)
    assert msgspec.convert(value, Joiner(case).vector)


@pytest.mark.parametrize("wrong", [{"all_count": "three"}, {"si_last_3": [1.0, "x"]}, {"all_mean": True}])
def test_a_vector_that_can_be_no_example_is_refused(wrong: dict[str, Any]) -> None:
    event = predicted("p", START)
    event.value.features = wrong
    out = Joiner(use_case).process([event, labelled("p", START + 5)], START + 10)
    assert [r.reason for r in out.rejected] == ["invalid"]
    assert not examples(out)


def test_a_label_after_the_wait_is_refused() -> None:
    joiner = Joiner(replace(use_case, label=replace(use_case.label, on_expiry=None)))
    joiner.process([predicted("p", START)], START + 1)
    joiner.process([], START + WAIT + 1)
    assert not joiner.pending
    out = joiner.process([labelled("p", START + WAIT + 2)], START + WAIT + 3)
    assert [r.reason for r in out.rejected] == ["late_label"]
    assert not examples(out)


def test_a_label_at_the_end_of_the_wait_counts() -> None:
    joiner = Joiner(use_case)
    out = joiner.process([predicted("p", START), labelled("p", START + WAIT)], START + WAIT + 5)
    assert len(examples(out)) == 1


def test_no_event_within_the_wait_can_be_a_label() -> None:
    zero = replace(use_case, label=replace(use_case.label, on_expiry=0.0))
    out = Joiner(zero).process([predicted("p", START)], START + WAIT + 1)
    assert examples(out) == [("p", 0.0, START + WAIT)]


def test_a_cut_counts_what_has_an_earlier_label_time() -> None:
    joiner = Joiner(use_case)
    out = joiner.process(
        [predicted("p", START), labelled("p", START + 5), predicted("q", START + CUT - 2), labelled("q", START + CUT)],
        START + CUT + 1,
    )
    cuts = [json.loads(m.value or b"") for m in out.messages if m.key == b"cut"]
    assert cuts == [{"cut": START + CUT, "examples": 1, "total": 1}]
    assert out.close
    assert joiner.outputs[0] == "toy.examples"  # a clock record on the cuts topic would wake Airflow


def test_memory_is_given_back() -> None:
    joiner = Joiner(use_case)
    events = [predicted(str(i), START + i) for i in range(50)] + [
        labelled(str(i), START + 100 + i) for i in range(25, 75)
    ]
    joiner.process(events, START + 1000)
    joiner.process([], START + 3 * WAIT)
    assert not joiner.pending and not joiner.labels and not joiner.expired and not joiner.expiry


@pytest.mark.parametrize("at", range(0, 12, 3))
def test_a_restart_changes_nothing(at: int) -> None:
    events = [
        e for i in range(6) for e in (predicted(str(i), START + i * WAIT // 4), labelled(str(i), START + i * WAIT // 2))
    ]
    events.sort(key=lambda e: e.applied)

    def run(restart: bool) -> list[Any]:
        joiner, out = Joiner(use_case), []
        for i, event in enumerate(events):
            produced = joiner.process([event], event.applied + 1)
            out.append((examples(produced), [m.value for m in produced.messages], len(produced.rejected)))
            if restart and i == at:
                saved, joiner = joiner.snapshot(), Joiner(use_case)
                joiner.restore(saved)
        return out

    assert run(True) == run(False)
