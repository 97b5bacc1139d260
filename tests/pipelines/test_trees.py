from __future__ import annotations

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier

from pipelines.trees import Trees


def rows(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    numbers = (rng.normal(size=(n, 5)) * [1, 10, 1e6, 1e-3, 1]).astype(np.float32)
    numbers[:, 4] = rng.integers(0, 3, n)
    numbers[rng.random((n, 5)) < 0.1] = np.nan
    known = np.nan_to_num(numbers)
    logit = 2 * known[:, 0] + np.where(np.isnan(numbers[:, 1]), 2, known[:, 1] / 10) - (known[:, 4] == 1)
    return numbers, (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(np.float32)


def test_they_score_as_scikit_learn_does() -> None:
    numbers, label = rows(4000)
    trees = Trees(30)
    trees.fit(numbers, label, seed=3)
    same = HistGradientBoostingClassifier(
        max_iter=30, learning_rate=0.5, max_depth=3, max_leaf_nodes=8, min_samples_leaf=50, l2_regularization=5.0,
        max_features=0.3, early_stopping=False, random_state=3,
    ).fit(numbers, label > 0.5)  # fmt: skip
    depths = {int(nodes.nodes["depth"][nodes.nodes["is_leaf"] == 1].min()) for (nodes,) in same._predictors}
    assert min(depths) < 3, "no tree has a leaf above the deepest level"
    fresh = np.concatenate([rows(3000, seed=1)[0], numbers])
    assert np.abs(trees(torch.from_numpy(fresh)).numpy() - same.decision_function(fresh)).max() < 1e-5
    odd = np.array([[np.nan] * 5, [np.inf] * 5, [-np.inf] * 5], np.float32)
    assert np.abs(trees(torch.from_numpy(odd)).numpy() - same.decision_function(odd)).max() < 1e-5


def test_a_column_that_is_null_throughout_teaches_nothing() -> None:
    numbers, label = rows(2000)
    without, trees = Trees(10), Trees(10)
    numbers[:, 2] = 0
    without.fit(numbers, label, seed=1)
    numbers[:, 2] = np.nan
    trees.fit(numbers, label, seed=1)
    assert torch.equal(trees(torch.from_numpy(numbers)), without(torch.from_numpy(numbers)))


def test_neighbouring_numbers_stay_apart() -> None:
    """The threshold between two neighbouring float32 is no float32: rounded up it would be the upper one."""
    lower = np.nextafter(np.float32(1), np.float32(2))
    upper = np.nextafter(lower, np.float32(2))
    numbers = np.array([[lower], [upper]] * 500, np.float32)
    trees = Trees(10)
    trees.fit(numbers, np.array([0, 1] * 500, np.float32), seed=0)
    low, high = trees(torch.from_numpy(numbers[:2])).tolist()
    assert low < -1 and high > 1


def test_a_second_fit_forgets_the_first() -> None:
    numbers, label = rows(2000)
    once, twice = Trees(20), Trees(20)
    once.fit(numbers, label, seed=1)
    twice.fit(numbers, 1 - label, seed=5)
    twice.fit(numbers, label, seed=1)
    x = torch.from_numpy(numbers)
    assert torch.equal(once(x), twice(x))


def test_too_few_rows_or_one_class_teach_nothing() -> None:
    numbers, label = rows(2000)
    for n, labels in ((100, label), (2000, np.ones_like(label))):
        trees = Trees(5)
        assert not trees.fit(numbers[:n], labels[:n], seed=0)
        assert not trees(torch.from_numpy(numbers)).any()
