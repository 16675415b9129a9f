"""How predictors are weighed on a bank of retrained models, and how their sum grows."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from attribution.cases import KINDS, Case, Numbers

# What share of the factor growth may be where most rows change together: these, then the best
# one's neighbours.
SHARES, NEIGHBOURS = np.arange(0, 81, 5) / 100, np.arange(-4, 5) / 100
NEARER = 1e-9  # a gain below this share of what is explained is rounding
FEWEST_SETS = 10  # that can tell growth from chance


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


def mean_squares(cases: Sequence[Case], kind: int, *means: Sequence[Numbers]) -> tuple[Any, Any]:
    """What each forget set adds to the least squares of its measured changes on predicted ones.

    Each set weighs as `Case.weight` says of its rows of that kind.

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
        columns = np.stack([_flat(mean[rows]) for mean in told])
        weighed = columns * case.weight(kind)
        grams.append(weighed @ columns.T)
        rights.append(weighed @ _flat(case.change[rows]))
    return np.stack(grams), np.stack(rights)


def _flat(values: Numbers) -> Numbers:
    return values.ravel().astype(np.float64)


@dataclass(frozen=True)
class GrownWeights:
    """Weights of predictors, and how their sum grows with the rows that change together.

    Args:
        weights: of each predictor, >= 0, [predictor].
        growth: what one such row adds to the factor on the sum; see `growth_factor`.
        most: how many of them count at most.
    """

    weights: Numbers
    growth: float = 0.0
    most: float = 0.0

    def at(self, together: float) -> Numbers:
        """The weights for a forget set of which so many rows change together, [predictor]."""
        return np.asarray(self.weights * growth_factor(self.growth, self.most, together))


def growth_factor(growth: float, most: float, together: float) -> float:
    """Factor on a predicted change: 1 + growth x min(together, most).

    Where rows that hold an output in place go together, less is left to hold it, and the change is
    larger than the sum of what each of them does: to second order by a part in proportion to how
    many they are. Where they have little in common, more of what is predicted is error, and the
    best factor is smaller. Growth holds both; beyond what was measured it is taken to end.

    Args:
        growth: what one row adds.
        most: how many rows count at most.
        together: how many rows change together; see `rows_together`.

    Returns:
        The factor, 1 or more.

    Example:
        >>> growth_factor(0.01, 80, 50), growth_factor(0.01, 80, 1000)
        (1.5, 1.8)
    """
    return 1 + growth * min(together, most)


def fit_weights(gram: Numbers, right: Numbers, together: Numbers | None = None) -> GrownWeights:
    """Non-negative least squares over forget sets, with one growth of the weighed sum.

    Minimises sum_j f_j^2 w^T G_j w - 2 f_j w^T r_j over w >= 0 and the growth x >= 0, where
    f_j = 1 + x e_j and e_j rows of set j change together. The largest of these factors is
    1 / (1 - share); of the shares 0, 0.05, ..., 0.8 the best one is taken, and then the best of
    those around it that are 0.01 apart.

    Args:
        gram: G_j, [set, predictor, predictor]; see `mean_squares`.
        right: r_j, [set, predictor].
        together: e_j, [set]; None: nothing grows.

    Returns:
        The weights, 0 where there is no set, and how their sum grows.

    Example:
        >>> fit = fit_weights(np.ones((2, 1, 1)), np.array([[2.0], [3.0]]), np.array([0.0, 10.0]))
        >>> fit.weights.round(1), round(fit.growth, 2), fit.most
        (array([2.]), 0.05, 10.0)
    """
    most = 0.0 if together is None else float(together.max(initial=0.0))
    if together is None or not most > 0:
        return GrownWeights(nonnegative_squares(gram.sum(0), right.sum(0)))
    relative = together / most
    plain, *others = [_least(gram, right, relative, share) for share in SHARES]
    best = min([plain, *others], key=itemgetter(0))
    near = np.clip(best[1] + NEIGHBOURS, 0, SHARES[-1])
    best = min([_least(gram, right, relative, share) for share in near], key=itemgetter(0))
    _, share, weights = plain if best[0] > (1 + NEARER) * plain[0] else best
    return GrownWeights(weights, share / (1 - share) / most, most)


def _least(
    gram: Numbers, right: Numbers, relative: Numbers, share: float
) -> tuple[float, float, Numbers]:
    """What is minimised, where it is least for this share; the share; the weights."""
    factors = 1 + share / (1 - share) * relative
    grown = np.tensordot(factors, right, 1)
    weights = nonnegative_squares(np.tensordot(factors**2, gram, 1), grown)
    return -float(weights @ grown), float(share), weights


def weights_without(gram: Numbers, right: Numbers, together: Numbers | None = None) -> Numbers:
    """Non-negative weights of predictors, fitted for each forget set to all other sets.

    Args:
        gram: of each set, [set, predictor, predictor]; see `mean_squares`.
        right: likewise, [set, predictor].
        together: how many rows of each set change together, [set]; None: nothing grows.

    Returns:
        Weights, times the factor of the set left out, [set left out, predictor]; 0 where there is
        no other set.

    Example:
        >>> weights_without(np.ones((2, 1, 1)), np.array([[2.0], [3.0]]))
        array([[3.],
               [2.]])
    """
    return np.stack([_without(j, gram, right, together) for j in range(len(gram))])


def growth_helps(gram: Numbers, right: Numbers, together: Numbers) -> bool:
    """Whether a sum that grows is nearer on forget sets that it was not fitted to.

    With fewer than 10 sets, which often say so by chance, it is not.

    Args:
        gram: of each set, [set, predictor, predictor]; see `mean_squares`.
        right: likewise, [set, predictor].
        together: how many rows of each set change together, [set].

    Returns:
        True where the squared error of sets left out in turn, each with its weight, is less with
        growth by more than rounding.

    Example:
        >>> gram, rows = np.ones((12, 1, 1)), np.arange(12.0)
        >>> [growth_helps(gram, 2 + rows[:, None], each) for each in (rows, np.ones(12))]
        [True, False]
    """
    if len(gram) < FEWEST_SETS:
        return False
    grown, plain = weights_without(gram, right, together), weights_without(gram, right)
    before = _error(gram, right, plain)
    return _error(gram, right, grown) < before - NEARER * abs(before)


def _error(gram: Numbers, right: Numbers, weights: Numbers) -> float:
    """Squared error over all sets by weights of each, less what no weights change."""
    squares = np.einsum("sa,sab,sb->", weights, gram, weights)
    return float(squares - 2 * np.einsum("sa,sa->", weights, right))


def _without(left: int, gram: Numbers, right: Numbers, together: Numbers | None) -> Numbers:
    others = np.arange(len(gram)) != left
    if together is None:
        return fit_weights(gram[others], right[others]).weights
    return fit_weights(gram[others], right[others], together[others]).at(together[left])


def held_out_error(
    cases: Sequence[Case],
    *means: Sequence[Numbers],
    added: Sequence[Numbers] | None = None,
    together: Sequence[Numbers | None] = (None,) * len(KINDS),
) -> float:
    """Error of a weighed sum of predictions on forget sets that its weights were not fitted to.

    For each set the weights of each kind of row are fitted to all other sets; see `Case.error`.

    Args:
        cases: the forget sets, two or more.
        means: of one or more predictors, for each set [target, output].
        added: of one more, which is weighed against the weighed sum of the others.
        together: how many rows of each set change together, with which the last weighed sum grows,
            [kind][set]; None for kinds of row of which it does not.

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
    if added is not None:
        means = (*means, added)
    without = weights_without if added is None else _in_turn_without
    weights = [
        without(*mean_squares(cases, kind, *means), grows) for kind, grows in enumerate(together)
    ]
    told = zip(cases, np.stack(weights, 1), zip(*means, strict=True), strict=True)
    return float(np.mean([case.error(_summed(own, case, each)) for case, own, each in told]))


def _summed(weights: Numbers, case: Case, means: Sequence[Numbers]) -> Any:
    """The sum of predictions with weights [kind, predictor]."""
    return sum(w[case.kind_numbers, None] * m for w, m in zip(weights.T, means, strict=True))


def _in_turn_without(gram: Numbers, right: Numbers, together: Numbers | None) -> Numbers:
    """As `weights_without`, the last predictor weighed against the weighed sum of the others."""
    found = []
    for left in range(len(gram)):
        others = np.arange(len(gram)) != left
        both = np.zeros((2, right.shape[1]))
        both[0, :-1] = fit_weights(gram[others, :-1, :-1], right[others, :-1]).weights
        both[1, -1] = 1
        found.append(_without(left, both @ gram @ both.T, right @ both.T, together) @ both)
    return np.stack(found)
