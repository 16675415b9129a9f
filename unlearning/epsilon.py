"""The epsilon of unlearning that attacks on many models allow, as the 2023 competition has it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from unlearning.klom import Array, check_margins

Flags = np.ndarray[Any, np.dtype[np.bool_]]

DELTA = 1e-5
WIDTH = 0.5


@dataclass(frozen=True)
class Forgetting:
    """What single-threshold attacks on many models allow to say of each forgotten row.

    Args:
        epsilon: [target]; infinite where a threshold separates all models.
        quality: mean over targets of 2^-floor(epsilon / .5), from 0 to 1.
        largest: the largest finite epsilon that so many models can show.
    """

    epsilon: Array
    quality: float
    largest: float


def forgetting_epsilon(unlearned: Array, oracles: Array) -> Forgetting:
    """Epsilon of unlearning of each row: how well the best of four attacks tells the models apart.

    An attack calls a model unlearned by one threshold on its margin (above it, or below it) or on
    the distance of its margin from the median of all (outside it, or inside it, which finds
    samples that are too wide or too narrow). With its false positive rate a and its false negative
    rate b, epsilon = max over attacks and thresholds of ln((1 - delta - a) / b) and
    ln((1 - delta - b) / a), at least 0; delta = 1e-5. Thresholds where one rate alone is 0 are left
    out, because they speak of too few models.

    Direction: lower epsilon, and higher quality, is better. Reference: the oracles. Null: far from
    0, because the best threshold is chosen on the models it is judged by, mostly where one of N
    oracles lies beside five of N others: equal samples give a median of ln 5 = 1.6 at 20 to 512
    models alike and a quality of .19 to .17, a shift by 1 sd 2.8 and .03 with 100. Resolution: N
    models show no finite epsilon above ln(N (1 - delta) - 1), 4.6 for 100; the competition had 512.

    Args:
        unlearned: margins [model, target].
        oracles: margins [model, target].

    Returns:
        Epsilon of each target, the mean quality, and the resolution.

    Raises:
        ValueError: the shapes do not fit, or a margin is not a number.

    Example:
        >>> rows = np.arange(6.0)[:, None]
        >>> forgetting_epsilon(rows, rows + 10).epsilon, forgetting_epsilon(rows, rows).epsilon
        (array([inf]), array([0.]))

    Source: the NeurIPS 2023 machine unlearning competition; Triantafillou et al. 2024
        (arXiv 2406.09073).
    """
    u, o = check_margins(unlearned, oracles)
    middle = np.median(np.concatenate([u, o]), 0)
    epsilon = np.maximum(_best(u, o), _best(np.abs(u - middle), np.abs(o - middle)))
    shares = 2.0 ** -np.floor(epsilon / WIDTH)
    fewest = min(len(u), len(o))
    largest = float(np.log(max(fewest * (1 - DELTA) - 1, 1)))
    quality = float(shares.mean()) if shares.size else float("nan")
    return Forgetting(epsilon, quality, largest)


def _best(unlearned: Array, oracles: Array) -> Array:
    """Largest epsilon of a threshold on a statistic, taken either way round, [target]."""
    both = np.concatenate([unlearned, oracles])
    order = np.argsort(both, 0, kind="stable")
    ranked = np.take_along_axis(both, order, 0)
    ours = (order < len(unlearned)).cumsum(0)[:-1]
    theirs = np.arange(1, len(both))[:, None] - ours
    possible = ranked[1:] > ranked[:-1]  # no threshold parts equal margins
    below, oracles_below = ours / len(unlearned), theirs / len(oracles)
    above = _epsilon(1 - oracles_below, below, possible)
    return np.maximum(above, _epsilon(oracles_below, 1 - below, possible))


def _epsilon(positive: Array, negative: Array, possible: Flags) -> Array:
    """Largest epsilon over thresholds [threshold, target] from the two rates, [target]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.log((1 - DELTA - positive) / negative)
        second = np.log((1 - DELTA - negative) / positive)
    found = np.fmax(np.fmax(first, second), 0)
    found = np.where((positive == 0) != (negative == 0), 0, found)
    return np.asarray(np.where(possible, found, 0).max(0, initial=0))
