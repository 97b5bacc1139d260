"""The runner on the in-memory broker: killed at any point of a commit, what it leaves equals an undisturbed run."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from features.errors import StateError
from features.flights import use_case as flights
from pipelines.broker import Message, clock_message, clock_of
from pipelines.checkpoint import (
    Checkpoints,
    Committed,
    Plan,
    listed_files,
    parse_metadata,
    told_positions,
    unserved_views,
    watermark_of,
)
from pipelines.featurizer import Featurizer
from pipelines.joiner import Joiner
from pipelines.memory_store import MemoryStore
from pipelines.runner import CommitPolicy, Owned, Runner
from services import timetable
from services.topics import create_topics
from tests.memory_broker import MemoryBroker, MemoryProducer
from tests.toy import use_case as toy

MINUTE = 60_000
START = 1_000_000 * MINUTE
use_case = replace(toy, file_every=timedelta(minutes=30))
TOPICS = ["ordered", "returned", "predictions", "examples", "cuts", "rejected"]


class Killed(BaseException):
    """Stands for kill -9: nothing of the process goes on."""


class Store(MemoryStore):
    """A store that shows what it holds, and can lose it."""

    def snapshot_rows(self) -> Any:
        return {view: dict(rows) for view, rows in self._rows.items()}

    def clear(self) -> None:
        self._marks.clear()
        for rows in self._rows.values():
            rows.clear()


def make_broker() -> MemoryBroker:
    broker = MemoryBroker()
    broker.create_topics({f"toy.{name}": {} for name in TOPICS}, 1)
    return broker


def orders(broker: MemoryBroker, start: int, n: int, clock: bool = True) -> None:
    """n orders and some returns, a minute apart; then clock records."""
    messages = []
    for i in range(start, start + n):
        at = START + i * MINUTE
        value = {"id": f"o{i}", "time": at, "shop": f"s{i % 3}", "item": i % 2, "price": i * 0.25}
        messages.append(Message("toy.ordered", json.dumps(value).encode(), timestamp=at))
        if i % 4 == 0:
            value = {"id": f"r{i}", "time": at, "order": f"o{i}", "why": "late"}
            messages.append(Message("toy.returned", json.dumps(value).encode(), timestamp=at))
    if clock:
        end = START + (start + n) * MINUTE
        messages += [clock_message(f"toy.{name}", 0, end) for name in ("ordered", "returned", "predictions")]
    producer = broker.producer()
    producer.send(messages)
    producer.flush()


def predictions(broker: MemoryBroker, start: int, n: int) -> None:
    producer = broker.producer()
    for i in range(start, start + n):
        at = START + i * MINUTE
        value = {
            "request_id": f"o{i}", "event_time": at, "entities": {"shop": "s", "item": 1}, "fields": {"price": 1.0},
            "features": {"all_count": i}, "schema": "x", "feature_times": {}, "version": "1", "arm": "champion",
            "score": 0.5,
        }  # fmt: skip
        producer.send([Message("toy.predictions", json.dumps(value).encode(), f"o{i}".encode(), timestamp=at)])
    producer.flush()


def values(broker: MemoryBroker, topic: str) -> list[Any]:
    """The committed records of a topic, without clocks."""
    consumer = broker.consumer([topic])
    return [json.loads(r.value or b"null") for r in consumer.poll(0, 10**6) if clock_of(r) is None]


def runner(broker: MemoryBroker, step: Any, path: Path, store: MemoryStore | None = None) -> Runner:
    return Runner(broker, use_case, step, str(path), store=store, policy=CommitPolicy(1e9, 7))


def once(r: Runner) -> None:
    r.run(threading.Event(), once=True)


def offline(broker: MemoryBroker, path: Path, step: str, table: str) -> list[Any]:
    rows = [row for f in listed_files(str(path), "toy", step, table, broker) for row in pq.read_table(f).to_pylist()]
    return sorted(rows, key=repr)


def kill_at(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, when: int, after: bool) -> None:
    """The `when`-th call of target.name kills the process, before or after it did its work."""
    original, calls = getattr(target, name), [0]

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == when and not after:
            raise Killed
        result = original(*args, **kwargs)
        if calls[0] == when:
            raise Killed
        return result

    monkeypatch.setattr(target, name, dying)


def crash_points() -> list[Any]:
    points = [(Checkpoints, "save_base"), (Checkpoints, "save_delta"), (Checkpoints, "write_table")]
    points += [(MemoryProducer, "commit"), (Store, "write")]  # type: ignore[list-item]
    return [
        pytest.param(target, name, when, after, id=f"{name}-{when}-{'after' if after else 'before'}")
        for target, name in points
        for when in (1, 2)
        for after in (False, True)
        if (name, when) != ("save_base", 2)
    ]


def work(broker: MemoryBroker, path: Path, store: Store, kill: Any = None) -> None:
    """Both steps over two stretches of input, started again after every kill."""
    for start in (0, 60):
        orders(broker, start, 60)
        predictions(broker, start, 60)
        for make in (lambda _: Featurizer(use_case), lambda _: Joiner(use_case)):
            for _ in range(4):
                try:
                    once(runner(broker, make, path, store))
                    break
                except Killed:
                    pass
            else:
                raise AssertionError("killed more often than asked")


@pytest.mark.parametrize(("target", "name", "when", "after"), crash_points())
def test_killed_anywhere_nothing_is_lost_or_doubled(
    target: Any, name: str, when: int, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, calm_store = make_broker(), Store(use_case)
    work(calm, tmp_path / "calm", calm_store)
    broker, store = make_broker(), Store(use_case)
    kill_at(monkeypatch, target, name, when, after)
    work(broker, tmp_path / "killed", store)
    assert store.snapshot_rows() == calm_store.snapshot_rows()
    for topic in ("toy.examples", "toy.rejected", "toy.cuts"):
        assert values(broker, topic) == values(calm, topic), topic
    assert values(calm, "toy.examples")
    for step, table in (("featurizer", "all_orders"), ("featurizer", "shop_item"), ("joiner", "examples")):
        expected = offline(calm, tmp_path / "calm", step, table)
        assert expected
        assert offline(broker, tmp_path / "killed", step, table) == expected
    assert watermark_of(broker, "toy.joiner") == watermark_of(calm, "toy.joiner") == START + 120 * MINUTE


def test_an_emptied_store_is_filled_at_the_next_commit(tmp_path: Path) -> None:
    full, lost = Store(use_case), Store(use_case)
    for store in (full, lost):
        broker, path = make_broker(), tmp_path / str(store is lost)
        orders(broker, 0, 60)
        once(runner(broker, lambda _: Featurizer(use_case), path, store))
        if store is lost:
            store.clear()
        orders(broker, 60, 1)
        once(runner(broker, lambda _: Featurizer(use_case), path, store))

    def rows(store: Store) -> Any:
        return {view: {key: row for key, (row, _) in of.items()} for view, of in store.snapshot_rows().items()}

    assert rows(lost) == rows(full) and len(rows(full)["shop_item"]) == 6


EXAMPLES, CUTS, GROUP = ("toy.examples", 0), ("toy.cuts", 0), "toy.joiner"


def join(broker: MemoryBroker, path: Path) -> None:
    """Every commit that takes labels in makes examples, and a cut every half hour; killed, the joiner starts again."""
    cutting = replace(use_case, retrain_every=timedelta(minutes=30))
    for start in range(0, 180, 20):
        predictions(broker, start, 20)
        orders(broker, start, 20)
    for _ in range(2):
        with suppress(Killed):
            once(runner(broker, lambda _: Joiner(cutting), path))


OUTPUT, ALL = {EXAMPLES, CUTS}, {EXAMPLES, CUTS, GROUP}
LOST = [(True, OUTPUT, 0), (True, {GROUP}, 0), (True, ALL, 0), (False, OUTPUT, 0), (False, {GROUP}, 0), (False, ALL, 0)]


@pytest.mark.parametrize(("committed", "where", "later"), [*LOST, (True, {GROUP}, 1), (True, ALL, 1)])
@pytest.mark.parametrize("which", [1, 2])
def test_a_commit_whose_end_a_killed_broker_lost_counts_once(
    which: int, committed: bool, where: set[Any], later: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The joiner dies too: with that commit, or one commit later and before its end."""
    monkeypatch.setattr(Checkpoints, "wants_base", property(lambda self: not self.base or self.number % 2 == 0))
    monkeypatch.setattr("pipelines.runner.POLL_RECORDS", 7)
    join(calm := make_broker(), tmp_path / "calm")
    broker, ended, left = make_broker(), MemoryProducer.end, which

    def open_examples() -> bool:
        entries = (e for e in broker.logs[EXAMPLES] if e.transaction and e.transaction.state == "open")
        return any(e.record and e.record.value for e in entries)

    def dying(self: MemoryProducer, state: str) -> None:
        nonlocal left
        left -= open_examples() if left > 0 else 1
        if left == 0:
            broker.loses = where
            ended(self, state if committed else "aborted")
            broker.loses = set()
        if left == -later:
            raise Killed
        if left:
            ended(self, state)

    monkeypatch.setattr(MemoryProducer, "end", dying)
    join(broker, tmp_path / "killed")
    assert left < 0
    for topic, fewest in (("toy.examples", 45), ("toy.cuts", 6), ("toy.rejected", 0)):
        assert values(broker, topic) == values(calm, topic), topic
        assert len(values(broker, topic)) >= fewest
    archive = offline(calm, tmp_path / "calm", "joiner", "examples")
    assert archive and offline(broker, tmp_path / "killed", "joiner", "examples") == archive
    assert {tp: p.offset for tp, p in broker.committed(GROUP).items()} == {
        tp: p.offset for tp, p in calm.committed(GROUP).items()
    }
    assert not broker.open and not broker.undecided


def test_a_lost_end_is_mended_though_nothing_more_comes(tmp_path: Path) -> None:
    orders(broker := make_broker(), 1, 6)
    broker.loses = ALL | {GROUP}
    r = runner(broker, lambda _: Joiner(use_case), tmp_path)
    r.policy = CommitPolicy(seconds=0.01, patient_seconds=0.2)

    def mended() -> bool:
        if broker.undecided:
            broker.loses = set()
        return not broker.loses and not broker.undecided and not broker.open

    until(r, mended, "end of the commit")
    assert broker.committed(GROUP)


def test_the_newest_commit_is_found_however_much_lies_behind_it(tmp_path: Path) -> None:
    broker = make_broker()
    assert told_positions(broker, EXAMPLES) == {}
    join(broker, tmp_path)
    send(broker, *(Message("toy.examples", b"{}") for _ in range(2500)))
    assert told_positions(broker, EXAMPLES) == broker.committed(GROUP)


def test_who_removes_state_and_offsets_starts_over(tmp_path: Path) -> None:
    join(broker := make_broker(), tmp_path)
    once = values(broker, "toy.examples")
    shutil.rmtree(tmp_path)
    del broker.groups[GROUP]
    join(broker, tmp_path)
    again = values(broker, "toy.examples")
    assert again[: len(once)] == once and len(again) > len(once)


def test_every_bad_record_is_on_the_rejected_topic(tmp_path: Path) -> None:
    broker = make_broker()
    producer = broker.producer()
    producer.send(
        [
            Message("toy.ordered", b"{", timestamp=START),
            Message("toy.ordered", b'{"id": 1}', timestamp=START),
            Message("toy.ordered", b"x" * 100_000, timestamp=START),
            Message("toy.ordered", json.dumps(order("f", START + 10**9)).encode(), timestamp=START),
            Message("toy.ordered", json.dumps(order("a", START)).encode(), timestamp=START),
            Message("toy.ordered", json.dumps(order("a", START)).encode(), timestamp=START),
            *(clock_message(f"toy.{n}", 0, START + 600 * MINUTE) for n in ("ordered", "returned")),
            Message("toy.ordered", json.dumps(order("old", START)).encode(), timestamp=START),
            clock_message("toy.ordered", 0, START + 601 * MINUTE),
            clock_message("toy.returned", 0, START + 601 * MINUTE),
        ]
    )
    producer.flush()
    once(runner(broker, lambda _: Featurizer(use_case), tmp_path, Store(use_case)))
    rejected = values(broker, "toy.rejected")
    assert [r["reason"] for r in rejected] == ["malformed", "invalid", "oversized", "future", "duplicate", "late"]
    big = rejected[2]
    assert (big["size"], len(big["raw"]) < 6000, big["topic"], big["offset"]) == (100_000, True, "toy.ordered", 2)


def order(id: str, time: int) -> dict[str, Any]:
    return {"id": id, "time": time, "shop": "s", "item": 1, "price": 1.0}


def test_positions_without_their_snapshot_are_refused(tmp_path: Path) -> None:
    broker = make_broker()
    orders(broker, 0, 20)
    once(runner(broker, lambda _: Featurizer(use_case), tmp_path, Store(use_case)))
    for file in tmp_path.glob("toy/featurizer/0/snapshots/*"):
        file.unlink()
    with pytest.raises(StateError, match="missing"):
        once(runner(broker, lambda _: Featurizer(use_case), tmp_path, Store(use_case)))


def test_a_snapshot_without_positions_is_refused(tmp_path: Path) -> None:
    broker = make_broker()
    for start in (0, 20):
        orders(broker, start, 20)
        once(runner(broker, lambda _: Featurizer(use_case), tmp_path, Store(use_case)))
    orders(again := make_broker(), 0, 20)
    with pytest.raises(StateError, match="no committed positions"):
        once(runner(again, lambda _: Featurizer(use_case), tmp_path, Store(use_case)))


def late_returns(broker: MemoryBroker, orders_at: int, returns_at: int, n: int) -> None:
    """n orders and n returns, a minute apart, no clocks; the two topics begin far from each other."""
    for i in range(n):
        value = order(f"o{i}", START + (orders_at + i) * MINUTE)
        send(broker, Message("toy.ordered", json.dumps(value).encode(), timestamp=value["time"]))
        back = {"id": f"r{i}", "time": START + (returns_at + i) * MINUTE, "order": f"o{i}", "why": "late"}
        send(broker, Message("toy.returned", json.dumps(back).encode(), timestamp=back["time"]))


def send(broker: MemoryBroker, *messages: Message) -> None:
    producer = broker.producer()
    producer.send(messages)
    producer.flush()


def until(r: Runner, reached: Callable[[], bool], what: str) -> None:
    """Run `r` on a thread until `reached`."""
    stop, give_up = threading.Event(), time.monotonic() + 20
    thread = threading.Thread(target=r.run, args=(stop,))
    thread.start()
    pause = threading.Event()
    while not reached() and thread.is_alive() and time.monotonic() < give_up:
        pause.wait(0.01)
    ok = reached()
    stop.set()
    thread.join()
    assert ok, f"no {what} within 20 s"


def test_an_input_that_runs_ahead_is_paused_and_memory_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late_returns(broker := make_broker(), 5000, 0, 600)
    monkeypatch.setattr("pipelines.runner.MOST_WAITING", 50)
    monkeypatch.setattr("pipelines.runner.POLL_RECORDS", 20)
    store, most = Store(use_case), 0
    r = runner(broker, lambda _: Featurizer(use_case), tmp_path, store)
    r.policy = CommitPolicy(0.05, 100)
    balance = r._balance

    def watched(owned: Owned, now: float) -> None:
        nonlocal most
        most = max(most, owned.waiting)
        balance(owned, now)

    monkeypatch.setattr(r, "_balance", watched)
    end = START + 5599 * MINUTE
    until(r, lambda: (watermark_of(broker, "toy.featurizer") or 0) >= end, "end of the backlog")
    assert 50 <= most <= 70
    assert r.reported == {}
    assert (
        store.read([{"shop": "s", "item": 1}])[0]["all_orders"][0]["all_count"] == 75
    )  # an hour and the tile it begins in


def test_inputs_that_were_ahead_are_read_again_when_they_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four topics, one after the other: as time goes on, each in turn is the one that the others wait for."""
    monkeypatch.setattr("pipelines.runner.MOST_WAITING", 200)
    monkeypatch.setattr("pipelines.runner.POLL_RECORDS", 100)
    day = timetable.OPENING // 86_400_000 * 86_400_000
    events = sorted(timetable.events(day, day + 3 * 86_400_000), key=lambda event: event.event)
    create_topics(broker := MemoryBroker(), flights)
    messages = [Message(f"flights.{e.event}", e.value, e.key, timestamp=e.time) for e in events]
    end = max(e.time for e in events) + 1
    send(broker, *messages, *(clock_message(topic, 0, end) for topic in flights.event_topics))
    once(Runner(broker, flights, lambda _: Featurizer(flights), str(tmp_path), store=Store(flights)))
    assert watermark_of(broker, "flights.featurizer") == end
    assert {tp[0]: p.offset for tp, p in broker.committed("flights.featurizer").items()} == {
        topic: len(broker.logs[topic, 0]) for topic in flights.event_topics
    }


def test_a_bounded_run_ends_when_only_inputs_are_left_that_run_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late_returns(broker := make_broker(), 5000, 0, 100)
    monkeypatch.setattr("pipelines.runner.MOST_WAITING", 30)
    monkeypatch.setattr("pipelines.runner.POLL_RECORDS", 10)
    make = lambda _: Featurizer(use_case)  # noqa: E731
    once(runner(broker, make, tmp_path, Store(use_case)))
    committed = broker.committed("toy.featurizer")
    assert committed["toy.returned", 0].offset == 100
    assert 30 <= committed["toy.ordered", 0].offset <= 40
    assert watermark_of(broker, "toy.featurizer") == START + 99 * MINUTE
    send(broker, clock_message("toy.returned", 0, START + 9000 * MINUTE))
    once(runner(broker, make, tmp_path, store := Store(use_case)))
    assert broker.committed("toy.featurizer")["toy.ordered", 0].offset == 100
    assert watermark_of(broker, "toy.featurizer") == START + 5099 * MINUTE
    assert store.read([{"shop": "s", "item": 1}])[0]["all_orders"][1] == START + 5098 * MINUTE + 1


def test_a_bounded_run_stops_exactly_where_the_input_ended_at_its_start(tmp_path: Path) -> None:
    orders(broker := make_broker(), 0, 40)
    ends = {tp: len(broker.logs[tp]) for tp in (("toy.ordered", 0), ("toy.returned", 0))}

    class Busy(Store):
        def write(self, rows: Any) -> None:
            orders(broker, 40 + 20 * len(broker.logs["toy.ordered", 0]), 20)
            super().write(rows)

    once(runner(broker, lambda _: Featurizer(use_case), tmp_path, Busy(use_case)))
    assert len(broker.logs["toy.ordered", 0]) > ends["toy.ordered", 0]
    assert {tp: p.offset for tp, p in broker.committed("toy.featurizer").items()} == ends
    assert watermark_of(broker, "toy.featurizer") == START + 40 * MINUTE


def test_a_bounded_run_leaves_the_work_to_a_live_owner(tmp_path: Path) -> None:
    orders(broker := make_broker(), 0, 20)
    owner = broker.consumer(["toy.ordered", "toy.returned"], group="toy.featurizer")
    owner.poll(0)
    once(runner(broker, lambda _: Featurizer(use_case), tmp_path, Store(use_case)))
    assert broker.committed("toy.featurizer") == {}


def test_an_empty_input_does_not_hold_the_others_back(tmp_path: Path) -> None:
    orders(broker := make_broker(), 1, 3, clock=False)  # none of them is returned
    store = Store(use_case)
    r = runner(broker, lambda _: Featurizer(use_case), tmp_path, store)
    until(r, lambda: len(store.snapshot_rows()["shop_item"]) == 3, "row of each order")


def test_time_that_goes_on_alone_is_seldom_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders(broker := make_broker(), 1, 3, clock=False)
    r = runner(broker, lambda _: Featurizer(use_case), tmp_path, store := Store(use_case))
    r.policy = CommitPolicy(seconds=0.02, patient_seconds=1e9)
    commits, moves = [], []
    commit, advance = r._commit, r._advance

    def watched_commit(i: int) -> None:
        if r.owned[i].calls:
            commits.append(r.owned[i].eventful)
        commit(i)

    def watched_advance(i: int, *args: Any) -> bool:
        moved = advance(i, *args)
        moves.append(moved and not r.owned[i].eventful)
        return moved

    monkeypatch.setattr(r, "_commit", watched_commit)
    monkeypatch.setattr(r, "_advance", watched_advance)
    monkeypatch.setattr("pipelines.runner.IDLE_POLL_S", 0.02)
    until(r, lambda: sum(moves) >= 3, "moves of time alone")
    assert len(store.snapshot_rows()["shop_item"]) == 3
    assert commits[-1:] == [False] and all(commits[:-1])  # the last one is that of the stop


def test_a_view_that_was_added_starts_empty_and_is_not_served(tmp_path: Path) -> None:
    fewer = replace(use_case, views=use_case.views[1:])
    orders(broker := make_broker(), 0, 20)
    once(Runner(broker, fewer, lambda _: Featurizer(fewer), str(tmp_path), store=Store(fewer)))
    assert unserved_views(broker, "toy.featurizer") == frozenset()
    for start in (20, 40):
        orders(broker, start, 20)
        once(runner(broker, lambda _: Featurizer(use_case), tmp_path, store := Store(use_case)))
        assert unserved_views(broker, "toy.featurizer") == {"all_orders"}
    rows = store.read([{"shop": f"s{59 % 3}", "item": 59 % 2}])[0]
    assert rows["all_orders"] == (None, None), "its rows would lack history"
    expected = sum(f"s{i % 3}" == f"s{59 % 3}" and i % 2 == 59 % 2 for i in range(60))
    assert rows["shop_item"][0]["si_count"] == expected


def plan(**changes: Any) -> Plan:
    parts = {"a": ["count(x)"], "b": ["sum(x)"], "wait": 5}
    return Plan(**{"step": "s", "parts": parts, "contracts": {"t": ["c", 1]}, **changes})


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        ({}, []),
        ({"parts": {"a": ["count(x)"], "b": ["sum(x)"], "wait": 5, "c": ["mean(x)"]}}, ["c"]),
        ({"parts": {"a": ["count(x)", "count(y)"], "b": ["sum(x)"], "wait": 5}}, ["a"]),
        ({"contracts": {"t": ["c", 1], "u": ["d", 1]}}, []),
        ({"parts": {"a": ["count(y)"], "b": ["sum(x)"], "wait": 5}}, None),
        ({"parts": {"a": ["count(x)"], "wait": 5}}, None),
        ({"parts": {"a": ["count(x)"], "b": ["sum(x)"], "wait": 6}}, None),
        ({"parts": {"a": ["count(x)"], "b": ["sum(x)"], "wait": 5, "late": 1}}, None),
        ({"contracts": {"t": ["c", 2]}}, None),
        ({"contracts": {}}, None),
        ({"step": "other"}, None),
    ],
)
def test_what_a_stored_state_can_be_read_by(changes: dict[str, Any], added: list[str] | None) -> None:
    assert plan(**changes).added(plan()) == added


def test_committed_metadata_reads_back() -> None:
    for committed in (Committed("0000000001-ab", 5), Committed("0000000001-ab", 5, ("v", "w"))):
        assert parse_metadata(str(committed)) == committed
    with pytest.raises(StateError, match="another program"):
        parse_metadata("")


def test_another_plan_is_refused(tmp_path: Path) -> None:
    orders(broker := make_broker(), 0, 20)
    once(runner(broker, lambda _: Featurizer(use_case), tmp_path, Store(use_case)))
    fewer = replace(use_case, views=use_case.views[:1])
    with pytest.raises(StateError, match="backfill"):
        once(Runner(broker, fewer, lambda _: Featurizer(fewer), str(tmp_path), store=Store(use_case)))
