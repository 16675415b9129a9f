"""Factors that make deviations right, from what a bank of retrained models says."""

from collections.abc import Sequence

import numpy as np

from attribution.cases import Case, Numbers
from attribution.forget import Mask
from attribution.weighing import nonnegative_squares

# How often the expected size of a squared deviation is taken anew, and its floor as a share of the
# variances before they have factors.
ROUNDS, LEAST = 8, 1e-3


def variance_factors(
    left: Numbers,
    *variances: Numbers,
    beside: Numbers | float = 0.0,
    weight: Numbers | None = None,
) -> tuple[float, ...]:
    """Factors a >= 0 of standard deviations whose variances explain what is left.

    left = sum_k a_k^2 variance_k, least squares, weighted by the expected size, because a squared
    deviation is off in proportion to itself; the size expected is what the last fit says.

    Args:
        left: squared deviations, [value], less what is known of their variance; where all
            variances are 0 they tell nothing. A value where anything is not finite is left out.
        variances: one or more, each [value]; not finite where one is unknown.
        beside: what was taken off, as it is to be counted in the expected size, [value]. It must
            not tell one value from the next where it is itself measured: one that is too small by
            chance would weigh more, and leave more.
        weight: of each value's squared error, [value]; None: all alike.

    Returns:
        One factor a variance; NaN where no value is left.

    Example:
        >>> variances = np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 1.0])
        >>> a, b = variance_factors(4 * variances[0] + 9 * variances[1], *variances)
        >>> round(a, 3), round(b, 3)
        (2.0, 3.0)
    """
    columns = np.stack(variances, 1)
    beside = np.broadcast_to(beside, left.shape)
    finite = np.isfinite(columns).all(1) & np.isfinite(left) & np.isfinite(beside)
    if not finite.any():
        return (float("nan"),) * len(variances)
    told = finite & (columns.sum(1) > 0)
    columns, left, beside = columns[told], left[told], beside[told]
    least = LEAST * columns.sum(1)
    expected = columns.sum(1) + beside
    shares = 1.0 if weight is None else np.sqrt(weight[told])
    found = np.zeros(len(variances))
    for _ in range(ROUNDS):
        scale = shares / expected
        scaled = columns * scale[:, None]
        found = nonnegative_squares(scaled.T @ scaled, scaled.T @ (left * scale))
        expected = np.maximum(columns @ found, least) + beside
    return tuple(float(root) for root in np.sqrt(found))


def deviation_factors(
    predicted: Sequence[tuple[Case, Mask, Numbers]],
    *variances: Sequence[Numbers],
    noise: Sequence[Numbers],
) -> tuple[float, ...]:
    """Factors of the deviations of a prediction and of the spread of one retraining.

    For the change t of a forget set, which a few retrained models tell,

        (t - predicted)^2 = sum_k a_k^2 variance_k + variance of t,

    least squares weighted by the expected size, see `variance_factors`, in which the variance of t
    counts by its mean over the set's rows. Deviations that a few checkpoints tell get larger
    factors than their mean size asks for, as intervals that are too narrow as often as too wide
    need them. b^2 is the mean variance of one retraining over the mean of noise^2: the same may not
    happen to it. Every forget set weighs the same: a coherent one has fewer rows, and says alone
    what coherence does.

    Args:
        predicted: each forget set, the rows looked at, and their predicted change, [row, output].
        variances: one or more, each a list of [row, output].
        noise: standard deviation of one retraining, list of [row, output].

    Returns:
        a_1 to a_k, not numbers where no deviation is finite, and b, which is 1 where nothing tells
        the variance of one retraining.

    Example:
        >>> from attribution import ForgetSet
        >>> from examples.digits import task
        >>> one, forget = np.ones((1797, 10)), ForgetSet.of(task, ["train-17"])
        >>> case = Case(task, forget, 0 * one, 3 * one, 4 * one, change_variance=one)
        >>> rows = np.ones(1797, dtype=bool)
        >>> a, b = deviation_factors([(case, rows, 0 * one)], [2 * one], noise=[one])
        >>> round(a, 3), round(b, 3)
        (2.0, 2.0)
    """
    alike = joined([np.full(mean.shape, 1 / mean.size) for *_, mean in predicted])
    error = joined([np.square(case.change[rows] - mean) for case, rows, mean in predicted])
    chance = [_values(case.change_variance, case, rows) for case, rows, _ in predicted]
    beside = joined([np.full(each.shape, each.mean()) for each in chance])
    left, columns = error - joined(chance), [joined(each) for each in variances]
    factors = variance_factors(left, *columns, beside=beside, weight=alike)
    measured = joined([_values(case.noise_variance, case, rows) for case, rows, _ in predicted])
    return *factors, _noise_factor(measured, np.square(joined(noise)), alike)


def _values(of: Numbers | float, case: Case, rows: Mask) -> Numbers:
    return np.broadcast_to(of, case.change.shape)[rows]


def _noise_factor(measured: Numbers, told: Numbers, weight: Numbers) -> float:
    known = np.isfinite(told) & (measured > 0)
    expected = float(weight[known] @ told[known])
    return float(np.sqrt(weight[known] @ measured[known] / expected)) if expected > 0 else 1.0


def joined(parts: Sequence[Numbers]) -> Numbers:
    """All values of some arrays in a row, float64.

    Args:
        parts: arrays of any shape, one or more.

    Returns:
        The values, [value].

    Example:
        >>> joined([np.ones((1, 2)), np.zeros(1)])
        array([1., 1., 0.])
    """
    return np.concatenate([part.ravel() for part in parts]).astype(np.float64)
