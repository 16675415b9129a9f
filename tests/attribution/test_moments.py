import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import TensorDataset

from attribution import Task, draw_subsets, moments, train_models
from attribution.moments import (
    Moments,
    compute_moments,
    input_moments,
    layer_vectors,
    layers,
    moment_shape,
)
from attribution.outputs import evaluate
from stores import Store
from tests.gradient_references import group_patches
from tests.tasks import RECIPE, blobs, normalised_mlp

CONVOLUTIONS = {
    "plain": nn.Conv2d(3, 4, 3),
    "one by one": nn.Conv2d(3, 4, 1, stride=2),
    "stride": nn.Conv2d(3, 4, (3, 2), stride=(2, 3)),
    "padding": nn.Conv2d(3, 4, (3, 5), padding=(1, 2)),
    "dilation": nn.Conv2d(3, 4, (2, 3), dilation=(3, 2)),
    "all": nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 3)),
    "groups": nn.Conv2d(6, 9, 3, groups=3),
    "own channel": nn.Conv2d(3, 6, (2, 3), groups=3, dilation=(3, 2), stride=2),
}


@pytest.fixture(params=CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def convolution(request):
    return request.param


def test_patches_equal_indexing(convolution):
    images = torch.randn(2, convolution.in_channels, 9, 7)
    expected = group_patches(convolution, images)
    torch.testing.assert_close(layer_vectors(convolution, images), expected, rtol=0, atol=0)


def test_patches_times_the_weight_are_the_output(convolution):
    images, groups = torch.randn(2, convolution.in_channels, 9, 7), convolution.groups
    vectors = layer_vectors(convolution, images).reshape(groups, -1, moment_shape(convolution)[-1])
    weights = convolution.weight.flatten(1).unflatten(0, (groups, -1))
    product = (vectors @ weights.mT).transpose(0, 1).flatten(1)
    expected = convolution(images) - convolution.bias[:, None, None]
    torch.testing.assert_close(product, expected.permute(0, 2, 3, 1).flatten(0, 2))


@pytest.mark.parametrize(
    "options", [{"padding": "same"}, {"padding": 2, "padding_mode": "circular"}], ids=str
)
def test_other_paddings_are_followed(options):
    convolution, images = nn.Conv2d(3, 4, 3, bias=False, **options), torch.randn(2, 3, 9, 7)
    product = layer_vectors(convolution, images) @ convolution.weight.flatten(1).T
    expected = convolution(images).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(product, expected)


def test_vectors_of_a_linear_layer_are_all_its_inputs():
    inputs = torch.randn(2, 5, 3)
    found = layer_vectors(nn.Linear(3, 4), inputs)
    torch.testing.assert_close(found, inputs.flatten(0, 1), rtol=0, atol=0)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 3 * 2, 4),
        nn.ReLU(),
        nn.Linear(4, 2),
    ).double()


class Sequences(nn.Module):
    """Linear layers on inputs [row, place, feature], whose outputs are averaged."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, inputs):
        return self.second(torch.tanh(self.first(inputs))).mean(1)


def grouped():
    return nn.Sequential(
        nn.Conv2d(4, 6, (2, 3), groups=2, dilation=(2, 1)),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6, padding=1),
        nn.Flatten(),
        nn.Linear(6 * 5 * 4, 2),
    ).double()


MODELS = {
    "convolutions": (convolutional, (2, 7, 6)),
    "groups": (grouped, (4, 7, 6)),
    "sequences": (lambda: Sequences().double(), (4, 3)),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def case(request):
    """A model in float64 and more rows than one batch of the moments takes."""
    make, shape = request.param
    return make(), torch.randn(11, *shape, dtype=torch.float64)


def row_gradients(model, inputs):
    """Gradient of the first output of each row, [row, ...] by name."""

    def first_output(state, row):
        return functional_call(model, state, (row[None],))[0, 0]

    return vmap(grad(first_output), in_dims=(None, 0))(dict(model.named_parameters()), inputs)


def test_gradients_of_a_row_lie_in_the_span_of_its_vectors(case):
    model, inputs = case
    gradients = row_gradients(model, inputs)
    assert all(gradient.any() for gradient in gradients.values())
    for row in range(len(inputs)):
        found = input_moments(model, model.state_dict(), inputs[row : row + 1])
        for name, moment in found.items():
            own = moment.reshape(-1, *moment.shape[-2:])
            weights = gradients[f"{name}.weight"][row].flatten(1).unflatten(0, (len(own), -1))
            for group, gradient in zip(own, weights, strict=True):
                values, vectors = torch.linalg.eigh(group)
                outside = gradient @ vectors[:, values < 1e-12 * values[-1]]
                torch.testing.assert_close(outside, torch.zeros_like(outside))


def test_moments_are_sums_over_the_layers_inputs(case, monkeypatch):
    model, inputs = case
    seen = {}
    for name, layer in layers(model).items():
        layer.register_forward_pre_hook(
            lambda layer, given, name=name: seen.update({name: layer_vectors(layer, given[0])})
        )
    evaluate(model, model.state_dict(), inputs)
    expected = {name: vectors.mT @ vectors for name, vectors in seen.items()}
    for rows in (3, 11, 256):
        monkeypatch.setattr(moments, "ROWS_AT_ONCE", rows)
        found = input_moments(model, model.state_dict(), inputs)
        assert list(found) == list(expected)
        for name, moment in expected.items():
            torch.testing.assert_close(found[name], moment, rtol=0, atol=1e-12)


def test_moments_are_taken_in_eval_mode_and_change_nothing():
    model, inputs = normalised_mlp().train(), torch.randn(11, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = input_moments(model, model.state_dict(), inputs)
    hidden = model[:3].eval()(inputs).double()
    torch.testing.assert_close(found["3"], hidden.T @ hidden)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_models_without_layers_are_refused():
    with pytest.raises(ValueError, match="the model has no Linear or Conv2d layer"):
        layers(nn.Sequential(nn.ReLU()))


@pytest.fixture(scope="module")
def task():
    return blobs()


@pytest.fixture(scope="module")
def full(task, tmp_path_factory):
    subsets = draw_subsets(task, models=3, design="full", seed=1)
    to = tmp_path_factory.mktemp("runs") / "full"
    return train_models(task, subsets, to, keep="weights", workers=0)


@pytest.fixture(scope="module")
def stored(full, tmp_path_factory):
    return compute_moments(full, tmp_path_factory.mktemp("runs") / "moments")


def test_stored_moments_are_those_of_each_model(task, full, stored):
    inputs, _ = task.rows("train", range(37))
    found = stored.layers([2, 0])
    for place, index in enumerate([2, 0]):
        expected = input_moments(task.new_model(0), full.model(index).state, inputs)
        assert list(found) == list(expected) == ["0", "2"]
        for name in expected:
            torch.testing.assert_close(found[name][place], expected[name])


def test_moments_of_groups_are_stored(tmp_path):
    data = TensorDataset(torch.randn(11, 4, 7, 6), torch.arange(11) % 2)
    make = lambda: grouped().float()  # noqa: E731
    task = Task("grouped", data, data, make, recipe=RECIPE, test_ids=list("abcdefghijk"))
    subsets = draw_subsets(task, models=2, design="full")
    full = train_models(task, subsets, tmp_path / "full", keep="weights", workers=0)
    found = compute_moments(full, tmp_path / "moments").layers([1])
    assert [found[name].shape[1:] for name in found] == [(2, 12, 12), (6, 9, 9), (120, 120)]
    expected = input_moments(
        task.new_model(0), full.model(1).state, task.rows("train", range(11))[0]
    )
    for name in expected:
        torch.testing.assert_close(found[name][0], expected[name])


def test_models_are_found_by_their_digest(task, full, stored):
    assert [stored.find_digest(full.model(i).digest()) for i in (2, 0, 1)] == [2, 0, 1]
    with pytest.raises(ValueError, match=r"moments holds no input moments of this model: compute"):
        stored.find_digest("0" * 64)


def test_accuracies_are_those_on_the_test_rows(task, full, stored):
    _, labels = task.targets()
    right = full.outputs[:, 37:].argmax(-1) == labels[37:].numpy()
    np.testing.assert_allclose(stored.accuracy([2, 1]), right.mean(1)[[2, 1]])


def test_finished_moments_are_opened(full, stored, monkeypatch):
    monkeypatch.setattr(moments, "input_moments", None)
    again = compute_moments(full, stored.store.path)
    torch.testing.assert_close(again.layers([1]), stored.layers([1]), rtol=0, atol=0)


def test_moments_of_other_models_are_refused(task, full, stored, tmp_path):
    subsets = draw_subsets(task, models=3, design="full", seed=2)
    other = train_models(task, subsets, tmp_path / "other", keep="weights", workers=0)
    with pytest.raises(ValueError, match=r"ensemble\.seed: stored 1, wanted 2"):
        compute_moments(other, stored.store.path)


def test_moments_need_weights(task, tmp_path):
    subsets = draw_subsets(task, models=1, design="full")
    lean = train_models(task, subsets, tmp_path / "lean", workers=0)
    with pytest.raises(ValueError, match="lean kept no weights"):
        compute_moments(lean, tmp_path / "moments")


def test_unfinished_moments_are_refused(stored, tmp_path):
    Store.create(tmp_path / "moments", stored.store.spec, stored.store.provenance)
    with pytest.raises(ValueError, match="moments is not finished: run the command"):
        Moments.open(tmp_path / "moments")
