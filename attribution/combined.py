"""Two predictors weighed against each other: what one misses the other often knows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from attribution.cases import KINDS, Case, row_kinds
from attribution.counterfactual import Change, Counterfactual
from attribution.deviations import (
    deviation_factors,
    mean_squares,
    nonnegative_squares,
    weights_without,
)
from attribution.forget import ForgetSet
from attribution.outputs import Array
from attribution.task import Rows, Task


@dataclass(frozen=True)
class Weights:
    """How two predictors are weighed, for one kind of row.

    Args:
        first: factor on the first one's change, >= 0.
        second: factor on the second one's.
        spread: factor on the first one's standard deviation, beside its weight.
        noise: factor on the first one's spread of one retraining.
        second_spread: factor on the second one's standard deviation; None: the first one's.
    """

    first: float
    second: float
    spread: float
    noise: float
    second_spread: float | None = None

    def as_sure_as_the_first(self) -> "Weights":
        """The same means with the first one's deviations as they are, or else the second one's.

        Factors that a bank fits to them are set by the few sets on which everything linear fails.
        """
        if self.first > 0:
            return replace(self, spread=1 / self.first, noise=1.0, second_spread=0.0)
        return replace(self, spread=0.0, noise=1.0, second_spread=1.0)

    @property
    def row(self) -> tuple[float, ...]:
        """Both weights, both factors on standard deviations, and the factor on the noise."""
        other = self.spread if self.second_spread is None else self.second_spread
        return self.first, self.second, self.spread, other, self.noise


@dataclass(frozen=True)
class Combined(Counterfactual):
    """A weighed sum of two predictions, with weights of its own for each kind of row.

    mean = a m_1 + b m_2, std^2 = (c a s_1)^2 + (d b s_2)^2, noise = e n_1, where a to e are those
    of forget rows, other training rows or test rows. Retrained models (datamodels) know what the
    path of training does, gradients what the curvature at its end does.

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
        one = self.first.change(forget, already, targets)
        two = self.second.change(forget, already, targets)
        places = np.arange(len(one.mean)) if targets is None else targets
        found = weighed_sum(self.weights, one, two, row_kinds(forget, places))
        if already is None:
            return found
        # Rows that are gone already are of the kind that they were when they were removed.
        mean = self.change(forget, None, targets).mean - self.change(already, None, targets).mean
        return replace(found, mean=mean)


def weighed_sum(weights: Mapping[str, Weights], one: Change, two: Change, kinds: Rows) -> Change:
    """The weighed sum of two changes.

    Args:
        weights: by kind of row; see `weigh`.
        one: what the first predictor says of some targets.
        two: what the second one says of them.
        kinds: kind of each of these targets, [target]; see `row_kinds`.

    Returns:
        The sum.

    Example:
        >>> unit = np.ones((1, 1), dtype=np.float32)
        >>> one, two = Change(2 * unit, unit, unit), Change(3 * unit, unit, unit)
        >>> weights = dict.fromkeys(KINDS, Weights(first=0.5, second=1.0, spread=1.0, noise=1.0))
        >>> weighed_sum(weights, one, two, np.array([0])).mean
        array([[4.]], dtype=float32)
    """
    table = np.array([weights[kind].row for kind in KINDS])
    a, b, spread, other, noise = table.astype(np.float32)[kinds].T[..., None]
    std = np.hypot(_part(spread * a, one.std), _part(other * b, two.std))
    return Change(a * one.mean + b * two.mean, std, noise * one.noise)


def weigh(
    cases: Sequence[Case], pairs: Sequence[tuple[Change, Change]], *, trusted: bool = True
) -> dict[str, Weights]:
    """Fits the weights of two predictors on models retrained without forget sets of their own.

    Non-negative least squares for each kind of row, every forget set weighing the same; a kind
    without rows takes the first predictor as it is. Factors on the standard deviations are fitted
    to what is left of each set by weights that are fitted to the others.

    Args:
        cases: the forget sets.
        pairs: what the two predictors say of each, for all targets.
        trusted: False leaves the second one's standard deviation out.

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
    return {kind: _fitted(number, cases, pairs, trusted) for number, kind in enumerate(KINDS)}


def _fitted(
    kind: int, cases: Sequence[Case], pairs: Sequence[tuple[Change, Change]], trusted: bool
) -> Weights:
    parts = [
        (case, one, two, case.kinds[kind])
        for case, (one, two) in zip(cases, pairs, strict=True)
        if case.kinds[kind].any()
    ]
    if not parts:
        return Weights(1.0, 0.0, 1.0, 1.0)
    known = [case for case, *_ in parts]
    gram, right = mean_squares(
        known, kind, [one.mean for _, one, _, _ in parts], [two.mean for _, _, two, _ in parts]
    )
    a, b = (float(weight) for weight in nonnegative_squares(gram.sum(0), right.sum(0)))
    variances = [[np.square(_part(a, x.std[rows])) for _, x, _, rows in parts]]
    if trusted:
        variances.append([np.square(_part(b, y.std[rows])) for _, _, y, rows in parts])
    predicted = [
        (case, rows, first * x.mean[rows] + second * y.mean[rows])
        for (first, second), (case, x, y, rows) in zip(
            weights_without(gram, right), parts, strict=True
        )
    ]
    noise = [x.noise[rows] for _, x, _, rows in parts]
    *spreads, factor = deviation_factors(predicted, *variances, noise=noise)
    return Weights(a, b, spreads[0], factor, spreads[1] if trusted else 0.0)


def _part(factor: Array | float, std: Array) -> Array:
    """What a prediction adds to the deviation; nothing without weight, even where unknown."""
    known = np.broadcast_to(np.not_equal(factor, 0), std.shape)
    return np.asarray(np.multiply(factor, std, where=known, out=np.zeros_like(std)))
