"""Stored TRAK scores: effects of all training rows on all targets."""

from dataclasses import dataclass, field

import numpy as np

from attribution.outputs import Array
from attribution.task import Rows
from stores import Store, Where, column, place

KIND = "trak"


@dataclass(frozen=True)
class TrakScores:
    """Effects of including each training row on the outputs and the margin of each target.

    A score is in the unit of the outputs; removing rows subtracts theirs. Only the block of the
    targets that are asked for is read.

    Args:
        store: where they lie.
    """

    store: Store = field(repr=False)

    @classmethod
    def open(cls, path: Where) -> "TrakScores":
        """Opens scores.

        Args:
            path: folder that `fit_trak` was given.

        Returns:
            The scores.

        Raises:
            ValueError: no scores there, or blocks are missing.
        """
        store = Store.open(place(path) / "scores", KIND)
        if store.pending():
            raise ValueError(f"{store.path} is not finished: run the command that makes it again")
        return cls(store)

    @property
    def checkpoints(self) -> int:
        """Number of checkpoints that the scores are the mean of."""
        return len(self.store.provenance.settings["features"])

    @property
    def damping(self) -> float:
        """Lambda, in the unit of the curvature."""
        return float(self.store.provenance.settings["damping"])

    def effects(self, target: int) -> Array:
        """Effects of all rows on the outputs of the target at a position, [train, output]."""
        return column(self.store, "effects", target)

    def margins(self, target: int) -> Array:
        """Effects of all rows on the margin of the target at a position, [train]."""
        if "margins" in self.store.spec.arrays:
            return column(self.store, "margins", target)
        return np.asarray(self.effects(target) @ column(self.store, "slopes", target))

    def strongest(self, target: int) -> tuple[Rows, Array]:
        """Rows that raise and that lower a target's margin most, and by how much.

        Args:
            target: position of the target.

        Returns:
            Rows and effects on the margin, each [2, count]: the highest, then the lowest.
        """
        rows, values = (column(self.store, name, target) for name in ("top_rows", "top_values"))
        return rows, values
