import pytest
import torch
from torch import nn

from attribution.gradients import Projection, gradient_projector
from attribution.gradients.jacobian import Dense, Factored
from tests.attribution.gradients.models import CASES, Twice

PROJECTIONS = {
    "identity": Projection(inputs=1000, outputs=1000, features=10_000),
    "sides": Projection(inputs=3, outputs=2, features=1000, seed=3),
    "sides and sums": Projection(inputs=3, outputs=2, features=4, seed=4),
}
ROWS = 9


def network(outputs=4):
    return nn.Sequential(
        nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, outputs)
    )


def of_rows(projection, module=None, rows=ROWS):
    """A model on some rows, and directions of every output."""
    module = (module or network()).double()
    projector = gradient_projector(module, projection)
    width = next(module.parameters()).shape[1]
    inputs = torch.randn(rows, width, dtype=torch.float64)
    run = projector.linearise(module.state_dict(), inputs)
    every = torch.eye(run.outputs.shape[1], dtype=torch.float64).expand(rows, -1, -1)
    return run, every


@pytest.mark.parametrize("projection", PROJECTIONS.values(), ids=PROJECTIONS.keys())
def test_factors_give_the_features(projection):
    run, every = of_rows(projection)
    rows = run.factor_rows(every)
    assert rows.shape == (ROWS, run.factors.size(4))
    torch.testing.assert_close(run.factors.dense(rows), run.features(every))


@pytest.mark.parametrize(
    "module", [network(), network(1), nn.Linear(3, 2)], ids=["many", "one", "head"]
)
@pytest.mark.parametrize("projection", PROJECTIONS.values(), ids=PROJECTIONS.keys())
def test_products_with_factors_are_those_of_the_features(projection, module):
    run, every = of_rows(projection, module)
    factored, dense = Factored(run.factors, run.factor_rows(every)), Dense(run.features(every))
    direction = torch.randn(run.projector.size, dtype=torch.float64)
    weights = torch.randn_like(run.outputs)
    expected = torch.einsum("rof,f->ro", dense.values, direction)
    torch.testing.assert_close(dense.times(direction), expected)
    torch.testing.assert_close(factored.times(direction), expected)
    expected = torch.einsum("rof,ro->f", dense.values, weights)
    torch.testing.assert_close(dense.pulled(weights), expected)
    torch.testing.assert_close(factored.pulled(weights), expected)


def frozen(module, *names):
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in names)
    return module


@pytest.mark.parametrize("names", [["0.weight"], ["0.bias", "4.bias"], ["2.weight", "2.bias"]])
def test_frozen_parameters_have_no_factors(names):
    run, every = of_rows(PROJECTIONS["sides and sums"], frozen(network(), *names))
    torch.testing.assert_close(run.factors.dense(run.factor_rows(every)), run.features(every))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_any_model_made_of_factors_has_the_same_features(case):
    module, inputs = case
    projector = gradient_projector(module, PROJECTIONS["sides and sums"])
    run = projector.linearise(module.state_dict(), inputs)
    every = torch.eye(run.outputs.shape[1]).expand(len(inputs), -1, -1)
    if run.factors is None:
        with pytest.raises(ValueError, match="its features cannot be kept as factors"):
            run.factor_rows(every)
    else:
        torch.testing.assert_close(run.factors.dense(run.factor_rows(every)), run.features(every))


class Skipped(nn.Module):
    """A layer that is called and has no part in the outputs."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        self.idle(x)
        return self.used(x)


def test_a_layer_without_a_part_in_the_outputs_is_zero():
    run, every = of_rows(PROJECTIONS["identity"], Skipped())
    torch.testing.assert_close(run.factors.dense(run.factor_rows(every)), run.features(every))
    assert not run.factors.dense(run.factor_rows(every))[..., 21:].any()


def models_without_factors():
    positions = nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Linear(3, 2), nn.Flatten(), nn.Linear(4, 2)
    )
    return {
        "several positions": positions,
        "called twice": Twice(),
        "normalised": nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
        "convolved": nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)
        ),
    }


@pytest.mark.parametrize("name", models_without_factors())
def test_only_linear_layers_with_one_position_are_made_of_factors(name):
    module = models_without_factors()[name]
    projector = gradient_projector(module, Projection())
    inputs = torch.randn(ROWS, 4 if name == "called twice" else 6)
    assert projector.linearise(module.state_dict(), inputs).factors is None
