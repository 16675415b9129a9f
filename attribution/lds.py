"""How well predicted changes agree with measured ones: slope, R2 and its ceiling, coverage."""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

LEVELS = (80, 95)


@dataclass(frozen=True)
class Agreement:
    """Agreement of predicted with measured changes, over rows and outputs together.

    Args:
        slope: least-squares factor that maps prediction to truth; 1 is calibrated, above 1 the
            prediction is too small.
        r2: 1 - squared error / squared truth: 0 is as good as predicting no change.
        corr: Pearson correlation.
        ceiling: the r2 that the true mean change would reach against this noisy measurement.
        coverage: share of measured changes inside the predicted interval, by its level in %.
    """

    slope: float
    r2: float
    corr: float
    ceiling: float
    coverage: dict[str, float]


def agreement(predicted: Array, measured: Array, std: Array, error: Array) -> Agreement:
    """Compares predicted changes with measured ones.

    Args:
        predicted: predicted changes, any shape.
        measured: differences of mean outputs, same shape.
        std: predicted uncertainty, one standard deviation, same shape.
        error: standard error of the measured differences, same shape; it widens the interval,
            because the measurement itself is noisy.

    Returns:
        The agreement.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> change = np.array([1.0, -2.0])
        >>> found = agreement(change, 2 * change, np.ones(2), np.zeros(2))
        >>> found.slope, found.r2, found.coverage["95"]
        (2.0, 0.75, 0.5)
    """
    shapes = {np.shape(values) for values in (predicted, measured, std, error)}
    if len(shapes) != 1:
        raise ValueError(f"expected four arrays of one shape, got {sorted(shapes)}")
    p, t = np.ravel(predicted).astype(np.float64), np.ravel(measured).astype(np.float64)
    power, truth = float(p @ p), float(t @ t)
    width = np.sqrt(np.ravel(std).astype(np.float64) ** 2 + np.ravel(error).astype(np.float64) ** 2)
    off = np.abs(p - t)
    return Agreement(
        slope=float(p @ t) / power if power else float("nan"),
        r2=1 - float((p - t) @ (p - t)) / truth if truth else float("nan"),
        corr=_correlation(p, t),
        ceiling=1 - float(np.square(error).sum()) / truth if truth else float("nan"),
        coverage={str(level): float((off <= _quantile(level) * width).mean()) for level in LEVELS},
    )


def _quantile(level: int) -> float:
    return NormalDist().inv_cdf(0.5 + level / 200)


def _correlation(p: Array, t: Array) -> float:
    if len(p) < 2 or not p.std() or not t.std():
        return float("nan")
    return float(np.corrcoef(p, t)[0, 1])
