"""Attacks: what someone who holds a model can tell of a row that it should have forgotten."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from unlearning.klom import Array, check_margins

FALSE_POSITIVES = 0.01
OFFLINE = 0.3
# A variance without one model needs two others.
FEWEST_MODELS_FOR_ULIRA = 3


@dataclass(frozen=True)
class RowAttack:
    """How well unlearned models are told from retrained ones by their outputs on one row.

    Args:
        accuracy: balanced, (true positive rate + true negative rate) / 2, [target].
        auc: chance that of one model of either kind the unlearned one looks more so, [target].
    """

    accuracy: Array
    auc: Array


@dataclass(frozen=True)
class MembershipAttack:
    """How well rows that were forgotten are told from rows never trained on, model by model.

    Args:
        auc: chance that a forgotten row looks more like a training row than another, [model].
        rate: share of forgotten rows found at no more than 1 % false alarms, [model].
    """

    auc: Array
    rate: Array


def ulira(unlearned: Array, oracles: Array) -> RowAttack:
    """U-LiRA, balanced: was this row trained on and unlearned, or never trained on?

    Normal distributions are fitted to the margins of unlearned and of never-trained models; a
    model is called unlearned where ln N(m; unlearned) - ln N(m; oracles) > 0. One model of either
    kind is left out of both fits and then judged by them. So equal samples give .5 on average at
    every number of models; leaving out the judged model alone gives an AUC of .45 with 100 models
    and of .42 with 20, because a sample without a model lies a little farther from it.

    Direction: lower is better, down to .5. Reference: the oracles. Null: .5 on average, 95 % of
    single targets between .34 and .58 with 100 models; two banks of oracles give it. A shift of
    normal margins by 1 sd gives .69, and an AUC of .76, at 20 to 200 models.

    Args:
        unlearned: margins [model, target].
        oracles: margins [model, target], of models that were never trained on the row.

    Returns:
        Balanced accuracy and AUC of each target; not a number where all margins are equal.

    Raises:
        ValueError: the shapes do not fit, a margin is not a number, or a side has fewer than 3
            models.

    Example:
        >>> first, second = np.random.default_rng(0).normal(size=(2, 100, 300))
        >>> found = [ulira(first + d, second) for d in (0, 2)]
        >>> [(round(float(a.accuracy.mean()), 2), round(float(a.auc.mean()), 2)) for a in found]
        [(0.5, 0.5), (0.84, 0.92)]

    Source: Hayes et al. 2024 (arXiv 2403.01218); the balance and the pairs are stated here,
        because published code counts true positives alone.
    """
    u, o = check_margins(unlearned, oracles)
    folds = min(len(u), len(o))
    if folds < FEWEST_MODELS_FOR_ULIRA:
        raise ValueError(
            f"U-LiRA needs at least {FEWEST_MODELS_FOR_ULIRA} models of either kind, got {len(u)}"
            f" and {len(o)}"
        )
    turns = np.arange(max(len(u), len(o)))
    ours, theirs = (_normals_without(side, folds) for side in (u, o))
    fold = turns % folds
    scores = [_log_ratio(side[turns % len(side)], ours, theirs, fold) for side in (u, o)]
    valid = np.isfinite(scores).all((0, 1))
    judged = _wins(scores[0], 0.0), _wins(0.0, scores[1])
    accuracy, auc = (judged[0] + judged[1]) / 2, _wins(*scores)
    return RowAttack(*(np.where(valid, found.mean(0), np.nan) for found in (accuracy, auc)))


def loss_attack(members: Array, others: Array) -> MembershipAttack:
    """Loss threshold: a row of small loss was trained on.

    Direction: nearer to the oracles' own value is better; farther below it shows too, as
    over-forgetting. Reference and null: the same attack on oracles, which is .5 only where
    forgotten rows are as hard as test rows.

    Args:
        members: losses of the forgotten rows, [model, row].
        others: losses of rows that no model was trained on, [model, row].

    Returns:
        AUC and rate of true positives at 1 % false ones of each model.

    Raises:
        ValueError: other numbers of models, a side without rows, or a loss that is not a number.

    Example:
        >>> loss_attack(np.array([[0.1, 0.3]]), np.array([[0.2, 0.4]])).auc
        array([0.75])

    Source: Yeom et al. 2018 (arXiv 1709.01604); the rate at few false alarms, Carlini et al. 2022
        (arXiv 2112.03570).
    """
    m, o = _losses(members, others)
    return _attack(-m, -o)


def rmia(
    members: Array,
    others: Array,
    reference_members: Array,
    reference_others: Array,
    *,
    offline: float = OFFLINE,
) -> MembershipAttack:
    """RMIA: a row that is likelier than reference models find it, more than others are, was seen.

    Score of a row x: the share of rows z with [p(x) / p'(x)] / [p(z) / p'(z)] > 1, where
    p = exp(-loss) and p' = ((1 + a) mean over references of p + 1 - a) / 2. Of all rows z of one
    model it rises with p(x) / p'(x) alone, so that this ratio has the same ROC curve and is what
    is computed.

    Direction, reference and null: as `loss_attack`; the null is another bank of oracles.

    Args:
        members: losses of the forgotten rows, [model, row].
        others: losses of rows that no model was trained on, [model, row].
        reference_members: losses of oracles on the forgotten rows, [oracle, row].
        reference_others: losses of oracles on the other rows, [oracle, row].
        offline: a, from 0 to 1; 1 takes the oracles' mean as it is, less trusts it less where
            it is small, because no reference was trained on the row.

    Returns:
        AUC and rate of true positives at 1 % false ones of each model.

    Raises:
        ValueError: numbers of models or rows that do not fit, a loss that is not a number, or an
            `offline` outside its range.

    Example:
        >>> hard, easy = np.array([[2.0]]), np.array([[1.0]])
        >>> rmia(hard - 0.5, easy, hard, easy, offline=1).auc, loss_attack(hard - 0.5, easy).auc
        (array([1.]), array([0.]))

    Source: Zarifzadeh et al. 2024 (arXiv 2312.03262), offline form; a = .3 stands in the authors'
        settings for CIFAR-10 and .6 in those for CIFAR-100, chosen for a softened softmax as p.
    """
    if not 0 <= offline <= 1:
        raise ValueError(f"offline must lie between 0 and 1, got {offline}")
    m, o = _losses(members, others)
    rm, ro = _losses(reference_members, reference_others)
    if (m.shape[1], o.shape[1]) != (rm.shape[1], ro.shape[1]):
        raise ValueError(
            f"expected the references' losses on the same rows, got {m.shape[1]} and {o.shape[1]}"
            f" rows and {rm.shape[1]} and {ro.shape[1]} of the references"
        )
    usual = [((1 + offline) * np.exp(-r).mean(0) + 1 - offline) / 2 for r in (rm, ro)]
    with np.errstate(divide="ignore"):
        return _attack(-m - np.log(usual[0]), -o - np.log(usual[1]))


def _normals_without(margins: Array, folds: int) -> tuple[Array, Array]:
    """Mean and variance of the models outside each fold (model % folds), [fold, target]."""
    middle = margins.mean(0)
    centred = margins - middle
    parts = [centred[fold::folds] for fold in range(folds)]
    left = np.array([[len(margins) - len(part)] for part in parts])
    mean = (centred.sum(0) - np.stack([part.sum(0) for part in parts])) / left
    squares = np.square(centred).sum(0) - np.stack([np.square(part).sum(0) for part in parts])
    variance = np.maximum(squares - left * mean**2, 0) / (left - 1)
    return mean + middle, variance


def _log_ratio(
    margins: Array, unlearned: tuple[Array, Array], oracles: tuple[Array, Array], fold: Any
) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        densities = [
            -np.log(variance[fold]) / 2 - (margins - mean[fold]) ** 2 / (2 * variance[fold])
            for mean, variance in (unlearned, oracles)
        ]
        return np.asarray(densities[0] - densities[1])


def _wins(first: Any, second: Any) -> Array:
    """1 where the first is larger, half where they are equal."""
    return np.asarray(np.greater(first, second) / 2 + np.greater_equal(first, second) / 2)


def _losses(members: Array, others: Array) -> tuple[Array, Array]:
    m, o = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if m.ndim != 2 or o.ndim != 2 or len(m) != len(o) or 0 in m.shape + o.shape:
        raise ValueError(
            f"expected losses [model, row] of the same models, got {m.shape} and {o.shape}"
        )
    if np.isnan(m).any() or np.isnan(o).any():
        raise ValueError("the losses hold values that are not a number")
    return m, o


def _attack(members: Array, others: Array) -> MembershipAttack:
    """AUC and rate of each model; the higher a score, the more it looks like a training row."""
    ordered = np.sort(others, 1)
    allowed = int(FALSE_POSITIVES * ordered.shape[1])
    bar = ordered[:, -1 - allowed, None]
    below = [
        [np.searchsorted(row, scores, side).mean() for side in ("left", "right")]
        for row, scores in zip(ordered, members, strict=True)
    ]
    return MembershipAttack(np.mean(below, 1) / ordered.shape[1], (members > bar).mean(1))
