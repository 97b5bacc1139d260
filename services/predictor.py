"""The predictor's answers: features from the online store, scores of the champion and its challenger, a record of both.

Requests that wait are answered together: one read of the store, one run of each model, one write to the spool.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol

import structlog

from features.errors import UnavailableError
from features.inputs import encode_values
from features.usecase import UseCase
from features.vectors import StoredRow, Vectorizer
from pipelines.broker import Message
from pipelines.prediction import prediction_message
from services.arms import Arms, scored
from services.batcher import Answers
from services.metrics import PredictMetrics
from services.predict_request import Answered, Asked
from services.serving_state import Model, ModelSlot
from services.settings import Settings
from services.spool import Spool

log = structlog.get_logger()
STORE_PAUSE_S = 1.0


class Reader(Protocol):
    """What the predictor needs of an online store."""

    def read(self, keys: Sequence[Mapping[str, Any]]) -> list[dict[str, StoredRow]]: ...


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
        self.arms = Arms(use_case, slot, metrics.unscored)
        self._store_again_at = 0.0

    def answer(self, rows: Sequence[Asked]) -> Answers[Answered]:
        """Answers in the order of `rows`, and whether their predictions are spooled; UnavailableError when they should
        be and can't."""
        now = self.clock()
        times = [now if row.event_time is None else row.event_time for row in rows]
        keys = [self.vectorizer.entity_keys(row.entities, row.fields) for row in rows]
        vectors = [
            self.vectorizer.assemble(k, row.fields, t, stored)
            for row, k, t, stored in zip(rows, keys, times, self._read(keys), strict=True)
        ]
        choices = self.arms.answers([row.entities for row in rows], [v.features for v in vectors])
        answers, messages = [], []
        for row, k, at, vector, choice in zip(rows, keys, times, vectors, choices, strict=True):
            empty = vector.missing, vector.stale
            answers.append(Answered(row.request_id, choice.score, choice.version, choice.arm, choice.refresh, *empty))
            message = prediction_message(
                self.use_case,
                choice,
                request_id=row.request_id,
                event_time=at,
                keys=k,
                fields=row.fields,
                vector=vector,
                schema=self.vectorizer.schema_id,
                timestamp=at if self.simulated_time else now,
                sent=now,
            )
            messages.append(message)
        logged = self._log(messages)
        self.metrics.answered(vectors)
        return answers, logged

    def score(self, rows: Sequence[tuple[Model, tuple[Any, ...]]]) -> Answers[float]:
        """Models' answers to vectors that callers have made, in the order of the model's columns; nothing is read and
        nothing logged."""
        scores = list[float | None]()
        for model, same in groupby(rows, key=itemgetter(0)):
            scores += scored(model, encode_values(model.inputs, [values for _, values in same])).scores
        self.metrics.nan_scores.inc(scores.count(None))
        return [self.use_case.prior if score is None else score for score in scores], True

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
