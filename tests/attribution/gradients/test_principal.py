"""Moments of the two sides of layers, their eigenvectors, and which products are kept."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from attribution import Model
from attribution.gradients import Directions, Projection, gradient_projector, principal
from attribution.gradients.capture import capture
from attribution.gradients.convolution import CONVOLUTIONS
from attribution.gradients.principal import (
    SideMoments,
    kept_directions,
    layer_moments,
    principal_directions,
    root_vectors,
)
from attribution.losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from tests.attribution.gradients.models import CASES
from tests.attribution.gradients.stored import checkpoint
from tests.gradient_references import gradients_of_rows, projected_gradients, second_moments
from tests.tasks import blobs

LAYERS = ("plain", "without bias", "stride", "padding", "dilation", "groups", "depthwise")
LAYERS += ("Linear", "Linear without bias", "Linear over positions", "layer used twice")
LAYERS += ("BatchNorm2d",)


@pytest.fixture(scope="module")
def task():
    return blobs()


@pytest.fixture(scope="module")
def model(task):
    return checkpoint(task, 0)


CONVOLVING = [
    name
    for name, (module, _) in CASES.items()
    if type(getattr(module, "layer", None)) in CONVOLUTIONS and module.layer.weight.requires_grad
]
EVERYTHING = Projection(1000, 1000, principal=10_000)


def few(features):
    return Projection(principal=features)


def random():
    return np.random.default_rng(0)


def case(name):
    module, inputs = CASES[name]
    return copy.deepcopy(module).double(), inputs.double()


def moments(module, inputs, loss=CrossEntropy()):
    return layer_moments(module, [module.state_dict()], inputs, loss, random())


def of_values(outputs, inputs, positions=1):
    """Moments whose eigenvectors are the axes."""
    sides = (
        torch.diag_embed(torch.tensor(side, dtype=torch.float64)) for side in (outputs, inputs)
    )
    return SideMoments(*sides, torch.tensor(positions))


@pytest.mark.parametrize("at_once", [2, 32])
@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_those_of_every_row_by_itself(monkeypatch, name, at_once):
    monkeypatch.setattr(principal, "ROWS_AT_ONCE", at_once)
    module, inputs = case(name)
    found, expected = moments(module, inputs), second_moments(module, inputs, CrossEntropy())
    assert found.keys() == expected.keys()
    for layer, (outputs, given, positions) in expected.items():
        torch.testing.assert_close(found[layer].outputs, outputs, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[layer].inputs, given, rtol=1e-9, atol=1e-12)
        assert found[layer].positions == positions


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Embedding with padding", {"mix", "head"}),
        ("Conv3d", {"head"}),
        ("parametrised weights", set()),
        ("attention", {"encoder.linear1", "encoder.linear2", "head"}),
    ],
)
def test_layers_without_two_sides_have_none(name, expected):
    assert set(moments(*CASES[name])) == expected


def test_a_layer_whose_outputs_are_not_used_keeps_one_product():
    module, inputs = CASES["views and unused outputs"]
    found = moments(module, inputs)
    assert not found["unused"].outputs.any()
    assert len(kept_directions(found, few(3))["unused"].kept) == 1


def test_a_layer_with_a_frozen_weight_has_those_of_its_bias():
    module, inputs = CASES["frozen weight of a convolution"]
    found = moments(module, inputs)["layer"]
    assert found.inputs.shape == (2, 1, 1)
    assert (found.inputs == found.positions).all()


def test_layers_that_share_parameters_share_moments():
    module, inputs = case("tied layers")
    found, apart = moments(module, inputs), second_moments(module, inputs, CrossEntropy())
    assert set(found) == {"a", "head"}
    torch.testing.assert_close(found["a"].inputs, apart["a"][1] + apart["b"][1])


def test_a_side_that_is_too_wide_is_left_to_random_directions(monkeypatch):
    monkeypatch.setattr(principal, "WIDEST", 9)
    module, inputs = CASES["Linear"]  # sides of 9 and 8, then of 3 and 10
    assert set(moments(module, inputs)) == {"0"}


@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError(), BinaryCrossEntropy()], ids=str)
def test_root_vectors_have_the_hessian_as_second_moment(loss):
    outputs = torch.randn(5, 1 if isinstance(loss, BinaryCrossEntropy) else 4, dtype=torch.float64)
    found = root_vectors(loss, outputs, random())
    torch.testing.assert_close(found.mT @ found, loss.hessian(outputs))


def test_mixtures_do_not_depend_on_the_signs_of_eigenvectors(monkeypatch):
    outputs, decompose = torch.randn(3, 40, dtype=torch.float64), torch.linalg.eigh
    expected = root_vectors(CrossEntropy(), outputs, random())

    def turned(matrices):
        values, vectors = decompose(matrices)
        return values, vectors * (2 * torch.randint(2, values.shape) - 1).unsqueeze(1)

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    torch.testing.assert_close(root_vectors(CrossEntropy(), outputs, random()), expected)


def test_many_outputs_are_mixed_at_random():
    outputs = torch.randn(1, 40, dtype=torch.float64).expand(1000, -1)
    found = root_vectors(CrossEntropy(), outputs, random())
    assert found.shape == (1000, principal.VECTORS, 40)
    mean, expected = (found.mT @ found).mean(0), CrossEntropy().hessian(outputs[:1])[0]
    assert (mean - expected).norm() < 0.05 * expected.norm()


def test_the_products_with_the_largest_curvature_are_kept():
    found = kept_directions(
        {
            "a": of_values([[1.0, 6.0]], [[2.0, 1.0, 0.1]], positions=2),  # 1 .5 .05, 6 3 .3
            "b": of_values([[4.0]], [[1.0, 5.0]]),  # 4 20
        },
        few(2),
    )
    # 20, 6, 4 and 3, each layer's largest eigenvalue first.
    np.testing.assert_array_equal(found["a"].outputs.abs(), [[[0, 1]]])
    np.testing.assert_array_equal(found["a"].inputs.abs(), [[[1, 0, 0], [0, 1, 0]]])
    assert found["a"].kept.tolist() == [0, 1]
    np.testing.assert_array_equal(found["b"].inputs.abs(), [[[0, 1], [1, 0]]])
    assert found["b"].kept.tolist() == [0, 1]


def test_every_layer_keeps_one_and_no_layer_more_than_it_has():
    large, small = of_values([[9.0, 8.0]], [[9.0, 8.0]]), of_values([[1e-9]], [[1.0, 0.0]])
    found = kept_directions({"large": large, "small": small}, few(1))
    assert [found[name].kept.tolist() for name in found] == [[0], [0]]
    found = kept_directions({"large": large, "small": small}, few(100))
    assert [found[name].kept.tolist() for name in found] == [[0, 1, 2, 3], [0, 1]]


def test_the_sides_bound_how_many_directions_there_are():
    part = of_values([[4.0, 3.0, 2.0]], [[1.0, 0.1, 0.01, 0.001]])
    found = kept_directions({"a": part}, Projection(inputs=2, outputs=1, principal=10))["a"]
    assert (found.outputs.shape, found.inputs.shape) == ((1, 1, 3), (1, 2, 4))
    assert found.kept.tolist() == [0, 1]


def test_groups_compete_like_layers():
    found = kept_directions(
        {"a": of_values([[1.0, 2.0], [5.0, 4.0]], [[1.0, 0.0], [1.0, 0.5]])}, few(3)
    )
    # 1 0 and 2 0 in the first group; 5 2.5 and 4 2 in the second.
    assert found["a"].outputs.shape == (2, 2, 2)
    assert found["a"].inputs.shape == (2, 2, 2)
    assert found["a"].kept.tolist() == [4, 5, 6]


def test_outputs_that_are_not_finite_are_refused(task, model):
    state = {name: value * float("nan") for name, value in model.state.items()}
    with pytest.raises(ValueError, match=r"^outputs are not finite .* whose training diverged$"):
        principal_directions(task, [model, Model(task, state)], few(3))


def test_a_model_without_such_layers_has_none(task):
    assert kept_directions({}, few(3)) == {}


def every_output(module, inputs):
    count = module.eval()(inputs).shape[1]
    return torch.eye(count, dtype=torch.float64).expand(len(inputs), -1, -1)


@pytest.mark.parametrize("features", [1, 20])
@pytest.mark.parametrize("name", [*LAYERS, "Embedding and a raw parameter", "tied layers"])
def test_features_are_gradients_along_the_directions(name, features):
    module, inputs = CASES[name]
    kept = kept_directions(moments(module, inputs), few(features))
    module, state = copy.deepcopy(module).double(), copy.deepcopy(module).double().state_dict()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    projector = gradient_projector(module, Projection(features=4, principal=features), 0, kept)
    found = projector.features(state, inputs, every_output(module, inputs))
    expected = projected_gradients(projector, gradients_of_rows(module, state, inputs))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    vector = torch.randn(projector.size, dtype=torch.float64)
    back = projector.adjoint(vector)
    gradients = gradients_of_rows(module, state, inputs)
    products = sum((gradients[name] * back[name]).flatten(2).sum(2) for name in gradients)
    torch.testing.assert_close(found @ vector, products, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["Linear", "groups", "layer used twice"])
def test_all_directions_together_only_turn_the_gradients(name):
    module, inputs = case(name)
    state, one = module.state_dict(), every_output(module, inputs)[:, :1]
    kept = kept_directions(moments(module, inputs), EVERYTHING)
    whole = gradient_projector(module, Projection(1000, 1000, 10_000))
    turned = gradient_projector(module, EVERYTHING, 0, kept)
    assert turned.size == whole.size
    found, expected = (each.features(state, inputs, one)[:, 0] for each in (turned, whole))
    torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=1e-5, atol=1e-6)


def test_more_of_the_curvature_is_kept_than_by_as_many_random_directions(task, model):
    inputs, _ = task.rows("train", np.arange(37))
    module = task.new_model(0)
    cotangents = root_vectors(task.loss, torch.from_numpy(model.outputs(range(37))), random())

    def curvature(projector):
        return float(projector.features(model.state, inputs, cotangents).square().sum())

    kept = principal_directions(task, [model], Projection(principal=6))
    found = gradient_projector(module, Projection(principal=6), 0, kept)
    drawn = gradient_projector(module, Projection(inputs=3, outputs=2))
    assert drawn.size == found.size == 12
    parts = drawn.features(model.state, inputs, cotangents).square()
    # Rows of random matrices are longer than 1, so that they keep lengths in the mean.
    longer = [
        math.prod(matrix.shape[-1] / matrix.shape[-2] for matrix in block.matrices)
        for block in drawn.plan.blocks
    ]
    pairs = zip(drawn.spans, longer, strict=True)
    at_random = sum(float(parts[..., span].sum()) / factor for span, factor in pairs)
    whole = curvature(gradient_projector(module, Projection(1000, 1000, 10_000)))
    assert at_random < 0.8 * whole < curvature(found) <= whole


@pytest.mark.parametrize("name", CONVOLVING)
def test_patches_are_what_a_convolution_multiplies_with_its_weight(name):
    module, inputs = CASES[name]
    plan = gradient_projector(module, principal.WHOLE).plan
    run = capture(module, plan, module.state_dict(), inputs)
    number = plan.layers["layer"]
    call = next(call for place, call in run.calls if place == number)
    block, layer = plan.blocks[number], module.layer
    patches = block.capture(call)
    weight = layer.weight.reshape(layer.groups, -1, layer.weight[0].numel())
    if layer.bias is not None:
        weight = torch.cat([weight, layer.bias.reshape(layer.groups, -1, 1)], 2)
    expected = layer(inputs)
    torch.testing.assert_close((weight @ patches).reshape(expected.shape), expected)


def test_directions_are_the_same_every_time_and_those_of_all_checkpoints_together(task, model):
    first, again = (principal_directions(task, [model], Projection(principal=5)) for _ in "ab")
    for name, layer in first.items():
        assert torch.equal(layer.inputs, again[name].inputs)
        assert torch.equal(layer.kept, again[name].kept)
    other = Model(task, task.new_model(3).state_dict())
    inputs, _ = task.rows("train", np.arange(37))
    states = [model.state, other.state]
    both = layer_moments(task.new_model(0), states, inputs, task.loss, random())
    apart = [layer_moments(task.new_model(0), [s], inputs, task.loss, random()) for s in states]
    for name, moments in both.items():
        sums = [sum(getattr(each[name], side) for each in apart) for side in vars(moments)]
        for found, expected in zip(vars(moments).values(), sums, strict=True):
            torch.testing.assert_close(found, expected)
    found = principal_directions(task, [model, other], Projection(principal=5))
    for name, layer in kept_directions(both, few(5)).items():
        assert torch.equal(layer.outputs, found[name].outputs)


def test_many_rows_are_sampled_evenly(monkeypatch, task, model):
    monkeypatch.setattr(principal, "ROWS", 5)
    inputs, _ = task.rows("train", np.array([0, 7, 14, 22, 29]))
    moments = layer_moments(task.new_model(0), [model.state], inputs, task.loss, random())
    found = principal_directions(task, [model], Projection(principal=5))
    for name, layer in kept_directions(moments, few(5)).items():
        assert torch.equal(layer.inputs, found[name].inputs)


def test_directions_must_be_given_where_they_are_asked_for_and_fit_the_model():
    one = Directions(torch.ones(1, 1, 3), torch.ones(1, 1, 5), torch.tensor([0]))
    with pytest.raises(ValueError, match="follow from a model and data: give those of principal_d"):
        gradient_projector(nn.Linear(4, 3), few(4))
    with pytest.raises(ValueError, match="and none with principal=0"):
        gradient_projector(nn.Linear(4, 3), Projection(), 0, {"": one})
    with pytest.raises(ValueError, match="directions of 'head', but the model has no such layer"):
        gradient_projector(nn.Linear(4, 3), few(4), 0, {"head": one})
    with pytest.raises(
        ValueError, match="1 groups with sides of 3 and 5, the layer has 1 with 3 and"
    ):
        gradient_projector(nn.Linear(2, 3), few(4), 0, {"": one})
    assert gradient_projector(nn.Linear(4, 3), few(4), 0, {"": one}).size == 1
