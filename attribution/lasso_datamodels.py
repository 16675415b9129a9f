"""Lasso datamodels: sparse effects, lambda for each target by held-out models."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attribution.lasso import (
    Centred,
    Numbers,
    centred,
    lasso_effects,
    own_effect,
    regress_out,
    without_row,
)
from attribution.regression import Fitted, Problem, Regression, Sizes, Solver
from attribution.scratch import Columns
from stores import ArraySpec, Store

# Candidates for lambda, as parts of the smallest at which all effects but the own row's are 0.
FRACTIONS = (0.7, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.0625)


@dataclass(frozen=True)
class Lasso(Regression):
    """Lasso: 1/2 sum_j a_j (y_j - b - x_j w)^2 + lambda sum_{i != own} |w_i|, by scikit-learn.

    The Gram matrix of the rows is in memory several times: it suits some ten thousand rows.

    Args:
        fractions: candidates for lambda, falling, as parts of the smallest lambda of each target
            and output at which all effects but the own row's are zero; that with the least error
            on held-out models is taken for each target.
        tolerance: largest gap between the objective and its dual, as a part of the outputs' sum of
            squares.
        iterations: passes over the rows at most.

    Example:
        >>> Lasso(fractions=(0.5, 0.1)).settings()["fractions"]
        [0.5, 0.1]
    """

    name: ClassVar = "lasso"
    sparse: ClassVar = True

    fractions: tuple[float, ...] = FRACTIONS
    tolerance: float = 1e-5
    iterations: int = 10_000

    def __post_init__(self) -> None:
        falling = list(self.fractions) == sorted(set(self.fractions), reverse=True)
        if not self.fractions or not falling or self.fractions[-1] <= 0 or self.fractions[0] >= 1:
            raise ValueError(f"fractions must fall and lie between 0 and 1, got {self.fractions}")
        if self.tolerance <= 0 or self.iterations < 1:
            raise ValueError(
                "tolerance and iterations must be above 0, got"
                f" {self.tolerance} and {self.iterations}"
            )

    def settings(self) -> dict[str, Any]:
        """Its name and all that it was made with."""
        found: dict[str, Any] = {"name": self.name, "fractions": list(self.fractions)}
        return found | {"tolerance": self.tolerance, "iterations": self.iterations}

    def arrays(self, sizes: Sizes, wide: str) -> dict[str, ArraySpec]:
        """The lambdas, and what tells how sure the effects are."""
        each = ArraySpec(("target", "output"), (sizes.targets, sizes.outputs), wide)
        return dict.fromkeys(("penalty", "own_variance", "row_variance"), each)

    def step(self, sizes: Sizes, number: torch.dtype, most: int) -> int:
        """As many as have their models' outputs and their effects in memory."""
        column = (sizes.models + 1 + sizes.train) * sizes.outputs * number.itemsize
        return max(1, most // column)

    def constants(self, models: Problem) -> Mapping[str, Numbers]:
        """None: each process multiplies the masks out by itself."""
        return {}

    def solver(self, models: Problem) -> "LassoSolver":
        """What fits blocks of a store."""
        return LassoSolver(models, self)


@dataclass(frozen=True)
class LassoSolver(Solver):
    """Lasso target by target; what is kept of a target are its effects.

    Args:
        problem: the models.
        method: the settings.
    """

    method: Lasso

    def inner(self, store: Store) -> int:
        """Number of rows."""
        return store.spec.array("effects").shape[0]

    def fit(self, store: Store, outputs: Tensor, noise: Numbers, targets: slice) -> Fitted:
        """Takes the lambda that predicts the held-out models best, and fits all models."""
        effects = torch.empty(self.inner(store), *outputs.shape[1:], dtype=outputs.dtype)
        found: list[dict[str, Numbers]] = []
        for place in range(outputs.shape[1]):
            fitted = self._fit(outputs[:, place : place + 1], noise[place], targets.start + place)
            effects[:, place] = torch.from_numpy(fitted.pop("effects"))
            found.append(fitted)
        arrays = {name: np.stack([one[name] for one in found]) for name in found[0]}
        beside = {name: torch.from_numpy(value) for name, value in arrays.items()}
        return Fitted(effects, effects.abs().amax(0), beside)

    def effects(self, store: Store, kept: Columns, rows: slice) -> Tensor:
        """What was kept."""
        return kept.through(lambda effects: effects, rows)

    def _fit(self, outputs: Tensor, noise: Numbers, target: int) -> dict[str, Numbers]:
        """One target's effects [train, output] and what stands beside them."""
        models, values = self._models, outputs[:, 0].numpy()
        row = target if target < len(models.centre) else None
        lambdas = self._lambdas(values, row)
        chosen, residuals, own = self._choose(values, row, lambdas)
        used = lambdas[: chosen + 1]
        effects, mine, left = self._solved(models, values, row, used)
        last, owned = effects[:, -1], mine[:, -1]
        fitted = left - models.masks @ last.T
        if row is not None:
            fitted -= np.outer(models.masks[:, row], owned)
            last[:, row] = owned
        free = np.maximum(1, len(values) - 1 - (last != 0).sum(1))
        variance = np.square(fitted).sum(0) / free
        judged = self.problem.judged(
            torch.from_numpy(residuals)[:, None], torch.from_numpy(own)[None], outputs, _at(target)
        )
        return {
            "effects": last.T,
            "own": owned,
            "penalty": used[-1],
            "variance": variance,
            "own_variance": _own_variance(models, row, last, variance),
            "row_variance": self._row_variance(residuals, noise),
            "cross_products": judged[0].numpy(),
        }

    @cached_property
    def _models(self) -> Centred:
        return centred(self.problem.masks().numpy(), self.problem.weights().numpy())

    @cached_property
    def _kept(self) -> Numbers:
        everyone = np.arange(len(self._models.weights))
        return np.asarray(np.setdiff1d(everyone, self.problem.held.numpy()))

    @cached_property
    def _trial(self) -> Centred:
        masks, weights = self.problem.masks().numpy(), self.problem.weights().numpy()
        return centred(masks[self._kept], weights[self._kept])

    def _lambdas(self, values: Numbers, row: int | None) -> Numbers:
        """Candidates, [lambda, output]."""
        outputs, _ = self._models.outputs(values)
        left = [regress_out(self._models, row, column) for column in outputs.T]
        smallest = np.abs(self._models.masks.T @ np.stack(left, 1))
        if row is not None:
            smallest[row] = 0
        fractions = np.array(self.method.fractions, values.dtype)
        return np.asarray(fractions[:, None] * smallest.max(0))

    def _solved(
        self, models: Centred, values: Numbers, row: int | None, lambdas: Numbers
    ) -> tuple[Numbers, Numbers, Numbers]:
        """Effects [output, lambda, train], own effects [output, lambda], centred outputs."""
        outputs, _ = models.outputs(values)
        gram = without_row(models, row)
        effects = np.stack(
            [
                lasso_effects(
                    models,
                    gram,
                    regress_out(models, row, column),
                    penalties,
                    tolerance=self.method.tolerance,
                    iterations=self.method.iterations,
                )
                for column, penalties in zip(outputs.T, lambdas.T, strict=True)
            ]
        )
        if row is not None:
            effects[:, :, row] = 0
        mine = [own_effect(models, row, y, e) for y, e in zip(outputs.T, effects, strict=True)]
        return effects, np.stack(mine), outputs

    def _choose(
        self, values: Numbers, row: int | None, lambdas: Numbers
    ) -> tuple[int, Numbers, Numbers]:
        """The best lambda on held-out models, residuals there and of the last model, own effect."""
        trial, kept = self._trial, self._kept
        # In units of a model, as there are fewer of them.
        fewer = lambdas * (trial.weights.sum() / self._models.weights.sum()).astype(lambdas.dtype)
        effects, own, _ = self._solved(trial, values[kept], row, fewer)
        if row is not None:
            effects[:, :, row] = own
        _, mean = trial.outputs(values[kept])
        asked = np.append(self.problem.held.numpy(), len(values) - 1)
        masks = self._asked - trial.centre
        found = np.tensordot(masks, effects, (1, 2)).transpose(2, 0, 1)
        residuals = values[asked] - mean - found
        best = int(np.square(residuals[:, :-1]).sum((1, 2)).argmin())
        return best, residuals[best], own[:, best]

    @cached_property
    def _asked(self) -> Numbers:
        masks = self.problem.masks().numpy()
        return np.asarray(masks[np.append(self.problem.held.numpy(), len(masks) - 1)])

    def _row_variance(self, residuals: Numbers, noise: Numbers) -> Numbers:
        """Squared error of held-out changes beyond the noise of retraining, for each removed row.

        What so many models cannot tell from no error counts as error.
        """
        judging = self.problem.judging.numpy()
        error = np.square(residuals[judging] - residuals[-1]).mean(0)
        known = np.square(noise) * (1 + 1 / self.problem.anchor.spec.length)
        removed = (1 - self._asked[judging]).sum(1).mean()
        return np.asarray(np.maximum(error - known, error * np.sqrt(2 / len(judging))) / removed)


def _at(target: int) -> slice:
    return slice(target, target + 1)


def _own_variance(models: Centred, row: int | None, effects: Numbers, variance: Numbers) -> Numbers:
    """Of the own row's effect by least squares on it and the rows whose effects are not 0.

    -1 stands for unknown, where all models saw the row.
    """
    if row is None:
        return np.zeros_like(variance)
    if models.gram[row, row] == 0:
        return np.full_like(variance, -1)
    left = [_square_left(models, row, np.flatnonzero(one)) for one in effects]
    return np.asarray(variance / np.array(left, variance.dtype))


def _square_left(models: Centred, row: int, active: Numbers) -> float:
    mask, beside = models.masks[:, row], models.masks[:, active[active != row]]
    left = mask - beside @ np.linalg.lstsq(beside, mask)[0]
    square, whole = float(left @ left), float(models.gram[row, row])
    # Where the others stand for the row entirely, only rounding is left.
    return square if square > 1e-6 * whole else whole
