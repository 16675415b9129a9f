import numpy as np
import pytest
import torch
from torch import nn

from attribution import outputs as module_under_test
from attribution.descent import stack
from attribution.outputs import evaluate, evaluate_many, target_margins
from tests.tasks import blobs, line, normalised_mlp, small_mlp


def with_dropout():
    return nn.Sequential(normalised_mlp(), nn.Dropout(0.5))


def trained_a_little(model):
    """Moves BatchNorm statistics away from where they start."""
    model.train()(3 + torch.randn(9, 3))
    return model


@pytest.fixture
def inputs():
    return torch.randn(11, 3)


def test_outputs_are_those_of_eval_mode(inputs):
    model = trained_a_little(with_dropout())
    found = evaluate(with_dropout(), model.state_dict(), inputs)
    torch.testing.assert_close(found, model.eval()(inputs).detach())
    assert not found.requires_grad


def test_many_models_equal_each_one(inputs):
    models = [trained_a_little(with_dropout()) for _ in range(3)]
    states = [model.state_dict() for model in models]
    found = evaluate_many(with_dropout(), stack(states), inputs)
    expected = torch.stack([evaluate(with_dropout(), state, inputs) for state in states])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("many", [False, True])
def test_the_mode_of_every_submodule_is_restored(inputs, many):
    module = with_dropout().train()
    module[0][1].eval()
    modes = [part.training for part in module.modules()]
    state = with_dropout().state_dict()
    if many:
        evaluate_many(module, stack([state]), inputs)
    else:
        evaluate(module, state, inputs)
    assert [part.training for part in module.modules()] == modes


def test_the_mode_is_restored_after_an_error():
    module = with_dropout().train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        evaluate(module, module.state_dict(), torch.zeros(2, 9))
    assert all(part.training for part in module.modules())


class Tied(nn.Module):
    """A model with one tensor under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.second(torch.relu(self.first(inputs)))


def test_layers_that_share_a_parameter_can_be_evaluated(inputs):
    models = [Tied() for _ in range(3)]
    # As read from a file: one tensor for each name.
    states = [{n: t.clone() for n, t in model.state_dict().items()} for model in models]
    expected = torch.stack([model(inputs).detach() for model in models])
    torch.testing.assert_close(evaluate(Tied(), states[1], inputs), expected[1])
    torch.testing.assert_close(evaluate_many(Tied(), stack(states), inputs), expected)


def test_neither_weights_nor_buffers_change(inputs):
    module, other = with_dropout(), trained_a_little(with_dropout())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    given = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    evaluate(module, other.state_dict(), inputs)
    evaluate(module, module.state_dict(), inputs)
    for state, expected in ((module.state_dict(), before), (other.state_dict(), given)):
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 4, 11, 100])
def test_pieces_of_any_size_give_the_same(inputs, rows, monkeypatch):
    model = small_mlp()
    expected = model(inputs).detach()
    monkeypatch.setattr(module_under_test, "ROWS_AT_ONCE", rows)
    torch.testing.assert_close(evaluate(model, model.state_dict(), inputs), expected)
    many = evaluate_many(model, stack([model.state_dict()] * 2), inputs)
    torch.testing.assert_close(many, torch.stack([expected] * 2))


def test_margins_of_a_task_use_the_labels_of_its_targets():
    task = blobs()
    outputs = np.random.default_rng(0).normal(size=(2, 3, 48, 2))
    _, labels = task.targets()
    of_label = np.take_along_axis(outputs, np.broadcast_to(labels[:, None], (2, 3, 48, 1)), -1)
    expected = 2 * of_label[..., 0] - outputs.sum(-1)
    np.testing.assert_allclose(target_margins(task, outputs), expected, rtol=0, atol=1e-12)


def test_margins_of_a_regression_are_its_first_output():
    outputs = np.random.default_rng(0).normal(size=(3, 48, 1)).astype(np.float32)
    np.testing.assert_array_equal(target_margins(line(), outputs), outputs[..., 0])


def test_margins_of_a_regression_with_several_labels():
    task = line()
    inputs, labels = task.train_data.tensors
    pairs = torch.utils.data.TensorDataset(inputs, torch.stack([labels, -labels], 1))
    task = line(rows=37, test_rows=0)
    object.__setattr__(task, "train_data", pairs)
    outputs = np.random.default_rng(0).normal(size=(3, 37, 2)).astype(np.float32)
    np.testing.assert_array_equal(target_margins(task, outputs), outputs[..., 0])
