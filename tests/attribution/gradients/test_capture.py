import pytest
import torch
from torch import nn
from torch.nn import functional

from attribution.gradients import Projection, gradient_projector
from tests.attribution.gradients.models import CASES, mlp
from tests.gradient_references import gradients_of_rows, projected_gradients

SMALL = Projection(inputs=5, outputs=3, features=4)


class Forward(nn.Module):
    """Two layers and a forward pass of one's own."""

    def __init__(self, forward, dtype=torch.float64, **layers):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype)
        for name, layer in layers.items():
            setattr(self, name, layer.to(dtype))
        self.own = forward

    def forward(self, x):
        return self.own(self, x)


def features(module, inputs, projection=SMALL):
    projector = gradient_projector(module, projection)
    outputs = projector.linearise(module.state_dict(), inputs).outputs
    every = torch.eye(outputs.shape[1]).to(outputs).expand(len(inputs), -1, -1)
    return projector, projector.features(module.state_dict(), inputs, every)


def assert_right(module, inputs):
    projector, found = features(module, inputs)
    gradients = gradients_of_rows(module, module.state_dict(), inputs)
    expected = projected_gradients(projector, gradients)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.norm()))


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def turned(model, x):
    return model.b(model.a(x.transpose(0, 1)).mean(0))


def places(model, x):
    return model.b(x + model.words(torch.arange(x.shape[1])[:, None]).mean(1)[None, :, 0])


def by_hand(model, x):
    return model.b(functional.linear(torch.relu(model.a(x)), model.a.weight))


def instead(model, x):
    model.a(x)
    return model.b(functional.linear(x, model.a.weight, model.a.bias))


def writing(model, x):
    hidden = torch.tanh(x)
    found = model.a(hidden)
    with torch.no_grad():
        hidden.mul_(2)
    return model.b(found)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_must_come_first(rows):
    module = Forward(turned)
    with pytest.raises(ValueError, match=rf"layer 'a' was given inputs of shape .* {rows} rows"):
        features(module, numbers(rows, 3, 4))


def test_inputs_that_all_rows_share_are_refused():
    module = Forward(places, words=nn.Embedding(4, 1))
    with pytest.raises(ValueError, match=r"layer 'words' .*\(4, 1\) for a batch of 3 rows"):
        features(module, numbers(3, 4))


@pytest.mark.parametrize(("forward", "text"), [(by_hand, "2 times"), (instead, "1 times")])
def test_parameters_used_outside_their_layer_are_refused(forward, text):
    with pytest.raises(ValueError, match=f"parameter 'a.weight' enters the outputs {text}.*freeze"):
        features(Forward(forward), numbers(3, 4))


def test_such_a_parameter_may_be_frozen():
    module = Forward(by_hand)
    module.a.weight.requires_grad_(False)
    assert_right(module, numbers(3, 4))


def test_inputs_that_are_written_into_later_are_refused():
    with pytest.raises(ValueError, match="inputs of layer 'a' are written into after its call"):
        features(Forward(writing), numbers(3, 4))


def test_outputs_must_be_one_row_each():
    with pytest.raises(ValueError, match=r"outputs \[row, output\], got shape \(3, 5, 2\)"):
        features(Forward(lambda model, x: model.b(model.a(x))), numbers(3, 5, 4))


def test_a_state_without_a_name_is_refused():
    module, inputs = mlp(), torch.randn(3, 7)
    state = {name: value for name, value in module.state_dict().items() if name != "3.bias"}
    with pytest.raises(ValueError, match=r"the state has no '3\.bias'"):
        gradient_projector(module, SMALL).linearise(state, inputs)


def test_a_state_that_parts_tied_parameters_is_refused():
    module, inputs = CASES["tied embedding"]
    state = module.state_dict() | {"head.weight": module.head.weight + 1}
    with pytest.raises(ValueError, match=r"'words\.weight' and 'head\.weight' are one parameter"):
        gradient_projector(module, SMALL).linearise(state, inputs)


def test_a_part_run_without_gradients_has_none():
    def half(model, x):
        with torch.no_grad():
            hidden = model.a(x)
        return model.b(torch.relu(hidden))

    module, inputs = Forward(half), numbers(3, 4)
    assert_right(module, inputs)
    projector, found = features(module, inputs)
    assert not found[..., projector.spans[0]].any()


def test_hooks_of_the_user_are_followed():
    module = Forward(lambda model, x: model.b(torch.relu_(model.a(x))))
    module.a.register_forward_pre_hook(lambda _, given: (3 * given[0],))
    module.a.register_forward_hook(lambda _, given, found: found * found)
    assert_right(module, numbers(3, 4))
    assert len(module.a._forward_hooks) == 1


def test_writing_into_the_outputs_of_a_layer_over_positions_is_followed():
    module = Forward(lambda model, x: model.b(model.a(x).mul_(2).tanh_().mean(1)))
    assert_right(module, numbers(3, 5, 4))


def test_weight_normalisation_by_hooks_is_followed():
    layer = nn.Linear(4, 4, dtype=torch.float64)
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layer)
    module = Forward(lambda model, x: model.b(model.normed(x)), normed=layer)
    module.a.requires_grad_(False)
    inputs, projector = numbers(3, 4), gradient_projector(module, SMALL)
    assert [other.name for other in projector.plan.others] == ["normed.weight_g", "normed.weight_v"]
    found = projector.features(module.state_dict(), inputs, torch.ones(3, 1, 2))
    # A module with such a weight cannot be copied.
    module.eval()
    rows = [
        torch.autograd.grad(module(row[None]).sum(), list(trained(module).values()))
        for row in inputs
    ]
    gradients = {
        name: torch.stack([row[i] for row in rows])[:, None]
        for i, name in enumerate(trained(module))
    }
    torch.testing.assert_close(found, projected_gradients(projector, gradients))


def trained(module):
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def test_mode_and_hooks_are_restored_after_an_error():
    module = mlp().train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gradient_projector(module, SMALL).linearise(module.state_dict(), torch.zeros(2, 9))
    assert all(part.training for part in module.modules())
    assert not any(part._forward_hooks for part in module.modules())
