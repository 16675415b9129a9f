"""Linear datamodels: predictions from stored effects of all training rows on all targets."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from attribution.counterfactual import Change, Counterfactual, check_ids
from attribution.forget import ForgetSet
from attribution.outputs import Array
from attribution.task import Rows, Task
from attribution.uncertainty import Uncertainty, uncertainty_of
from stores import Store, Where, mapped, total

if TYPE_CHECKING:
    from attribution.trak import TrakScores  # which needs much that need not be loaded here


@dataclass(frozen=True)
class LinearDatamodel(Counterfactual):
    """Effects of every training row on every target, and their uncertainty.

    The change of removing rows F is -(own factor x effect of the target's own row, if in F, +
    other factor x sum of the effects of the other rows in F).

    Args:
        store: where the effects lie.
    """

    store: Store = field(repr=False)

    @classmethod
    def open(cls, path: Where) -> "LinearDatamodel":
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

    @classmethod
    def from_scores(cls, scores: "TrakScores") -> "LinearDatamodel":
        """The linear datamodel whose effects are TRAK scores, as they are.

        Its std is how far the checkpoints differ on random forget sets of the same size, and its
        noise how far their outputs differ; both are unknown (not a number) of one checkpoint.

        Args:
            scores: effects in output units.

        Returns:
            The datamodel.
        """
        return cls(scores.store)

    @property
    def shrink(self) -> tuple[float, float]:
        """Factors of a target's own row and of other rows, >= 0; 1 of TRAK scores."""
        return self._uncertainty.shrink

    @cached_property
    def _uncertainty(self) -> Uncertainty:
        return uncertainty_of(self.store)

    @cached_property
    def _own(self) -> Any:
        return self.store.numpy("own")

    @cached_property
    def _ids(self) -> tuple[list[str], list[str]]:
        return self.store.ids("train"), self.store.ids("target")

    def check_task(self, task: Task) -> None:
        """Refuses a task with other rows than the datamodel's."""
        check_ids(task, *self._ids, self.store.path)

    def effects(self, target: int) -> Array:
        """Effect of including each row, by which predictions of one target are made.

        It is minus the change of removing the row alone. Only the block of the target is read.

        Args:
            target: position of the target.

        Returns:
            Effects times their factors, [train, output].
        """
        block, place = divmod(target, self.store.spec.block)
        effects = np.array(mapped(self.store, "effects", block)[:, place])
        factors = np.full((len(effects), 1), self.shrink[1], dtype=effects.dtype)
        factors[target : target + 1] = self.shrink[0]
        return np.asarray(factors * effects)

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
        own = self._own[places] * mine[:, None]
        others = total(self.store, "effects", rows)[places] - own
        factor_own, factor_other = self.shrink
        mean = -(factor_own * own + factor_other * others)
        std = self._uncertainty.std(rows, mine, places)
        return Change(mean.astype(np.float32), std, self._uncertainty.noise(places))
