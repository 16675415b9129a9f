import pytest
import torch
from torch import nn

from attribution.gradients import Projection, gradient_projector, others
from tests.attribution.gradients.models import CASES

SMALL = Projection(inputs=5, outputs=3, features=4)


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


class Branching(nn.Module):
    """Branches on values, so that rows cannot be taken together."""

    def __init__(self):
        super().__init__()
        self.gate, self.head = nn.Parameter(torch.ones(3)), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x * self.gate if x.sum() > 0 else x)


@pytest.mark.parametrize("size", [1, 200, 1_000])
def test_pieces_of_any_size_give_the_same(size, monkeypatch):
    module, inputs = CASES["attention"]
    projector, cotangents = gradient_projector(module, SMALL), torch.randn(5, 3, 2)
    expected = projector.features(module.state_dict(), inputs, cotangents)
    monkeypatch.setattr(others, "GRADIENT_BYTES", size * 4 * 3)
    found = projector.features(module.state_dict(), inputs, cotangents)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_parameters_that_cannot_be_differentiated_are_named():
    module, inputs = Recurrent(nn.GRU(3, 4, batch_first=True)), torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match=r"'layer\.weight_ih_l0', .*torch\.func cannot.*freeze"):
        gradient_projector(module, SMALL).features(module.state_dict(), inputs, torch.ones(2, 1, 2))
    module.layer.requires_grad_(False)
    projector = gradient_projector(module, SMALL)
    assert projector.features(module.state_dict(), inputs, torch.ones(2, 1, 2)).any()


def test_models_that_branch_on_values_are_refused():
    module = Branching()
    with pytest.raises(ValueError, match="no per-example gradient of 'gate'"):
        gradient_projector(module, SMALL).features(
            module.state_dict(), torch.ones(2, 3), torch.ones(2, 1, 2)
        )
