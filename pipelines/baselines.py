"""What the net is held against: constant, rolling rate, a model refitted on a schedule, River's logistic regression."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from features.inputs import Floats, Inputs
from features.usecase import ModelInputs
from features.windows import pack, unpack
from pipelines.archive import Examples
from pipelines.learner import Learner
from pipelines.quality import splittable

SMALL = 512  # a category with more buckets is hashed so finely that trees learn noise from it


class Constant:
    """The mean of all labels so far."""

    def __init__(self, prior: float) -> None:
        self.prior, self.total, self.count = prior, 0.0, 0

    def update(self, examples: Examples) -> None:
        self.total += float(examples.label.sum(dtype=np.float64))
        self.count += len(examples)

    def score(self, inputs: Inputs) -> Floats:
        return np.full(len(inputs), self.total / self.count if self.count else self.prior, np.float32)

    def snapshot(self) -> bytes:
        return pack([self.total, self.count])

    def restore(self, data: bytes) -> None:
        self.total, self.count = unpack(data)


class RollingRate:
    """The mean of the labels that came within `window_ms` before the newest one."""

    def __init__(self, prior: float, window_ms: int) -> None:
        self.prior, self.window = prior, window_ms
        self.labels: deque[tuple[int, float]] = deque()
        self.total = 0.0

    def update(self, examples: Examples) -> None:
        for time, label in zip(examples.label_time.tolist(), examples.label.tolist(), strict=True):
            self.labels.append((time, label))
            self.total += label
        while self.labels and self.labels[0][0] < self.labels[-1][0] - self.window:
            self.total -= self.labels.popleft()[1]

    def score(self, inputs: Inputs) -> Floats:
        return np.full(len(inputs), self.total / len(self.labels) if self.labels else self.prior, np.float32)

    def snapshot(self) -> bytes:
        return pack([list(self.labels), self.total])

    def restore(self, data: bytes) -> None:
        labels, self.total = unpack(data)
        self.labels = deque((time, label) for time, label in labels)


Scores = Callable[[Floats], npt.NDArray[Any]]


class Batch(Protocol):
    """A model that is fitted at once: rows [n, F + C] of numbers (NaN for null) and small categories, labels [n] ->
    what scores rows."""

    def __call__(self, rows: Floats, label: npt.NDArray[np.bool_], categories: list[int], /) -> Scores: ...


class Refit:
    """A batch model fitted anew to all history on a schedule.

    Parameters
    ----------
    fit : the model; the same examples give the same scores
    inputs : what it reads: numbers and categories of at most 512 buckets, no sequences
    every_ms, anchor_ms : it is fitted at anchor + k x every, by label time, to the labels before that instant
    """

    def __init__(self, fit: Batch, inputs: ModelInputs, prior: float, every_ms: int, anchor_ms: int) -> None:
        self.fit, self.prior, self.every, self.anchor = fit, prior, every_ms, anchor_ms
        self.small = [i for i, c in enumerate(inputs.categories) if c.buckets <= SMALL]
        self.categories = [len(inputs.numbers) + i for i in range(len(self.small))]
        self.rows: list[Floats] = []
        self.labels: list[Floats] = []
        self.due: int | None = None
        self.fitted = 0
        self.model: Scores | None = None

    def update(self, examples: Examples) -> None:
        if self.due is None:
            first = int(examples.label_time[0])
            self.due = first + (self.anchor - first) % self.every
        while self.due <= examples.label_time[-1]:
            before = examples.between(0, self.due)
            self._add(before)
            examples = examples.take(slice(len(before), None))
            self._fit(sum(map(len, self.labels)))
            self.due += self.every
        self._add(examples)

    def score(self, inputs: Inputs) -> Floats:
        if self.model is None:
            return np.full(len(inputs), self.prior, np.float32)
        return np.asarray(self.model(self._matrix(inputs)), np.float32)

    def _add(self, examples: Examples) -> None:
        self.rows.append(self._matrix(examples.inputs))
        self.labels.append(examples.label)

    def _matrix(self, inputs: Inputs) -> Floats:
        return np.concatenate([inputs.numbers, inputs.ids[:, self.small].astype(np.float32)], axis=1)

    def _fit(self, examples: int) -> None:
        """Fit to the first so many examples; labels of one class teach nothing."""
        self.rows, self.labels = [np.concatenate(self.rows)], [np.concatenate(self.labels)]
        rows, label = self.rows[0][:examples], self.labels[0][:examples] > 0.5
        if len(np.unique(label)) == 2:
            self.fitted, self.model = examples, self.fit(rows, label, self.categories)

    def snapshot(self) -> bytes:
        """The history; a restored learner fits the model again."""
        out = io.BytesIO()
        rows = np.concatenate(self.rows) if self.rows else np.empty((0, 0), np.float32)
        label = np.concatenate(self.labels) if self.labels else np.empty(0, np.float32)
        np.savez(out, rows=rows, label=label, due=-1 if self.due is None else self.due, fitted=self.fitted)
        return out.getvalue()

    def restore(self, data: bytes) -> None:
        with np.load(io.BytesIO(data)) as state:
            self.rows, self.labels = ([state["rows"]], [state["label"]]) if len(state["label"]) else ([], [])
            self.due = int(state["due"]) if state["due"] >= 0 else None
            self.fitted, self.model = int(state["fitted"]), None
        if self.fitted:
            self._fit(self.fitted)


def lightgbm(rounds: int, leaves: int, rate: float, least: int, columns: float, l2: float, seed: int) -> Batch:
    """LightGBM with these settings."""

    def fit(rows: Floats, label: npt.NDArray[np.bool_], categories: list[int]) -> Scores:
        import lightgbm

        settings = {
            "objective": "binary",
            "learning_rate": rate,
            "num_leaves": leaves,
            "min_data_in_leaf": least,
            "feature_fraction": columns,
            "bagging_fraction": 0.8,
            "bagging_freq": 1,
            "lambda_l2": l2,
            "seed": seed,
            "deterministic": True,
            "force_row_wise": True,
            "verbose": -1,
        }
        data = lightgbm.Dataset(rows, label, categorical_feature=categories, params={"verbose": -1})
        booster = lightgbm.train(settings, data, rounds)
        return lambda asked: np.asarray(booster.predict(asked))

    return fit


def sklearn_trees(rounds: int, leaves: int, rate: float, seed: int) -> Batch:
    """scikit-learn's histogram gradient boosting."""

    def fit(rows: Floats, label: npt.NDArray[np.bool_], categories: list[int]) -> Scores:
        from sklearn.ensemble import HistGradientBoostingClassifier

        model = HistGradientBoostingClassifier(
            max_iter=rounds, max_leaf_nodes=leaves, learning_rate=rate, early_stopping=False, random_state=seed
        )
        model.fit(splittable(rows), label)
        return lambda asked: np.asarray(model.predict_proba(asked)[:, 1])

    return fit


class River:
    """River's logistic regression behind its standard scaler: one step for each label. It reads numbers as signed
    log1p, leaves nulls out, and has a weight for each id."""

    def __init__(self, inputs: ModelInputs, prior: float, rate: float, l2: float) -> None:
        from river import linear_model, optim, preprocessing

        self.names = [c.name for c in inputs.categories]
        self.scaler: Any = preprocessing.StandardScaler()
        self.model: Any = linear_model.LogisticRegression(
            optim.SGD(rate), l2=l2, intercept_init=float(np.log(prior / (1 - prior)))
        )

    def _rows(self, inputs: Inputs, learn: bool) -> list[dict[str, float]]:
        """Scaled numbers by place, and a one for each id."""
        squashed = np.sign(inputs.numbers) * np.log1p(np.abs(inputs.numbers))
        found = []
        for numbers, ids in zip(squashed.tolist(), inputs.ids.tolist(), strict=True):
            row = {str(i): v for i, v in enumerate(numbers) if v == v}
            if learn:
                self.scaler.learn_one(row)
            found.append(
                self.scaler.transform_one(row) | {f"{n}={v}": 1.0 for n, v in zip(self.names, ids, strict=True)}
            )
        return found

    def update(self, examples: Examples) -> None:
        for row, label in zip(self._rows(examples.inputs, learn=True), examples.label.tolist(), strict=True):
            self.model.learn_one(row, label > 0.5)

    def score(self, inputs: Inputs) -> Floats:
        rows = self._rows(inputs, learn=False)
        return np.array([self.model.predict_proba_one(row)[True] for row in rows], np.float32)

    def snapshot(self) -> bytes:
        scaler = [dict(values) for values in (self.scaler.counts, self.scaler.means, self.scaler.vars)]
        steps = self.model.optimizer.n_iterations
        return pack([scaler, self.model.weights, self.model.intercept, steps])

    def restore(self, data: bytes) -> None:
        from river.utils import VectorDict

        scaler, weights, self.model.intercept, self.model.optimizer.n_iterations = unpack(data)
        for values, saved in zip((self.scaler.counts, self.scaler.means, self.scaler.vars), scaler, strict=True):
            values.clear()
            values.update(saved)
        self.model._weights = VectorDict(weights)


class Frozen:
    """A learner that learns from no label after an instant (epoch ms)."""

    def __init__(self, learner: Learner, until_ms: int) -> None:
        self.learner, self.until = learner, until_ms

    def update(self, examples: Examples) -> None:
        known = examples.between(0, self.until)
        if len(known):
            self.learner.update(known)

    def score(self, inputs: Inputs) -> Floats:
        return self.learner.score(inputs)

    def snapshot(self) -> bytes:
        return self.learner.snapshot()

    def restore(self, data: bytes) -> None:
        self.learner.restore(data)
