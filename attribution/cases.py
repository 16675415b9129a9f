"""Forget sets, how retraining without them changed the outputs, and what their rows share."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from attribution.ensemble import Ensemble
from attribution.forget import ForgetSet, Mask
from attribution.outputs import Array, target_margins
from attribution.task import Rows, Task
from stores import taken_out

Numbers = np.ndarray[Any, Any]

KINDS = ("forget", "retain", "test")
SMALLEST = 1e-30  # a squared change that is none


@dataclass(frozen=True)
class Case:
    """A forget set and how retraining without it changed the outputs.

    Args:
        task: whose rows were forgotten.
        forget: the forget set.
        before: mean outputs of models trained on all rows, [target, output].
        change: mean outputs of the retrained models less that mean, [target, output].
        noise_variance: of the outputs of one such model around their mean, [target, output]; 0
            where nothing tells it.
        change_variance: of the change, as means of few models differ by chance, [target, output].

    Example:
        >>> from examples.digits import task
        >>> before, change = np.zeros((1797, 10)), np.tile(np.eye(10)[0], (1797, 1))
        >>> case = Case(task, ForgetSet.of(task, ["train-17"]), before, change)
        >>> round(case.error(0 * change), 6), [int(rows.sum()) for rows in case.kinds]
        (1.0, [1, 1436, 360])
    """

    task: Task = field(repr=False)
    forget: ForgetSet
    before: Array = field(repr=False)
    change: Array = field(repr=False)
    noise_variance: Numbers | float = field(default=0.0, repr=False)
    change_variance: Numbers | float = field(default=0.0, repr=False)

    @property
    def targets(self) -> Rows:
        """All targets."""
        return np.arange(len(self.change))

    @cached_property
    def kinds(self) -> list[Mask]:
        """True at the targets of each kind, [target]."""
        return [self.kind_numbers == number for number in range(len(KINDS))]

    @cached_property
    def kind_numbers(self) -> Rows:
        """Kind of each target, [target]; see `row_kinds`."""
        return row_kinds(self.forget, self.targets)

    def weight(self, kind: int) -> float:
        """One over the squared change of the rows of a kind plus its variance.

        So all forget sets weigh the same, large or small, but those less whose change is chance for
        the most part: they tell little, and pull factors towards what chance made of them.

        Args:
            kind: a number of `KINDS`.

        Returns:
            The weight.
        """
        rows = self.kinds[kind]
        variance = np.broadcast_to(self.change_variance, self.change.shape)[rows].sum()
        return 1 / max(float(np.square(self.change[rows]).sum() + variance), SMALLEST)

    def views(self, change: Array) -> tuple[Array, Array]:
        """What a change of the outputs is in outputs and in margins.

        Args:
            change: of all targets, [target, output].

        Returns:
            The change as it is, and that of the margins, [target, 1].
        """
        outputs = np.stack([self.before, self.before + change]).astype(np.float32)
        before, after = target_margins(self.task, outputs)
        return change, (after - before)[:, None]

    def error(self, one: Array, other: Array | None = None) -> float:
        """Squared error over the squared change, averaged over outputs, margins and kinds of row.

        Args:
            one: a predicted change, [target, output].
            other: a second one with independent errors; then the error is (change - one) x
                (change - other), which on average is that of the mean that both scatter around.

        Returns:
            The error; 1 is what predicting no change has.
        """
        triples = zip(
            self.views(self.change),
            self.views(one),
            self.views(one if other is None else other),
            strict=True,
        )
        parts: list[Any] = [
            ((t - a) * (t - b))[rows].sum() / max(np.square(t[rows]).sum(), SMALLEST)
            for t, a, b in triples
            for rows in self.kinds
            if rows.any()
        ]
        return float(np.mean(parts))


def cases_of(bank: Ensemble, before: Array) -> list[Case]:
    """The forget sets of a bank; models whose set was purged tell nothing and are left out.

    With s_j^2 the sample variance of the outputs of the m_j models retrained without set j, and
    s_0^2 that of m_0 models trained on all rows, the variance of one model's outputs is pooled,

        s^2 = sum_j (m_j - 1) s_j^2 / sum_j (m_j - 1),    j = 0, 1, ...,

    because a few models alone tell it badly. What forgetting does to it is one factor f for each
    kind of row, taken to be the same for all sets: sum_j <s_j^2> / sum_j <s^2> over those of two
    models or more, where <> is the mean over the rows of that kind. The variance of one retraining
    is f s^2, that of the change f s^2 / m_j + s^2 / m_0.

    Args:
        bank: models that each never saw a forget set of their own.
        before: outputs of models trained on all rows, [model, target, output].

    Returns:
        One case a set.

    Raises:
        ValueError: some model of the bank saw all rows, no forget set is left of it, or `before`
            has other axes.
    """
    wanted = bank.outputs.shape[1:]
    if before.ndim != 3 or not len(before) or before.shape[1:] != wanted:
        raise ValueError(
            "expected outputs of one model or more trained on all rows, [model, target, output],"
            f" whose last two axes are {list(wanted)}, got the shape {list(before.shape)}"
        )
    if taken_out(bank.store.path) is None and bank.masks.all(axis=1).any():
        raise ValueError(f"{bank.store.path} holds a model trained on all rows: it is no bank")
    models: dict[bytes, list[int]] = {}
    for number, mask in enumerate(bank.masks):
        if not mask.all():
            models.setdefault(mask.tobytes(), []).append(number)
    if not models:
        raise ValueError(
            f"all forget sets of {bank.store.path} were purged: remove it, and the same command"
            " makes others"
        )
    groups = list(models.values())
    full, spreads = _spread(before), [_spread(bank.outputs[numbers]) for numbers in groups]
    cases = [
        _case(bank, full.mean, numbers[0], each.mean)
        for numbers, each in zip(groups, spreads, strict=True)
    ]
    return _with_variances(cases, spreads, full)


@dataclass(frozen=True)
class _Spread:
    """Mean outputs of models that saw the same rows, and their sample variance; 0 of one model."""

    models: int
    mean: Array
    variance: Array


def _spread(outputs: Array) -> _Spread:
    mean, models = outputs.mean(0), len(outputs)
    return _Spread(models, mean, outputs.var(0, ddof=1) if models > 1 else np.zeros_like(mean))


def _case(bank: Ensemble, before: Array, model: int, after: Array) -> Case:
    forget = ForgetSet.at(bank.task, np.flatnonzero(~bank.masks[model]))
    return Case(bank.task, forget, before, after - before)


def _with_variances(cases: Sequence[Case], spreads: Sequence[_Spread], full: _Spread) -> list[Case]:
    pooled = _pooled_variance([full, *spreads])
    factors = _noise_factors(cases, spreads, pooled)
    found = []
    for case, each in zip(cases, spreads, strict=True):
        noise = factors[case.kind_numbers, None] * pooled
        variance = noise / each.models + pooled / full.models
        found.append(replace(case, noise_variance=noise, change_variance=variance))
    return found


def _pooled_variance(spreads: Sequence[_Spread]) -> Numbers:
    free = sum(each.models - 1 for each in spreads)
    squares = sum((each.models - 1) * each.variance for each in spreads)
    return np.asarray(squares / max(1, free))


def _noise_factors(cases: Sequence[Case], spreads: Sequence[_Spread], pooled: Numbers) -> Numbers:
    """Variance of models retrained without a set over the pooled one, [kind]."""
    measured, expected = np.zeros((2, len(KINDS)))
    for case, each in zip(cases, spreads, strict=True):
        for kind, rows in enumerate(case.kinds):
            if each.models > 1 and rows.any():
                measured[kind] += each.variance[rows].mean()
                expected[kind] += pooled[rows].mean()
    factors = np.divide(measured, expected, out=np.ones(len(KINDS)), where=expected > 0)
    return factors.astype(pooled.dtype)


def row_kinds(forget: ForgetSet, targets: Rows) -> Rows:
    """Kind of each target: 0 in the forget set, 1 another training row, 2 a test row.

    Args:
        forget: the forget set.
        targets: positions among the task's targets, [target].

    Returns:
        Kinds, [target].

    Example:
        >>> from examples.digits import task
        >>> row_kinds(ForgetSet.of(task, ["train-1"]), np.array([0, 1, 1437]))
        array([1, 0, 2])
    """
    kinds = np.where(targets < forget.total, 1, 2)
    kinds[np.isin(targets, forget.rows)] = 0
    return kinds


def common_share(change: Array) -> float:
    """How much of a change all rows have in common: |mean|^2 over the mean of |change|^2.

    Near 1 for rows that go together, such as a cluster of one class; about 1 / rows for rows that
    have nothing in common.

    Args:
        change: of the forget rows' outputs, [row, output].

    Returns:
        The share, in [0, 1]; 0 where nothing changes.

    Example:
        >>> common_share(np.array([[1.0, 0.0], [1.0, 0.0]])), common_share(np.eye(2))
        (1.0, 0.5)
    """
    power = float(np.square(change, dtype=np.float64).sum(1).mean())
    mean = np.square(change.mean(0, dtype=np.float64)).sum()
    return float(mean) / power if power else 0.0


def rows_together(change: Array) -> float:
    """How many forget rows change as one: their number times `common_share`.

    Their number for rows of one cluster; about 1 for rows that have nothing in common.

    Args:
        change: of the forget rows' outputs, [row, output].

    Returns:
        The number, 0 to that of the rows.

    Example:
        >>> rows_together(np.array([[1.0, 0.0], [1.0, 0.0]])), rows_together(np.eye(2))
        (2.0, 1.0)
    """
    return len(change) * common_share(change)
