"""Order, watermark, late, future and duplicate; and that neither interleaving nor batches nor restarts matter."""

from __future__ import annotations

import json
import random
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.contracts import Contract, Field
from features.windows import pack, unpack
from pipelines.broker import CLOCK_HEADER, CLOCK_KEY, Record
from pipelines.intake import Intake

fields = (Field("id", str), Field("at", "time"))
a = Contract("a", fields, time="at", id="id")
b = Contract("b", fields, time="at", id="id", out_of_orderness=timedelta(seconds=1))
INPUTS = {("t.a", 0): a, ("t.b", 0): b}


def event(topic: str, offset: int, time: int, id: str = "", timestamp: int | None = None) -> Record:
    value = json.dumps({"id": id or f"{topic}{offset}", "at": time}).encode()
    return Record(topic, 0, offset, time if timestamp is None else timestamp, None, value)


def clock(topic: str, offset: int, time: int) -> Record:
    return Record(topic, 0, offset, time, CLOCK_KEY, None, ((CLOCK_HEADER, str(time).encode()),))


def ids(events: list) -> list[str]:  # type: ignore[type-arg]
    return [e.value.id for e in events]


def test_events_wait_for_every_partition_and_come_in_time_order() -> None:
    intake = Intake(INPUTS)
    assert not intake.advance([event("t.a", 0, 5000, "a5"), event("t.a", 1, 9000, "a9")])[0]
    due, _ = intake.advance([event("t.b", 0, 8000, "b8")])
    assert ids(due) == ["a5"]
    assert intake.watermark == 7000
    due, _ = intake.advance([clock("t.a", 2, 10_000), clock("t.b", 1, 10_000)])
    assert ids(due) == ["b8", "a9"]
    assert intake.watermark == 10_000


def test_what_a_contract_refuses_is_refused_with_the_reason() -> None:
    intake = Intake(INPUTS)
    records = [
        Record("t.a", 0, 0, 1000, None, b"{"),
        Record("t.a", 0, 1, 1000, None, b'{"id": 5, "at": 1000}'),
        Record("t.a", 0, 2, 1000, None, b'{"id": "x"}'),
        Record("t.a", 0, 3, 1000, None, None),
        Record("t.a", 0, 4, 1000, None, b'{"id": "' + b"x" * 70_000 + b'", "at": 1}'),
        event("t.a", 5, 1000 + 5 * 60_000 + 1, timestamp=1000),
        event("t.a", 6, 1000, "twice"),
        event("t.a", 7, 1000, "twice"),
        Record("t.a", 0, 8, 1000, None, b'{"id": "n", "at": "2013-01-01T00:00:00"}'),
    ]
    _, refused = intake.advance(records)
    assert [r.reason for r in refused] == [
        "malformed",
        "invalid",
        "invalid",
        "malformed",
        "oversized",
        "future",
        "duplicate",
        "invalid",
    ]
    assert [r.record.offset for r in refused] == [0, 1, 2, 3, 4, 5, 7, 8]
    assert intake.counts["invalid"] == 3


def test_a_bad_clock_moves_no_watermark() -> None:
    intake = Intake(INPUTS)
    intake.advance([clock("t.b", 0, 10_000), event("t.a", 0, 10**12, timestamp=5000)])
    assert intake.watermark == 0


def test_a_late_event_counts_from_the_watermark_it_met() -> None:
    intake = Intake(INPUTS)
    intake.advance([clock("t.a", 0, 10_000), clock("t.b", 0, 4_000)])
    due, refused = intake.advance([event("t.a", 1, 3_000, "late"), clock("t.a", 2, 20_000), clock("t.b", 1, 20_000)])
    assert (due[0].time, due[0].applied) == (3_000, 10_000)
    assert not refused
    assert intake.counts["counted_late"] == 1


def test_a_silent_partition_holds_nothing_back_unless_it_carries_clocks() -> None:
    intake = Intake(INPUTS)
    due, _ = intake.advance([event("t.a", 0, 5000), event("t.a", 1, 6000)], idle=[("t.b", 0)])
    assert len(due) == 1
    intake.advance([], idle=INPUTS, quiet_ms=250)
    assert intake.watermark == 6250
    intake.advance([clock("t.b", 0, 6100)], idle=[("t.a", 0)])
    due, _ = intake.advance([event("t.a", 2, 9000)], idle=INPUTS, quiet_ms=9999)
    assert not due
    assert intake.watermark == 6250


def test_silence_before_the_first_event_means_nothing() -> None:
    intake = Intake(INPUTS)
    intake.advance([], idle=INPUTS, quiet_ms=10**9)
    assert intake.watermark == 0


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 9))
def test_interleaving_batches_and_restarts_change_nothing(seed: int, size: int) -> None:
    """With clock records the events handed over are a function of the logs alone."""
    rng = random.Random(seed)
    logs: dict[str, list[Record]] = {"t.a": [], "t.b": []}
    for topic, log in logs.items():
        now = 0
        for offset in range(30):
            now += rng.randrange(2000)
            late = rng.random() < 0.3
            time = max(0, now - rng.randrange(5000)) if late else now
            log.append(clock(topic, offset, now) if rng.random() < 0.2 else event(topic, offset, time, timestamp=now))
        log.append(clock(topic, 30, 10**6))
    handed = []
    for restart in (False, True):
        queues = {topic: list(log) for topic, log in logs.items()}
        intake, out = Intake(INPUTS), []
        while any(queues.values()):
            topic = rng.choice([t for t, q in queues.items() if q])
            batch, queues[topic] = queues[topic][:size], queues[topic][size:]
            out += intake.advance(batch)[0]
            if restart:
                saved, intake = unpack(pack(intake.snapshot())), Intake(INPUTS)
                intake.restore(saved)
        handed.append([(e.contract.name, e.value.id, e.time, e.applied) for e in out])
    assert handed[0] == handed[1]
    assert [x[3] for x in handed[0]] == sorted(x[3] for x in handed[0])


@pytest.mark.parametrize("header", [b"", b"soon", b"-5"])
def test_a_clock_record_without_a_time_is_an_ordinary_record(header: bytes) -> None:
    intake = Intake(INPUTS)
    _, refused = intake.advance([Record("t.a", 0, 0, 0, CLOCK_KEY, None, ((CLOCK_HEADER, header),))])
    assert refused[0].reason == "malformed"
