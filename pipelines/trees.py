"""Boosted trees as tensors: fitted by scikit-learn, they score as a part of the net and travel in its weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipelines.quality import splittable

DEPTH = 3
NODES, LEAVES = 2**DEPTH - 1, 2**DEPTH
REACH = 15.0  # trees times learning rate
LEAST_ROWS = 500  # fewer teach trees nothing
MOST_ROWS = 100_000  # the newest: a rank waits for another one only so long


class Trees(nn.Module):
    """Logits of boosted trees of depth 3, in heap order; 0 until there are any.

    Parameters
    ----------
    trees : how many
    """

    def __init__(self, trees: int) -> None:
        super().__init__()
        self.count = trees
        self.register_buffer("feature", torch.zeros(NODES, trees, dtype=torch.int64))
        self.register_buffer("threshold", torch.zeros(NODES, trees))
        self.register_buffer(
            "missing_left", torch.zeros(NODES, trees)
        )  # 0 or 1: Horovod and ONNX Runtime know few bools
        self.register_buffer("leaf", torch.zeros(LEAVES, trees))
        self.register_buffer("base", torch.zeros(()))
        self.feature: Tensor
        self.threshold: Tensor
        self.missing_left: Tensor
        self.leaf: Tensor
        self.base: Tensor

    def forward(self, numbers: Tensor) -> Tensor:
        """Logits [n] of numbers [n, F], NaN allowed.

        All nodes are compared at once, a feature's values of all rows side by side: a null is on the right of every
        threshold, and in the second copy of the features on the left of every one.
        """
        lowest = torch.where(torch.isnan(numbers), torch.full_like(numbers, -torch.inf), numbers)
        places = self.feature + numbers.shape[1] * self.missing_left.long()
        x = torch.cat([numbers, lowest], 1).t()[places.reshape(-1)]
        left = (x <= self.threshold.reshape(-1, 1)).reshape(NODES, self.count, -1)
        return self.base + self._value(left, 0).sum(0)

    def _value(self, left: Tensor, node: int) -> Tensor:
        """What each tree says below a node: [trees, n], or [trees, 1] at a leaf."""
        if node >= NODES:
            return self.leaf[node - NODES][:, None]
        return torch.where(left[node], self._value(left, 2 * node + 1), self._value(left, 2 * node + 2))

    def fit(self, numbers: npt.NDArray[np.float32], label: npt.NDArray[np.float32], seed: int) -> bool:
        """Learn anew from rows [n, F] in time order and their labels [n]; too few rows, or one class, teach nothing:
        then the answer is False."""
        from sklearn.ensemble import HistGradientBoostingClassifier

        numbers, wanted = numbers[-MOST_ROWS:], label[-MOST_ROWS:] > 0.5
        if not self.count or len(numbers) < LEAST_ROWS or len(np.unique(wanted)) < 2:
            return False
        model = HistGradientBoostingClassifier(
            max_iter=self.count,
            learning_rate=REACH / self.count,
            max_depth=DEPTH,
            max_leaf_nodes=LEAVES,
            min_samples_leaf=50,
            l2_regularization=5.0,
            max_features=0.3,
            early_stopping=False,
            random_state=seed,
        )
        model.fit(splittable(numbers), wanted)
        self.base.fill_(float(model._baseline_prediction.item()))
        for tree, (predictor,) in enumerate(model._predictors):
            self._take(predictor.nodes, 0, tree, 0)
        return True

    def _take(self, nodes: npt.NDArray[np.void], at: int, tree: int, place: int) -> None:
        """Copy the subtree at scikit-learn's node `at` to `place`; a leaf above the deepest level fills all below."""
        node = nodes[at]
        if place >= NODES:
            self.leaf[place - NODES, tree] = float(node["value"])
        elif node["is_leaf"]:
            self._take(nodes, at, tree, 2 * place + 1)
            self._take(nodes, at, tree, 2 * place + 2)
        else:
            self.feature[place, tree] = int(node["feature_idx"])
            self.threshold[place, tree] = _float32_below(float(node["num_threshold"]))
            self.missing_left[place, tree] = float(node["missing_go_to_left"])
            self._take(nodes, int(node["left"]), tree, 2 * place + 1)
            self._take(nodes, int(node["right"]), tree, 2 * place + 2)


def _float32_below(threshold: float) -> float:
    """The largest float32 up to a threshold: it parts float32 numbers as the threshold does."""
    near = np.float32(threshold)
    return float(near if float(near) <= threshold else np.nextafter(near, np.float32(-np.inf)))
