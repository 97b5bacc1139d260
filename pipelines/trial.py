"""A challenger beside the champion: what both did with the same requests, gathered by the joiner, judged by control.

The joiner adds up what it sees of a pair of versions (`Tally`) and sends sums to `<uc>.evidence`: of the requests at
once, of the labels by day of the requests' event time, and of a day only when the label of its last request would have
come. Before that the labels that are there are those that come fast, and they are not like the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from features.contracts import Contract, Field
from features.usecase import UseCase
from pipelines.comparison import DAY_MS
from pipelines.quality import LOSS_CAP, losses
from pipelines.sequential import Sequence

BLOCK_MS = DAY_MS
Pair = tuple[str, str]  # champion, challenger
Sums = dict[str, float]
REQUESTS = ("requests", "errors", "canary", "shift", "distance", "slowness")
BLOCK = ("n", "difference", "gap", "champion_gap")


def evidence_contract(use_case: UseCase) -> Contract:
    """What joiners send to control; it counts when it arrives."""
    return Contract(
        "evidence",
        (
            Field("time", "time"),
            Field("partition", int),
            Field("closed", "time"),
            Field("champion", str),
            Field("challenger", str),
            Field("requests", dict),
            Field("blocks", list),
        ),
        time="time",
        topic=use_case.topic("evidence"),
        max_bytes=1 << 20,
        by_arrival=True,
    )


def number(value: Any) -> float | None:
    """A finite number, else None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if known else None


def pair_of(prediction: Any) -> Pair | None:
    """Which versions a prediction was scored by; None when by one alone."""
    if not prediction.shadow:
        return None
    other = next(iter(prediction.shadow))
    return (other, prediction.version) if prediction.arm == "canary" else (prediction.version, other)


def scores_of(prediction: Any, pair: Pair) -> tuple[float, float | None]:
    """The champion's and the challenger's score; None when the challenger gave no number."""
    found = {**prediction.shadow, prediction.version: prediction.score}
    champion, challenger = (number(found.get(version)) for version in pair)
    return (0.0, None) if champion is None else (champion, challenger)


class Tally:
    """What one partition has seen of the newest pair of versions and has not sent yet.

    wait : ms after which a request's label counts as never coming
    """

    def __init__(self, partition: int, wait: int) -> None:
        self.partition, self.wait = partition, wait
        self.pair: Pair | None = None
        self.requests: Sums = {}
        self.blocks: dict[int, Sums] = {}
        self.closed = 0  # blocks that begin earlier have been sent

    def predicted(self, prediction: Any) -> None:
        """A request that was answered."""
        pair = pair_of(prediction)
        if pair is None or pair != self.pair:
            self.pair, self.requests, self.blocks = pair, {}, {}
        if pair is None:
            return
        champion, challenger = scores_of(prediction, pair)
        spent = [number((prediction.score_ms or {}).get(version)) for version in pair]
        seen = {"requests": 1.0, "errors": float(challenger is None), "canary": float(prediction.arm == "canary")}
        if challenger is not None:
            seen |= {"shift": challenger - champion, "distance": abs(challenger - champion)}
        if spent[0] is not None and spent[1] is not None:
            seen["slowness"] = math.log1p(abs(spent[1])) - math.log1p(abs(spent[0]))
        _add(self.requests, seen)

    def labelled(self, prediction: Any, label: float) -> None:
        """A label of an earlier request."""
        start = prediction.event_time - prediction.event_time % BLOCK_MS
        if self.pair is None or pair_of(prediction) != self.pair or start < self.closed:
            return
        champion, challenger = scores_of(prediction, self.pair)
        if challenger is None:
            return
        loss = np.minimum(losses(np.array([label, label]), np.array([challenger, champion])), LOSS_CAP)
        seen = {"n": 1.0, "difference": float(loss[0] - loss[1])}
        _add(self.blocks.setdefault(start, {}), seen | {"gap": challenger - label, "champion_gap": champion - label})

    def take(self, watermark: int) -> dict[str, Any] | None:
        """What is new and known by now, as the value of an evidence record; None when nothing is."""
        done = [start for start in sorted(self.blocks) if start + BLOCK_MS + self.wait <= watermark]
        before, self.closed = self.closed, max(self.closed, (watermark - self.wait) // BLOCK_MS * BLOCK_MS)
        if self.pair is None or not (self.requests or self.closed > before):
            return None
        found = {"time": watermark, "partition": self.partition, "closed": self.closed, "champion": self.pair[0]}
        found |= {"challenger": self.pair[1], "requests": self.requests}
        found["blocks"] = [{"start": start} | self.blocks.pop(start) for start in done]
        self.requests = {}
        return found

    def snapshot(self) -> Any:
        return [self.pair, self.requests, list(self.blocks.items()), self.closed]

    def restore(self, data: Any) -> None:
        pair, self.requests, blocks, self.closed = data
        self.pair, self.blocks = tuple(pair) if pair else None, dict(blocks)


def _add(sums: Sums, seen: Mapping[str, float]) -> None:
    for name, value in seen.items():
        sums[name] = sums.get(name, 0.0) + value


@dataclass(frozen=True)
class Trial:
    """A challenger's trial so far.

    since : epoch ms
    tags : of the version
    requests : sums over requests (`REQUESTS`): slowness is ln((1 + its ms) / (1 + the champion's ms))
    closed : partition -> the day (epoch ms) up to which its evidence is complete
    open : day -> sums over its labelled requests (`BLOCK`), not yet complete in every partition
    difference : of the days that are, the mean difference of clipped losses, challenger less champion, nats
    gap, champion_gap : sums over these days' examples, score less label
    """

    version: str
    phase: str
    since: int
    tags: Mapping[str, Any] = field(default_factory=dict)
    requests: Mapping[str, float] = field(default_factory=dict)
    closed: Mapping[str, int] = field(default_factory=dict)
    open: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    difference: Sequence = Sequence()
    examples: float = 0.0
    gap: float = 0.0
    champion_gap: float = 0.0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        return cls(**{**data, "difference": Sequence(**data["difference"])})

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def add(self, evidence: Any) -> Trial:
        """With one record more; what of it is no finite number does not count."""
        requests = dict(self.requests)
        _add(requests, _finite(evidence.requests, REQUESTS))
        opened = {day: dict(sums) for day, sums in self.open.items()}
        for block in evidence.blocks:
            if isinstance(block, Mapping) and isinstance(block.get("start"), int):
                _add(opened.setdefault(str(block["start"]), {}), _finite(block, BLOCK))
        closed = {**self.closed, str(evidence.partition): evidence.closed}
        trial = replace(self, requests=requests, closed=closed, open=opened)
        for day in sorted((d for d in opened if int(d) < min(closed.values())), key=int):
            trial = trial._with(day)
        return trial

    def _with(self, day: str) -> Trial:
        sums, rest = self.open[day], {d: s for d, s in self.open.items() if d != day}
        n = sums.get("n", 0.0)
        if not n or len(sums) < len(BLOCK):
            return replace(self, open=rest)
        return replace(
            self,
            open=rest,
            difference=self.difference.add(sums["difference"] / n),
            examples=self.examples + n,
            gap=self.gap + sums["gap"],
            champion_gap=self.champion_gap + sums["champion_gap"],
        )

    def mean(self, name: str) -> float:
        """Of a sum over requests."""
        return self.requests.get(name, 0.0) / max(1.0, self.requests.get("requests", 0.0))


def _finite(sums: Any, names: tuple[str, ...]) -> Sums:
    found = {name: number(sums.get(name)) if isinstance(sums, Mapping) else None for name in names}
    return {name: value for name, value in found.items() if value is not None}
