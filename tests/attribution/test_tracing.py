import pytest
import torch
from torch.func import grad, vmap

from attribution.tracing import trace

ROWS, WIDTH = 5, 3


def nodes(traced):
    return [node.target for node in traced.graph.nodes if node.op == "call_function"]


FUNCTIONS = {
    "arithmetic": lambda x: torch.exp(x - x.amax(-1, keepdim=True)).sum(-1),
    "same shape": lambda x: 2 * x.view(ROWS, WIDTH).expand(ROWS, WIDTH),
    "other shape": lambda x: x.view(WIDTH, ROWS).expand(2, WIDTH, ROWS) * 2,
    "times one": lambda x: x * 1 + x * 1.0,
    "there and back": lambda x: x.transpose(0, 1).transpose(1, 0) + 1,
    "back by negative axes": lambda x: x.transpose(-1, 0).transpose(-2, 1) + 1,
    "transposed twice": lambda x: x.view(ROWS, 1, WIDTH).transpose(0, 1).transpose(1, 2) + 1,
    "a copy changed in place": lambda x: torch.ops.aten.mul.Scalar(x, 1).view(-1).relu_(),
    "in place": lambda x: (2 * x).relu_().mul_(3),
    "in place, unused": lambda x: add_in_place(2 * x),
    "per row": vmap(grad(lambda row: (row.sin() ** 2).sum())),
}


def add_in_place(x):
    x.view(-1).add_(1)
    return x


@pytest.fixture(params=FUNCTIONS.values(), ids=FUNCTIONS.keys())
def function(request):
    return request.param


def test_replaying_equals_running(function):
    traced = trace(function, torch.randn(ROWS, WIDTH))
    for _ in range(2):
        x = torch.randn(ROWS, WIDTH)
        before, expected = x.clone(), function(x.clone())
        torch.testing.assert_close(traced(x), expected)
        torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_kernels_that_change_nothing_are_left_out():
    x = torch.randn(ROWS, WIDTH)
    assert nodes(trace(FUNCTIONS["same shape"], x)) == [torch.Tensor.mul]
    assert nodes(trace(FUNCTIONS["there and back"], x)) == [torch.Tensor.add]


def test_whole_numbers_times_one_point_nought_become_fractions():
    numbers = torch.arange(6)
    traced = trace(lambda x: torch.ops.aten.mul.Scalar(x, 1.0), numbers)
    torch.testing.assert_close(traced(numbers), numbers * 1.0)


def test_dicts_and_tuples_are_taken():
    def function(state, parts):
        return {"sum": state["a"] + parts[0], "product": state["b"] * parts[1]}

    values = {"a": torch.randn(2), "b": torch.randn(2)}, (torch.randn(2), torch.randn(2))
    traced = trace(function, *values)
    other = {name: 2 * tensor for name, tensor in values[0].items()}
    torch.testing.assert_close(traced(other, values[1]), function(other, values[1]))
