import pytest
import torch
from torch import nn

from attribution import CrossEntropy
from attribution.descent import SGD, Adam, Batch, Descent, split_state, stack, unstack
from attribution.paths import why_one_by_one
from tests.tasks import normalised_mlp, small_mlp

RATES = [0.1, 0.3, 0.02, 0.2, 0.1]
ROWS, MODELS = 7, 3


def cross_entropy_gradient(outputs, labels, targets):
    del targets
    return CrossEntropy().gradient(outputs, labels)


def towards_targets(outputs, labels, targets):
    del labels
    return outputs - targets


def torch_optimizer(kind, model):
    if isinstance(kind, Adam):
        return torch.optim.Adam(model.parameters())
    return torch.optim.SGD(
        model.parameters(), momentum=kind.momentum, weight_decay=kind.weight_decay
    )


def plainly(model, batches, kind):
    """State dict after steps on the weighted cross-entropy by torch.optim."""
    optimizer = torch_optimizer(kind, model)
    for batch, rate in zip(batches, RATES, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(model(batch.inputs), batch.labels, reduction="none")
        (losses @ batch.weight).backward()
        optimizer.step()
    return model.state_dict()


def make_batches(seed):
    random = torch.Generator().manual_seed(seed)
    weight = torch.tensor([0.25, 0.25, 0.25, 0.25, 0, 0, 0])
    return [
        Batch(
            torch.randn(ROWS, 3, generator=random),
            torch.randint(2, (ROWS,), generator=random),
            weight,
            torch.zeros(ROWS, 0),
        )
        for _ in RATES
    ]


def stacked(batches):
    names = ("inputs", "labels", "weight", "targets")
    return Batch(*(torch.stack([getattr(batch, name) for batch in batches]) for name in names))


def descend(descent, batches):
    for batch, rate in zip(batches, RATES, strict=True):
        descent.step(batch, rate)
    return descent.state


def assert_close_states(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance)


OPTIMIZERS = [SGD(), SGD(momentum=0.9, weight_decay=0.01), Adam()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_steps_equal_torch(optimizer):
    model, batches = small_mlp(), make_batches(0)
    descent = Descent(model, model.state_dict(), cross_entropy_gradient, optimizer, many=False)
    found = descend(descent, batches)
    assert_close_states(found, plainly(model, batches, optimizer))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_many_models_take_the_steps_of_each(optimizer):
    models = [small_mlp() for _ in range(MODELS)]
    batches = [make_batches(seed) for seed in range(MODELS)]
    states = stack([model.state_dict() for model in models])
    descent = Descent(small_mlp(), states, cross_entropy_gradient, optimizer, many=True)
    found = descend(descent, [stacked(each) for each in zip(*batches, strict=True)])
    for index in range(MODELS):
        expected = plainly(models[index], batches[index], optimizer)
        # Adam's first steps divide by gradients near 0, which enlarges rounding.
        assert_close_states(unstack(found, index), expected, 2e-5)


class Residual(nn.Module):
    """A layer whose input is added to its output."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, inputs):
        return inputs + self.layer(inputs)


class First(nn.Module):
    """The first outputs, so that the layer before gets gradients of zero for the others."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, inputs):
        return inputs[:, : self.count]


ARCHITECTURES = {
    "in place": lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)),
    "normalised rows": lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)),
    "residual": lambda: nn.Sequential(Residual(nn.Linear(3, 3)), nn.GELU(), nn.Linear(3, 2)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3, 1)),
        nn.Conv2d(1, 4, (2, 1), padding=(1, 0)),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.MaxPool2d((2, 1)),
        nn.Conv2d(4, 3, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 2),
    ),
    "an output left out": lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), First(2)),
}


@pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_all_kinds_of_layers_train_many_at_once(make):
    models, optimizer = [make() for _ in range(MODELS)], SGD(momentum=0.9, weight_decay=0.01)
    assert why_one_by_one(models[0], torch.randn(2, 3), training=True) is None
    batches = [make_batches(seed) for seed in range(MODELS)]
    states = stack([model.state_dict() for model in models])
    descent = Descent(make(), states, cross_entropy_gradient, optimizer, many=True, training=True)
    found = descend(descent, [stacked(each) for each in zip(*batches, strict=True)])
    for index in range(MODELS):
        expected = plainly(models[index], batches[index], optimizer)
        assert_close_states(unstack(found, index), expected, 5e-6)


@pytest.mark.parametrize("many", [True, False])
def test_the_cotangent_gets_the_targets(many):
    model = nn.Linear(3, 2)
    batch = Batch(torch.randn(4, 3), torch.zeros(4), torch.full((4,), 0.25), torch.randn(4, 2))
    state = model.state_dict()
    descent = Descent(model, stack([state]) if many else state, towards_targets, SGD(), many=many)
    descent.step(stacked([batch]) if many else batch, 0.5)
    found = unstack(descent.state, 0) if many else descent.state
    slope = (model(batch.inputs) - batch.targets).detach()
    expected = state["weight"] - 0.5 * slope.T @ batch.inputs / 4
    torch.testing.assert_close(found["weight"], expected)


def test_neither_the_module_nor_the_given_state_changes():
    model = small_mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    descent = Descent(model, model.state_dict(), cross_entropy_gradient, SGD(), many=False)
    descend(descent, make_batches(0))
    assert_close_states(model.state_dict(), before, 0)


def test_a_state_is_a_copy():
    model, batches = small_mlp(), make_batches(0)
    descent = Descent(model, model.state_dict(), cross_entropy_gradient, SGD(), many=False)
    first = descent.state
    descent.step(batches[0], 0.1)
    assert_close_states(first, model.state_dict(), 0)


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_move_in_train_mode_only(training):
    model, batches = normalised_mlp(), make_batches(0)
    descent = Descent(
        model, model.state_dict(), cross_entropy_gradient, SGD(), many=False, training=training
    )
    found, expected = descend(descent, batches), plainly(model.train(training), batches, SGD())
    assert_close_states(found, expected)
    assert int(found["1.num_batches_tracked"]) == (len(RATES) if training else 0)


@pytest.mark.parametrize("many", [True, False])
def test_projections_replace_the_update(many):
    model, batches = nn.Linear(3, 2), make_batches(0)

    def first_input_only(updates):
        return {
            "weight": updates["weight"] * torch.tensor([1.0, 0, 0]),
            "bias": 2 * updates["bias"],
        }

    state = stack([model.state_dict()]) if many else model.state_dict()
    plain, projected = (
        Descent(model, state, cross_entropy_gradient, SGD(), many=many, project=project)
        for project in (None, first_input_only)
    )
    batch = stacked(batches[:1]) if many else batches[0]
    for descent in (plain, projected):
        descent.step(batch, 0.1)
    moved, kept = ({n: d.state[n] - state[n] for n in state} for d in (plain, projected))
    torch.testing.assert_close(kept["weight"][..., 0], moved["weight"][..., 0])
    assert not kept["weight"][..., 1:].any()
    torch.testing.assert_close(kept["bias"], 2 * moved["bias"])


def test_stack_and_unstack_are_inverse():
    states = [small_mlp().state_dict() for _ in range(MODELS)]
    for index, state in enumerate(states):
        assert_close_states(unstack(stack(states), index), dict(state), 0)


def test_frozen_parameters_and_buffers_are_the_rest():
    model = normalised_mlp()
    model[0].bias.requires_grad_(False)
    parameters, rest = split_state(model, model.state_dict())
    assert set(parameters) == {"0.weight", "1.weight", "1.bias", "3.weight", "3.bias"}
    assert parameters.keys() | rest.keys() == model.state_dict().keys()
    assert not parameters.keys() & rest.keys()


class Branching(nn.Module):
    """A model whose path depends on its values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs):
        outputs = self.layer(inputs)
        return outputs if outputs.sum() > 0 else -outputs


class Tied(nn.Module):
    """A model with one tensor under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.second(torch.relu(self.first(inputs)))


@pytest.mark.parametrize(
    ("model", "training", "reason"),
    [
        (small_mlp, True, None),
        (normalised_mlp, True, r"its buffers \(1.running_mean, ...\) change during training"),
        (normalised_mlp, False, None),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout()), True, "random"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout()), False, None),
        (Branching, True, "data-dependent control flow"),
        (Tied, True, "share"),
    ],
)
def test_reasons_to_train_one_by_one(model, training, reason):
    found = why_one_by_one(model(), torch.randn(2, 3), training=training)
    assert (found is None) == (reason is None), found
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            raise ValueError(found)


def test_tied_parameters_stay_tied():
    model, batches = Tied(), make_batches(0)
    descent = Descent(model, model.state_dict(), cross_entropy_gradient, SGD(), many=False)
    found = descend(descent, batches)
    assert_close_states(found, plainly(model, batches, SGD()))


class _Branching(torch.nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs) if inputs.sum() > 0 else super().forward(-inputs)


def test_a_model_that_branches_on_values_is_trained_one_by_one():
    reason = why_one_by_one(_Branching(3, 2), torch.ones(2, 3), training=True)
    assert reason is not None
    assert "control flow" in reason


class Transposed(nn.Module):
    """A linear layer that holds its matrix the other way round."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(inputs, outputs) / inputs)

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.matrix.T)


SHAPES = {
    "few inputs, many hidden": lambda: [nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2)],
    "wide": lambda: [nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 2)],
    "transposed": lambda: [Transposed(3, 20), nn.ReLU(), Transposed(20, 2)],
}


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS[1:], ids=str)
@pytest.mark.parametrize("layers", SHAPES.values(), ids=SHAPES.keys())
def test_gradients_of_any_layout_move_the_right_numbers(layers, optimizer, many):
    model, batches = nn.Sequential(*layers()), make_batches(0)
    # Rows enough for every way to multiply.
    batches = [Batch(*(torch.cat([part] * 3) for part in batch.tensors)) for batch in batches]
    state = stack([model.state_dict()] * MODELS) if many else model.state_dict()
    descent = Descent(model, state, cross_entropy_gradient, optimizer, many=many)
    found = descend(descent, [stacked([each] * MODELS) if many else each for each in batches])
    expected = plainly(model, batches, optimizer)
    for index in range(MODELS if many else 1):
        assert_close_states(unstack(found, index) if many else found, expected, 2e-5)


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("optimizer", [SGD(0.9), Adam()], ids=["SGD", "Adam"])
def test_a_model_without_trainable_parameters_is_refused(optimizer, many):
    frozen = nn.Linear(3, 2).requires_grad_(False)
    for model in (nn.Flatten(), frozen):
        state = stack([model.state_dict()]) if many else model.state_dict()
        message = f"the model, {type(model).__name__}, has no trainable parameters: give the task"
        with pytest.raises(ValueError, match=message):
            Descent(model, state, cross_entropy_gradient, optimizer, many=many)


def test_a_recording_serves_other_models():
    recordings = {}
    batches = make_batches(0)
    for model in (small_mlp(), small_mlp()):
        states = stack([model.state_dict()] * MODELS)
        descents = [
            Descent(model, states, cross_entropy_gradient, SGD(0.9), many=True, recordings=known)
            for known in (recordings, {})
        ]
        found, expected = (descend(d, [stacked([b] * MODELS) for b in batches]) for d in descents)
        assert_close_states(found, expected, 0)
    assert len(recordings) == 1
