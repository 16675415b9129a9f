"""What a bank of retrained models gives: weights of means, and factors of deviations."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from attribution.cases import KINDS, Case, Numbers
from attribution.forget import Mask

# How often the expected size of a squared deviation is taken anew, and its floor as a share of the
# variances before they have factors.
ROUNDS, LEAST = 8, 1e-3


def nonnegative_squares(gram: Numbers, right: Numbers) -> Any:
    """Non-negative least squares for a few columns: the best of all choices of columns.

    Minimises w^T G w - 2 w^T r over w >= 0, where G = C^T C and r = C^T y.

    Args:
        gram: G, [column, column].
        right: r, [column].

    Returns:
        w, [column].

    Example:
        >>> nonnegative_squares(np.eye(2), np.array([2.0, -1.0]))
        array([2., 0.])
    """
    best, lowest = np.zeros(len(gram)), 0.0
    for number in range(1, 2 ** len(gram)):
        chosen = np.flatnonzero([number >> k & 1 for k in range(len(gram))])
        part = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], right[chosen])[0]
        height = -float(part @ right[chosen])  # of the parabola, at its lowest point
        if part.min() >= 0 and height < lowest:
            best, lowest = np.zeros(len(gram)), height
            best[chosen] = part
    return best


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


def mean_squares(cases: Sequence[Case], kind: int, *means: Sequence[Numbers]) -> tuple[Any, Any]:
    """What each forget set adds to the least squares of its measured changes on predicted ones.

    Each set weighs one over the squared change of its rows of that kind.

    Args:
        cases: the forget sets.
        kind: of row, a number of `KINDS`.
        means: of one or more predictors, for each set [target, output].

    Returns:
        C^T C, [set, predictor, predictor], and C^T y, [set, predictor].

    Example:
        >>> from attribution import ForgetSet
        >>> from examples.digits import task
        >>> one, forget = np.ones((1797, 10)), ForgetSet.of(task, ["train-17"])
        >>> gram, right = mean_squares([Case(task, forget, 0 * one, 2 * one)], 2, [one])
        >>> gram, right
        (array([[[0.25]]]), array([[0.5]]))
    """
    grams, rights = [], []
    for case, *told in zip(cases, *means, strict=True):
        rows = case.kinds[kind]
        columns = np.stack([joined([mean[rows]]) for mean in told])
        weighed = columns * case.weight(kind)
        grams.append(weighed @ columns.T)
        rights.append(weighed @ joined([case.change[rows]]))
    return np.stack(grams), np.stack(rights)


def weights_without(gram: Numbers, right: Numbers) -> Numbers:
    """Non-negative weights of predictors, fitted for each forget set to all other sets.

    Args:
        gram: of each set, [set, predictor, predictor]; see `mean_squares`.
        right: likewise, [set, predictor].

    Returns:
        Weights, [set left out, predictor]; 0 where there is no other set.

    Example:
        >>> weights_without(np.ones((2, 1, 1)), np.array([[2.0], [3.0]]))
        array([[3.],
               [2.]])
    """
    left = zip(gram.sum(0) - gram, right.sum(0) - right, strict=True)
    return np.stack([nonnegative_squares(*one) for one in left])


def held_out_error(
    cases: Sequence[Case], *means: Sequence[Numbers], added: Sequence[Numbers] | None = None
) -> float:
    """Error of a weighed sum of predictions on forget sets that its weights were not fitted to.

    For each set the weights of each kind of row are fitted to all other sets; see `Case.error`.

    Args:
        cases: the forget sets, two or more.
        means: of one or more predictors, for each set [target, output].
        added: of one more, which is weighed against the weighed sum of the others.

    Returns:
        The mean error over the sets.

    Example:
        >>> from attribution import ForgetSet
        >>> from examples.digits import task
        >>> one = np.tile(np.eye(10)[0], (1797, 1))
        >>> sets = [ForgetSet.of(task, [f"train-{i}"]) for i in (17, 18)]
        >>> cases = [Case(task, forget, 0 * one, 3 * one) for forget in sets]
        >>> round(held_out_error(cases, [one, one]), 6)
        0.0
    """
    if added is None:
        squares = [mean_squares(cases, kind, *means) for kind in range(len(KINDS))]
        weights = np.stack([weights_without(*of_kind) for of_kind in squares], 1)
    else:
        means = (*means, added)
        weights = np.stack([_in_turn_without(cases, k, *means) for k in range(len(KINDS))], 1)
    told = zip(cases, weights, zip(*means, strict=True), strict=True)
    return float(np.mean([case.error(_summed(own, case, each)) for case, own, each in told]))


def _summed(weights: Numbers, case: Case, means: Sequence[Numbers]) -> Any:
    """The sum of predictions with weights [kind, predictor]."""
    return sum(w[case.kind_numbers, None] * m for w, m in zip(weights.T, means, strict=True))


def _in_turn_without(cases: Sequence[Case], kind: int, *means: Sequence[Numbers]) -> Numbers:
    """As `weights_without`, the last predictor weighed against the weighed sum of the others."""
    gram, right = mean_squares(cases, kind, *means)
    found = []
    for g, r in zip(gram.sum(0) - gram, right.sum(0) - right, strict=True):
        first = nonnegative_squares(g[:-1, :-1], r[:-1])
        both = np.zeros((2, len(r)))
        both[0, :-1], both[1, -1] = first, 1
        found.append(nonnegative_squares(both @ g @ both.T, both @ r) @ both)
    return np.stack(found)
