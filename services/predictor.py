"""The predictor's answers: features from the online store, scores of the champion and its challenger, a record of both.

Requests that wait are answered together: one read of the store, one run of each model, one write to the spool.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import structlog

from features.errors import UnavailableError
from features.inputs import Inputs, encode, encode_values
from features.usecase import Row, UseCase
from features.vectors import StoredRow, Vector, Vectorizer
from pipelines.broker import Message
from pipelines.prediction import in_share, prediction_message
from services.batcher import Answers
from services.metrics import PredictMetrics
from services.predict_request import Answered, Asked
from services.serving_state import Model, ModelSlot, Serving
from services.settings import Settings
from services.spool import Spool

log = structlog.get_logger()
STORE_PAUSE_S = 1.0


class Reader(Protocol):
    """What the predictor needs of an online store."""

    def read(self, keys: Sequence[Mapping[str, Any]]) -> list[dict[str, StoredRow]]: ...


class Scored(NamedTuple):
    """A model's run over a batch: scores, None where they are no finite number, and ms a row (None: it failed)."""

    model: Model
    scores: list[float | None]
    ms: float | None


class Predictor:
    """Answers batches of rows: reads, assembles, scores, spools.

    unserved : views whose rows read as missing
    """

    def __init__(
        self,
        use_case: UseCase,
        store: Reader,
        spool: Spool,
        slot: ModelSlot,
        settings: Settings,
        *,
        clock: Callable[[], int],
        metrics: PredictMetrics,
        unserved: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self.use_case, self.store, self.spool, self.slot = use_case, store, spool, slot
        self.simulated_time, self.drops = settings.allow_event_time, settings.spool_when_full == "drop"
        self.clock, self.metrics, self.unserved = clock, metrics, unserved
        self.vectorizer = Vectorizer(use_case)
        self._store_again_at = 0.0
        self._failed = ""

    def answer(self, rows: Sequence[Asked]) -> Answers[Answered]:
        """Answers in the order of `rows`, and whether their predictions are spooled; UnavailableError when they should
        be and can't."""
        serving, now = self.slot.serving, self.clock()
        times = [now if row.event_time is None else row.event_time for row in rows]
        keys = [self.vectorizer.entity_keys(row.entities, row.fields) for row in rows]
        vectors = [
            self.vectorizer.assemble(k, row.fields, t, stored)
            for row, k, t, stored in zip(rows, keys, times, self._read(keys), strict=True)
        ]
        champion, challenger = self._scored(serving, [v.features for v in vectors])
        score_ms = {s.model.version: s.ms for s in (champion, challenger) if s and s.ms is not None}
        answers, messages = [], []
        for i, (row, vector) in enumerate(zip(rows, vectors, strict=True)):
            answer, shadow = self._choose(i, row, vector, champion, challenger, serving.share)
            answers.append(answer)
            messages.append(self._message(row, keys[i], times[i], now, vector, answer, shadow, score_ms))
        logged = self._log(messages)
        self.metrics.answered(vectors)
        return answers, logged

    def _choose(
        self, i: int, row: Asked, vector: Vector, champion: Scored, challenger: Scored | None, share: float
    ) -> tuple[Answered, dict[str, float | None]]:
        """Row i's answer and the score of the model that didn't give it. Who asks a challenger that has no score gets
        the champion's; a champion without one is answered by the prior."""
        by, other = champion, challenger
        if challenger and share and challenger.scores[i] is not None:
            keys = [row.entities[name] for name in self.use_case.entities]
            if in_share(keys, challenger.model.version, share):
                by, other = challenger, champion
        score, (model, arm) = by.scores[i], (by.model, "champion" if by is champion else "canary")
        score = self.use_case.prior if score is None else score
        shadow = {other.model.version: other.scores[i]} if other else {}
        return Answered(
            row.request_id,
            score,
            model.version,
            arm,
            model.refresh,
            vector.missing,
            vector.stale,  # type: ignore[arg-type]
        ), shadow

    def _scored(self, serving: Serving, vectors: Sequence[Row]) -> tuple[Scored, Scored | None]:
        inputs = encode(serving.champion.inputs, vectors)
        champion, challenger = self._run(serving.champion, inputs), serving.challenger
        self.metrics.nan_scores.inc(champion.scores.count(None))
        if challenger is None:
            return champion, None
        try:
            same = challenger.inputs == serving.champion.inputs
            second = self._run(challenger, inputs if same else encode(challenger.inputs, vectors))
        except Exception as error:  # a challenger never disturbs
            if self._failed != challenger.version:
                log.error("the challenger fails, the champion answers", version=challenger.version, error=str(error))
                self._failed = challenger.version
            second = Scored(challenger, [None] * len(vectors), None)
        self.metrics.shadow_failures.labels(challenger.version).inc(second.scores.count(None))
        return champion, second

    def _run(self, model: Model, inputs: Inputs) -> Scored:
        began = time.perf_counter()
        scores = model.score(inputs).tolist()
        ms = (time.perf_counter() - began) * 1000 / max(1, len(scores))
        return Scored(model, [score if math.isfinite(score) else None for score in scores], round(ms, 4))

    def score(self, rows: Sequence[tuple[Model, tuple[Any, ...]]]) -> Answers[float]:
        """Models' answers to vectors that callers have made, in the order of the model's columns; nothing is read and
        nothing logged."""
        scores = list[float | None]()
        for model, same in groupby(rows, key=itemgetter(0)):
            scores += self._run(model, encode_values(model.inputs, [values for _, values in same])).scores
        self.metrics.nan_scores.inc(scores.count(None))
        return [self.use_case.prior if score is None else score for score in scores], True

    def _message(
        self,
        row: Asked,
        keys: Row,
        time: int,
        now: int,
        vector: Vector,
        answer: Answered,
        shadow: dict[str, float | None],
        score_ms: dict[str, float],
    ) -> Message:
        return prediction_message(
            self.use_case,
            request_id=row.request_id,
            event_time=time,
            keys=keys,
            fields=row.fields,
            vector=vector,
            schema=self.vectorizer.schema_id,
            timestamp=time if self.simulated_time else now,
            sent=now,
            version=answer.version,
            refresh=answer.refresh,
            arm=answer.arm,
            score=answer.score,
            shadow=shadow,
            score_ms=score_ms,
        )

    def _log(self, messages: Sequence[Message]) -> bool:
        try:
            self.spool.append(messages)
        except UnavailableError:
            if not self.drops:
                raise
            self.metrics.dropped.inc(len(messages))
            return False
        return True

    def _read(self, keys: Sequence[Mapping[str, Any]]) -> list[dict[str, StoredRow]]:
        """Stored rows, or none at all while the store is away: the model knows nulls, a caller wants an answer."""
        if time.monotonic() < self._store_again_at:
            self.metrics.store_errors.inc()
            return [{}] * len(keys)
        try:
            rows = self.store.read(keys)
        except UnavailableError as error:
            if self._store_again_at == 0.0:
                log.warning("answering without stored features", error=str(error))
            self.metrics.store_errors.inc()
            self._store_again_at = time.monotonic() + STORE_PAUSE_S
            return [{}] * len(keys)
        if self._store_again_at:
            log.info("stored features are back")
            self._store_again_at = 0.0
        if unserved := self.unserved():
            return [{view: row for view, row in found.items() if view not in unserved} for found in rows]
        return rows
