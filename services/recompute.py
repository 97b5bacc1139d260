"""The vector a request should have been served, worked out from the raw events by brute force."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from features.columns import Source
from features.contracts import Contract, Invalid
from features.engine import Applied
from features.oracle import brute_force
from features.usecase import UseCase
from features.values import Structs
from features.vectors import Vectorizer, join_keys
from features.windows import compile_view
from pipelines.broker import Broker, clock_of
from services.served import Prediction
from services.topic_reader import read_all

Key = tuple[Any, ...]
TIMER_REACH = 3 * 86_400_000  # ms: how long before it shows in a view an event may have set its timer
TOLERANCE = 1e-6


def read_events(broker: Broker, use_case: UseCase) -> list[Applied]:
    """Every valid event on Kafka in the order in which it counts: (time, topic, partition, offset)."""
    found = []
    for topic, contract in use_case.event_topics.items():
        for record in read_all(broker, topic):
            if clock_of(record) is None and (value := _valid(contract, record.value)) is not None:
                time = contract.time_of(value)
                found.append((time, topic, record.partition, record.offset, Applied(contract.name, value, time, time)))
    return [event for *_, event in sorted(found, key=lambda item: item[:4])]


def _valid(contract: Contract, raw: bytes | None) -> Any:
    try:
        return contract.decode(raw)
    except Invalid:
        return None  # the steps put it on the rejected topic


class Recomputation:
    """Vectors of one use case as of an instant.

    Each view only sees the events near the instant that can bear on the key; which ones count is the oracle's affair.
    """

    def __init__(self, use_case: UseCase, events: Sequence[Applied]) -> None:
        self.use_case, self.vectorizer = use_case, Vectorizer(use_case)
        self.events = {view.name: self._by_key(view, events) for view in use_case.views}
        self.reach = {
            view.name: max(a.window + a.slide for a in compile_view(view))
            + (TIMER_REACH if view.name in use_case.timers else 0)
            for view in use_case.views
        }

    def vector(self, prediction: Prediction, as_of: int) -> dict[str, Any]:
        """Features of a request with every event before `as_of` (epoch ms) known."""
        keys, fields = msgspec.json.decode(prediction.entities), msgspec.json.decode(prediction.fields)
        keys = self.vectorizer.entity_keys(keys, fields)
        rows = {view.name: (self._row(view, keys, as_of), as_of) for view in self.use_case.views}
        return self.vectorizer.assemble(keys, fields, prediction.event_time, rows).features

    def _row(self, view: Any, keys: Mapping[str, Any], as_of: int) -> dict[str, Any]:
        key = tuple(map(keys.get, join_keys(view)))
        near = self.events[view.name].get(key, [])
        first = bisect_left(near, as_of - self.reach[view.name], key=lambda event: event.time)
        last = bisect_left(near, as_of, key=lambda event: event.time)
        return brute_force(self.use_case, view.name, key, near[first:last], as_of)

    def _by_key(self, view: Any, events: Sequence[Applied]) -> dict[Key, list[Applied]]:
        """The events that a key's row of this view may depend on."""
        rule = self.use_case.timers.get(view.name)
        contract = self.use_case.event_topics[view.stream_source.kafka_options.topic]
        own = [e for e in events if e.contract in (rule.events if rule else (contract.name,))]
        names = join_keys(view)
        if rule:
            columns = {name: [getattr(e.value, name) for e in own] for name in names}
        else:
            source = Source(contract, Structs([e.value for e in own]))
            columns = {name: source[name] for name in contract.names} | (view.udf(source) if view.udf and own else {})
        by_key: dict[Key, list[Applied]] = defaultdict(list)
        key_columns: Iterable[Key] = zip(*(columns[name] for name in names), strict=True) if names else [()] * len(own)
        for key, event in zip(key_columns, own, strict=True):
            by_key[key].append(event)
        return by_key


def differences(served: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Names whose values differ, numbers by more than 1e-6 relative (absolute below 1), or that only one side has."""
    return sorted(
        name
        for name in served.keys() | expected.keys()
        if name not in served or name not in expected or not _same(served[name], expected[name])
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, bool) or isinstance(b, bool) or not (isinstance(a, int | float) and isinstance(b, int | float)):
        return bool(a == b)
    return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
