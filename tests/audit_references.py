"""Slow and obvious implementations of what an audit measures, model by model."""

import itertools
import math

import numpy as np
import torch


def _smoothed_kl(unlearned, oracles, edges):
    """KL(p || q) of two lists of margins in given bins, half a count added to every bin of q."""
    p = np.histogram(unlearned, edges)[0] / len(unlearned)
    q = (np.histogram(oracles, edges)[0] + 0.5) / (len(oracles) + (len(edges) - 1) / 2)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def jackknifed_kl(unlearned, oracles, bins):
    """Of one target, with every model of either side really left out once."""
    pooled = [*unlearned, *oracles]
    edges = np.linspace(min(pooled), max(pooled), bins + 1)
    whole = _smoothed_kl(unlearned, oracles, edges)
    n, m = len(unlearned), len(oracles)
    without = [_smoothed_kl(np.delete(unlearned, i), oracles, edges) for i in range(n)]
    without_oracle = [_smoothed_kl(unlearned, np.delete(oracles, i), edges) for i in range(m)]
    own = (n - 1) * (whole - np.mean(without))
    return whole + own + (m - 1) * (whole - np.mean(without_oracle))


def _log_density(value, sample):
    mean, deviation = np.mean(sample), np.std(sample, ddof=1)
    return -((value - mean) ** 2) / (2 * deviation**2) - math.log(deviation)


def _looks_unlearned(value, unlearned, oracles):
    return _log_density(value, unlearned) - _log_density(value, oracles)


def _points(first, second):
    return 1.0 if first > second else 0.5 if first == second else 0.0


def ulira_of_row(unlearned, oracles):
    """Balanced accuracy and AUC of one target, fitting anew for every pair of models left out."""
    folds, turns = min(len(unlearned), len(oracles)), max(len(unlearned), len(oracles))
    right, ranked = [], []
    for turn in range(turns):
        left = [
            [margin for i, margin in enumerate(side) if i % folds != turn % folds]
            for side in (unlearned, oracles)
        ]
        ours = _looks_unlearned(unlearned[turn % len(unlearned)], *left)
        theirs = _looks_unlearned(oracles[turn % len(oracles)], *left)
        right += [_points(ours, 0), _points(0, theirs)]
        ranked.append(_points(ours, theirs))
    return np.mean(right), np.mean(ranked)


def area_and_rate(members, others):
    """AUC and true positives at 1 % false ones of one model, from scores that members raise."""
    area = np.mean([_points(a, b) for a in members for b in others])
    bars = [bar for bar in others if np.mean([b > bar for b in others]) <= 0.01]
    return area, np.mean([a > min(bars) for a in members])


def rmia_scores(members, others, reference_members, reference_others, *, population, offline):
    """The paper's scores of one model: shares of a population that each row is likelier than."""

    def ratio(loss, references):
        usual = np.mean([math.exp(-reference) for reference in references])
        return math.exp(-loss) / (((1 + offline) * usual + 1 - offline) / 2)

    seen = [ratio(a, b) for a, b in zip(members, reference_members.T, strict=True)]
    unseen = [ratio(a, b) for a, b in zip(others, reference_others.T, strict=True)]
    many = [ratio(a, b) for a, b in population]
    return [[np.mean([_points(x, z) for z in many]) for x in side] for side in (seen, unseen)]


def epsilon_of_row(unlearned, oracles):
    """Epsilon of one target over every threshold of every attack, one after the other."""
    middle = np.median([*unlearned, *oracles])
    best = 0.0
    for statistic in (float, lambda margin: abs(margin - middle)):
        ours, theirs = ([statistic(margin) for margin in side] for side in (unlearned, oracles))
        values = sorted({*ours, *theirs})
        for bar in [(a + b) / 2 for a, b in itertools.pairwise(values)]:
            for sign in (1, -1):
                missed = np.mean([sign * x < sign * bar for x in ours])
                alarms = np.mean([sign * x > sign * bar for x in theirs])
                if missed == alarms == 0:
                    return math.inf
                if missed == 0 or alarms == 0:
                    continue
                for a, b in ((missed, alarms), (alarms, missed)):
                    if 1 - 1e-5 - a > 0:
                        best = max(best, math.log((1 - 1e-5 - a) / b))
    return best


def steps_to_relearn(task, model, rows, goal, *, rate, most):
    """Full steps of gradient descent on some rows until their mean loss is below the goal."""
    inputs, labels = task.rows("train", rows)
    module = task.new_model(0)
    module.load_state_dict(model)
    module.eval()
    for step in range(most + 1):
        loss = task.loss.value(module(inputs), labels).mean()
        if loss < goal:
            return step
        for parameter, gradient in zip(
            module.parameters(), torch.autograd.grad(loss, list(module.parameters())), strict=True
        ):
            parameter.data -= rate * gradient
    return math.inf
