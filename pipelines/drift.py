"""Drift: whether losses and inputs, as served, still are what they were. River's detectors over daily summaries.

A day is compared with days, as the hours of one differ more than days do, and needs some 50 examples: fewer go on into
the next one. The first 14 days say what is usual: each series' mean and its spread from day to day, in which the weekly
cycle is. From then on Page and Hinkley's cumulative sum (Page 1954) of the standardised days is watched, one for each
series: it takes a shift that stays, where one odd day, cut off at four deviations, is not enough. After an alarm all
begins anew.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from features.inputs import encode
from features.kernel import Ints
from features.usecase import ModelInputs, UseCase
from features.windows import pack, unpack
from pipelines.broker import Message
from pipelines.comparison import DAY_MS
from pipelines.learning import examples_contract
from pipelines.quality import Floats, losses
from pipelines.step import Event, Outputs

BASE = 14  # days that say what is usual
KEPT = 120  # days after which it is said anew: a snapshot holds no more
FEWEST = 50  # examples of a block
COMMON = 64  # values of an id that are counted, the most frequent of each day; shares below RARE are not watched
RARE = 0.01
CUT_OFF, SLACK, ALARM = 4.0, 0.5, 18.0  # deviations from day to day; see DECISIONS.md
LEAST_SPREAD = 0.02  # of squashed means and of shares
RECENT = 3  # days that say what a series is now
NAMED = 10
UNIT = 1 << 20  # sums are whole numbers, so that they are the same however examples come in batches


class Block(NamedTuple):
    """A day or more.

    end : epoch ms
    means, missing : [F] of signed log1p of the numbers, NaN without any; the share of nulls
    shares : by category, of its most frequent values
    loss : mean log loss, nats
    """

    end: int
    means: Floats
    missing: Floats
    shares: list[dict[str, float]]
    loss: float


class Moved(msgspec.Struct):
    """A series that has moved: its values then and now in its own unit, `score` its recent distance in deviations."""

    name: str
    before: float
    after: float
    score: float


class Sums:
    """A block that is still filled."""

    def __init__(self, inputs: ModelInputs) -> None:
        self.inputs = inputs
        self.examples = self.loss = 0
        self.known, self.total = np.zeros((2, len(inputs.numbers)), np.int64)
        self.values = [Counter[str]() for _ in inputs.categories]

    def add(self, vectors: Sequence[Mapping[str, Any]], label: Floats, score: Floats) -> None:
        """Examples: what was served, what was answered, what came."""
        numbers = encode(ModelInputs(self.inputs.numbers), vectors).numbers.astype(np.float64)
        squashed = np.clip(np.sign(numbers) * np.log1p(np.abs(numbers)), -99, 99)
        self.known += (~np.isnan(squashed)).sum(0)
        self.total += _whole(np.nan_to_num(squashed))
        self.loss += int(_whole(losses(label, score)))
        self.examples += len(vectors)
        for counts, category in zip(self.values, self.inputs.categories, strict=True):
            counts.update(str(v.get(category.name)) for v in vectors)

    def block(self, end: int) -> Block:
        with np.errstate(invalid="ignore", divide="ignore"):
            means = self.total / UNIT / self.known
        frequent = (sorted(counts.items(), key=lambda c: (-c[1], c[0]))[:COMMON] for counts in self.values)
        shares = [{value: n / self.examples for value, n in most} for most in frequent]
        return Block(end, means, 1 - self.known / self.examples, shares, self.loss / UNIT / self.examples)

    def snapshot(self) -> list[Any]:
        counts = [dict(counts) for counts in self.values]
        return [self.examples, self.loss, self.known.tolist(), self.total.tolist(), counts]

    def restore(self, data: Sequence[Any]) -> None:
        self.examples, self.loss, known, total, counts = data
        self.known, self.total = np.array(known, np.int64), np.array(total, np.int64)
        self.values = [Counter(c) for c in counts]


def _whole(values: Floats) -> Ints:
    """[F], the sum of rows [n, F]; exact, whatever the order."""
    return np.asarray(np.rint(values * UNIT).astype(np.int64).sum(0))


class Watch:
    """Detectors of every series of blocks whose first 14 are usual."""

    def __init__(self, inputs: ModelInputs, base: Sequence[Block]) -> None:
        from river.drift import PageHinkley

        self.inputs = inputs
        self.common = [
            sorted({value for shares in of_days for value, share in shares.items() if share >= RARE})
            for of_days in zip(*(block.shares for block in base), strict=True)
        ]
        ids = [f"{c.name}={v}" for c, values in zip(inputs.categories, self.common, strict=True) for v in values]
        self.names = ["loss", *inputs.numbers, *(f"{name} is null" for name in inputs.numbers), *ids]
        usual = np.array([self.series(b) for b in base])
        known = ~np.isnan(usual)
        count = np.maximum(1, known.sum(0))
        self.mean = np.where(known, usual, 0).sum(0) / count
        self.spread = np.sqrt((np.where(known, usual - self.mean, 0) ** 2).sum(0) / np.maximum(1, count - 1))
        self.spread = np.maximum(self.spread, LEAST_SPREAD)
        self.detectors: list[Any] = [
            PageHinkley(min_instances=BASE + 1, delta=SLACK, threshold=ALARM, alpha=1.0) for _ in self.names
        ]
        self.recent: list[Floats] = []
        for block in base:
            self.add(block)

    def series(self, block: Block) -> Floats:
        """A block's value of each series."""
        ids = [block.shares[i].get(v, 0.0) for i, values in enumerate(self.common) for v in values]
        return np.concatenate([[block.loss], block.means, block.missing, ids])

    def add(self, block: Block) -> list[Moved]:
        """The series that have moved, the farthest first; none when no detector says so."""
        value = self.series(block)
        distance = np.clip(np.nan_to_num((value - self.mean) / self.spread), -CUT_OFF, CUT_OFF)
        self.recent = [*self.recent, value][-RECENT:]
        for detector, x in zip(self.detectors, distance.tolist(), strict=True):
            detector.update(x)
        alarmed = [i for i, detector in enumerate(self.detectors) if detector.drift_detected]
        found = [self._moved(i) for i in alarmed]
        return sorted(found, key=lambda moved: (-abs(moved.score), moved.name))

    def _moved(self, i: int) -> Moved:
        values = [v[i] for v in self.recent if not math.isnan(v[i])]
        now = sum(values) / len(values) if values else math.nan
        score = float((now - self.mean[i]) / self.spread[i])
        squashed = 0 < i <= len(self.inputs.numbers)
        before, after = ((math.copysign(math.expm1(abs(x)), x) if squashed else float(x)) for x in (self.mean[i], now))
        return Moved(self.names[i], round(before, 4), round(after, 4), round(score, 2))


class Drift:
    """Examples in; a record of `<uc>.drift` out when losses or inputs have moved: `time` (epoch ms, the end of a day,
    up to which a retrain learns), `what` (loss or inputs), `features` (`Moved`) and `sentence`.

    Memory: 120 days of 16 bytes a number and 64 shares an id; what an example costs is the sums of its numbers.
    """

    name = "drift"
    outputs: Sequence[str] = ()  # a record of `<uc>.drift` wakes Airflow: no clocks there

    def __init__(self, use_case: UseCase, partition: int = 0) -> None:
        contract = examples_contract(use_case)
        self.inputs = {contract.topic: contract}
        self.declared, self.partition, self.topic = use_case.inputs, partition, use_case.topic("drift")
        self.plan: dict[str, Any] = {"state": 1, "inputs": use_case.inputs.as_json()}
        self.blocks: list[Block] = []
        self.sums, self.end = Sums(self.declared), 0
        self.watch: Watch | None = None

    def process(self, events: Sequence[Event], watermark: int) -> Outputs:
        out, start = Outputs(), 0
        for i, event in enumerate(events):
            if event.applied >= self.end:
                self._add(events[start:i])
                start = i
                self._until(event.applied, out)
        self._add(events[start:])
        if self.end:
            self._until(watermark, out)
        return out

    def _add(self, events: Sequence[Event]) -> None:
        if values := [e.value for e in events]:
            label, score = (np.array([getattr(v, n) for v in values], np.float64) for n in ("label", "score"))
            self.sums.add([v.features for v in values], label, score)

    def _until(self, time: int, out: Outputs) -> None:
        """Let blocks end that are over at `time`."""
        if time < self.end:
            return
        if self.sums.examples >= FEWEST:
            self._close(self.sums.block(self.end), out)
            self.sums = Sums(self.declared)
        self.end = time - time % DAY_MS + DAY_MS

    def _close(self, block: Block, out: Outputs) -> None:
        self.blocks.append(block)
        moved = self._watched(block)
        if moved:
            value: dict[str, Any] = {
                "time": block.end,
                "what": "loss" if any(m.name == "loss" for m in moved) else "inputs",
            }
            value |= {"features": moved[:NAMED], "sentence": sentence(moved)}
            out.messages.append(Message(self.topic, msgspec.json.encode(value), b"drift", self.partition))
        if moved or len(self.blocks) >= KEPT:
            self.blocks = [] if moved else self.blocks[-BASE:]
            self.watch = None

    def _watched(self, block: Block) -> list[Moved]:
        if len(self.blocks) <= BASE:
            return []
        if self.watch is None:
            self.watch = Watch(self.declared, self.blocks[:BASE])
            for later in self.blocks[BASE:-1]:
                self.watch.add(later)
        return self.watch.add(block)

    def snapshot(self) -> bytes:
        plain = [[b.end, b.means.tolist(), b.missing.tolist(), b.shares, b.loss] for b in self.blocks]
        return pack([plain, self.sums.snapshot(), self.end])

    def restore(self, data: bytes) -> None:
        blocks, sums, self.end = unpack(data)
        self.blocks = [Block(end, np.array(m), np.array(n), shares, loss) for end, m, n, shares, loss in blocks]
        self.sums.restore(sums)
        self.watch = None


def sentence(moved: Sequence[Moved]) -> str:
    """What has moved, for a reader: the farthest three.

    >>> sentence([Moved("distance", 800.0, 1600.0, 7.5), Moved("carrier=UA", 0.2, 0.0, -4.1)])
    'moved: distance from 800 to 1600 (+7.5 deviations), carrier=UA from 0.2 to 0 (-4.1 deviations)'
    """
    told = [f"{m.name} from {m.before:g} to {m.after:g} ({m.score:+.1f} deviations)" for m in moved[:3]]
    return f"moved: {', '.join(told)}" + (f" and {len(moved) - 3} more" if len(moved) > 3 else "")
