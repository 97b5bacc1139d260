"""Boosted trees as tensors: fitted by scikit-learn, they score as a part of the net and travel in its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from pipelines.quality import splittable

DEPTH = 3
NODES, LEAVES = 2**DEPTH - 1, 2**DEPTH
REACH = 15.0  # trees times learning rate
WEIGHTS = {  # of the node in a graph, as the state dictionary has them
    "nodes_featureids": "feature",
    "nodes_splits": "threshold",
    "nodes_missing_value_tracks_true": "missing_left",
    "leaf_weights": "leaf",
}
NODE_OPSET = 5  # of `ai.onnx.ml`: the first one with TreeEnsemble
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
        threshold, and in the second copy of the features on the left of every one. In an ONNX graph all of it is one
        node, which ONNX Runtime walks in compiled code; `set_node_weights` gives it its weights.
        """
        if torch.onnx.is_in_onnx_export():
            logits: Tensor = _Node.apply(numbers, self.count)  # type: ignore[no-untyped-call]
            return self.base + logits
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


class _Node(torch.autograd.Function):
    """The trees of an ONNX graph, without their weights."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, trees: int) -> Tensor:
        """Logits [n], all 0."""
        return numbers.new_zeros(len(numbers))

    @staticmethod
    def symbolic(g: Any, numbers: Any, trees: int) -> Any:
        """In heap order: below inner node i are 2i + 1 and 2i + 2, of which those from `NODES` on are leaves."""
        below = 2 * np.arange(NODES) + np.array([[1], [2]])
        is_leaf = below >= NODES
        tree = np.arange(trees)[:, None, None]
        left, right = np.where(is_leaf, below - NODES + LEAVES * tree, below + NODES * tree).swapaxes(0, 1)
        scores = g.op(
            "ai.onnx.ml::TreeEnsemble",
            numbers,
            n_targets_i=1,
            tree_roots_i=(NODES * tree).ravel().tolist(),
            nodes_modes_t=torch.zeros(NODES * trees, dtype=torch.uint8),  # 0: left if x <= split
            nodes_truenodeids_i=left.ravel().tolist(),
            nodes_falsenodeids_i=right.ravel().tolist(),
            nodes_trueleafs_i=is_leaf[0].astype(int).tolist() * trees,
            nodes_falseleafs_i=is_leaf[1].astype(int).tolist() * trees,
            nodes_featureids_i=[0] * (NODES * trees),
            nodes_splits_t=torch.zeros(NODES * trees),
            nodes_missing_value_tracks_true_i=[0] * (NODES * trees),
            leaf_targetids_i=[0] * (LEAVES * trees),
            leaf_weights_t=torch.zeros(LEAVES * trees),
        )
        return g.op("Squeeze", scores, g.op("Constant", value_t=torch.tensor([1])))


def set_node_weights(weights: Mapping[str, Tensor], node: onnx.NodeProto) -> None:
    """Give a graph's node the weights of a state dictionary."""
    for attribute in node.attribute:
        if name := WEIGHTS.get(attribute.name):
            flat = weights[name].cpu().numpy().T.ravel()
            is_tensor = attribute.type == onnx.AttributeProto.TENSOR
            value: Any = onnx.numpy_helper.from_array(flat) if is_tensor else flat.astype(np.int64)
            attribute.CopyFrom(onnx.helper.make_attribute(attribute.name, value))


def node_weights(node: onnx.NodeProto) -> dict[str, Tensor]:
    """The weights that `set_node_weights` has given."""
    found, like = dict[str, Tensor](), Trees(0).state_dict()
    for attribute in node.attribute:
        if name := WEIGHTS.get(attribute.name):
            value: Any = onnx.helper.get_attribute_value(attribute)
            flat = onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.array(value)
            found[name] = torch.from_numpy(flat.reshape(-1, len(like[name])).T.copy()).to(like[name].dtype)
    return found


def _float32_below(threshold: float) -> float:
    """The largest float32 up to a threshold: it parts float32 numbers as the threshold does."""
    near = np.float32(threshold)
    return float(near if float(near) <= threshold else np.nextafter(near, np.float32(-np.inf)))
