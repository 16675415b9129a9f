"""Linear datamodeling score: do scores rank models trained on random subsets as retraining does?"""

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from attribution.bootstrap import bootstrap
from attribution.ensemble import Ensemble, subsets_left
from attribution.ensemble_training import train_models
from attribution.seeds import derive_seed
from attribution.subsets import draw_subsets
from attribution.task import Rows, Task
from stores import Where

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

COLUMNS_AT_ONCE = 4096


@dataclass(frozen=True)
class LDS:
    """Linear datamodeling scores; not a number for what does not differ between subsets.

    Args:
        values: Spearman correlation of predicted and measured outputs over the subsets,
            [target], or [target, output] of logits.
        split_half: the same between two trainings on the same subsets; not a number where
            subsets were trained on once.
        ceiling: the score of a predictor that knew the mean output on every subset. Single
            targets are as noisy as the number of subsets makes them: read its mean.
        mean: of the values, over targets.
        interval: its lower and upper end at 95 %, resampling targets.
    """

    values: Array
    split_half: Array
    ceiling: Array
    mean: float
    interval: tuple[float, float]


def lds_bank(
    task: Task,
    to: Where,
    *,
    models: int = 200,
    repeats: int = 2,
    design: str = "half",
    seed: int = 0,
    device: str = "cpu",
    workers: int | None = None,
    scheduler: str | None = None,
) -> Ensemble:
    """Trains the ground truth of LDS: each subset several times; resumes by itself.

    Its subsets and models have seeds of their own, so they are never those that datamodels of
    the same seed were fitted on.

    Args:
        task: whose training rows.
        to: folder of the ensemble.
        models: how many are trained in all.
        repeats: independent trainings on each subset; two or more give a ceiling.
        design: how subsets are drawn, as in `draw_subsets`.
        seed: of the bank.
        device: where to compute.
        workers: processes; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The ensemble, trainings on the same subset in a row.

    Raises:
        ValueError: a number of models that the repeats do not divide, fewer than 2 subsets, or
            what `draw_subsets` and `train_models` refuse.

    Example:
        >>> import tempfile
        >>> from examples.digits import task
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bank = lds_bank(task, f"{folder}/bank", models=4, workers=0)
        ...     len(bank), bool((bank.masks[0] == bank.masks[1]).all())
        (4, True)
    """
    if repeats < 1 or models % repeats or models // repeats < 2:
        raise ValueError(
            f"{models} models cannot be {repeats} trainings on each of at least 2 subsets: choose"
            " repeats above 0 and models a multiple of it"
        )
    own = derive_seed(seed, "ground truth of LDS")
    drawn = draw_subsets(task, models=models // repeats, design=design, seed=own)
    # Repeats stand side by side, because models of one size are trained together.
    masks, judges = (np.repeat(values, repeats, axis=0) for values in (drawn.masks, drawn.judges))
    # Of a bank from which rows were purged another draw would come.
    subsets = subsets_left(to) or replace(drawn, masks=masks, judges=judges)
    return train_models(task, subsets, to, device=device, workers=workers, scheduler=scheduler)


def linear_datamodeling_score(
    scores: Array, bank: Ensemble, *, targets: Rows | None = None, seed: int = 0
) -> LDS:
    """Scores of training rows against models retrained on subsets.

    A subset's predicted output is the sum of its rows' scores; measured is the mean over the
    trainings on it. LDS is their Spearman correlation over the subsets.

    Args:
        scores: effect of including each row, [train, target] of margins or
            [train, target, output] of outputs, in any unit.
        bank: ensemble that no score was fitted on, each subset trained equally often; see
            `lds_bank`.
        targets: positions among the task's targets of the scores' columns; None: all. A
            training row's own score decides its LDS: test rows tell methods apart.
        seed: of the resampled targets.

    Returns:
        The scores by target, their ceiling and their mean.

    Raises:
        ValueError: shapes that do not fit, scores that are not finite, fewer than 2 subsets, or
            subsets trained on unequally often.

    Example:
        >>> import tempfile
        >>> from examples.digits import task
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bank = lds_bank(task, f"{folder}/bank", models=6, workers=0)
        ...     measured = bank.masks.T.astype(float) @ bank.margins
        >>> found = linear_datamodeling_score(measured, bank)
        >>> found.values.shape, bool(found.mean > 0.5)
        ((1797,), True)

    Source: TRAK (arXiv 2303.14186), definition of the linear datamodeling score.
    """
    trainings, masks = _trainings(scores, bank, targets)
    values = lds(_subset_sums(scores, masks), trainings.mean(0))
    halves = split_half(trainings)
    found = bootstrap(values, seed=seed)
    return LDS(
        values, halves, split_half_ceiling(halves, len(trainings)), found.mean, found.interval
    )


def lds(predictions: Array, truths: Array) -> Array:
    """Spearman correlation over subsets: the Pearson correlation of ranks, ties sharing theirs.

    Args:
        predictions: predicted outputs in any unit, [subset, target], or with further axes.
        truths: measured outputs, same shape.

    Returns:
        The correlation of each target, [target, ...]; not a number where either is constant.

    Raises:
        ValueError: the shapes differ, fewer than 2 subsets, or values that are not finite.

    Example:
        >>> truths = np.array([[0.0, 5.0], [1.0, 5.0], [4.0, 5.0]])
        >>> lds(np.array([[2.0, 1.0], [3.0, 2.0], [9.0, 3.0]]), truths)
        array([ 1., nan])
    """
    if np.shape(predictions) != np.shape(truths) or np.ndim(truths) < 2 or len(truths) < 2:
        raise ValueError(
            f"expected predictions and truths of one shape [subset, target] and 2 or more subsets,"
            f" got {np.shape(predictions)} and {np.shape(truths)}"
        )
    _refuse_not_finite(predictions, "predictions")
    _refuse_not_finite(truths, "truths")
    a, b = (ranks(values) - (len(truths) + 1) / 2 for values in (predictions, truths))
    scale = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    nothing = np.full(scale.shape, np.nan)
    return np.asarray(np.divide((a * b).sum(0), scale, out=nothing, where=scale > 0))


def ranks(values: Array) -> Array:
    """Ranks along the first axis from 1, equal values sharing the mean of theirs.

    Args:
        values: [subset, ...], finite.

    Returns:
        Ranks, same shape.

    Example:
        >>> ranks(np.array([7.0, 3.0, 7.0, 9.0]))
        array([2.5, 1. , 2.5, 4. ])
    """
    order = np.argsort(values, axis=0, kind="stable")
    ascending = np.take_along_axis(values, order, axis=0)
    steps = ascending[1:] != ascending[:-1]
    edge = np.ones((1, *steps.shape[1:]), dtype=bool)
    places = np.arange(1, len(values) + 1).reshape(-1, *(1 for _ in steps.shape[1:]))
    opens, closes = np.concatenate([edge, steps]), np.concatenate([steps, edge])
    first = np.maximum.accumulate(np.where(opens, places, 1))
    last = np.minimum.accumulate(np.where(closes, places, len(values))[::-1])[::-1]
    shared = np.empty(np.shape(values))
    np.put_along_axis(shared, order, (first + last) / 2, axis=0)
    return shared


def split_half(trainings: Array) -> Array:
    """Spearman correlation between trainings on the same subsets, mean over their pairs.

    Args:
        trainings: outputs of independent trainings, [repeat, subset, target].

    Returns:
        The correlation of each target, [target]; not a number for a single repeat.

    Raises:
        ValueError: fewer than 2 subsets, or outputs that are not finite.

    Example:
        >>> split_half(np.array([[[1.0], [2.0], [3.0]], [[1.0], [3.0], [2.0]]]))
        array([0.5])
    """
    pairs = [lds(a, b) for a, b in combinations(trainings, 2)]
    return np.mean(pairs, axis=0) if pairs else np.full(trainings.shape[2:], np.nan)


def split_half_ceiling(correlation: Array, repeats: int = 1) -> Array:
    """LDS that the best predictor reaches against the mean of some trainings.

    One training gives y = s + e: the mean s over trainings on that subset, which is all that can
    be predicted, and chance e. Two trainings correlate by c = var(s) / (var(s) + var(e)), and
    s itself with one of them by sqrt(c). Of the mean of R trainings the share of s is
    R c / (1 + (R - 1) c) (Spearman and Brown), and the ceiling its root. For the ranks of normal
    variables, rho = 6 / pi asin(c / 2) leads from Pearson's correlation to Spearman's and back.

    Args:
        correlation: Spearman correlation of two trainings, as from `split_half`; a negative one
            is chance and counts as 0.
        repeats: R, the trainings that the measured outputs are the mean of.

    Returns:
        The ceiling, Spearman, same shape.

    Example:
        >>> split_half_ceiling(np.array([0.5, -0.1])).round(3)
        array([0.703, 0.   ])
        >>> split_half_ceiling(np.array([0.5]), repeats=2).round(3)
        array([0.813])

    Source: Spearman 1910; Brown 1910; ranks of normal variables: Pearson 1907.
    """
    c = np.maximum(2 * np.sin(np.pi / 6 * correlation), 0)
    best = np.sqrt(repeats * c / (1 + (repeats - 1) * c))
    return np.asarray(6 / np.pi * np.arcsin(best / 2))


def _trainings(scores: Array, bank: Ensemble, targets: Rows | None) -> tuple[Array, Array]:
    """Measured outputs [repeat, subset, target, ...] and the subsets [subset, train]."""
    if np.ndim(scores) not in (2, 3):
        raise ValueError(
            f"expected scores [train, target] or [train, target, output], got shape"
            f" {np.shape(scores)}"
        )
    _refuse_not_finite(scores, "scores")
    outputs = bank.margins if np.ndim(scores) == 2 else bank.outputs
    measured = outputs if targets is None else outputs[:, targets]
    expected = (bank.masks.shape[1], *measured.shape[1:])
    if np.shape(scores) != expected:
        raise ValueError(
            f"expected scores of shape {expected}, a row for each training row and a column for"
            f" each target, got {np.shape(scores)}: name the columns by targets="
        )
    models = _models_by_subset(bank)
    return measured[models], bank.masks[models[0]]


def _models_by_subset(bank: Ensemble) -> Rows:
    """Models trained on each subset, [repeat, subset]."""
    _, subset, counts = np.unique(bank.masks, axis=0, return_inverse=True, return_counts=True)
    if len(set(counts.tolist())) > 1:
        raise ValueError(
            f"{bank.store.path} has subsets trained on {counts.min()} to {counts.max()} times:"
            " LDS needs each equally often, as lds_bank trains them"
        )
    if len(counts) < 2:
        raise ValueError(
            f"{bank.store.path} has 1 subset: LDS ranks models on different ones; make them with"
            " lds_bank"
        )
    return np.argsort(subset, kind="stable").reshape(len(counts), -1).T


def _subset_sums(scores: Array, masks: Array) -> Array:
    """Sum of the scores of each subset's rows, in float64, [subset, target, ...]."""
    included, flat = masks.astype(np.float64), np.reshape(scores, (len(scores), -1))
    pieces = range(0, flat.shape[1], COLUMNS_AT_ONCE)
    sums = [included @ flat[:, i : i + COLUMNS_AT_ONCE].astype(np.float64) for i in pieces]
    return np.concatenate(sums, axis=1).reshape(len(masks), *np.shape(scores)[1:])


def _refuse_not_finite(values: Array, name: str) -> None:
    if not np.isfinite(values).all():
        bad = np.argwhere(~np.isfinite(values))[0].tolist()
        raise ValueError(f"{name} hold a value that is not finite at {bad}")
