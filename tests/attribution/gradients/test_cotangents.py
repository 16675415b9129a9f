import pytest
import torch

from attribution import CrossEntropy, SquaredError
from attribution.gradients import output_cotangents

CASES = {
    "cross-entropy": (CrossEntropy(), torch.randint(4, (6,)), 4),
    "squared error": (SquaredError(), torch.randn(6), 1),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    loss, labels, width = request.param
    return loss, torch.randn(6, width, dtype=torch.float64), labels


def by_autograd(function, outputs, labels):
    free = outputs.clone().requires_grad_()
    return torch.autograd.grad(function(free, labels).sum(), free)[0][:, None]


def test_of_the_loss(case):
    loss, outputs, labels = case
    found = output_cotangents(loss, outputs, labels, "loss")
    torch.testing.assert_close(found, by_autograd(loss.value, outputs, labels))


@pytest.mark.parametrize("gradients", [True, False])
def test_of_the_margin(case, gradients):
    loss, outputs, labels = case
    with torch.set_grad_enabled(gradients):
        found = output_cotangents(loss, outputs, labels, "margin")
    torch.testing.assert_close(found, by_autograd(loss.margin, outputs, labels))
    assert not found.requires_grad


def test_of_every_output(case):
    loss, outputs, labels = case
    width = outputs.shape[1]
    found = output_cotangents(loss, outputs, labels, "outputs")
    assert found.dtype == outputs.dtype
    assert torch.equal(found, torch.eye(width, dtype=torch.float64).expand(6, -1, -1))


def test_anything_else_is_refused(case):
    with pytest.raises(ValueError, match="of must be 'outputs', 'loss' or 'margin', got 'margins'"):
        output_cotangents(*case, "margins")
