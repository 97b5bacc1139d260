from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from features.inputs import Inputs, Ragged
from features.usecase import Category, EventSequence, ModelInputs
from pipelines import net
from pipelines.onnx_model import OnnxModel

INPUTS = ModelInputs(
    ("a", "b", "c"), (Category("k", 32, 4), Category("m", 8, 2)), (EventSequence("seen", ("age", "size")),)
)


def example(rows: int, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    numbers = (rng.normal(size=(rows, 3)) * [1, 1000, 1e9]).astype(np.float32)
    numbers[rng.random((rows, 3)) < 0.2] = np.nan
    lengths = rng.poisson(2.0, rows)
    events = rng.normal(size=(lengths.sum(), 2)).astype(np.float32)
    ids = np.stack([rng.integers(0, 32, rows), rng.integers(0, 8, rows)], 1)
    return Inputs(numbers, ids, (Ragged(events, lengths),))


def fitted(seed: int = 0) -> net.Net:
    torch.manual_seed(seed)
    model = net.Net(INPUTS, targets=2, members=3)
    model.normalise(example(500, 1))
    for last in (model.skip, model.head):
        torch.nn.init.normal_(last.weight, std=0.1)
    return model


def test_export_equals_torch_for_any_number_of_rows(tmp_path: Path) -> None:
    model = fitted()
    net.export(model, tmp_path, INPUTS.as_json(), example(20))
    onnx = OnnxModel.load(tmp_path, "1")
    for rows in (1, 2, 777):
        inputs = example(rows, rows)
        assert np.abs(onnx.score(inputs) - model.score(inputs)).max() < 1e-5


def test_the_answer_is_the_mean_of_the_members_in_logit_space() -> None:
    model = fitted().eval()
    tensors = model.tensors(example(50))
    each = model.foretell(*tensors)
    assert each.shape == (3, 50, 3) and each[:, :, 0].std(0).min() > 1e-4
    assert torch.allclose(model(*tensors), each[:, :, 0].mean(0))
    alone = net.Net(INPUTS, targets=2, members=1).eval()
    weights = {k: v[1:2] if v.dim() == 3 else v for k, v in model.state_dict().items()}
    alone.load_state_dict(weights)
    assert torch.allclose(alone(*tensors), each[1, :, 0], atol=1e-5)


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
    assert model.score(example(5)) == pytest.approx([0.25] * 5)
    assert torch.sigmoid(model.foretell(*model.tensors(example(5))))[3, 4].tolist() == pytest.approx([0.25, 0.001, 0.5])


def test_trees_have_half_a_say_once_there_are_any(tmp_path: Path) -> None:
    model = fitted().eval()
    inputs = example(2000)
    numbers, members = inputs.numbers, model.score(inputs)
    model.grow(inputs, (np.nan_to_num(numbers[:, 0]) > 0.5).astype(np.float32), seed=0)
    logit = (np.log(members / (1 - members)) + model.trees(torch.from_numpy(numbers)).numpy()) / 2
    assert model.score(inputs) == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)
    assert np.abs(model.score(inputs) - members).max() > 0.2
    net.export(model, tmp_path, INPUTS.as_json(), inputs)
    onnx = OnnxModel.load(tmp_path, "1")
    assert np.abs(onnx.score(inputs) - model.score(inputs)).max() < 1e-5
    read = net.weights_of((tmp_path / "model.onnx").read_bytes())
    assert {name for name in model.state_dict() if name.startswith("trees.")} <= set(read)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in read.items())


def test_export_takes_numbers_that_training_never_saw(tmp_path: Path) -> None:
    net.export(fitted(), tmp_path, INPUTS.as_json(), example(8))
    odd = np.array([[np.nan] * 3, [np.inf, -np.inf, 3e38], [0, -1e-30, 1]], np.float32)
    scores = OnnxModel.load(tmp_path, "1").score(
        Inputs(odd, np.zeros((3, 2), np.int64), (Ragged(odd[:, :2], np.array([0, 3, 0])),))
    )
    assert np.isfinite(scores).all() and ((scores > 0) & (scores < 1)).all()


def test_weights_go_back_into_a_net(tmp_path: Path) -> None:
    model = fitted()
    net.export(model, tmp_path, INPUTS.as_json(), example(8))
    other = fitted(seed=9)
    assert not np.allclose(other.score(example(9)), model.score(example(9)))
    net.load_weights(other, tmp_path)
    assert np.array_equal(other.score(example(9)), model.score(example(9)))


def test_example_holds_what_the_net_scored(tmp_path: Path) -> None:
    model = fitted()
    inputs = example(30)
    net.export(model, tmp_path, INPUTS.as_json(), inputs)
    recorded = json.loads((tmp_path / "example.json").read_text())
    assert recorded["ids"] == inputs.ids[:8].tolist()
    assert recorded["score"] == pytest.approx(model.score(inputs.take(slice(8))), abs=1e-6)
    assert [v is None for v in recorded["numbers"][3]] == np.isnan(inputs.numbers[3]).tolist()


def test_normaliser_standardises_what_is_known_and_flags_the_rest() -> None:
    numbers = example(5000).numbers
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
    for n in (3, 0):
        assert model.score(Inputs(np.ones((n, 1), np.float32), np.empty((n, 0), np.int64))).shape == (n,)


def test_events_are_pooled_by_row_whatever_stands_beside_them() -> None:
    pool = fitted().events[0]
    inputs = example(40)
    (ragged,) = inputs.sequences
    like = torch.from_numpy(inputs.numbers)
    together = pool(torch.from_numpy(ragged.values), torch.from_numpy(ragged.rows), like)
    for row in range(40):
        one = ragged.take(slice(row, row + 1))
        alone = pool(torch.from_numpy(one.values), torch.from_numpy(one.rows), like[:1])
        assert torch.allclose(alone[0], together[row], atol=1e-6)
        if not ragged.lengths[row]:
            assert not together[row].any()
    encoded = pool.encoder(pool.normaliser(torch.from_numpy(ragged.values)))
    weight = torch.exp(net.STEEPEST * torch.tanh(pool.attention(encoded) / net.STEEPEST))
    of_first = torch.from_numpy(ragged.rows == np.flatnonzero(ragged.lengths)[0])
    expected = (weight * encoded)[of_first].sum(0) / weight[of_first].sum()
    first = int(np.flatnonzero(ragged.lengths)[0])
    assert torch.allclose(together[first, : net.EVENT_WIDTH], expected, atol=1e-6)
