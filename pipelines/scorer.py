"""The scorer: featurize, then answer scoring requests that are events themselves, each as of its own time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from features.contracts import Contract, Field, Invalid
from features.engine import Engine
from features.usecase import Row, UseCase
from features.vectors import Vectorizer
from features.windows import pack, unpack
from pipelines.memory_store import MemoryStore
from pipelines.prediction import Choice, prediction_message
from pipelines.step import Due, Event, Outputs, Rejection, Rows

Answers = Callable[[Sequence[Row], Sequence[Row]], Sequence[Choice]]


def requests_contract(use_case: UseCase) -> Contract:
    """A scoring request as an event: the row that `POST /predict` takes."""
    return replace(
        use_case.request,
        name="requests",
        fields=(
            Field("request_id", str),
            Field("event_time", "time"),
            Field("entities", dict),
            Field("fields", dict, optional=True),
        ),
        time="event_time",
        id="request_id",
        topic=use_case.topic("requests"),
    )


class Scorer:
    """Answers each request with the features as of its event time: requests at t before events at t.

    Parameters
    ----------
    parse : (entities, fields) -> the same, checked against the use case's request contract; raises Invalid
    answers : (entities, vectors by feature name) -> who answers what, of the models that serve now
    """

    name = "scorer"

    def __init__(self, use_case: UseCase, parse: Callable[[Row, Row], tuple[Row, Row]], answers: Answers) -> None:
        self.use_case, self.parse, self.answers = use_case, parse, answers
        self.engine, self.store, self.vectorizer = Engine(use_case), MemoryStore(use_case), Vectorizer(use_case)
        requests = requests_contract(use_case)
        self.inputs: dict[str, Contract] = {**use_case.event_topics, requests.topic: requests}
        self.outputs = (use_case.topic("predictions"),)

    @property
    def plan(self) -> Mapping[str, Any]:
        return self.engine.plan

    def process(self, events: Sequence[Event], watermark: int) -> Outputs:
        out = Outputs()
        assert isinstance(events, Due)
        columns = events.columns()
        others = columns.kind != columns.names.index("requests")
        changed, refused = self.engine.advance(columns.take(others), watermark)
        places = np.flatnonzero(others)
        out.rejected = [Rejection(events[int(places[r.position])], r.reason, r.detail) for r in refused]
        waiting = {name: Rows(name, rows.keys, rows.times, dict(rows.columns)) for name, rows in changed.items()}
        asked = list(events.take(~others))
        found = [a for e in asked if (a := self._vector(e, waiting, out))]
        self._apply(waiting, watermark)
        if found:
            choices = self.answers([keys for _, keys, *_ in found], [vector.features for *_, vector in found])
            for (event, keys, fields, vector), choice in zip(found, choices, strict=True):
                message = prediction_message(
                    self.use_case,
                    choice,
                    request_id=event.value.request_id,
                    event_time=event.time,
                    keys=keys,
                    fields=fields,
                    vector=vector,
                    schema=self.vectorizer.schema_id,
                    timestamp=event.record.timestamp if event.record else event.time,
                    sent=watermark,
                )
                out.messages.append(message)
        return out

    def _vector(self, event: Event, waiting: dict[str, Rows], out: Outputs) -> tuple[Event, Row, Row, Any] | None:
        try:
            entities, fields = self.parse(event.value.entities, event.value.fields or {})
        except Invalid as invalid:
            out.rejected.append(Rejection(event, invalid.reason, invalid.detail))
            return None
        self._apply(waiting, event.applied)
        keys = self.vectorizer.entity_keys(entities, fields)
        return event, keys, fields, self.vectorizer.assemble(keys, fields, event.time, self.store.read([keys])[0])

    def _apply(self, waiting: dict[str, Rows], until: int) -> None:
        """Make the rows that hold at `until` readable."""
        for name, rows in waiting.items():
            n = int(np.searchsorted(rows.times, until, side="right"))
            if n:
                self.store.write([rows.take(slice(n))])
                waiting[name] = rows.take(slice(n, None))

    def snapshot(self) -> bytes:
        return pack({"engine": self.engine.snapshot(), "store": self.store.snapshot()})

    def restore(self, data: bytes) -> None:
        state = unpack(data)
        self.engine.restore(state["engine"])
        self.store.restore(state["store"])
