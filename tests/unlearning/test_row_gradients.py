"""Gradients by parameter against autograd, row by row."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from attribution import BinaryCrossEntropy, CrossEntropy, SquaredError
from tests.unlearning.cases import blob_data, branching, mlp, normalised
from unlearning import row_gradients
from unlearning.row_gradients import mean_gradient, mean_squared_gradients


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.last = nn.Linear(5, 3)
        self.last.bias.requires_grad_(False)

    def forward(self, inputs):
        return self.last(self.second(self.first(inputs).tanh()))


def one_logit():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))


CASES = {
    "many": (mlp, CrossEntropy()),
    "normalised": (normalised, CrossEntropy()),
    "one by one": (branching, CrossEntropy()),
    "shared": (Tied, CrossEntropy()),
    "one logit": (one_logit, BinaryCrossEntropy()),
    "regression": (one_logit, SquaredError()),
}


@pytest.fixture(params=CASES, autouse=True)
def case(request, monkeypatch):
    """Eleven rows in pieces of four."""
    monkeypatch.setattr(row_gradients, "ROWS_AT_ONCE", 4)
    make, loss = CASES[request.param]
    torch.manual_seed(0)
    module = make().double().eval()
    inputs, labels = blob_data(11, 5).tensors
    labels = labels if isinstance(loss, CrossEntropy) else (labels > 0).double()
    return module, loss, inputs.double(), labels


def row_losses(module, loss, inputs, labels):
    outputs = module(inputs)
    if isinstance(loss, CrossEntropy):
        return functional.cross_entropy(outputs, labels, reduction="none")
    if isinstance(loss, BinaryCrossEntropy):
        return functional.binary_cross_entropy_with_logits(outputs[:, 0], labels, reduction="none")
    return (outputs[:, 0] - labels).square() / 2


def trainable(module):
    return {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}


def test_the_mean_gradient_is_autograds(case):
    module = case[0]
    held = trainable(module)
    expected = torch.autograd.grad(row_losses(*case).mean(), list(held.values()))
    found = mean_gradient(*case)
    assert list(found) == list(held)
    for gradient, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("numbers", [1, 200])
def test_large_models_take_fewer_rows_at_once(case, monkeypatch, numbers):
    expected = mean_squared_gradients(*case)
    monkeypatch.setattr(row_gradients, "NUMBERS_AT_ONCE", numbers)
    for name, square in mean_squared_gradients(*case).items():
        torch.testing.assert_close(square, expected[name], rtol=1e-9, atol=1e-12)


def test_the_squares_are_those_of_each_rows_own_gradient(case):
    module = case[0]
    held = trainable(module)
    losses = row_losses(*case)
    each = [torch.autograd.grad(x, list(held.values()), retain_graph=True) for x in losses]
    found = mean_squared_gradients(*case)
    assert list(found) == list(held)
    for i, square in enumerate(found.values()):
        expected = torch.stack([gradients[i].square() for gradients in each]).mean(0)
        torch.testing.assert_close(square, expected, rtol=1e-9, atol=1e-12)
