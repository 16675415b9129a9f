"""Checkpoints of tiny tasks, their features, and TRAK scores written out slowly."""

import torch
from torch.func import functional_call, jacrev

from attribution import Model
from attribution.gradients import featurize


def checkpoints(task, count):
    """Models that were trained on all rows, or fresh ones where the task tells no training."""
    return [Model(task, task.new_model(seed).state_dict()) for seed in range(count)]


def make_features(task, folder, count=3, **settings):
    """Features that are the gradients themselves: no side of these models is projected."""
    return featurize(task, checkpoints(task, count), folder, block=7, **settings)


def dense_scores(task, models, damping, weighting=True):
    """Effects [train, target, output] and margin effects [train, target], in float64."""
    each = [_dense(task, model, damping, weighting) for model in models]
    return tuple(sum(parts) / len(models) for parts in zip(*each, strict=True))


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
    pull = torch.einsum("ro,rok->rk", gradients, j[:train])
    solved = torch.linalg.solve(hessian + damping * torch.eye(len(hessian)).double(), pull.T)
    effects = -torch.einsum("kr,tok->rto", solved, j)
    return effects.numpy(), torch.einsum("rto,to->rt", effects, slopes).numpy()
