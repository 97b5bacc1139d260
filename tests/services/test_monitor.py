"""What is broken since when, from looks in sequence."""

from __future__ import annotations

from typing import Any

from services.monitor import Watch


def status(**changes: Any) -> dict[str, Any]:
    steps = {name: {"watermark": 60, "position": 10, "lag": 0, "members": 1} for name in ("featurizer", "joiner")}
    steps["learner"] = {"watermark": 60, "position": 4, "lag": 6, "members": 1}
    services = {
        name: {"state": "ready", "pid": 1, "restarts": 0, "since": 1.0}
        for name in ("kafka", "redis", "featurizer+joiner-toy", "learner-toy", "predictor-toy")
    }
    found = {"running": True, "services": services, "steps": steps, "predictor": {"ready": True}}
    return found | {"reachable": {"predictor": True, "redis": True, "kafka": True}} | changes


def told(watch: Watch, seen: dict[str, Any], now: float) -> list[tuple[str, str, float]]:
    return [(t.what, t.why, t.since) for t in watch.look(seen, now)]


def step(seen: dict[str, Any], name: str, **changes: Any) -> dict[str, Any]:
    return seen | {"steps": seen["steps"] | {name: seen["steps"][name] | changes}}


def test_a_quiet_stack_is_whole_though_the_learner_waits_for_more_examples() -> None:
    watch = Watch()
    assert told(watch, status(), 100.0) == [] and told(watch, status(), 900.0) == []


def test_a_step_that_stands_beside_records_is_broken_since_it_moved_last_and_heals() -> None:
    watch, seen = Watch(), status()
    told(watch, seen, 100.0)
    behind = step(seen, "joiner", lag=5)
    assert told(watch, behind, 110.0) == []
    assert told(watch, behind, 120.0) == [("step joiner", "stands still, 5 records behind", 100.0)]
    assert told(watch, step(seen, "joiner", lag=4, position=11), 130.0) == []
    assert told(watch, seen, 150.0) == []
    ahead = step(seen, "joiner", watermark=90)
    assert told(watch, ahead, 160.0) == []  # it has been quiet for long, and behind for a moment
    assert told(watch, ahead, 170.0) == [("step learner", "stands still, 6 records behind", 150.0)]


def test_a_killed_service_is_named_with_the_time_of_its_end_until_it_is_ready() -> None:
    watch, seen = Watch(), status()
    for state, since, now in (("restarting", 200.0, 201.0), ("starting", 202.0, 203.0)):
        services = seen["services"] | {"featurizer+joiner-toy": {"state": state, "restarts": 1, "since": since}}
        broken = told(watch, seen | {"services": services}, now)
        assert broken == [("featurizer+joiner-toy", f"{state}, restarted 1 times", 200.0)]
    assert told(watch, step(seen, "featurizer", members=0), 204.0) == [("step featurizer", "no instance runs", 204.0)]
    services = seen["services"] | {"featurizer+joiner-toy": {"state": "ready", "restarts": 1, "since": 209.0}}
    again = seen | {"services": services}
    assert [t[0] for t in told(watch, again, 210.0)] == ["featurizer+joiner-toy"] and told(watch, again, 225.0) == []


def test_what_does_not_answer_is_named_once_and_only_when_it_was_started() -> None:
    watch, seen = Watch(), status()
    away = seen["reachable"] | {"redis": False, "predictor": False}
    services = seen["services"] | {"predictor-toy": {"state": "restarting", "restarts": 3, "since": 50.0}}
    broken = told(watch, seen | {"reachable": away, "services": services, "predictor": None}, 60.0)
    assert [(what, since) for what, _, since in broken] == [("predictor-toy", 50.0), ("redis", 60.0)]
    late = told(watch, seen | {"predictor": {"ready": False, "problem": "no state"}}, 70.0)
    assert late == [("predictor", "not ready: no state", 70.0)]
    outage = {name: value for name, value in seen.items() if name != "steps"}
    outage |= {"problem": "Kafka does not answer", "reachable": seen["reachable"] | {"kafka": False}}
    assert told(watch, outage, 80.0) == [("kafka", "Kafka does not answer", 80.0)]
    without = step(seen, "learner", members=0, watermark=None)
    without["services"] = {name: s for name, s in seen["services"].items() if "learner" not in name}
    assert told(watch, without, 90.0) == []


def test_rates_are_records_a_second_over_the_last_half_minute() -> None:
    watch = Watch()
    for second in range(0, 100, 2):
        watch.look(step(status(), "joiner", position=10 * second), float(second))
    assert watch.rates() == {"featurizer": 0.0, "joiner": 10.0, "learner": 0.0}
