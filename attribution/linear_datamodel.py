"""Linear datamodels: predictions from stored effects of all training rows on all targets."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from attribution.counterfactual import Change, Counterfactual, check_ids
from attribution.forget import ForgetSet
from attribution.outputs import Array
from attribution.task import Rows, Task
from attribution.uncertainty import Uncertainty, fitted_by_older, uncertainty_of
from stores import Store, Where, column, total

if TYPE_CHECKING:
    import dask.array

    from attribution.trak import TrakScores  # which needs much that need not be loaded here


@dataclass(frozen=True)
class LinearDatamodel(Counterfactual):
    """Effects of every training row on every target, and their uncertainty.

    The change of removing rows F is -(own factor x effect of the target's own row, if in F, +
    other factor x sum of the effects of the other rows in F). Of TRAK scores, where training
    minimises a mean, the mean effect of all rows is taken off each row's: rows that stay count for
    more when others go.

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
            ValueError: no such store, blocks are missing, or an older version fitted it.
        """
        store = Store.open(path, "datamodel")
        if fitted_by_older(store):
            raise ValueError(
                f"{store.path} was fitted by an older version, which expected the effects of all"
                " rows alike: remove it and fit it anew; for a run, dmm precompute says what to"
                " remove"
            )
        if store.pending():
            raise ValueError(f"{store.path} is not finished: run the command that makes it again")
        return cls(store)

    @classmethod
    def from_scores(cls, scores: "TrakScores") -> "LinearDatamodel":
        """The linear datamodel whose effects are TRAK scores.

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
    def _common(self) -> Array:
        """What is taken off the effect of each row, [target, output]."""
        if self.store.provenance.settings.get("objective") != "mean":  # as of fitted effects
            return np.zeros_like(self._own)
        return np.asarray(self.store.numpy("sum") / self.store.spec.array("effects").shape[0])

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
        effects = column(self.store, "effects", target)
        factors = np.full((len(effects), 1), self.shrink[1], dtype=effects.dtype)
        factors[target : target + 1] = self.shrink[0]
        return np.asarray(factors * effects - self._common[target], dtype=effects.dtype)

    def strongest(self, target: int) -> tuple[Rows, Array]:
        """Rows that raise and that lower a target's margin most, and by how much.

        The margin's derivative is taken at the outputs of the models that the effects are of; the
        effects are times their factors. They were kept when the effects were written; TRAK scores
        are as they were written.

        Args:
            target: position of the target.

        Returns:
            Rows and effects on the margin, each [2, count]: the highest, then the lowest.
        """
        rows, values = (column(self.store, name, target) for name in ("top_rows", "top_values"))
        if self.store.spec.kind == "trak":
            return rows, values
        train = self.store.spec.array("effects").shape[0]
        values = np.where(rows == target, self.shrink[0], self.shrink[1]) * values
        count = rows.shape[1]
        if count < train:
            # The own row, whose factor is another one, may have lost its rank to one that was not
            # kept, or may not have been kept and have won a rank.
            count -= 1
            rows, values = (
                self._with_own(target, rows, values) if target < train else (rows, values)
            )
        order = np.argsort([[-1], [1]] * values, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(rows, order, 1), np.take_along_axis(values, order, 1)

    def _with_own(self, target: int, rows: Rows, values: Array) -> tuple[Rows, Array]:
        own, slopes = (column(self.store, name, target) for name in ("own", "slopes"))
        # Where it stands among them already it stands last once more, behind all that count.
        there = (rows == target).any(1, keepdims=True)
        mine = np.where(there, [[-np.inf], [np.inf]], self.shrink[0] * (own @ slopes))
        return np.append(rows, np.full((2, 1), target), 1), np.append(values, mine, 1)

    def effects_view(self) -> "dask.array.Array":
        """A lazy view of the effects of all rows, [train, target, output], for one's own analysis.

        They are as regressed, without the factors; a chunk is a storage object. Do not write it
        with dask's `to_zarr` or `store`, which lose rows where chunks do not fit.

        Returns:
            A dask array.
        """
        lazy = self.store.dask("effects")
        scale = self.store.spec.array("effects").scale
        return lazy if scale is None else lazy.astype("float32") * self.store.dask(scale)

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
        mean = len(rows) * self._common[places] - (factor_own * own + factor_other * others)
        std = self._uncertainty.std(rows, mine, places)
        return Change(mean.astype(np.float32), std, self._uncertainty.noise(places))
