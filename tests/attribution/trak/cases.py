"""Checkpoints of tiny tasks, their features, and TRAK scores written out slowly."""

import torch
from torch.func import functional_call, jacrev

from attribution import Model
from attribution.gradients import featurize


def checkpoints(task, count, first=0):
    """Fresh models."""
    return [Model(task, task.new_model(seed).state_dict()) for seed in range(first, first + count)]


def make_features(task, folder, count=3, first=0, **settings):
    """Features that are the gradients themselves: no side of these models is projected."""
    return featurize(task, checkpoints(task, count, first), folder, block=7, **settings)


def dense_scores(task, models, damping, **settings):
    """Effects [train, target, output] and margin effects [train, target], in float64."""
    each = scores_by_model(task, models, damping, **settings)
    return tuple(sum(parts) / len(models) for parts in zip(*each, strict=True))


def scores_by_model(task, models, damping, weighting=True):
    """What the scores are the means of.

    Effects of a pull of one unit of margin, times how the loss falls with it in the mean over the
    models.
    """
    each = [_dense(task, model, damping, weighting) for model in models]
    strength = sum(strength for strength, *_ in each) / len(models)
    return [(effects * strength[:, None, None], on * strength[:, None]) for _, effects, on in each]


def _dense(task, model, damping, weighting):
    module = task.new_model(0).double().eval()
    state = {name: value.double() for name, value in model.state.items()}
    inputs, labels = task.targets()
    inputs, train = inputs.double(), len(task.train_ids)

    def run(weights):
        return functional_call(module, weights, (inputs,))

    outputs, parts = run(state), jacrev(run)(state)
    j = torch.cat([part.flatten(2) for part in parts.values()], 2)
    slopes = jacrev(lambda values: task.loss.margin(values, labels).sum())(outputs)
    phi = torch.einsum("to,tok->tk", slopes, j)
    hessian = sum(
        j[i].T @ task.loss.hessian(outputs[i]) @ j[i] if weighting else torch.outer(phi[i], phi[i])
        for i in range(train)
    )
    gradients = task.loss.gradient(outputs, labels)[:train]
    strength = (gradients * slopes[:train]).sum(1) / slopes[:train].square().sum(1)
    torch.testing.assert_close(gradients, strength[:, None] * slopes[:train])
    solved = torch.linalg.solve(hessian + damping * torch.eye(len(hessian)).double(), phi[:train].T)
    effects = -torch.einsum("kr,tok->rto", solved, j)
    return strength.numpy(), effects.numpy(), torch.einsum("rto,to->rt", effects, slopes).numpy()
