"""Slow and obvious implementations that the packages are compared with."""

import math

import numpy as np
import torch
from torch.nn import functional

from attribution.seeds import derive_seed, generator


def ridge(inputs, labels, penalty):
    """Weights and intercept that minimise sum (y - x w - b)^2 + penalty |w|^2."""
    design = np.column_stack([inputs, np.ones(len(inputs))])
    damping = penalty * np.eye(design.shape[1])
    damping[-1, -1] = 0
    found = np.linalg.solve(design.T @ design + damping, design.T @ labels)
    return found[:-1], found[-1]


def leave_set_out_ridge(inputs, labels, queries, removed, penalty):
    """Change of the predictions on `queries` when the rows `removed` are not trained on."""
    kept = np.setdiff1d(np.arange(len(inputs)), removed)
    before, after = ridge(inputs, labels, penalty), ridge(inputs[kept], labels[kept], penalty)
    return queries @ (after[0] - before[0]) + after[1] - before[1]


def _datamodel_equations(masks, weights, penalty, own):
    """Matrix of the normal equations over (intercept, effects), and the design matrix."""
    design = np.column_stack([np.ones(len(masks)), masks])
    penalties = np.full(design.shape[1], float(penalty))
    penalties[0] = 0
    if own is not None:
        penalties[1 + own] = 0
    return design.T @ (weights[:, None] * design) + np.diag(penalties), design


def dense_datamodel(masks, outputs, weights, penalty, own=None):
    """Intercept and effects [train] of one target and output, by the normal equations.

    Minimises sum_j a_j (y_j - b - x_j w)^2 + penalty sum_{i != own} w_i^2.
    """
    matrix, design = _datamodel_equations(masks, weights, penalty, own)
    found = np.linalg.solve(matrix, design.T @ (weights * outputs))
    return found[0], found[1:]


def datamodel_objective(masks, outputs, weights, penalty, own=None):
    """Smallest value of the objective that `dense_datamodel` minimises."""
    intercept, effects = dense_datamodel(masks, outputs, weights, penalty, own)
    squares = effects**2
    if own is not None:
        squares[own] = 0
    misfit = outputs - intercept - masks @ effects
    return float(weights @ misfit**2 + penalty * squares.sum())


def datamodel_posterior_variance(masks, weights, penalty, removed, own=None):
    """Posterior variance of the sum of the removed rows' effects, for noise variance 1.

    Bayesian regression: noise variance 1 / a_j, prior variance 1 / penalty on all effects but
    the own one, flat priors on that and on the intercept.
    """
    matrix, _ = _datamodel_equations(masks, weights, penalty, own)
    chosen = np.zeros(len(matrix))
    chosen[1 + np.asarray(removed)] = 1
    return float(chosen @ np.linalg.solve(matrix, chosen))


def triangular_rate(recipe, step, steps):
    """Learning rate in the middle of a step: up to the peak, then down to 0."""
    peak, now = max(1, round(recipe.peak_at * steps)), step + 0.5
    share = now / peak if now < peak else (steps - now) / (steps - peak)
    return recipe.peak_rate * share


def plain_training(task, rows, seed, index, row_loss=functional.cross_entropy):
    """State dict after training by the recipe with torch.optim.SGD, written out."""
    recipe, random = task.recipe, generator(seed, "order", index)
    model = task.new_model(seed, index).train()
    settings = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, **settings)
    steps = recipe.epochs * math.ceil(len(rows) / recipe.batch_size)
    step = 0
    for epoch in range(recipe.epochs):
        order = random.permutation(rows)
        for start in range(0, len(rows), recipe.batch_size):
            chosen = order[start : start + recipe.batch_size]
            inputs, labels = task.rows("train", chosen)
            if recipe.augment is not None:
                own_seed = derive_seed(seed, "augment", index)
                inputs = recipe.augment(inputs, own_seed, epoch, torch.from_numpy(chosen))
            optimizer.param_groups[0]["lr"] = triangular_rate(recipe, step, steps)
            optimizer.zero_grad()
            row_loss(model(inputs), labels).backward()
            optimizer.step()
            step += 1
    return model.state_dict()


def patches(layer, images):
    """Input patches of a Conv2d, one row for each output pixel, by indexing: [patch, width]."""
    (up, left), (down, right) = layer.padding, layer.stride
    padded = functional.pad(images, (left, left, up, up))
    heights, widths = (
        range(0, padded.shape[2 + axis] - layer.dilation[axis] * (layer.kernel_size[axis] - 1), by)
        for axis, by in enumerate((down, right))
    )
    found = [
        [
            image[channel, row + a * layer.dilation[0], column + b * layer.dilation[1]]
            for channel in range(image.shape[0])
            for a in range(layer.kernel_size[0])
            for b in range(layer.kernel_size[1])
        ]
        for image in padded
        for row in heights
        for column in widths
    ]
    return torch.tensor(found, dtype=images.dtype)


def klom_of_row(unlearned, oracles):
    """KLOM of one target from two lists of margins, bin by bin."""
    u = [min(max(margin, -100.0), 100.0) for margin in unlearned]
    o = [min(max(margin, -100.0), 100.0) for margin in oracles]
    lowest, highest = min(u + o), max(u + o)
    if lowest == highest:
        return 0.0
    edges = np.linspace(lowest, highest, 21)
    p = [count / len(u) for count in np.histogram(u, edges)[0]]
    q = [count / len(o) for count in np.histogram(o, edges)[0]]
    raised = [max(b, 1e-5) if a > 0 else b for a, b in zip(p, q, strict=True)]
    normal = [b / sum(raised) for b in raised]
    return sum(a * math.log(a / b) for a, b in zip(p, normal, strict=True) if a > 0)


def divergence_of_normals(mean, deviation, other_mean, other_deviation):
    """KL(N(mean, deviation) || N(other)) by the trapezoid rule over 12 standard deviations."""
    x = np.linspace(mean - 12 * deviation, mean + 12 * deviation, 200_001)

    def log_density(m, s):
        return -(((x - m) / s) ** 2) / 2 - math.log(s) - math.log(2 * math.pi) / 2

    mine, other = log_density(mean, deviation), log_density(other_mean, other_deviation)
    return np.trapezoid(np.exp(mine) * (mine - other), x)


def dense_projector(vectors, gamma):
    """Projector on the leading directions of stacked input vectors [vector, width], by an SVD."""
    _, singular, rows = np.linalg.svd(vectors, full_matrices=True)
    share = np.cumsum(singular) / singular.sum()
    kept = rows[: max(1, int((share <= gamma).sum()))]
    return kept.T @ kept
