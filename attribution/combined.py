"""Two predictors weighed against each other: what one misses the other often knows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from attribution.cases import KINDS, Case, Numbers, common_share, row_kinds, rows_together
from attribution.counterfactual import Change, Counterfactual
from attribution.deviations import deviation_factors
from attribution.forget import ForgetSet, Mask
from attribution.outputs import Array
from attribution.task import Rows, Task
from attribution.weighing import (
    fit_weights,
    growth_factor,
    growth_helps,
    mean_squares,
    weights_without,
)


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
        shared: factor on the sum, which makes it a standard deviation, too, for forget sets whose
            rows have everything in common; for others times the root of their `common_share`.
    """

    first: float
    second: float
    spread: float
    noise: float
    second_spread: float | None = None
    growth: float = 0.0
    most: float = 0.0
    shared: float = 0.0

    def as_sure_as_the_first(self) -> "Weights":
        """The same means with the first one's deviations, or else the second one's weighed ones.

        They grow as the means do, if those grow. Factors that a bank fits to them are set by the
        few sets on which everything linear fails.
        """
        if self.first > 0:
            spreads = {"spread": 1 / self.first, "second_spread": 0.0}
        else:
            spreads = {"spread": 0.0, "second_spread": 1.0}
        return replace(self, noise=1.0, shared=0.0, **spreads)

    def factors(self, together: float) -> tuple[float, ...]:
        """Both weights, both factors on standard deviations, those on the noise and on the sum.

        The weights are those for a forget set of which so many rows change together.
        """
        other = self.spread if self.second_spread is None else self.second_spread
        grown = growth_factor(self.growth, self.most, together)
        weights = grown * self.first, grown * self.second
        return *weights, self.spread, other, self.noise, self.shared


@dataclass(frozen=True)
class Combined(Counterfactual):
    """A weighed sum of two predictions, with weights of its own for each kind of row.

    mean = f (a m_1 + b m_2), f = 1 + growth x min(k, most),
    std^2 = f^2 ((spread a s_1)^2 + (second_spread b s_2)^2) + k / |F| (shared x mean)^2,

    and the noise is the first one's times a factor. a and b are the `Weights` first and second, and
    all are those of forget rows, of other training rows or of test rows. k of the |F| forget rows
    change together as the first one predicts it, see `rows_together`. Retrained models (datamodels)
    know what the path of training does, gradients what the curvature at its end does.

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
        one, own = self._first(forget, targets)
        two = self.second.change(forget, None, targets)
        kinds = row_kinds(forget, np.arange(len(one.mean)) if targets is None else targets)
        found = weighed_sum(self.weights, one, two, kinds, own)
        if already is None:
            return found
        one, two = (each.change(forget, already, targets) for each in (self.first, self.second))
        # Rows that are gone already are of the kind that they were when they were removed, and as
        # many changed together. Deviations are those of the difference, with the k of all of them.
        mean = found.mean - self.change(already, None, targets).mean
        return replace(weighed_sum(self.weights, one, two, kinds, own), mean=mean)

    def _first(self, forget: ForgetSet, targets: Rows | None) -> tuple[Change, Array]:
        """The first one's change of these targets, and its means of the forget rows."""
        if targets is None:
            found = self.first.change(forget)
            return found, found.mean[forget.rows]
        places, at = np.unique(np.append(targets, forget.rows), return_inverse=True)
        found = self.first.change(forget, None, places)
        asked, own = at[: len(targets)], at[len(targets) :]
        return Change(found.mean[asked], found.std[asked], found.noise[asked]), found.mean[own]


def weighed_sum(
    weights: Mapping[str, Weights], one: Change, two: Change, kinds: Rows, own: Array
) -> Change:
    """The weighed sum of two changes.

    Args:
        weights: by kind of row; see `weigh`.
        one: what the first predictor says of some targets.
        two: what the second one says of them.
        kinds: kind of each of these targets, [target]; see `row_kinds`.
        own: mean change of the forget rows as the first predictor says, [forget row, output].

    Returns:
        The sum.

    Example:
        >>> unit = np.ones((1, 1), dtype=np.float32)
        >>> one, two = Change(2 * unit, unit, unit), Change(3 * unit, unit, unit)
        >>> weights = dict.fromkeys(KINDS, Weights(first=0.5, second=1.0, spread=1.0, noise=1.0))
        >>> weighed_sum(weights, one, two, np.array([0]), one.mean).mean
        array([[4.]], dtype=float32)
    """
    together = rows_together(own)
    table = np.array([weights[kind].factors(together) for kind in KINDS])
    a, b, spread, other, noise, shared = table.astype(np.float32)[kinds].T[..., None]
    mean = a * one.mean + b * two.mean
    std = np.hypot(_weighed_std(spread * a, one.std), _weighed_std(other * b, two.std))
    off = _weighed_std(shared, np.float32(np.sqrt(common_share(own))) * np.abs(mean))
    return Change(mean, np.hypot(std, off), noise * one.noise)


def weigh(
    cases: Sequence[Case],
    pairs: Sequence[tuple[Change, Change]],
    *,
    trusted: bool = True,
    grows: bool = False,
) -> dict[str, Weights]:
    """Fits the weights of two predictors on models retrained without forget sets of their own.

    Non-negative least squares for each kind of row; see `Case.weight` for what each forget set
    weighs. A kind without rows takes the first predictor as it is. Factors on the deviations, both
    predictors' and the one that forget rows share, are fitted to what is left of each set by
    weights that are fitted to the others.

    Args:
        cases: the forget sets.
        pairs: what the two predictors say of each, for all targets.
        trusted: False leaves the second one's standard deviation out.
        grows: whether the sum may grow with the rows that change together; it does for those kinds
            of which forget sets left out in turn are predicted better so.

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


@dataclass(frozen=True)
class _Part:
    """The rows of a kind of a forget set, and what two predictors say of the set."""

    case: Case
    one: Change
    two: Change
    rows: Mask

    def mean(self, weights: Numbers) -> Numbers:
        first, second = weights
        return np.asarray(first * self.one.mean[self.rows] + second * self.two.mean[self.rows])

    def variances(self, weights: Numbers, trusted: bool) -> list[Numbers]:
        changes = [self.one, self.two] if trusted else [self.one]
        told = [_weighed_std(w, c.std[self.rows]) for w, c in zip(weights, changes, strict=False)]
        common = common_share(self.one.mean[self.case.forget.rows])
        return [np.square(std) for std in (*told, np.sqrt(common) * self.mean(weights))]


def _fitted(
    kind: int,
    cases: Sequence[Case],
    pairs: Sequence[tuple[Change, Change]],
    trusted: bool,
    grows: bool,
) -> Weights:
    every = [_Part(c, *pair, c.kinds[kind]) for c, pair in zip(cases, pairs, strict=True)]
    parts = [part for part in every if part.rows.any()]
    if not parts:
        return Weights(1.0, 0.0, 1.0, 1.0)
    known, ones = [part.case for part in parts], [part.one for part in parts]
    means = [one.mean for one in ones], [part.two.mean for part in parts]
    gram, right = mean_squares(known, kind, *means)
    together = forget_rows_together(known, ones)
    if not (grows and growth_helps(gram, right, together)):
        together = np.zeros(len(parts))
    fit, others = fit_weights(gram, right, together), weights_without(gram, right, together)
    predicted = [(p.case, p.rows, p.mean(w)) for p, w in zip(parts, others, strict=True)]
    variances = [
        part.variances(fit.at(number), trusted)
        for part, number in zip(parts, together, strict=True)
    ]
    *spreads, shared, noise = deviation_factors(
        predicted,
        *map(list, zip(*variances, strict=True)),
        noise=[part.one.noise[part.rows] for part in parts],
    )
    first, second = map(float, fit.weights)
    other = spreads[1] if trusted else 0.0
    return Weights(first, second, spreads[0], noise, other, fit.growth, fit.most, shared)


def _weighed_std(factor: Array | float, std: Array) -> Array:
    """What a prediction adds to the deviation; nothing without weight, even where unknown."""
    known = np.broadcast_to(np.not_equal(factor, 0), std.shape)
    return np.asarray(np.multiply(factor, std, where=known, out=np.zeros_like(std)))
