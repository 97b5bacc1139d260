"""The continuous learner: goes on with the champion's weights as labels come, and publishes what it has become."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import compress
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import structlog

from features.contracts import Contract, Field
from features.inputs import Floats, Inputs, encode
from features.usecase import ModelInputs, UseCase
from pipelines.archive import Examples
from pipelines.broker import Message
from pipelines.quality import LOSS_CAP, losses
from pipelines.step import Event, Outputs

REFRESH_KEY = "refresh:"
CHUNK = 2_000  # examples of one attempt
MOST_BEHIND = 200_000  # positions of a partition; a new champion does not learn what lies further back
FILES_KEPT = 20  # of the champion's refreshes: who has read of one fetches it in time
SPANS_KEPT = 200
SPAN_EXAMPLES = 1_024  # of what is remembered
log = structlog.get_logger()

Offsets = dict[int, tuple[int, int]]  # partition of `<uc>.examples` -> [from, until)


def examples_contract(use_case: UseCase) -> Contract:
    """What the joiner writes. A killed broker may have one twice: the first counts."""
    return Contract(
        "examples",
        (
            Field("request_id", str),
            Field("event_time", "time"),
            Field("features", dict),
            Field("version", str),
            Field("score", float),
            Field("label", float),
            Field("label_time", "time"),
        ),
        time="label_time",
        id="request_id",
        topic=use_case.topic("examples"),
        max_bytes=1 << 20,
        dedupe=timedelta(minutes=10),
        partial=True,
    )


class Row(NamedTuple):
    """An example and where it is; `value` is the contract's struct, `raw` the record's value with the targets."""

    partition: int
    offset: int
    value: Any
    raw: bytes


class Span(msgspec.Struct):
    """Examples that follow each other: how many, where, until which label time; `reason` says why they were skipped,
    and is empty when they were learned. What else lies between the offsets is no example of this version's."""

    examples: int
    offsets: Offsets
    latest_label_time: int
    reason: str = ""

    @classmethod
    def of(cls, rows: Sequence[Row], reason: str = "") -> Span:
        offsets: Offsets = {}
        for row in rows:
            first, _ = offsets.get(row.partition, (row.offset, 0))
            offsets[row.partition] = (first, row.offset + 1)
        return cls(len(rows), offsets, max(row.value.label_time for row in rows), reason)

    def has(self, row: Row) -> bool:
        """Whether a row's place is in it."""
        first, end = self.offsets.get(row.partition, (0, 0))
        return first <= row.offset < end

    def extend(self, later: Span) -> None:
        """Become one with a span that follows."""
        self.examples += later.examples
        self.latest_label_time = max(self.latest_label_time, later.latest_label_time)
        for partition, (first, end) in later.offsets.items():
            self.offsets[partition] = (self.offsets.get(partition, (first, 0))[0], end)


class Refresh(msgspec.Struct):
    """The record `refresh:<version>` of `<uc>.models`.

    number, file, sha256 : the version's newest refresh, and its ONNX file below `state_url`; 0 and empty when all was
        skipped so far
    score : what it answers to the version's recorded example
    latest_label_time : epoch ms; it has learned from every label up to it that is in no skipped span
    learned, skipped : examples since the version was made
    spans : where they are, in order; the newest 200
    """

    version: str
    number: int = 0
    file: str = ""
    sha256: str = ""
    score: list[float] = []
    latest_label_time: int = 0
    learned: int = 0
    skipped: int = 0
    spans: list[Span] = []

    def add(self, span: Span) -> None:
        """Enter examples in the ledger."""
        if span.reason:
            self.skipped += span.examples
        else:
            self.learned += span.examples
            self.latest_label_time = max(self.latest_label_time, span.latest_label_time)
        if self.spans and self.spans[-1].reason == span.reason:
            self.spans[-1].extend(span)
        else:
            self.spans = [*self.spans, span][-SPANS_KEPT:]


@dataclass(frozen=True)
class Champion:
    """The version that serves; it has learned every label before `since` (epoch ms)."""

    version: str
    since: int


class Refreshable(Protocol):
    """A version that goes on learning; `pipelines.refresher.Refresher`."""

    inputs: ModelInputs
    targets_named: Sequence[str]
    example: Inputs

    def score(self, inputs: Inputs) -> Floats: ...

    def remember(self, examples: Examples) -> None: ...

    def recent(self, rows: int) -> tuple[Inputs, Floats] | None: ...

    def attempt(self, examples: Examples) -> Callable[[], None]: ...

    def is_finite(self) -> bool: ...

    def graph(self) -> bytes: ...

    def snapshot(self) -> bytes: ...

    def restore(self, data: bytes) -> None: ...


class World(Protocol):
    """What the learner is told and given."""

    def champion(self) -> Champion | None:
        """The version that serves now, once its files are here; None before the first."""

    def learner(self, champion: Champion) -> Refreshable:
        """That version, ready to go on."""

    def starts(self, until: Mapping[int, int], since: int, memory: int) -> dict[int, int]:
        """Offsets from which to read to meet every example before `until` with a label time of `since` or later, and
        some that are older: about `memory` together when there are so many."""

    def read(self, offsets: Offsets) -> Iterable[list[Row]]:
        """The examples there, in chunks, each ordered by (label_time, request_id)."""


@dataclass(frozen=True)
class Guard:
    """What a refresh must not do.

    window : newest examples before it, on which the model is compared with itself before the refresh
    deviations, margin : it is significantly worse when the mean of the paired differences of losses (nats, clipped at
        4) is more than so many standard errors above zero and more than the margin
    explosion : the mean loss over window and new examples must not grow by this factor
    """

    window: int = 1_000
    deviations: float = 3.0
    margin: float = 0.01
    explosion: float = 2.0

    def objection(self, before: Floats, after: Floats, new: int) -> str:
        """Why a refresh is dropped, or nothing. Losses [n] of the window's examples, then of the `new` ones."""
        if not np.isfinite(after).all():
            return "its loss is not finite"
        if after.mean() > self.explosion * max(float(before.mean()), self.margin):
            return f"its loss explodes: {after.mean():.3f} after {before.mean():.3f}"
        n = len(after) - new
        if n < 2:
            return ""
        difference = np.minimum(after[:n], LOSS_CAP) - np.minimum(before[:n], LOSS_CAP)
        mean, error = float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(n))
        if mean > self.margin and mean > self.deviations * error:
            return f"significantly worse on the {n} newest examples: by {mean:.4f} +- {error:.4f} nats"
        return ""


class State(msgspec.Struct):
    """What a snapshot holds.

    refresh : the ledger and the newest refresh of the version at hand; None before the first version
    memory : the examples that are replayed
    numbers : newest refresh of each version, as a number never comes twice
    files : paths of a version's refresh files, oldest first
    position : partition -> the next offset to take an example from
    """

    champion: Champion | None = None
    refresh: Refresh | None = None
    learner: bytes = b""
    due: int = 0
    memory: list[Span] = []
    numbers: dict[str, int] = {}
    files: dict[str, list[str]] = {}
    position: dict[int, int] = {}


class Learning:
    """Examples in; every `every` ms of event time with new ones a refresh out, as a file and a record.

    Each example that its version has not learned is learned or skipped, once: a refresh that makes the model worse is
    undone and its examples are skipped. It asks for its state to be stored whole with each refresh (`whole` of the
    runner), since learning twice might not give the same weights. When the champion changes it starts from the new
    one's weights and the examples that one has not seen.
    """

    name = "learner"
    outputs: Sequence[str] = ()  # `<uc>.models` is compacted: no clock records in it

    def __init__(self, use_case: UseCase, world: World, every: int, memory: int, guard: Guard = Guard()) -> None:
        contract = examples_contract(use_case)
        self.inputs = {contract.topic: contract}
        self.plan: dict[str, Any] = {"state": 1}
        self.world, self.every, self.memory, self.guard = world, every, memory, guard
        self.log = log.bind(use_case=use_case.name, step=self.name)
        self.topic, self.place = use_case.topic("models"), f"{use_case.name}/{self.name}/0"
        self.state = State()
        self.learner: Refreshable | None = None
        self.waiting: list[Row] = []
        self.told = (0, 0)  # learned and skipped, as the newest record has them

    def process(self, events: Sequence[Event], watermark: int) -> Outputs:
        self.waiting += [Row(e.partition, e.record.offset, e.value, e.record.value or b"") for e in events if e.record]
        if watermark < self.state.due:
            return Outputs()
        first, self.state.due = self.state.due == 0, watermark - watermark % self.every + self.every
        champion, rows, self.waiting = self.world.champion(), self.waiting, []
        changed = champion is not None and (self.state.champion is None or champion.version != self._version)
        if champion and changed:
            self._follow(champion)
        for at in range(0, len(rows), CHUNK):
            self._take(rows[at : at + CHUNK])
        out = Outputs(keep=first or changed or bool(rows))
        if self.state.refresh:
            self._publish(self.state.refresh, out)
        return out

    @property
    def _version(self) -> str:
        return self.state.champion.version if self.state.champion else ""

    def _follow(self, champion: Champion) -> None:
        """Start from a version's weights, and take in what it has not learned."""
        state = self.state
        self.learner, state.champion, state.memory = self.world.learner(champion), champion, []
        self.told = (0, 0)
        state.refresh = Refresh(champion.version, state.numbers.get(champion.version, 0))
        state.refresh.latest_label_time = champion.since - 1
        self.log.info("following", version=champion.version)
        starts = self.world.starts(state.position, champion.since, self.memory)
        behind = {p: end - MOST_BEHIND for p, end in state.position.items()}
        for chunk in self.world.read({p: (start, state.position[p]) for p, start in starts.items()}):
            new = [r.value.label_time >= champion.since for r in chunk]
            far = [new and r.offset < behind[r.partition] for r, new in zip(chunk, new, strict=True)]
            if any(far):
                state.refresh.add(Span.of(list(compress(chunk, far)), "too far behind the newest label"))
            self._take([row for row, skipped in zip(chunk, far, strict=True) if not skipped])

    def _take(self, rows: Sequence[Row]) -> None:
        """Remember what the version has learned itself, learn the others."""
        for row in rows:
            self.state.position[row.partition] = row.offset + 1
        if not self.learner or not self.state.champion:
            return
        since = self.state.champion.since
        if known := [row for row in rows if row.value.label_time < since]:
            self.learner.remember(self._examples(self.learner, known))
            self._remembered(Span.of(known))
        if new := [row for row in rows if row.value.label_time >= since]:
            self._learn(self.learner, new)

    def _learn(self, learner: Refreshable, rows: Sequence[Row]) -> None:
        """Learn, or go back and skip."""
        assert self.state.refresh
        examples = self._examples(learner, rows)
        inputs, label = [examples.inputs], [examples.label]
        if recent := learner.recent(self.guard.window):
            inputs, label = [recent[0], *inputs], [recent[1], *label]
        seen, truth = Inputs.join(inputs), np.concatenate(label)
        before = losses(truth, learner.score(seen))
        undo = learner.attempt(examples)
        objection = "a weight is not finite" if not learner.is_finite() else ""
        objection = objection or self.guard.objection(before, losses(truth, learner.score(seen)), len(rows))
        span = Span.of(rows, objection and "dropped: " + objection)
        if objection:
            undo()
            self.log.warning("refresh dropped", version=self._version, examples=len(rows), reason=objection)
        else:
            self._remembered(Span.of(rows))
        self.state.refresh.add(span)

    def _remembered(self, span: Span) -> None:
        """Note which examples are in the learner's memory; the oldest have left it."""
        memory, ledger = self.state.memory, self.state.refresh.spans if self.state.refresh else []
        follows = not (ledger and ledger[-1].reason)  # else what was skipped lies between
        if memory and memory[-1].examples + span.examples <= SPAN_EXAMPLES and follows:
            memory[-1].extend(span)
        else:
            memory.append(span)
        while sum(s.examples for s in memory) - memory[0].examples >= self.memory:
            del memory[0]

    def _publish(self, refresh: Refresh, out: Outputs) -> None:
        """The record when the ledger has changed, and when the weights have, their file."""
        assert self.learner
        state, version = self.state, refresh.version
        (learned, skipped), self.told = self.told, (refresh.learned, refresh.skipped)
        if self.told == (learned, skipped):
            return
        if refresh.learned > learned:
            graph = self.learner.graph()
            refresh.number += 1
            refresh.sha256 = hashlib.sha256(graph).hexdigest()
            name = f"refreshes/{version}-{refresh.number}-{refresh.sha256[:12]}.onnx"
            refresh.file, refresh.score = f"{self.place}/{name}", self.learner.score(self.learner.example).tolist()
            out.files[name] = graph
            state.numbers[version] = refresh.number
            out.forget += self._forget(version, name)
        out.messages.append(Message(self.topic, msgspec.json.encode(refresh), f"{REFRESH_KEY}{version}".encode()))

    def _forget(self, version: str, newest: str) -> list[str]:
        """Refresh files that nobody needs any more: a former champion's newest one serves again after a rollback."""
        files = self.state.files
        files[version] = [*files.get(version, ()), newest]
        old: list[str] = []
        for other, names in files.items():
            most = FILES_KEPT if other == version else 1
            old, files[other] = old + names[:-most], names[-most:]
        return old

    def _examples(self, learner: Refreshable, rows: Sequence[Row]) -> Examples:
        """Rows as arrays."""
        values, names = [row.value for row in rows], learner.targets_named
        fields = [(f"t{i}", float | None, None) for i in range(len(names))]
        struct = msgspec.defstruct("Targets", fields, rename=dict(zip((f for f, *_ in fields), names, strict=True)))
        decode = msgspec.json.Decoder(struct).decode
        targets = [msgspec.structs.astuple(decode(row.raw)) for row in rows]
        return Examples(
            encode(learner.inputs, [v.features for v in values]),
            np.array([v.label for v in values], np.float32),
            np.array(targets, np.float64).astype(np.float32).reshape(len(values), len(names)),
            np.array([v.event_time for v in values], np.int64),
            np.array([v.label_time for v in values], np.int64),
            np.array([v.request_id for v in values], object),
            np.array([v.score for v in values], np.float32),
            np.array([v.version for v in values], object),
        )

    def snapshot(self) -> bytes:
        """Weights and optimizer, ledger, positions, and which examples are replayed. What waits is read again."""
        self.state.learner = self.learner.snapshot() if self.learner else b""
        return msgspec.msgpack.encode(self.state)

    def restore(self, data: bytes) -> None:
        self.state = msgspec.msgpack.decode(data, type=State)
        if self.state.champion is None:
            return
        if refresh := self.state.refresh:
            self.told = (refresh.learned, refresh.skipped)
        self.learner = self.world.learner(self.state.champion)
        self.learner.restore(self.state.learner)
        if memory := self.state.memory:
            whole = Span(0, {}, 0)
            for span in memory:
                whole.extend(span)
            for rows in self.world.read(whole.offsets):
                kept = [row for row in rows if any(span.has(row) for span in memory)]
                self.learner.remember(self._examples(self.learner, kept))
