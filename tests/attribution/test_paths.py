"""Which way a model is computed, and that the ways agree."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from attribution.descent import SGD, Batch, Descent
from attribution.outputs import evaluate
from attribution.paths import at_once, multiplications, pays_at_once, takes_channels_last


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


class InPlace(nn.Sequential):
    """Normalises what it is given where it lies."""

    def forward(self, inputs):
        return super().forward(inputs.sub_(1.0).div_(2.0))


class ViewingInTraining(Viewing):
    """Views its activations in train mode alone."""

    def forward(self, inputs):
        return super().forward(inputs) if self.training else self[1](self[0](inputs).flatten(1))


class Uncopyable(nn.Sequential):
    """Keeps what cannot be copied."""

    def forward(self, inputs):
        self.latest = super().forward(inputs)
        return self.latest


def grey():
    return InPlace(nn.Conv2d(1, 5, 3), nn.Flatten(), nn.Linear(80, 2))


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
    assert takes_channels_last(module, inputs, training=False, backward=True) == taken


def test_train_mode_is_asked_for_by_itself():
    module = ViewingInTraining(nn.Conv2d(3, 5, 3), nn.Linear(80, 2))
    assert takes_channels_last(module, images(), training=False, backward=True)
    assert not takes_channels_last(module, images(), training=True, backward=True)
    batch = Batch(images(), torch.zeros(7), torch.full((7,), 1 / 7), torch.zeros(7, 2))
    how = {"many": False, "training": True}
    Descent(module, module.state_dict(), lambda o, y, t: o - t, SGD(), **how).step(batch, 0.1)


def test_asking_writes_into_no_row():
    module, inputs = grey(), images()[:, :1].contiguous()
    with torch.no_grad():
        expected = module(inputs.clone())
    found = evaluate(module, module.state_dict(), inputs.clone())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_cannot_be_copied_is_computed_as_it_is():
    module = Uncopyable(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(80, 2))
    module(images())  # what it keeps has a graph, which cannot be copied
    assert not takes_channels_last(module, images(), training=False, backward=False)
    found = evaluate(module, module.state_dict(), images())
    torch.testing.assert_close(found, plainly(module, images()), rtol=1e-5, atol=1e-6)


def test_asking_changes_nothing():
    module = convolving().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    takes_channels_last(module, images(), training=True, backward=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_hooks_see_no_other_rows():
    module, seen = convolving(), []
    module[0].register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    module[0].register_forward_hook(lambda _, given, outputs: seen.append(len(outputs)))
    module.register_full_backward_pre_hook(lambda _, slopes: seen.append("backward"))
    takes_channels_last(module, images(), training=True, backward=True)
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


@pytest.mark.parametrize(
    ("size", "device", "pays"), [(8, "cpu", True), (64, "cpu", False), (64, "cuda", True)]
)
def test_large_convolutions_are_computed_one_by_one_on_the_cpu(size, device, pays):
    module = nn.Sequential(nn.Conv2d(3, 9, 3), nn.Flatten())
    inputs = torch.zeros(2, 3, size, size)
    assert multiplications(module, inputs) == 27 * 9 * (size - 2) ** 2
    assert pays_at_once(module, inputs, device) == pays
    assert at_once(module, inputs, device, training=True) == pays


def test_many_at_once_only_where_it_can_be():
    assert at_once(nn.Linear(3, 2), torch.zeros(2, 3), "cpu", training=True)
    assert not at_once(nn.BatchNorm1d(3), torch.zeros(2, 3), "cpu", training=True)
