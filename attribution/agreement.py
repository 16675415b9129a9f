"""How well predicted changes agree with measured ones: slope, R2 and its ceiling, intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

LEVELS = (80, 95)


@dataclass(frozen=True)
class Comparison:
    """Predicted and measured changes of one forget set, arrays of one shape.

    Args:
        predicted: predicted changes, any shape.
        measured: differences of mean outputs.
        std: predicted uncertainty, one standard deviation.
        error: standard error of the measured differences; it widens the interval, because the
            measurement itself is noisy.
        noise: standard deviation of the outputs of one retraining; None: not known.

    Raises:
        ValueError: the shapes differ, or there is nothing to compare.
    """

    predicted: Array
    measured: Array
    std: Array
    error: Array
    noise: Array | None = None

    def __post_init__(self) -> None:
        parts = (self.predicted, self.measured, self.std, self.error, self.noise)
        shapes = {np.shape(values) for values in parts if values is not None}
        if len(shapes) != 1:
            raise ValueError(f"expected arrays of one shape, got {sorted(shapes)}")
        if not np.size(self.predicted):
            raise ValueError("expected at least one change to compare, got none")

    @property
    def size(self) -> int:
        """Number of changes."""
        return int(np.size(self.predicted))


@dataclass(frozen=True)
class Agreement:
    """Agreement of predicted with measured changes, over rows and outputs together.

    An interval at 1 - alpha is prediction -+ z(1 - alpha / 2) sqrt(std^2 + error^2).

    Args:
        slope: least-squares factor that maps prediction to truth; 1 is calibrated, above 1 the
            prediction is too small.
        r2: 1 - squared error / squared truth: 0 is as good as predicting no change.
        corr: Pearson correlation.
        ceiling: the r2 that the true mean change would reach against this noisy measurement.
        coverage: share of measured changes inside the predicted interval, by its level in %.
        width: mean width of the intervals, upper end less lower end, in output units, by level.
        interval_score: mean of width + 2 / alpha x distance from the interval of a measured
            change outside it, in output units, by level; lower is better.
        constant_width: mean width that intervals need to cover as many changes as these when all
            of a forget set are equally wide, by level; above `width`, the error bars know more
            than the size of the change. Over several forget sets the constant is a multiple of
            the set's mean |predicted change|, one multiple for all of them.
        retrained_models: how many models would have to be retrained for their mean to be as near:
            sum of noise^2 over the sum of (predicted - measured)^2 - error^2, but no more than
            `most_models`, from where on there may be more. None where the noise is not known.
        most_models: how many models the measurement is worth, sum of noise^2 over that of error^2.

    Source: interval score, Gneiting and Raftery 2007, equation 43.
    """

    slope: float
    r2: float
    corr: float
    ceiling: float
    coverage: dict[str, float]
    width: dict[str, float]
    interval_score: dict[str, float]
    constant_width: dict[str, float]
    retrained_models: float | None
    most_models: float | None

    @property
    def share_of_ceiling(self) -> float:
        """The r2 over its ceiling; not a number where noise leaves nothing to explain."""
        return self.r2 / self.ceiling if self.ceiling > 0 else float("nan")


@dataclass(frozen=True)
class SetAverages:
    """What a predictor reaches on forget sets one by one, rather than on their rows together.

    Args:
        slope: mean over the forget sets.
        r2: mean over the forget sets.
        share_of_ceiling: mean r2 over its ceiling.
        lowest_share_of_ceiling: that of the worst forget set.
    """

    slope: float
    r2: float
    share_of_ceiling: float
    lowest_share_of_ceiling: float


def pooled_agreement(sets: Sequence[Comparison]) -> Agreement:
    """Compares predicted with measured changes of forget sets, all their rows together.

    Args:
        sets: one comparison a forget set.

    Returns:
        The agreement over all their changes.

    Raises:
        ValueError: no forget set.

    Example:
        >>> change, nothing = np.array([1.0, -2.0]), np.zeros(2)
        >>> found = pooled_agreement([Comparison(change, 2 * change, np.ones(2), nothing)])
        >>> found.slope, found.r2, found.coverage["95"]
        (2.0, 0.75, 0.5)
        >>> few = Comparison(change, change + 0.1, np.ones(2), nothing)
        >>> many = Comparison(5 * change, 5 * change + 0.5, np.ones(2), nothing)
        >>> found = pooled_agreement([few, many])
        >>> {level: round(width, 2) for level, width in found.width.items()}
        {'80': 2.56, '95': 3.92}
        >>> {level: round(width, 2) for level, width in found.constant_width.items()}
        {'80': 0.6, '95': 0.6}
    """
    if not sets:
        raise ValueError("expected at least one forget set to compare, got none")
    p, t, std, error = (
        np.concatenate([np.ravel(getattr(one, name)).astype(np.float64) for one in sets])
        for name in ("predicted", "measured", "std", "error")
    )
    power, truth, off = float(p @ p), float(t @ t), np.abs(p - t)
    halves = {str(level): _quantile(level) * np.sqrt(std**2 + error**2) for level in LEVELS}
    inside = {level: int((off <= half).sum()) for level, half in halves.items()}
    known, unknown = not np.isnan(std).any(), float("nan")
    return Agreement(
        slope=float(p @ t) / power if power else float("nan"),
        r2=1 - float((p - t) @ (p - t)) / truth if truth else float("nan"),
        corr=_correlation(p, t),
        ceiling=1 - float(error @ error) / truth if truth else float("nan"),
        coverage={level: count / len(off) if known else unknown for level, count in inside.items()},
        width={level: float(2 * half.mean()) for level, half in halves.items()},
        interval_score={
            level: float((2 * half + _penalty(level) * np.maximum(off - half, 0)).mean())
            for level, half in halves.items()
        },
        constant_width=_constant_width(off, _scales(sets), inside)
        if known
        else dict.fromkeys(inside, unknown),
        retrained_models=_models(sets, max(float(off @ off - error @ error), float(error @ error))),
        most_models=_models(sets, float(error @ error)),
    )


def set_averages(found: Sequence[Agreement]) -> SetAverages:
    """Averages over forget sets, each counted once, however many rows it has.

    Args:
        found: the agreement on each forget set.

    Returns:
        The averages; not a number where a set's own value is not.

    Raises:
        ValueError: no forget set.

    Example:
        >>> change, none = np.array([1.0, -2.0]), np.zeros(2)
        >>> sets = [Comparison(change * s, change, none, none) for s in (1, 2)]
        >>> found = [pooled_agreement([one]) for one in sets]
        >>> set_averages(found)
        SetAverages(slope=0.75, r2=0.5, share_of_ceiling=0.5, lowest_share_of_ceiling=0.0)
    """
    if not found:
        raise ValueError("expected at least one forget set to average, got none")
    rows = np.array([[one.slope, one.r2, one.share_of_ceiling] for one in found])
    slope, r2, share = (float(column.mean()) for column in rows.T)
    return SetAverages(slope, r2, share, float(rows[:, 2].min()))


def _quantile(level: int) -> float:
    return NormalDist().inv_cdf(0.5 + level / 200)


def _penalty(level: str) -> float:
    return 2 / (1 - int(level) / 100)


def _scales(sets: Sequence[Comparison]) -> Array:
    # A single forget set has one width, whatever it is a multiple of.
    sizes = [np.abs(one.predicted).mean(dtype=np.float64) if sets[1:] else 1.0 for one in sets]
    return np.repeat(np.array(sizes), [one.size for one in sets])


def _constant_width(off: Array, scales: Array, inside: dict[str, int]) -> dict[str, float]:
    """Mean width 2 c scale, with the smallest c that holds as many as were inside."""
    unreachable = np.where(off > 0, np.inf, 0)
    factors = np.sort(np.divide(off, scales, out=unreachable, where=scales > 0))
    chosen = {level: float(factors[count - 1]) if count else 0 for level, count in inside.items()}
    return {level: 2 * factor * float(scales.mean()) for level, factor in chosen.items()}


def _models(sets: Sequence[Comparison], squares: float) -> float | None:
    """How many models' mean is off by such a sum of squares."""
    noises = [np.square(one.noise, dtype=np.float64) for one in sets if one.noise is not None]
    if len(noises) < len(sets):
        return None
    total = sum(float(noise.sum()) for noise in noises)
    return total / squares if squares else float("inf")


def _correlation(p: Array, t: Array) -> float:
    if len(p) < 2 or not p.std() or not t.std():
        return float("nan")
    return float(np.corrcoef(p, t)[0, 1])
