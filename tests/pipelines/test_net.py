from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from features.usecase import Category, ModelInputs
from pipelines import net
from pipelines.onnx_model import OnnxModel

INPUTS = ModelInputs(("a", "b", "c"), (Category("k", 32, 4), Category("m", 8, 2)))


def example(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    numbers = (rng.normal(size=(rows, 3)) * [1, 1000, 1e9]).astype(np.float32)
    numbers[rng.random((rows, 3)) < 0.2] = np.nan
    return numbers, np.stack([rng.integers(0, 32, rows), rng.integers(0, 8, rows)], 1)


def fitted(seed: int = 0) -> net.Net:
    torch.manual_seed(seed)
    model = net.Net(INPUTS, targets=2, members=3)
    model.normaliser.fit(example(500, 1)[0])
    for last in (model.skip, model.head):
        torch.nn.init.normal_(last.weight, std=0.1)
    return model


def test_export_equals_torch_for_any_number_of_rows(tmp_path: Path) -> None:
    model = fitted()
    net.export(model, tmp_path, INPUTS.as_json(), *example(20))
    onnx = OnnxModel.load(tmp_path, "1")
    for rows in (1, 2, 777):
        numbers, ids = example(rows, rows)
        assert np.abs(onnx.score(numbers, ids) - model.score(numbers, ids)).max() < 1e-5


def test_the_answer_is_the_mean_of_the_members_in_logit_space() -> None:
    model = fitted().eval()
    numbers, ids = (torch.from_numpy(a) for a in example(50))
    each = model.foretell(numbers, ids)
    assert each.shape == (3, 50, 3) and each[:, :, 0].std(0).min() > 1e-4
    assert torch.allclose(model(numbers, ids), each[:, :, 0].mean(0))
    alone = net.Net(INPUTS, targets=2, members=1).eval()
    weights = {k: v[1:2] if v.dim() == 3 else v for k, v in model.state_dict().items()}
    alone.load_state_dict(weights)
    assert torch.allclose(alone(numbers, ids), each[1, :, 0], atol=1e-5)


def test_loss_is_the_labels_and_the_mean_of_the_known_targets_of_each_member() -> None:
    logits = torch.tensor([[[0.0, 2.0, -1.0], [1.0, 0.5, 3.0]], [[-1.0, 0.0, 0.0], [0.0, -2.0, 1.0]]])
    truth = torch.tensor([[1.0, 0.0, 0.25], [0.0, torch.nan, 1.0]])

    def cross_entropy(logit: float, wanted: float) -> float:
        p = 1 / (1 + np.exp(-logit))
        return float(-wanted * np.log(p) - (1 - wanted) * np.log(1 - p))

    first = sum(
        cross_entropy(a, 1) + 3 * (cross_entropy(b, 0) + cross_entropy(c, 0.25)) / 2
        for a, b, c in logits[:, 0].tolist()
    )
    second = sum(cross_entropy(a, 0) + 3 * cross_entropy(c, 1) / 2 for a, _, c in logits[:, 1].tolist())
    assert net.losses(logits, truth, 3.0).tolist() == pytest.approx([first, second], rel=1e-5)
    alone = net.losses(logits[:, :, :1], truth[:, :1], 3.0)
    assert alone[0].item() == pytest.approx(cross_entropy(0, 1) + cross_entropy(-1, 1))


def test_an_untrained_net_answers_with_the_base_rates() -> None:
    model = net.Net(INPUTS, targets=2).eval()
    model.start_at(np.array([[1, 0, np.nan], [0, 0, np.nan], [0, np.nan, np.nan], [0, 0, np.nan]], np.float32))
    assert model.score(*example(5)) == pytest.approx([0.25] * 5)
    numbers, ids = (torch.from_numpy(a) for a in example(5))
    assert torch.sigmoid(model.foretell(numbers, ids))[3, 4].tolist() == pytest.approx([0.25, 0.001, 0.5])


def test_trees_have_half_a_say_once_there_are_any(tmp_path: Path) -> None:
    model = fitted().eval()
    numbers, ids = example(2000)
    members = model.score(numbers, ids)
    model.trees.fit(numbers, (np.nan_to_num(numbers[:, 0]) > 0.5).astype(np.float32), seed=0)
    logit = (np.log(members / (1 - members)) + model.trees(torch.from_numpy(numbers)).numpy()) / 2
    assert model.score(numbers, ids) == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)
    assert np.abs(model.score(numbers, ids) - members).max() > 0.2
    net.export(model, tmp_path, INPUTS.as_json(), numbers, ids)
    onnx = OnnxModel.load(tmp_path, "1")
    assert np.abs(onnx.score(numbers, ids) - model.score(numbers, ids)).max() < 1e-5


def test_export_takes_numbers_that_training_never_saw(tmp_path: Path) -> None:
    net.export(fitted(), tmp_path, INPUTS.as_json(), *example(8))
    odd = np.array([[np.nan] * 3, [np.inf, -np.inf, 3e38], [0, -1e-30, 1]], np.float32)
    scores = OnnxModel.load(tmp_path, "1").score(odd, np.zeros((3, 2), np.int64))
    assert np.isfinite(scores).all() and ((scores > 0) & (scores < 1)).all()


def test_weights_go_back_into_a_net(tmp_path: Path) -> None:
    model = fitted()
    net.export(model, tmp_path, INPUTS.as_json(), *example(8))
    other = fitted(seed=9)
    assert not np.allclose(other.score(*example(9)), model.score(*example(9)))
    net.load_weights(other, tmp_path)
    assert np.array_equal(other.score(*example(9)), model.score(*example(9)))


def test_example_holds_what_the_net_scored(tmp_path: Path) -> None:
    model = fitted()
    numbers, ids = example(30)
    net.export(model, tmp_path, INPUTS.as_json(), numbers, ids)
    recorded = json.loads((tmp_path / "example.json").read_text())
    assert recorded["ids"] == ids[:8].tolist()
    assert recorded["score"] == pytest.approx(model.score(numbers[:8], ids[:8]), abs=1e-6)
    assert [v is None for v in recorded["numbers"][3]] == np.isnan(numbers[3]).tolist()


def test_normaliser_standardises_what_is_known_and_flags_the_rest() -> None:
    numbers, _ = example(5000)
    normaliser = net.Normaliser(3)
    normaliser.fit(numbers)
    out = normaliser(torch.from_numpy(numbers)).numpy()
    missing = np.isnan(numbers)
    assert np.array_equal(out[:, 3:], missing.astype(np.float32))
    assert (out[:, :3][missing] == 0).all()
    known = np.where(missing, np.nan, out[:, :3])
    assert np.abs(np.nanmean(known, 0)).max() < 0.01 and np.abs(np.nanstd(known, 0) - 1).max() < 0.05


def test_normaliser_moves_by_its_weight_and_stays_where_nothing_is_known() -> None:
    normaliser = net.Normaliser(2)
    rows = np.array([[np.expm1(4.0), np.nan]] * 10, np.float32)
    normaliser.fit(rows, weight=0.25)
    assert normaliser.mean.tolist() == pytest.approx([1.0, 0.0])
    assert normaliser.variance.tolist() == pytest.approx([0.75 + 0.25 * net.LEAST_VARIANCE, 1.0])


def test_a_net_without_categories_or_hidden_layers_works() -> None:
    model = net.Net(ModelInputs(("a",)), hidden=())
    assert model.score(np.ones((3, 1), np.float32), np.empty((3, 0), np.int64)).shape == (3,)
    assert model.score(np.ones((0, 1), np.float32), np.empty((0, 0), np.int64)).shape == (0,)
