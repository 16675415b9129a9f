"""Slow and obvious implementations that the packages are compared with."""

import copy
import functools
import itertools
import math

import numpy as np
import torch
from scipy.optimize import nnls
from torch.nn import functional

from attribution.seeds import derive_seed, generator


def ridge(inputs, labels, penalty, *, weights=None, free_intercept=True):
    """Weights and intercept that minimise sum a (y - x w - b)^2 + penalty (|w|^2 [+ b^2])."""
    design = np.column_stack([inputs, np.ones(len(inputs))])
    damping = penalty * np.eye(design.shape[1])
    if free_intercept:
        damping[-1, -1] = 0
    weighted = design if weights is None else np.asarray(weights)[:, None] * design
    found = np.linalg.solve(design.T @ weighted + damping, weighted.T @ labels)
    return found[:-1], found[-1]


def leave_set_out_ridge(
    inputs, labels, queries, removed, penalty, *, free_intercept=True, mean=False
):
    """Change of the predictions on `queries` when the rows `removed` are not trained on.

    mean: whether the mean of the losses is minimised, against the same penalty per row.
    """
    every, kept = np.arange(len(inputs)), np.setdiff1d(np.arange(len(inputs)), removed)
    before, after = (
        ridge(
            inputs[rows],
            labels[rows],
            penalty * len(rows) / len(inputs) if mean else penalty,
            free_intercept=free_intercept,
        )
        for rows in (every, kept)
    )
    return queries @ (after[0] - before[0]) + after[1] - before[1]


def penalised_logistic(inputs, labels, penalty, classes):
    """Weights and intercepts [class, width + 1] of softmax regression, to convergence.

    Minimises sum cross-entropy + penalty / 2 |W|^2, the intercepts included.
    """
    design = torch.column_stack([inputs, torch.ones(len(inputs))]).double()
    weights = torch.zeros(classes, design.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=1000,
        tolerance_grad=1e-11,
        tolerance_change=1e-16,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def objective():
        optimizer.zero_grad()
        loss = functional.cross_entropy(design @ weights.T, labels, reduction="sum")
        loss = loss + penalty / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return weights.detach()


def group_newton_step(features, outputs, labels, removed, *, loss, damping, temperature, held=0):
    """(H - H_F + damping I)^-1 (sum_F J^T g - |F| / n sum J^T g + held), in float64.

    features: of the training rows, [train, output, k]; H's part of a row is J^T R / T J at z / T.
    held: what part of the damping pulls to, times that part.
    """
    width = features.shape[-1]
    matrix, pull = damping * np.eye(width), np.zeros(width) + held
    for row, j in enumerate(features.astype(np.float64)):
        scaled = torch.from_numpy(outputs[row : row + 1]).double() / temperature
        slope = j.T @ loss.gradient(scaled, labels[row : row + 1]).numpy()[0]
        pull += ((row in removed) - len(removed) / len(features)) * slope
        if row not in removed:
            matrix += j.T @ (loss.hessian(scaled).numpy()[0] / temperature) @ j
    return np.linalg.solve(matrix, pull)


def _datamodel_equations(masks, weights, penalty, scales, free):
    """Matrix of the normal equations over (intercept, effects), and the design matrix."""
    design = np.column_stack([np.ones(len(masks)), masks])
    penalties = np.append(0, penalty / np.square(scales))
    if free is not None:
        penalties[1 + free] = 0
    return design.T @ (weights[:, None] * design) + np.diag(penalties), design


def dense_datamodel(masks, outputs, weights, penalty, scales, free=None):  # noqa: PLR0917
    """Intercept and effects [train] of one target and output, by the normal equations.

    Minimises sum_j a_j (y_j - b - x_j w)^2 + penalty sum_{i != free} w_i^2 / s_i^2.
    """
    matrix, design = _datamodel_equations(masks, weights, penalty, scales, free)
    found = np.linalg.solve(matrix, design.T @ (weights * outputs))
    return found[0], found[1:]


def datamodel_objective(masks, outputs, weights, penalty, scales, free=None):  # noqa: PLR0917
    """Smallest value of the objective that `dense_datamodel` minimises."""
    intercept, effects = dense_datamodel(masks, outputs, weights, penalty, scales, free)
    misfit, squares = outputs - intercept - masks @ effects, np.square(effects / scales)
    if free is not None:
        squares[free] = 0
    return float(weights @ misfit**2 + penalty * squares.sum())


def datamodel_posterior_variance(  # noqa: PLR0917
    masks, weights, penalty, removed, scales, free=None
):
    """Posterior variance of the sum of the removed rows' effects, for noise variance 1.

    Bayesian regression: noise variance 1 / a_j, prior variance s_i^2 / penalty on the effects, flat
    priors on the free one, if any, and on the intercept.
    """
    matrix, _ = _datamodel_equations(masks, weights, penalty, scales, free)
    chosen = np.zeros(len(matrix))
    chosen[1 + np.asarray(removed)] = 1
    return float(chosen @ np.linalg.solve(matrix, chosen))


def expected_effects(task, anchors, alike):
    """Scale of each row's effects: the root of alike + (1 - alike) |g_i| / mean_k |g_k|.

    anchors: outputs of models trained on all rows, [model, target, output].
    """
    pulls = []
    for row in range(len(task.train_ids)):
        label = task.targets(np.array([row]))[1]
        slopes = [task.loss.gradient(torch.tensor(z[row])[None], label)[0] for z in anchors]
        pulls.append(np.mean([float(slope.square().sum() ** 0.5) for slope in slopes]))
    return np.sqrt(alike + (1 - alike) * np.array(pulls) / np.mean(pulls))


def grown_weights(columns, wanted, together):
    """Weights w >= 0 and the growth x of sum_j |wanted_j - (1 + x together_j) columns_j w|^2.

    The best of the growths that make the largest factor 1 / (1 - share), share 0, .01 ... .8.
    """
    found, most = [], max(together)
    for hundredths in range(81 if most > 0 else 1):
        growth = hundredths / (100 - hundredths) / most if hundredths else 0.0
        scaled = [(1 + growth * n) * c for n, c in zip(together, columns, strict=True)]
        weights, error = nnls(np.concatenate(scaled), np.concatenate(list(wanted)))
        found.append((error, growth, weights))
    least = min(error for error, _, _ in found)
    # Growths that fit alike, as where all sets are: the least one.
    return next((w, x) for error, x, w in found if error <= least * (1 + 1e-9) + 1e-9)


def triangular_rate(recipe, step, steps):
    """Learning rate in the middle of a step: up to the peak, then down to 0."""
    peak, now = max(1, round(recipe.peak_at * steps)), step + 0.5
    share = now / peak if now < peak else (steps - now) / (steps - peak)
    return recipe.peak_rate * share


def plain_training(task, rows, seed, index, row_loss=functional.cross_entropy, *, visited=None):
    """State dict after training by the recipe with torch.optim.SGD, written out.

    visited: takes the state dict that each step starts from.
    """
    recipe, random = task.recipe, generator(seed, "order", index)
    model = task.new_model(seed, index).train()
    settings = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, **settings)
    parts = math.ceil(len(rows) / recipe.batch_size)
    steps, step = recipe.epochs * parts, 0
    for epoch in range(recipe.epochs):
        for chosen in np.array_split(random.permutation(rows), parts):
            inputs, labels = task.rows("train", chosen)
            if recipe.augment is not None:
                own_seed = derive_seed(seed, "augment", index)
                inputs = recipe.augment(inputs, own_seed, epoch, torch.from_numpy(chosen))
            optimizer.param_groups[0]["lr"] = triangular_rate(recipe, step, steps)
            optimizer.zero_grad()
            if visited is not None:
                visited.append(copy.deepcopy(model.state_dict()))
            row_loss(model(inputs), labels).backward()
            optimizer.step()
            step += 1
    return model.state_dict()


def _flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _recipe_batches(task, rows, seed, index):
    """Epoch and rows of each step of the recipe."""
    random = generator(seed, "order", index)
    parts = math.ceil(len(rows) / task.recipe.batch_size)
    for epoch in range(task.recipe.epochs):
        for chosen in np.array_split(random.permutation(rows), parts):
            yield epoch, chosen


def in_run_displacements(task, rows, seed, index):
    """Before each step: the model in eval mode, and how far each row, then weight decay, moves it.

    Displacements are [train + 1, parameter]; each row's share of the velocity is written out.
    """
    recipe, model = task.recipe, task.new_model(seed, index)
    torch.manual_seed(derive_seed(seed, "forward passes", index))
    batches, velocity = list(_recipe_batches(task, rows, seed, index)), 0
    for step, (epoch, chosen) in enumerate(batches):
        trained = copy.deepcopy(model).train()
        weights = [tensor for tensor in trained.parameters() if tensor.requires_grad]
        inputs, labels = task.rows("train", chosen)
        if recipe.augment is not None:
            own_seed = derive_seed(seed, "augment", index)
            inputs = recipe.augment(inputs, own_seed, epoch, torch.from_numpy(chosen))
        losses = task.loss.value(trained(inputs), labels)
        sources = torch.zeros(len(task.train_ids) + 1, _flat(weights).numel()).to(losses.dtype)
        for row, loss in zip(chosen, losses, strict=True):
            sources[row] = _flat(torch.autograd.grad(loss, weights, retain_graph=True))
        sources /= len(chosen)
        sources[-1] = recipe.weight_decay * _flat(weights).detach()
        velocity = recipe.momentum * velocity + sources
        moved = -triangular_rate(recipe, step, len(batches)) * velocity
        yield model.eval(), moved
        end = _flat(weights).detach() + moved.sum(0)
        torch.nn.utils.vector_to_parameters(end, weights)
        model.load_state_dict(trained.state_dict())


def in_run_slope(task, model, target, moved):
    """Gradient of a target's loss plus half its Hessian times a displacement, [parameter]."""
    weights = [tensor for tensor in model.parameters() if tensor.requires_grad]
    inputs, labels = task.targets([target])
    loss = task.loss.value(model(inputs), labels)[0]
    gradient = _flat(torch.autograd.grad(loss, weights, create_graph=True))
    curved = torch.autograd.grad(gradient @ moved, weights, materialize_grads=True)
    return gradient.detach() + _flat(curved) / 2


def in_run_values(task, rows, targets, *, seed, index, order):
    """In-Run Data Shapley [train, target] from explicit gradients of every row and target."""
    values = 0
    for model, moved in in_run_displacements(task, rows, seed, index):
        whole = moved.sum(0) * (order == 2)
        slopes = torch.stack([in_run_slope(task, model, target, whole) for target in targets])
        values = values + moved[:-1] @ slopes.T
    return values.numpy()


def shapley(worth, players):
    """Shapley values of a game by enumeration; worth takes a tuple of players in order."""
    values = []
    for one in range(players):
        others = [player for player in range(players) if player != one]
        value = 0.0
        for size in range(players):
            share = 1 / (players * math.comb(players - 1, size))
            for chosen in itertools.combinations(others, size):
                value += share * (worth(tuple(sorted((*chosen, one)))) - worth(chosen))
        values.append(value)
    return np.array(values)


def _mean_loss_after(task, model, targets, moved, chosen):
    """Mean loss of the targets once some of the displacements [player, parameter] are made."""
    other, (inputs, labels) = copy.deepcopy(model).requires_grad_(False), task.targets(targets)
    end = _flat(other.parameters()) + moved[list(chosen)].sum(0)
    torch.nn.utils.vector_to_parameters(end, other.parameters())
    return float(task.loss.value(other(inputs), labels).mean())


def in_run_shapley(task, rows, targets, *, seed, index):
    """Exact Shapley values [train] of the change of the mean loss at each step, added up."""
    values = 0
    for model, moved in in_run_displacements(task, rows, seed, index):
        worth = functools.partial(_mean_loss_after, task, model, targets, moved)
        values = values + shapley(functools.cache(worth), len(moved))[:-1]
    return values


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


def dense_projector(vectors, gamma, power=1):
    """Projector on the leading directions of stacked input vectors [vector, width], by an SVD.

    gamma: share of the sum of the singular values to this power.
    """
    _, singular, rows = np.linalg.svd(vectors, full_matrices=True)
    share = np.cumsum(singular**power) / (singular**power).sum()
    kept = rows[: max(1, int((share <= gamma).sum()))]
    return kept.T @ kept
