"""The meaning of a feature, written as plainly as possible: every window computed from the raw events.

It is slow on purpose and shares nothing with the engine but the definitions; tests and `penstock audit` compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from features.engine import Applied, column
from features.timers import Timers
from features.usecase import UseCase
from features.vectors import join_keys
from features.windows import Aggregate, compile_view


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


def _rows(use_case: UseCase, view: Any, events: Sequence[Applied], at: int) -> list[tuple[int, dict[str, Any]]]:
    """(event time, columns) of every event the view has seen and not taken back."""
    if rule := use_case.timers.get(view.name):
        heard = [(e.applied, e.contract, e.value) for e in events if e.contract in rule.events]
        rows: list[tuple[int, dict[str, Any]]] = []
        for made in Timers(rule).run(heard, at):
            if made.sign > 0:
                rows.append((made.time, made.row))
            else:
                rows.remove((made.time, made.row))
        return rows
    contract = use_case.event_topics[view.stream_source.kafka_options.topic]
    own = [e for e in events if e.contract == contract.name]
    if not own:
        return []
    columns = {f.name: column([getattr(e.value, f.name) for e in own], f.type, f.optional) for f in contract.fields}
    if view.udf:
        columns |= view.udf(columns)
    return [(e.time, {n: c[i] for n, c in columns.items()}) for i, e in enumerate(own)]


def _value(a: Aggregate, rows: Sequence[tuple[int, Mapping[str, Any]]], at: int) -> Any:
    since = (at - a.window) // a.slide * a.slide
    inside = sorted((time, i) for i, (time, _) in enumerate(rows) if since <= time < at)
    values = [v for _, i in inside if (v := rows[i][1][a.column]) is not None and v == v]
    if a.function == "count":
        return len(values)
    if a.function == "sum":
        return math.fsum(values)
    if a.function == "mean":
        return math.fsum(values) / len(values) if values else None
    if a.function == "std":
        if len(values) < 2:
            return None
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    if a.function == "last":
        return values[-1] if values else None
    return values[-a.depth :]
