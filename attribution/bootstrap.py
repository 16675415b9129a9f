"""Bootstrap over targets: how far other targets would move a mean, or a difference of means."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from attribution.seeds import generator

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over targets and how far other targets would move it.

    Args:
        mean: over the targets.
        interval: lower and upper end at 95 %.
    """

    mean: float
    interval: tuple[float, float]


def bootstrap(values: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean over targets with the 95 % interval of the percentile bootstrap over targets.

    Targets share the subsets and models they are measured on; these are taken as given.

    Args:
        values: [target], or [target, output], whose outputs stay together; targets with a value
            that is not a number are left out.
        resamples: how often the targets are drawn anew.
        seed: of the draws.

    Returns:
        Mean and interval; not a number where fewer than 2 targets are left.

    Raises:
        ValueError: no resamples.

    Example:
        >>> bootstrap(np.array([1.0, 1.0, np.nan]))
        Estimate(mean=1.0, interval=(1.0, 1.0))

    Source: Efron 1979.
    """
    if resamples < 1:
        raise ValueError(f"expected at least 1 resample, got {resamples}")
    each = np.mean(values, axis=tuple(range(1, np.ndim(values))))
    each = each[~np.isnan(each)]
    if len(each) < 2:
        return Estimate(float("nan"), (float("nan"), float("nan")))
    random = generator(seed, "bootstrap over targets")
    means = [each[random.integers(len(each), size=len(each))].mean() for _ in range(resamples)]
    lower, upper = np.percentile(means, [2.5, 97.5]).tolist()
    return Estimate(float(each.mean()), (lower, upper))


def paired_difference(
    first: Array, second: Array, *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Mean difference of two scorers on the same targets, with its 95 % interval.

    Args:
        first: values of one scorer, [target] or [target, output].
        second: values of the other on the same targets.
        resamples: how often the targets are drawn anew, both scorers' values together.
        seed: of the draws.

    Returns:
        Mean of first - second and its interval.

    Raises:
        ValueError: the shapes differ, or no resamples.

    Example:
        >>> paired_difference(np.array([0.4, 0.9]), np.array([0.3, 0.8])).mean.__round__(3)
        0.1
    """
    if np.shape(first) != np.shape(second):
        raise ValueError(
            f"expected two scorers' values on the same targets, got shapes {np.shape(first)} and"
            f" {np.shape(second)}"
        )
    return bootstrap(np.subtract(first, second), resamples=resamples, seed=seed)
