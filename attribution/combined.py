"""Two predictors weighed against each other: what one misses the other often knows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from attribution.cases import KINDS, Case, Numbers, row_kinds, rows_together
from attribution.counterfactual import Change, Counterfactual
from attribution.deviations import deviation_factors
from attribution.forget import ForgetSet, Mask
from attribution.outputs import Array
from attribution.task import Rows, Task
from attribution.weighing import fit_weights, growth_factor, mean_squares, weights_without


@dataclass(frozen=True)
class Weights:
    """How two predictors are weighed, for one kind of row.

    Args:
        first: factor on the first one's change, >= 0.
        second: factor on the second one's.
        spread: factor on the first one's standard deviation, beside its weight.
        noise: factor on the first one's spread of one retraining.
        second_spread: factor on the second one's standard deviation; None: the first one's.
        growth: what each row that changes together with others adds to the factor on the sum.
        most: how many such rows count at most; see `growth_factor`.
    """

    first: float
    second: float
    spread: float
    noise: float
    second_spread: float | None = None
    growth: float = 0.0
    most: float = 0.0

    def as_sure_as_the_first(self) -> "Weights":
        """The same means with the first one's deviations as they are, or else the second one's.

        Factors that a bank fits to them are set by the few sets on which everything linear fails.
        """
        if self.first > 0:
            return replace(self, spread=1 / self.first, noise=1.0, second_spread=0.0)
        return replace(self, spread=0.0, noise=1.0, second_spread=1.0)

    def row(self, together: float) -> tuple[float, ...]:
        """Both weights, both factors on standard deviations, and the factor on the noise.

        The weights are those for a forget set of which so many rows change together.
        """
        other = self.spread if self.second_spread is None else self.second_spread
        grown = growth_factor(self.growth, self.most, together)
        return grown * self.first, grown * self.second, self.spread, other, self.noise


@dataclass(frozen=True)
class Combined(Counterfactual):
    """A weighed sum of two predictions, with weights of its own for each kind of row.

    mean = f (a m_1 + b m_2), std^2 = f^2 ((c a s_1)^2 + (d b s_2)^2), noise = e n_1, where a to e
    are those of forget rows, other training rows or test rows, and f = 1 + x min(k, most) with the
    growth x of these rows and the number k of forget rows that change together as the first one
    predicts it. Retrained models (datamodels) know what the path of training does, gradients what
    the curvature at its end does.

    Args:
        first: a predictor: group Newton, a sum of it and what it lacks, or a linear datamodel.
        second: another: a linear datamodel, or TRAK scores.
        weights: by kind of row (forget, retain, test); see `weigh`.
    """

    first: Counterfactual = field(repr=False)
    second: Counterfactual = field(repr=False)
    weights: Mapping[str, Weights]

    def check_task(self, task: Task) -> None:
        """Refuses a task that one of the two refuses."""
        self.first.check_task(task)
        self.second.check_task(task)

    def change(
        self, forget: ForgetSet, already: ForgetSet | None = None, targets: Rows | None = None
    ) -> Change:
        """The weighed sum of the two changes."""
        one, together = self._first(forget, targets)
        two = self.second.change(forget, None, targets)
        kinds = row_kinds(forget, np.arange(len(one.mean)) if targets is None else targets)
        found = weighed_sum(self.weights, one, two, kinds, together)
        if already is None:
            return found
        one, two = (each.change(forget, already, targets) for each in (self.first, self.second))
        # Rows that are gone already are of the kind that they were when they were removed.
        mean = found.mean - self.change(already, None, targets).mean
        return replace(weighed_sum(self.weights, one, two, kinds, together), mean=mean)

    def _first(self, forget: ForgetSet, targets: Rows | None) -> tuple[Change, float]:
        """The first one's change, and how many forget rows change together, if that matters."""
        if not any(weights.growth for weights in self.weights.values()):
            return self.first.change(forget, None, targets), 0.0
        if targets is None:
            found = self.first.change(forget)
            return found, rows_together(found.mean[forget.rows])
        places, at = np.unique(np.append(targets, forget.rows), return_inverse=True)
        found = self.first.change(forget, None, places)
        asked, own = at[: len(targets)], at[len(targets) :]
        change = Change(found.mean[asked], found.std[asked], found.noise[asked])
        return change, rows_together(found.mean[own])


def weighed_sum(
    weights: Mapping[str, Weights], one: Change, two: Change, kinds: Rows, together: float = 0.0
) -> Change:
    """The weighed sum of two changes.

    Args:
        weights: by kind of row; see `weigh`.
        one: what the first predictor says of some targets.
        two: what the second one says of them.
        kinds: kind of each of these targets, [target]; see `row_kinds`.
        together: how many forget rows change together; see `rows_together`.

    Returns:
        The sum.

    Example:
        >>> unit = np.ones((1, 1), dtype=np.float32)
        >>> one, two = Change(2 * unit, unit, unit), Change(3 * unit, unit, unit)
        >>> weights = dict.fromkeys(KINDS, Weights(first=0.5, second=1.0, spread=1.0, noise=1.0))
        >>> weighed_sum(weights, one, two, np.array([0])).mean
        array([[4.]], dtype=float32)
    """
    table = np.array([weights[kind].row(together) for kind in KINDS])
    a, b, spread, other, noise = table.astype(np.float32)[kinds].T[..., None]
    std = np.hypot(_part(spread * a, one.std), _part(other * b, two.std))
    return Change(a * one.mean + b * two.mean, std, noise * one.noise)


def weigh(
    cases: Sequence[Case],
    pairs: Sequence[tuple[Change, Change]],
    *,
    trusted: bool = True,
    grows: bool = False,
) -> dict[str, Weights]:
    """Fits the weights of two predictors on models retrained without forget sets of their own.

    Non-negative least squares for each kind of row; see `Case.weight` for what each forget set
    weighs. A kind without rows takes the first predictor as it is. Factors on the standard
    deviations are fitted to what is left of each set by weights that are fitted to the others.

    Args:
        cases: the forget sets.
        pairs: what the two predictors say of each, for all targets.
        trusted: False leaves the second one's standard deviation out.
        grows: whether the sum may grow with the rows that change together; see `fit_weights`.

    Returns:
        Weights by kind of row.

    Example:
        >>> from attribution.cases import Case
        >>> from examples.digits import task
        >>> forget, one = ForgetSet.of(task, ["train-17"]), np.ones((1797, 10), dtype=np.float32)
        >>> case = Case(task, forget, before=0 * one, change=3 * one)
        >>> told = Change(one, one, one), Change(0 * one, one, one)
        >>> round(weigh([case], [told])["test"].first, 3)
        3.0
    """
    return {
        kind: _fitted(number, cases, pairs, trusted, grows) for number, kind in enumerate(KINDS)
    }


def forget_rows_together(cases: Sequence[Case], changes: Sequence[Change]) -> Numbers:
    """How many rows of each forget set change together, as a predictor says.

    Args:
        cases: the forget sets.
        changes: what the predictor says of each, for all targets.

    Returns:
        The numbers, [set]; see `rows_together`.

    Example:
        >>> from examples.digits import task
        >>> forget, one = ForgetSet.of(task, ["train-1", "train-2"]), np.ones((1797, 10))
        >>> forget_rows_together([Case(task, forget, one, one)], [Change(one, one, one)])
        array([2.])
    """
    told = zip(cases, changes, strict=True)
    return np.array([rows_together(change.mean[case.forget.rows]) for case, change in told])


def _fitted(
    kind: int,
    cases: Sequence[Case],
    pairs: Sequence[tuple[Change, Change]],
    trusted: bool,
    grows: bool,
) -> Weights:
    parts = [
        (case, one, two, case.kinds[kind])
        for case, (one, two) in zip(cases, pairs, strict=True)
        if case.kinds[kind].any()
    ]
    if not parts:
        return Weights(1.0, 0.0, 1.0, 1.0)
    known, rows = [case for case, *_ in parts], [rows for *_, rows in parts]
    one, two = [one for _, one, _, _ in parts], [two for _, _, two, _ in parts]
    gram, right = mean_squares(known, kind, *([each.mean for each in told] for told in (one, two)))
    together = forget_rows_together(known, one) if grows else np.zeros(len(parts))
    fit = fit_weights(gram, right, together)
    # What is left of each set by the others' weights, beside the deviations that its own give it.
    given = np.stack([fit.at(number) for number in together]).T
    variances = [_variances(*told) for told in zip(given, (one, two), (rows, rows), strict=True)]
    others = weights_without(gram, right, together)
    predicted = [
        (case, of, a * x.mean[of] + b * y.mean[of])
        for (a, b), case, x, y, of in zip(others, known, one, two, rows, strict=True)
    ]
    noise = [each.noise[of] for each, of in zip(one, rows, strict=True)]
    *spreads, factor = deviation_factors(predicted, *variances[: 1 + trusted], noise=noise)
    a, b = map(float, fit.weights)
    second = spreads[1] if trusted else 0.0
    return Weights(a, b, spreads[0], factor, second, fit.growth, fit.most)


def _variances(factors: Numbers, changes: Sequence[Change], rows: Sequence[Mask]) -> list[Numbers]:
    told = zip(factors, changes, rows, strict=True)
    return [np.square(_part(factor, change.std[of])) for factor, change, of in told]


def _part(factor: Array | float, std: Array) -> Array:
    """What a prediction adds to the deviation; nothing without weight, even where unknown."""
    known = np.broadcast_to(np.not_equal(factor, 0), std.shape)
    return np.asarray(np.multiply(factor, std, where=known, out=np.zeros_like(std)))
