"""The window engine against the oracle: random events, keys, ties, late events, batches and restarts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from feast import FeatureService
from feast.aggregation import Aggregation
from hypothesis import given, settings
from hypothesis import strategies as st

from features import columns, kernel, timers
from features.columns import Columns
from features.contracts import Contract, Field
from features.engine import Applied, Engine, Events
from features.errors import ConfigError
from features.oracle import brute_force
from features.timers import TimerRule
from features.usecase import Label, ModelInputs, UseCase
from features.views import entity, stream_view
from features.windows import compile_view, pack, unpack

MINUTE = 60_000
moved = Contract(
    "moved",
    (
        Field("id", str),
        Field("at", "time"),
        Field("user", str, optional=True),
        Field("size", int, optional=True),
        Field("price", float, decimals=3),
        Field("kind", str, optional=True),
    ),
    time="at",
    id="id",
)
user = entity("user")


def windows(prefix: str) -> list[Aggregation]:
    """Every function, over windows and slides of different shapes."""
    shapes = [(10, 1, "a"), (30, 10, "b"), (60, 30, "c")]
    functions = [("size", f) for f in ("count", "sum", "mean", "std", "last", "last_3", "min", "max")] + [
        ("price", f) for f in ("sum", "std", "min", "max", "last", "count_distinct")
    ]
    functions += [("id", "last_2"), ("id", "last"), ("kind", "count_distinct"), ("size", "count_distinct")]
    return [
        Aggregation(column, f, timedelta(minutes=w), timedelta(minutes=h), f"{prefix}_{column}_{f}_{tag}")
        for w, h, tag in shapes
        for column, f in functions
    ]


def began(moves: Columns) -> Columns:
    """Idle 5 minutes after an event without another one; for 20 minutes at most."""
    at, user = moves["at"], moves["user"]
    return {"key": user, "due": at + 5 * MINUTE, "until": at + 25 * MINUTE, "n": np.ones(len(at), np.int64)}


idle = [Aggregation("n", f, timedelta(minutes=60), timedelta(minutes=10), f"idle_{f}") for f in ("count", "sum")]
use_case = UseCase(
    name="toy",
    contracts=(moved,),
    request=moved,
    entities=("user",),
    views=(
        stream_view("by_user", [user], moved, "toy", windows("u"), last_types={"id": str}),
        stream_view(
            "all", [], moved, "toy", windows("all"), lambda c: {"half": c["price"] / 2}, last_types={"id": str}
        ),
        stream_view("idle", [user], moved, "toy", idle),
    ),
    on_demand=(),
    service=FeatureService(name="toy", features=[]),
    label=Label("moved", "id", lambda v: 1.0, timedelta(hours=1)),
    inputs=ModelInputs(()),
    prior=0.5,
    timers={"idle": TimerRule({"moved": began})},
)


@dataclass
class Stream:
    events: list[Applied] = field(default_factory=list)
    watermarks: list[int] = field(default_factory=list)


def stream(seed: int, n: int) -> Stream:
    """Events in the order they apply; one in five is late, ties are common, gaps empty whole windows."""
    rng = random.Random(seed)
    now, out = 1_000 * MINUTE, Stream()
    for i in range(n):
        now += rng.choice([0, 0, 1, 500, 7 * MINUTE // 3, 40 * MINUTE if rng.random() < 0.1 else MINUTE])
        time = now - rng.randrange(60 * MINUTE) if rng.random() < 0.2 else now
        value = SimpleNamespace(
            id=str(i),
            at=time,
            user=rng.choice(["ann", "bob", "eve", None]),
            size=rng.choice([None, -3, 0, 5, 1000]),
            price=rng.choice([rng.randrange(-5000, 5000) / 1000, -0.5, 0.0]),
            kind=rng.choice(["a", "b", "c", None]),
        )
        out.events.append(Applied("moved", value, time, now))
    return out


def run(events: list[Applied], cuts: list[int], end: int, restart: bool = False) -> dict[str, list[tuple[Any, ...]]]:
    """All rows by view, for the events cut into batches at `cuts` (positions)."""
    engine, out = Engine(use_case), {}
    for start, stop in zip([0, *cuts], [*cuts, len(events)], strict=True):
        watermark = events[stop].applied if stop < len(events) else end
        while stop > start and events[stop - 1].applied >= watermark:
            stop -= 1
        changed, refused = engine.advance(Events.of(events[start:stop]), watermark)
        assert not refused
        for name, rows in changed.items():
            for i, key in enumerate(zip(*rows.keys, strict=True) if rows.keys else [()] * len(rows.times)):
                values = tuple((n, plain(c[i])) for n, c in rows.columns.items())
                out.setdefault(name, []).append((key, int(rows.times[i]), values))
        if restart:
            saved, engine = engine.snapshot(), Engine(use_case)
            engine.restore(saved)
    return {name: sorted(rows, key=lambda r: (r[0], r[1])) for name, rows in out.items()}


def plain(value: Any) -> Any:
    """A comparable value: null as None, lists as tuples."""
    if isinstance(value, list):
        return tuple(value)
    return None if value is None or value != value else value


def same(value: Any, expected: Any) -> bool:
    """Equal to 1e-9 relative, 1e-6 absolute where a spread cancels; null and lists exactly."""
    if value is None or isinstance(value, str):
        return value == expected
    if isinstance(value, tuple):
        return list(value) == expected
    return bool(value == pytest.approx(expected, rel=1e-9, abs=1e-6))


def tie_free(events: list[Applied], cuts: list[int]) -> list[int]:
    """Cuts moved so that all events of one instant are in one batch, as the runner hands them over."""
    out = []
    for cut in cuts:
        while 0 < cut < len(events) and events[cut - 1].applied == events[cut].applied:
            cut -= 1
        out.append(cut)
    return sorted(set(out) - {0, len(events)})


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 60))
def test_rows_equal_the_oracle(seed: int, n: int) -> None:
    events = stream(seed, n).events
    end = events[-1].applied + 200 * MINUTE
    rng = random.Random(seed)
    for name, rows in run(events, [], end).items():
        assert rows
        for key, time, values in rng.sample(rows, min(12, len(rows))):
            expected = brute_force(use_case, name, key, events, time)
            for feature, value in values:
                assert same(value, expected[feature]), (name, key, time, feature)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 60), size=st.sampled_from([1, 7, 20]), restart=st.booleans())
def test_batches_and_restarts_change_nothing(seed: int, n: int, size: int, restart: bool) -> None:
    events = stream(seed, n).events
    end = events[-1].applied + 200 * MINUTE
    cuts = tie_free(events, list(range(size, n, size)))
    assert run(events, cuts, end, restart) == run(events, [], end)


@pytest.mark.parametrize("seed", range(5))
def test_between_rows_the_value_does_not_change(seed: int) -> None:
    """The newest row at or before any instant holds the oracle's value, so no change was missed."""
    events = stream(seed, 40).events
    end = events[-1].applied + 200 * MINUTE
    rng = random.Random(seed)
    rows = run(events, [], end)
    for name in rows:
        for key in {k for k, _, _ in rows[name]}:
            for at in [rng.randrange(events[0].applied, end) for _ in range(8)]:
                held = [values for k, time, values in rows[name] if k == key and time <= at]
                expected = brute_force(use_case, name, key, events, at)
                if not held:
                    assert not any(expected.values()), (name, key, at)
                for feature, value in held[-1] if held else ():
                    assert same(value, expected[feature]), (name, key, at, feature)


def test_empty_keys_are_forgotten() -> None:
    engine = Engine(use_case)
    events = Events.of(stream(3, 50).events)
    engine.advance(events, int(events.applied[-1]) + 1)
    assert engine.windows["by_user"].keys_alive
    engine.advance(Events.of([]), int(events.applied[-1]) + 10_000 * MINUTE)
    for windows in engine.windows.values():
        state = windows.state
        assert not windows.keys_alive
        for pool, top, free, link in (
            (state.entries, kernel.ENTRIES, kernel.FREE_ENTRY, kernel.NEXT),
            (state.nodes, kernel.NODES, kernel.FREE_NODE, 0),
        ):
            assert free_rows(pool, int(state.meta[free]), link) == state.meta[top], "some were not given back"
    engine.coder.sweep(engine._codes())
    assert len(engine.coder) == 0


def free_rows(pool: Any, at: int, link: int) -> int:
    """How long a free list is."""
    n = 0
    while at >= 0:
        n, at = n + 1, int(pool[at, link])
    return n


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 40))
def test_the_compiled_kernel_equals_plain_python(seed: int, n: int) -> None:
    """The same source, uncompiled, gives the same rows to the last bit."""
    events = stream(seed, n).events
    end = events[-1].applied + 200 * MINUTE
    compiled = run(events, [n // 2], end)
    with interpreted():
        assert run(events, [n // 2], end) == compiled


@contextmanager
def interpreted() -> Iterator[None]:
    """Every compiled function of the kernel and the timers as plain Python."""
    saved = [(m, name, f) for m in (kernel, timers) for name, f in vars(m).items() if hasattr(f, "py_func")]
    for module, name, function in saved:
        setattr(module, name, function.py_func)
    try:
        yield
    finally:
        for module, name, function in saved:
            setattr(module, name, function)


def test_codes_are_given_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many keys a stream has had, the engine remembers those whose windows are not empty."""
    monkeypatch.setattr(columns, "SWEEP_AT", 50)
    engine = Engine(use_case)
    for i in range(300):
        at = i * 200 * MINUTE
        value = SimpleNamespace(id=str(i), at=at, user=f"u{i}", size=1, price=0.5, kind=f"k{i}")
        changed, _ = engine.advance(Events.of([Applied("moved", value, at, at)]), at + 1)
        assert f"u{i}" in changed["by_user"].keys[0]
        assert changed["by_user"].columns["u_id_last_a"].tolist()[-1] == str(i)
    assert engine.coder.used < 300
    assert len(engine.coder) < 60


def test_an_integer_has_one_code_however_it_comes() -> None:
    coder, many = columns.Coder(), np.arange(-500, 500) * 7_919
    codes = coder.encode_integers(np.concatenate([many, many[::-1]]))
    assert len(set(codes.tolist())) == 1000 and (codes[:1000] == codes[:999:-1]).all()
    assert coder.decode(codes[:1000]).tolist() == many.tolist() == coder.decode(coder.encode(many.tolist())).tolist()
    assert coder.encode(["7919", 7919.0]).tolist() == [1000, 501]
    restored = columns.Coder()
    restored.restore(unpack(pack(coder.snapshot())))
    assert restored.encode_integers(many).tolist() == codes[:1000].tolist()
    restored.sweep([np.arange(1, 1001)])
    assert restored.encode_integers(np.array([12345, many[1]])).tolist() == [0, 1]


def test_an_event_too_old_for_every_window_is_refused() -> None:
    old = SimpleNamespace(id="1", at=0, user="ann", size=1, price=0.5, kind=None)
    _, refused = Engine(use_case).advance(Events.of([Applied("moved", old, 0, 91 * MINUTE)]), 92 * MINUTE)
    assert [(r.position, r.reason) for r in refused] == [(0, "late")]


@pytest.mark.parametrize(("size", "price"), [(2**41, 0.5), (1, 1e12)])
def test_what_could_overflow_a_sum_is_refused_and_the_rest_counts(size: int, price: float) -> None:
    values = [
        SimpleNamespace(id="1", at=0, user="ann", size=size, price=price, kind=None),
        SimpleNamespace(id="2", at=1, user="ann", size=7, price=0.25, kind=None),
    ]
    changed, refused = Engine(use_case).advance(Events.of([Applied("moved", v, v.at, v.at) for v in values]), 10)
    assert [(r.position, r.reason) for r in refused] == [(0, "invalid")]
    assert changed["by_user"].columns["u_size_sum_a"].tolist() == [7.0]


@pytest.mark.parametrize(
    ("function", "window", "slide"),
    [("median", 60, 10), ("sum", 60, 60), ("sum", 60, 7), ("sum", 60, None), ("last_x", 60, 10)],
)
def test_what_can_not_be_executed_is_named(function: str, window: int, slide: int | None) -> None:
    wrong = Aggregation(
        "size", function, timedelta(minutes=window), timedelta(minutes=slide) if slide else None, "wrong"
    )
    with pytest.raises(ConfigError, match="'wrong'"):
        compile_view(stream_view("v", [user], moved, "toy", [wrong]))


def test_a_fraction_that_is_summed_needs_decimals() -> None:
    bare = replace(moved, fields=tuple(replace(f, decimals=None) for f in moved.fields))
    total = [Aggregation("price", "sum", timedelta(hours=1), timedelta(minutes=10), "total")]
    wrong = replace(use_case, contracts=(bare,), views=(stream_view("v", [user], bare, "toy", total),), timers={})
    with pytest.raises(ConfigError, match="decimals"):
        Engine(wrong)


def test_only_what_can_be_taken_back_is_computed_over_timers() -> None:
    newest = [Aggregation("n", "last", timedelta(hours=1), timedelta(minutes=10), "newest")]
    wrong = replace(use_case, views=(stream_view("idle", [user], moved, "toy", newest),))
    with pytest.raises(ConfigError, match="take back"):
        Engine(wrong)
