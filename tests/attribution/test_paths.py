"""Which way a model is computed, and that the ways agree."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from attribution.descent import SGD, Batch, Descent
from attribution.outputs import evaluate
from attribution.paths import at_once, pays_at_once, takes_channels_last


class Viewing(nn.Sequential):
    """Views the activations of its convolution in another shape, as many users' models do."""

    def forward(self, inputs):
        convolved = self[0](inputs)
        return self[1](convolved.view(len(inputs), -1))


def convolving():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 2))


def viewing():
    return Viewing(nn.Conv2d(3, 5, 3), nn.Linear(80, 2))


def images(rows=7):
    return torch.randn(rows, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def plainly(module, inputs):
    with torch.no_grad():
        return functional_call(module.eval(), module.state_dict(), (inputs,))


@pytest.mark.parametrize(
    ("module", "inputs", "taken"),
    [
        (convolving(), images(), True),
        (viewing(), images(), False),
        (convolving().requires_grad_(False), images(), False),
        (nn.Linear(3, 2), torch.zeros(2, 3), False),
        (nn.Flatten(), images(), False),
        (nn.Conv2d(3, 2, 1), images().to("meta"), False),
    ],
)
def test_channels_last_where_it_can_be_and_pays(module, inputs, taken):
    assert takes_channels_last(module, inputs) == taken


def test_asking_changes_nothing():
    module = convolving().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    takes_channels_last(module, images())
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_hooks_see_no_other_rows():
    module, seen = convolving(), []
    module[0].register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    module[0].register_forward_hook(lambda _, given, outputs: seen.append(len(outputs)))
    evaluate(module, module.state_dict(), images())
    assert seen == [7, 7]


@pytest.mark.parametrize("make", [convolving, viewing])
def test_outputs_are_those_of_the_plain_way(make):
    module = make()
    found = evaluate(module, module.state_dict(), images())
    torch.testing.assert_close(found, plainly(module, images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [convolving, viewing])
def test_steps_are_those_of_the_plain_way(make):
    module, weight = make().eval(), torch.full((7,), 1 / 7)
    batch = Batch(images(), torch.zeros(7), weight, torch.zeros(7, 2))
    descent = Descent(module, module.state_dict(), lambda o, y, t: o - t, SGD(), many=False)
    plain = [parameter.detach().clone() for parameter in module.parameters()]
    for _ in range(3):
        descent.step(batch, 0.1)
        named = dict(zip(dict(module.named_parameters()), plain, strict=True))
        for tensor in plain:
            tensor.requires_grad_()
        loss = functional_call(module, named, (images(),)).square().sum(1).mean() / 2
        with torch.no_grad():
            gradients = torch.autograd.grad(loss, plain)
            plain = [w - 0.1 * g for w, g in zip(plain, gradients, strict=True)]
    for found, expected in zip(descent.parameters.values(), plain, strict=True):
        assert found.is_contiguous()
        torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-6)


def test_many_at_once_where_it_pays():
    assert pays_at_once(viewing(), "cuda")
    assert not pays_at_once(viewing(), "cpu")
    assert not at_once(viewing(), images(2), "cpu", training=False)
    assert at_once(nn.Linear(3, 2), torch.zeros(2, 3), "cpu", training=True)
    assert not at_once(nn.BatchNorm1d(3), torch.zeros(2, 3), "cpu", training=True)
