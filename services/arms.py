"""Champion and challenger over a batch of vectors, in one pass: who answers which row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog

from features.inputs import Inputs, encode
from features.usecase import Row, UseCase
from pipelines.prediction import Choice, in_share
from services.serving_state import Model, ModelSlot, Serving

log = structlog.get_logger()


class Scored(NamedTuple):
    """A model's run over a batch: scores, None where they are no finite number, and ms a row (None: it failed)."""

    model: Model
    scores: list[float | None]
    ms: float | None


def scored(model: Model, inputs: Inputs) -> Scored:
    """Run a model."""
    began = time.perf_counter()
    scores = model.score(inputs).tolist()
    ms = (time.perf_counter() - began) * 1000 / max(1, len(scores))
    return Scored(model, [score if math.isfinite(score) else None for score in scores], round(ms, 4))


class Arms:
    """What serves, asked for batches.

    unscored : told, after each batch, a version, how many rows it has no score for, and whether it is the champion
    """

    def __init__(
        self, use_case: UseCase, slot: ModelSlot, unscored: Callable[[str, int, bool], None] = lambda *_: None
    ) -> None:
        self.use_case, self.slot, self.unscored = use_case, slot, unscored
        self._failed = ""

    def answers(self, entities: Sequence[Row], vectors: Sequence[Row]) -> list[Choice]:
        """An answer to each row, by the entity keys of its request and its vector by feature name."""
        serving = self.slot.serving
        champion, challenger = self._run(serving, vectors)
        score_ms = {s.model.version: s.ms for s in (champion, challenger) if s and s.ms is not None}
        return [self._choice(i, keys, champion, challenger, serving.share, score_ms) for i, keys in enumerate(entities)]

    def _choice(
        self,
        i: int,
        entities: Row,
        champion: Scored,
        challenger: Scored | None,
        share: float,
        score_ms: dict[str, float],
    ) -> Choice:
        """Row i's answer. Who asks a challenger that has no score gets the champion's; a champion without one is
        answered by the prior."""
        by, other = champion, challenger
        if challenger and share and challenger.scores[i] is not None:
            keys = [entities[name] for name in self.use_case.entities]
            if in_share(keys, challenger.model.version, share):
                by, other = challenger, champion
        score, model = by.scores[i], by.model
        return Choice(
            model.version,
            model.refresh,
            "champion" if by is champion else "canary",
            self.use_case.prior if score is None else score,
            {other.model.version: other.scores[i]} if other else {},
            score_ms,
        )

    def _run(self, serving: Serving, vectors: Sequence[Row]) -> tuple[Scored, Scored | None]:
        inputs = encode(serving.champion.inputs, vectors)
        champion, challenger = scored(serving.champion, inputs), serving.challenger
        self.unscored(champion.model.version, champion.scores.count(None), True)
        if challenger is None:
            return champion, None
        try:
            same = challenger.inputs == serving.champion.inputs
            second = scored(challenger, inputs if same else encode(challenger.inputs, vectors))
        except Exception as error:  # a challenger never disturbs
            if self._failed != challenger.version:
                log.error("the challenger fails, the champion answers", version=challenger.version, error=str(error))
                self._failed = challenger.version
            second = Scored(challenger, [None] * len(vectors), None)
        self.unscored(challenger.version, second.scores.count(None), False)
        return champion, second
