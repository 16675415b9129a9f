import copy

import pytest
import torch
from torch import nn

from attribution.gradients import Projection, gradient_projector
from tests.attribution.gradients.models import CASES, Twice, mlp
from tests.gradient_references import gradients_of_rows, projected_gradients

PROJECTIONS = {
    "small": Projection(inputs=5, outputs=3, features=4, seed=1),
    "wide": Projection(inputs=8, outputs=2, features=7, seed=2),
    "identity": Projection(inputs=1000, outputs=1000, features=10_000),
}
SMALL = PROJECTIONS["small"]


def cast(case, dtype):
    module, inputs = case
    module = copy.deepcopy(module).to(dtype)
    return module, inputs.to(dtype) if inputs.is_floating_point() else inputs


def directions(module, inputs, count=2):
    outputs = module.eval()(inputs)
    return torch.randn(len(inputs), count, outputs.shape[1], dtype=outputs.dtype)


def assert_close(found, expected, tolerance):
    """Relative to the norm of each row's features, all blocks together."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < tolerance, f"relative error {error.max():.2g}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("projection", PROJECTIONS.values(), ids=PROJECTIONS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_features_are_projected_gradients_in_full(case, projection, dtype):
    module, inputs = cast(case, dtype)
    projector = gradient_projector(module, projection)
    cotangents = directions(module, inputs)
    found = projector.features(module.state_dict(), inputs, cotangents)
    gradients = gradients_of_rows(module, module.state_dict(), inputs)
    expected = cotangents @ projected_gradients(projector, gradients)
    assert found.shape == (len(inputs), 2, projector.size)
    assert_close(found, expected, 1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("projection", PROJECTIONS.values(), ids=PROJECTIONS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_adjoint_is_the_transpose(case, projection):
    module, inputs = cast(case, torch.float64)
    projector, state = gradient_projector(module, projection), module.state_dict()
    cotangents = directions(module, inputs)
    features = projector.features(state, inputs, cotangents)
    vector = torch.randn(projector.size, dtype=torch.float64)
    back = projector.adjoint(vector)
    gradients = gradients_of_rows(module, state, inputs)
    products = sum((gradients[name] * back[name]).flatten(2).sum(2) for name in gradients)
    expected = (cotangents * products[:, None]).sum(2)
    assert_close(features @ vector, expected, 1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_adjoint_has_the_names_and_shapes_of_the_trainable_parameters(case):
    module, _ = case
    named = dict(module.named_parameters(remove_duplicate=False))
    found = gradient_projector(module, SMALL).adjoint(
        torch.ones(gradient_projector(module, SMALL).size)
    )
    expected = {name: value.shape for name, value in named.items() if value.requires_grad}
    assert {name: value.shape for name, value in found.items()} == expected


def test_tied_parameters_get_one_direction_under_both_names():
    module, _ = CASES["tied embedding"]
    projector = gradient_projector(module, SMALL)
    found = projector.adjoint(torch.randn(projector.size))
    assert torch.equal(found["words.weight"], found["head.weight"])


def test_the_projection_keeps_inner_products_in_the_mean():
    module, inputs = cast(CASES["Linear"], torch.float64)
    state, one = module.state_dict(), directions(module, inputs, 1)
    whole = PROJECTIONS["identity"]
    full = gradient_projector(module, whole).features(state, inputs, one)[:, 0]
    mean = torch.zeros(len(inputs), len(inputs), dtype=torch.float64)
    for seed in range(400):
        projection = Projection(inputs=4, outputs=2, features=4, seed=seed)
        found = gradient_projector(module, projection).features(state, inputs, one)[:, 0]
        mean += found @ found.T / 400
    # Each product has a standard error of a few percent of the squared norms.
    error = (mean - full @ full.T).abs() / full.square().sum(1).outer(full.square().sum(1)).sqrt()
    assert error.max() < 0.2


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_features_do_not_depend_on_the_batch(rows):
    for name in ("plain", "groups", "layer used twice", "attention", "BatchNorm2d"):
        module, inputs = CASES[name]
        projector, state = gradient_projector(module, SMALL), module.state_dict()
        cotangents = directions(module, inputs)
        whole = projector.features(state, inputs, cotangents)
        pairs = zip(inputs.split(rows), cotangents.split(rows), strict=True)
        pieces = torch.cat([projector.features(state, *pair) for pair in pairs])
        # Kernels sum in another order at another size.
        assert_close(pieces, whole, 1e-5)


def test_directions_are_independent_of_each_other():
    module, inputs = CASES["plain"]
    projector, state = gradient_projector(module, SMALL), module.state_dict()
    cotangents = directions(module, inputs, 4)
    together = projector.features(state, inputs, cotangents)
    alone = [projector.features(state, inputs, cotangents[:, i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=0, atol=0)


def test_cotangents_may_be_a_function_of_the_outputs():
    module, inputs = CASES["Linear"]
    projector, state = gradient_projector(module, SMALL), module.state_dict()
    outputs = module.eval()(inputs).detach()
    found = projector.features(state, inputs, lambda given: 2 * given[:, None])
    expected = projector.features(state, inputs, 2 * outputs[:, None])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_one_forward_pass_serves_many_directions():
    module, inputs = CASES["Embedding and a raw parameter"]
    projector, state = gradient_projector(module, SMALL), module.state_dict()
    run = projector.linearise(state, inputs)
    torch.testing.assert_close(run.outputs, module.eval()(inputs).detach())
    assert not run.outputs.requires_grad
    for _ in range(2):
        cotangents = directions(module, inputs)
        found = run.features(cotangents)
        expected = projector.features(state, inputs, cotangents)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert not found.requires_grad


def test_the_state_given_is_used_and_nothing_of_the_module_changes():
    module, inputs = CASES["BatchNorm2d"]
    module = copy.deepcopy(module).train()
    module.layer.eval()
    module.layer.weight.grad = torch.ones_like(module.layer.weight)
    other = {name: value + 1 for name, value in module.state_dict().items()}
    before = copy.deepcopy(module.state_dict())
    modes = [part.training for part in module.modules()]
    given = {name: value.clone() for name, value in other.items()}
    projector = gradient_projector(module, SMALL)
    cotangents = torch.randn(len(inputs), 1, 3)
    found = projector.features(other, inputs, cotangents)
    expected = cotangents @ projected_gradients(projector, gradients_of_rows(module, other, inputs))
    assert_close(found, expected, 1e-4)
    for after, known in ((module.state_dict(), before), (other, given)):
        for name, value in known.items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    assert [part.training for part in module.modules()] == modes
    assert not any(part._forward_hooks for part in module.modules())
    assert all(not value.requires_grad for value in other.values())
    torch.testing.assert_close(module.layer.weight.grad, torch.ones(4))


def test_gradients_need_not_be_switched_on():
    module, inputs = CASES["plain"]
    projector, cotangents = gradient_projector(module, SMALL), directions(module, inputs)
    expected = projector.features(module.state_dict(), inputs, cotangents)
    with torch.no_grad():
        found = projector.features(module.state_dict(), inputs, cotangents)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_sizes_are_those_of_the_sides():
    module = Twice()
    assert gradient_projector(module, Projection(inputs=6, outputs=4)).size == 5 * 4 + 6 * 4 + 6 * 3
    assert gradient_projector(mlp(), Projection()).size == 8 * 9 + 10 * 3


def test_no_layer_has_more_features_than_asked_for():
    many = nn.Sequential(nn.Conv2d(32, 64, 3, groups=32), nn.Flatten())
    assert gradient_projector(many, Projection(inputs=8, outputs=8, features=64)).size == 64
    assert gradient_projector(mlp(), Projection(features=50)).size == 50 + 10 * 3


@pytest.mark.parametrize("name", ["plain", "attention", "BatchNorm2d", "Linear over positions"])
def test_no_rows_have_no_features(name):
    module, inputs = CASES[name]
    projector = gradient_projector(module, SMALL)
    cotangents = directions(module, inputs)[:0]
    found = projector.features(module.state_dict(), inputs[:0], cotangents)
    assert found.shape == (0, 2, projector.size)


def test_wrong_shapes_are_refused():
    module, inputs = CASES["Linear"]
    projector, state = gradient_projector(module, SMALL), module.state_dict()
    with pytest.raises(
        ValueError, match=r"expected cotangents \[row, direction, output\].*\(5, 3\)"
    ):
        projector.features(state, inputs, torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"outputs of shape \(5, 3\), got shape \(4, 1, 3\)"):
        projector.features(state, inputs, torch.zeros(4, 1, 3))
    with pytest.raises(ValueError, match=rf"expected {projector.size} features, got shape \(2,\)"):
        projector.adjoint(torch.zeros(2))
