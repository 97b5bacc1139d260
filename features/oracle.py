"""The meaning of a feature, written as plainly as possible: every window computed from the raw events.

It is slow on purpose and shares nothing with the engine but the definitions; tests and `penstock audit` compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from features.columns import Source
from features.engine import Applied
from features.timers import TimerRule
from features.usecase import UseCase
from features.values import Structs
from features.vectors import join_keys
from features.windows import Aggregate, compile_view

Row = dict[str, Any]


def brute_force(
    use_case: UseCase, view_name: str, key: Sequence[Any], events: Sequence[Applied], at: int
) -> dict[str, Any]:
    """The view's features of `key` at instant `at` (epoch ms).

    events : everything known before `at`, in the order it was applied
    """
    view = next(v for v in use_case.views if v.name == view_name)
    rows = _rows(use_case, view, [e for e in events if e.applied < at], at)
    entities = join_keys(view)
    mine = [(time, row) for time, row in rows if [row[e] for e in entities] == list(key)]
    return {a.name: _value(a, mine, at) for a in compile_view(view)}


def _rows(use_case: UseCase, view: Any, events: Sequence[Applied], at: int) -> list[tuple[int, Row]]:
    """(event time, columns) of every event the view has seen and not taken back."""
    if rule := use_case.timers.get(view.name):
        return _inside(use_case, rule, events, at)
    contract = use_case.event_topics[view.stream_source.kafka_options.topic]
    own = [e for e in events if e.contract == contract.name]
    return [(e.time, row) for e, row in zip(own, _columns(use_case, contract.name, view.udf, own), strict=True)]


def _columns(use_case: UseCase, contract: str, udf: Any, own: Sequence[Applied]) -> list[Row]:
    """The columns of each event of one contract."""
    if not own:
        return []
    source = Source(use_case.contract(contract), Structs([e.value for e in own]))
    columns = {name: source[name] for name in use_case.contract(contract).names} | (udf(source) if udf else {})
    return [{n: c[i] for n, c in columns.items()} for i in range(len(own))]


def _inside(use_case: UseCase, rule: TimerRule, events: Sequence[Applied], at: int) -> list[tuple[int, Row]]:
    """The rows of timers that have begun before `at` and have not ended by then."""
    heard = [e for e in events if e.contract in rule.events]
    set_rows: dict[int, Row] = {}
    for name, make in rule.at.items():
        own = [i for i, e in enumerate(heard) if e.contract == name]
        rows = _columns(use_case, name, make, [heard[i] for i in own])
        set_rows |= dict(zip(own, rows, strict=True))
    keys = [
        set_rows[i]["key"] if i in set_rows else getattr(e.value, rule.cancel[e.contract]) for i, e in enumerate(heard)
    ]
    found, stops = [], dict[Any, int]()
    for i in reversed(range(len(heard))):
        if (row := set_rows.get(i)) and keys[i] is not None:
            stopped = stops.get(keys[i], at)
            start = max(int(row["due"]), heard[i].applied)
            end = min(max(int(row["until"]), start + 1), stopped)
            if start < min(stopped, at) and not end < at:
                found.append((start, row))
        stops[keys[i]] = heard[i].applied
    return found


def _value(a: Aggregate, rows: Sequence[tuple[int, Mapping[str, Any]]], at: int) -> Any:
    since = (at - a.window) // a.slide * a.slide
    inside = sorted((time, i) for i, (time, _) in enumerate(rows) if since <= time < at)
    values = [v for _, i in inside if (v := rows[i][1][a.column]) is not None and v == v]
    if a.function in ("count", "count_distinct"):
        return len(values if a.function == "count" else set(values))
    if a.function == "sum":
        return math.fsum(values)
    if a.function == "mean":
        return math.fsum(values) / len(values) if values else None
    if a.function == "std":
        if len(values) < 2:
            return None
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    if a.function in ("min", "max"):
        return {"min": min, "max": max}[a.function](values, default=None)
    if a.function == "last":
        return values[-1] if values else None
    return values[-a.depth :]
