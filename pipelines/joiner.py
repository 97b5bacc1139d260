"""The joiner: predictions and, whenever they come, their labels; out come examples and cuts."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import msgspec

from features.contracts import Contract, Field
from features.usecase import UseCase
from features.windows import pack, unpack
from pipelines.broker import Message
from pipelines.step import Event, Outputs, Rejection
from pipelines.tables import vector_type
from pipelines.trial import Tally, number


def predictions_contract(use_case: UseCase) -> Contract:
    """What the predictor and the scorer log. At least once: the first record of a request id counts."""
    return Contract(
        "predictions",
        (
            Field("request_id", str),
            Field("event_time", "time"),
            Field("entities", dict),
            Field("fields", dict),
            Field("features", dict),
            Field("schema", str),
            Field("feature_times", dict),
            Field("version", str),
            Field("arm", str),
            Field("score", float),
            Field("shadow", dict, optional=True),
            Field("score_ms", dict, optional=True),
        ),
        time="event_time",
        id="request_id",
        topic=use_case.topic("predictions"),
        max_bytes=1 << 20,
        out_of_orderness=timedelta(0),
        dedupe=use_case.label.wait,
        partial=True,
    )


class Kept(msgspec.Struct, omit_defaults=True):
    """What of a prediction goes into its example."""

    request_id: str
    event_time: int
    version: str
    arm: str
    score: float
    entities: dict[str, Any]
    fields: dict[str, Any]
    features: dict[str, Any]
    shadow: dict[str, float | None] = msgspec.field(default_factory=dict)


Truth = dict[str, float | None]  # the label and the targets, by name
encode, decode = msgspec.json.Encoder().encode, msgspec.json.Decoder(Kept).decode


class Joiner:
    """Joins each prediction with its label; either may come first, and both are kept for the label's `wait`.

    An example's `label_time` is the instant from which it counts, so it never lies behind the watermark.

    Memory, with J the JSON bytes of a prediction's vector: J + 400 bytes per prediction that waits for its label, 300
    per label that waits for its prediction and per prediction whose wait is over (it is known as long again). So
    10 predictions a second of 4 KB each that wait an hour take 160 MB.
    """

    name = "joiner"

    def __init__(self, use_case: UseCase, partition: int = 0) -> None:
        self.partition = partition
        self.label, self.vector = use_case.label, vector_type(use_case)
        self.wait = _ms(use_case.label.wait)
        self.every = _ms(use_case.retrain_every)
        self.examples_topic, self.cuts_topic = use_case.topic("examples"), use_case.topic("cuts")
        predictions = predictions_contract(use_case)
        labels = {topic: c for topic, c in use_case.event_topics.items() if c.name == self.label.event}
        self.inputs: dict[str, Contract] = {predictions.topic: predictions, **labels}
        self.evidence_topic = use_case.topic("evidence")
        self.outputs = (self.examples_topic, self.cuts_topic)  # a record of the second wakes Airflow: no clocks there
        self.pending: dict[str, bytes] = {}
        self.labels: dict[str, tuple[Truth, int]] = {}
        self.expired: dict[str, int] = {}
        self.expiry: deque[tuple[int, str]] = deque()
        self.tally = Tally(partition, self.wait)
        self.next_cut = 0
        self.since_cut = self.total = self.dropped = 0

    @property
    def plan(self) -> dict[str, Any]:
        label = self.label
        return {
            "event": label.event,
            "key": label.key,
            "wait": self.wait,
            "on_expiry": label.on_expiry,
            "targets": sorted(label.targets),
            "cut": self.every,
        }

    @property
    def held(self) -> dict[str, int]:
        """Predictions that wait for their label, labels that wait for their prediction."""
        return {"predictions": len(self.pending), "labels": len(self.labels)}

    def process(self, events: Sequence[Event], watermark: int) -> Outputs:
        out = Outputs(rows={"examples": []})
        if not self.next_cut:
            start = events[0].applied if events else watermark
            self.next_cut = start - start % self.every + self.every
        for event in events:
            self._until(event.applied, out)
            if event.contract.name == "predictions":
                self._predicted(event, out)
            else:
                self._labelled(event, out)
        self._until(watermark, out)
        if found := self.tally.take(watermark):
            out.messages.append(Message(self.evidence_topic, encode(found), partition=0))
        return out

    def _predicted(self, event: Event, out: Outputs) -> None:
        value = event.value
        try:
            msgspec.convert({**value.entities, **value.fields, **value.features}, self.vector)
        except msgspec.ValidationError as error:
            out.rejected.append(Rejection(event, "invalid", str(error)))
            return
        self.tally.predicted(value)
        facts = {name: getattr(value, name) for name in Kept.__struct_fields__}
        kept = encode(Kept(**facts | {"shadow": {v: number(score) for v, score in (value.shadow or {}).items()}}))
        if value.request_id in self.labels:
            truth, _ = self.labels.pop(value.request_id)
            self._emit(kept, truth, event.applied, out)
            return
        self.pending[value.request_id] = kept
        self.expiry.append((max(value.event_time, event.applied) + self.wait, value.request_id))

    def _labelled(self, event: Event, out: Outputs) -> None:
        label = self.label.value(event.value)
        if label is None:
            return
        truth = {"label": label} | {name: value(event.value) for name, value in self.label.targets.items()}
        key = str(getattr(event.value, self.label.key))
        if kept := self.pending.pop(key, None):
            self._emit(kept, truth, event.applied, out)
        elif key in self.expired:
            out.rejected.append(Rejection(event, "late_label", f"the wait for the label of {key!r} is over"))
        else:
            self.labels[key] = (truth, event.applied)
            self.expiry.append((event.applied + self.wait, key))

    def _emit(self, kept: bytes, truth: Truth, time: int, out: Outputs) -> None:
        came = {**truth, "label_time": time}
        row = decode(kept)
        value = kept[:-1] + b"," + encode(came)[1:]
        out.messages.append(Message(self.examples_topic, value, row.request_id.encode(), self.partition))
        self.tally.labelled(row, truth["label"] or 0.0)
        features = {**row.entities, **row.fields, **row.features}
        about = {n: getattr(row, n) for n in ("request_id", "event_time", "version", "arm", "score")}
        out.rows["examples"].append({**features, **about, **came})
        self.since_cut += 1
        self.total += 1

    def _until(self, time: int, out: Outputs) -> None:
        """Let waits end and cuts pass, in order, up to and including `time`."""
        while self.expiry and self.expiry[0][0] < time:
            due, key = self.expiry.popleft()
            self._cut(due, out)
            self._expire(due, key, out)
        self._cut(time, out)

    def _expire(self, due: int, key: str, out: Outputs) -> None:
        if kept := self.pending.pop(key, None):
            if self.label.on_expiry is not None:
                self._emit(kept, {"label": self.label.on_expiry}, due, out)
            else:
                self.dropped += 1
            self.expired[key] = due
            self.expiry.append((due + self.wait, key))
        elif key in self.expired:
            del self.expired[key]
        elif key in self.labels and self.labels[key][1] + self.wait <= due:
            del self.labels[key]

    def _cut(self, time: int, out: Outputs) -> None:
        while self.next_cut <= time:
            value = {"cut": self.next_cut, "examples": self.since_cut, "total": self.total}
            out.messages.append(Message(self.cuts_topic, json.dumps(value).encode(), b"cut", self.partition))
            out.close, self.since_cut = True, 0
            self.next_cut += self.every

    def snapshot(self) -> bytes:
        return pack(
            {
                "pending": self.pending,
                "labels": self.labels,
                "expired": self.expired,
                "expiry": list(self.expiry),
                "counts": [self.next_cut, self.since_cut, self.total, self.dropped],
                "tally": self.tally.snapshot(),
            }
        )

    def restore(self, data: bytes) -> None:
        state = unpack(data)
        self.pending, self.expired = state["pending"], state["expired"]
        self.labels = {key: (truth, time) for key, (truth, time) in state["labels"].items()}
        self.expiry = deque((due, key) for due, key in state["expiry"])
        self.next_cut, self.since_cut, self.total, self.dropped = state["counts"]
        if "tally" in state:  # a snapshot of before there were trials has none
            self.tally.restore(state["tally"])


def _ms(duration: timedelta) -> int:
    return round(duration.total_seconds() * 1000)
