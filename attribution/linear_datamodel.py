"""Linear datamodels: predictions from stored effects of all training rows on all targets."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from attribution.counterfactual import Change, Counterfactual, check_ids
from attribution.forget import ForgetSet
from attribution.task import Rows, Task
from stores import Store, total


@dataclass(frozen=True)
class LinearDatamodel(Counterfactual):
    """Effects of every training row on every target, and their uncertainty.

    The change of removing rows F is -(own factor x effect of the target's own row, if in F, +
    other factor x sum of the effects of the other rows in F). Its variance is that of the ridge
    posterior: with v the sum of the other rows' rotated masks, k their number and f = 1 if the own
    row is in F, else 0, variance / lambda x [k - v D v + (f - a D v)^2 / (a D a) - f].

    Args:
        store: where the effects lie.
    """

    store: Store = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "LinearDatamodel":
        """Opens fitted datamodels.

        Args:
            path: folder of the store.

        Returns:
            The datamodel.

        Raises:
            ValueError: no such store, or blocks are missing.
        """
        store = Store.open(path, "datamodel")
        if store.pending():
            raise ValueError(f"{store.path} is not finished: run the command that makes it again")
        return cls(store)

    @cached_property
    def shrink(self) -> tuple[float, float]:
        """Factors of a target's own row and of other rows, fitted on held-out models, >= 0."""
        aa, ab, bb, ay, by = self.store.numpy("cross_products").sum(0, dtype=np.float64)
        own, other = np.linalg.lstsq(np.array([[aa, ab], [ab, bb]]), np.array([ay, by]))[0]
        return max(0.0, float(own)), max(0.0, float(other))

    @cached_property
    def _small(self) -> dict[str, Any]:
        return {name: self.store.numpy(name) for name in ("own", "variance", "noise", "chosen")}

    @cached_property
    def _design(self) -> tuple[Any, Any, Any]:
        masks, eigenvalues = self.store.constant("masks"), self.store.constant("eigenvalues")
        return masks, eigenvalues, self.store.constant("lambdas")

    @cached_property
    def _ids(self) -> tuple[list[str], list[str]]:
        return self.store.ids("train"), self.store.ids("target")

    def check_task(self, task: Task) -> None:
        """Refuses a task with other rows than the datamodel's."""
        check_ids(task, *self._ids, self.store.path)

    def change(
        self, forget: ForgetSet, already: ForgetSet | None = None, targets: Rows | None = None
    ) -> Change:
        """Predicted change; linear, so rows that are gone already drop out of the sum.

        Raises:
            ValueError: a forget set of other data.
        """
        n, count = self.store.spec.arrays["effects"].shape[:2]
        if forget.total != n:
            raise ValueError(
                f"the forget set is drawn from {forget.total} rows, the datamodel has {n}"
            )
        places = np.arange(count) if targets is None else targets
        gone = forget.mask & ~already.mask if already else forget.mask
        rows = np.flatnonzero(gone)
        mine = np.append(gone, np.zeros(count - n, dtype=bool))[places]
        own = self._small["own"][places] * mine[:, None]
        others = total(self.store, "effects", rows)[places] - own
        factor_own, factor_other = self.shrink
        mean = -(factor_own * own + factor_other * others)
        std = self._std(rows, mine, places)
        return Change(mean.astype(np.float32), std, self._small["noise"][places])

    def _std(self, rows: Rows, mine: Any, places: Rows) -> Any:
        masks, eigenvalues, lambdas = self._design
        chosen = self._small["chosen"][places]
        scale = np.zeros(len(places))
        for index in np.unique(chosen):
            group = chosen == index
            scale[group] = _spread(
                masks, 1 / (eigenvalues + lambdas[index]), rows, mine[group], places[group]
            )
        variance = self._small["variance"][places] / lambdas[chosen][:, None]
        return np.sqrt(variance * scale[:, None]).astype(np.float32)


def _spread(masks: Any, damped: Any, rows: Rows, mine: Any, places: Rows) -> Any:
    """The bracket of the posterior variance for targets that share a lambda, [target]."""
    summed = masks[:, rows].sum(1)
    inside = places < masks.shape[1]
    own = np.where(inside, masks[:, np.minimum(places, masks.shape[1] - 1)], 0)
    leverage = np.einsum("rt,r,rt->t", own, damped, own)
    across = own.T @ (damped * summed)
    within = summed @ (damped * summed)
    quadratic = within - mine * (2 * across - leverage)
    left = mine - (across - mine * leverage)
    # Nothing tells the effect of a row that every model saw: its uncertainty has no bound.
    unknown = np.where(mine & inside, np.inf, 0)
    unpenalised = np.divide(left**2, leverage, out=unknown, where=leverage > 0)
    return np.maximum(len(rows) - 2 * mine - quadratic + unpenalised, 0)
