"""Replays into a running loop: in lockstep, cut off and resumed, and at a speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from features.errors import InputError, UnavailableError
from pipelines.broker import Message
from services.feed import Followed
from services.lockstep import Lockstep
from services.paced import Paced
from services.replay_log import log_path, read_log
from services.replay_session import Plan, wait_until
from services.retrain_wait import RetrainWait
from services.topic_reader import tails
from tests.memory_broker import MemoryBroker
from tests.replay_rig import MINUTE, START, TICK, Orders, clocks, loop, records, session
from tests.toy import use_case

END = START + 8 * TICK


def lockstep(broker: MemoryBroker, settings: Any, until: int = END, at_tick: Any = None) -> Any:
    s = session(broker, settings, until)
    try:
        Lockstep(s, at_tick).run()
    finally:
        s.close()
    return s


def event_ids(broker: MemoryBroker) -> list[str]:
    return [json.loads(r.value or b"")["id"] for t in ("toy.ordered", "toy.returned") for r in records(broker, t)]


def test_lockstep_produces_and_asks_all_once(tmp_path: Path) -> None:
    broker, source = MemoryBroker(), Orders()
    with loop(broker, tmp_path) as (settings, predictor):
        done = lockstep(broker, settings)
    assert sorted(event_ids(broker)) == sorted(json.loads(e.value)["id"] for e in source.events(START, END))
    assert sorted(predictor.answered) == sorted(r.id for r in source.requests(START, END))
    assert (done.counts.ticks, done.counts.requests) == (8, 30)
    assert clocks(broker, "toy.predictions") == list(range(START, END + 1, TICK))
    assert clocks(broker, "toy.ordered") == list(range(START, END + 1, TICK))
    record = records(broker, "toy.ordered")[3]
    assert (record.timestamp, record.headers[0][0], record.headers[0][1].isdigit()) == (
        START + 15 * MINUTE,
        "sent",
        True,
    )


def test_windows_are_as_of_the_tick(tmp_path: Path) -> None:
    broker = MemoryBroker()
    with loop(broker, tmp_path) as (settings, _):
        lockstep(broker, settings)
    counts = [json.loads(r.value or b"")["features"]["all_count"] for r in records(broker, "toy.predictions")]
    asked = [r.time for r in Orders().requests(START, END)]
    expected = [min(12, (t - START) // TICK * 3) for t in asked]  # an hour of orders, up to the tick's start
    assert counts == expected


def test_a_lost_answer_is_asked_again_under_its_id(tmp_path: Path) -> None:
    broker = MemoryBroker()
    with loop(broker, tmp_path, failures=3) as (settings, predictor):
        lockstep(broker, settings)
    assert len(predictor.answered) == 33
    assert len(set(predictor.answered)) == 30


@pytest.mark.parametrize("fail_after", [0, 1, 5, 9])
def test_resumes_without_a_double_event(tmp_path: Path, fail_after: int) -> None:
    broker = MemoryBroker()
    with loop(broker, tmp_path) as (settings, predictor):
        s = session(broker, settings, END)
        send, left = s.feed.producer.send, [fail_after]

        def failing(messages: Sequence[Message]) -> None:
            for message in messages:
                if message.topic in s.feed.topics.values():
                    left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                send([message])

        s.feed.producer.send = failing  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            Lockstep(s).run()
        s.close()
        resumed = lockstep(broker, settings)
    ids = event_ids(broker)
    assert len(ids) == len(set(ids)) == len(Orders().events(START, END))
    assert set(predictor.answered) == {r.id for r in Orders().requests(START, END)}
    assert resumed.start >= START


def test_goes_on_where_the_last_range_ended(tmp_path: Path) -> None:
    broker = MemoryBroker()
    with loop(broker, tmp_path) as (settings, _):
        lockstep(broker, settings, START + 4 * TICK)
        second = lockstep(broker, settings)
        third = lockstep(broker, settings)
    assert second.start == START + 4 * TICK
    assert (third.start, third.counts.events, third.counts.requests) == (END, 0, 0)
    assert len(event_ids(broker)) == len(set(event_ids(broker)))


def test_says_what_it_waits_for(tmp_path: Path) -> None:
    broker = MemoryBroker()
    with loop(broker, tmp_path) as (settings, _):
        pass
    s = session(broker, settings, END, deadline_s=0.2)
    with pytest.raises(UnavailableError, match=r"step toy\.featurizer has committed nothing yet, awaited 2013-01-01"):
        Lockstep(s).run()
    s.close()


def test_paced_sends_all_and_completes_the_clock(tmp_path: Path) -> None:
    broker = MemoryBroker()
    until = START + 4 * TICK
    with loop(broker, tmp_path) as (settings, predictor):
        s = session(broker, settings, until)
        Paced(s, speed=3600.0).run()
        s.close()
    assert len(event_ids(broker)) == len(Orders().events(START, until))
    assert len(predictor.answered) == len(Orders().requests(START, until)) == s.counts.requests
    assert clocks(broker, "toy.predictions")[-1] == until
    assert s.counts.unanswered == 0
    ticks = [e for e in read_log(log_path(settings, "toy")) if e["kind"] == "tick"]
    assert sum(len(e["answers"]) for e in ticks) > 0


def test_requests_as_records(tmp_path: Path) -> None:
    broker = MemoryBroker()
    with loop(broker, tmp_path) as (settings, _):
        s = session(broker, settings, END, "topic", deadline_s=0.2)
        with pytest.raises(UnavailableError, match=r"step toy\.scorer"):  # none runs here
            Lockstep(s).run()
        s.close()
    assert clocks(broker, "toy.requests") == [START]
    row = json.loads(s.requests.request_message(Orders().requests(START, END)[1]).value or b"")
    assert row == Orders().requests(START, END)[1].row  # what POST /predict takes


def test_the_log_has_every_tick(tmp_path: Path) -> None:
    broker = MemoryBroker()
    with loop(broker, tmp_path) as (settings, _):
        lockstep(broker, settings)
    entries = read_log(log_path(settings, "toy"))
    ticks = [e for e in entries if e["kind"] == "tick"]
    assert [e["tick"] for e in ticks] == list(range(START, END, TICK))
    assert sum(len(e["answers"]) for e in ticks) == 30
    assert all(set(e["phases"]) == {"produce", "steps", "model", "predict", "log"} for e in ticks)
    assert all(0 <= ms < 60_000 for e in ticks for ms in e["freshness"])


def test_waits_at_a_cut_until_the_version_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = MemoryBroker()
    cut = START - START % 604_800_000 + 604_800_000
    with loop(broker, tmp_path) as (settings, predictor):
        waits = RetrainWait(settings, use_case, broker, START)
        recorded: list[Any] = []
        monkeypatch.setattr(waits, "_record", lambda cut, seconds: recorded.append((cut, seconds)))
        waits(START + TICK, 0.0)  # no cut: returns at once
        producer = broker.producer()
        send_json(producer, "toy.cuts", "cut", {"cut": cut, "examples": 10, "total": 10})
        waits(cut, 0.0)  # no version and too few examples: nothing to wait for
        assert not recorded
        decision = {"version": "1", "action": "promoted", "sentence": "first", "cut": cut}
        state = {"generation": 3, "roles": {"champion": "1"}, "versions": {"1": {}}, "decisions": [decision]}
        send_json(producer, "toy.models", "state", state)
        monkeypatch.setattr("services.retrain_wait.DEADLINE_S", 0.3)
        with pytest.raises(UnavailableError, match="the predictor does not serve the newest state"):
            waits(cut, 0.0)
        predictor.generation, predictor.champion = 3, "1"
        waits(cut, 0.0)
        waits.close()
    assert [c for c, _ in recorded] == [cut]


def send_json(producer: Any, topic: str, key: str, value: Any) -> None:
    producer.send([Message(topic, json.dumps(value).encode(), key.encode())])
    producer.flush()


def test_tails_look_back_until_a_clock(tmp_path: Path) -> None:
    broker = MemoryBroker()
    broker.create_topics({"t": {}}, 1)
    producer = broker.producer()
    from pipelines.broker import clock_message

    producer.send([clock_message("t", 0, 5), *(Message("t", b"x", str(i).encode()) for i in range(700))])
    tail = tails(broker, ["t"])["t", 0]
    assert (tail.clock, len(tail.after), tail.end) == (5, 700, 701)
    broker.create_topics({"empty": {}}, 1)
    assert tails(broker, ["empty"])["empty", 0].clock is None


@pytest.mark.parametrize(
    ("from_", "until", "tick", "message"),
    [
        (2, 1, 15, "nothing to replay"),
        (1, 1, 15, "nothing to replay"),
        (1, 2, 7 * 60, "must both be multiples of the tick"),
    ],
)
def test_a_bad_range_is_refused(from_: int, until: int, tick: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Plan.of(datetime(2013, 1, from_, tzinfo=UTC), datetime(2013, 1, until, tzinfo=UTC), timedelta(minutes=tick))


def test_wait_until_names_what_is_lacking() -> None:
    with pytest.raises(UnavailableError, match=r"the sun \(waited 0 s\)"):
        wait_until(lambda: False, lambda: "the sun", 0.01)


def test_what_is_open_is_closed_when_the_next_connection_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads would try again for ever."""
    closed: list[str] = []

    def refuse(*_: Any) -> None:
        raise UnavailableError("the broker is away")

    broker = MemoryBroker()
    with loop(broker, tmp_path) as (settings, _):
        pass  # its steps have ended: what is patched below is the session's alone
    producer = broker.producer()
    monkeypatch.setattr(producer, "close", lambda: closed.append("producer"))
    monkeypatch.setattr(broker, "producer", lambda: producer)
    monkeypatch.setattr(Followed, "close", lambda self: closed.append("followed"))
    monkeypatch.setattr("services.replay_session.Newest", refuse)
    with pytest.raises(UnavailableError, match="away"):
        session(broker, settings, END)
    assert closed == ["followed", "followed", "producer"]
