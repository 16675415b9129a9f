"""How far the checkpoints' scores differ, summed up while they stream past."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attribution.task import Rows

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tally:
    """Sums over training rows of one block's scores, of each checkpoint.

    Args:
        targets: positions of the targets.
        own: score of each target's own row, 0 for test rows, [checkpoint, target, output].
        sums: of all rows' scores, [checkpoint, target, output].
        squares: of the squares of all rows' scores, [checkpoint, target, output].
    """

    VARIANCES: ClassVar = ("own_variance", "row_variance", "sum_variance")

    targets: Rows
    own: Numbers
    sums: Numbers
    squares: Numbers

    @classmethod
    def empty(cls, checkpoints: int, targets: Rows, outputs: int) -> "Tally":
        """Nothing summed yet."""
        shape = (checkpoints, len(targets), outputs)
        return cls(targets, *(np.zeros(shape) for _ in range(3)))

    def add(self, checkpoint: int, rows: slice, scores: Numbers) -> None:
        """Takes in the scores of some rows.

        Args:
            checkpoint: whose.
            rows: positions of the rows.
            scores: [row, target, output].
        """
        self.sums[checkpoint] += scores.sum(0, dtype=np.float64)
        self.squares[checkpoint] += np.square(scores, dtype=np.float64).sum(0)
        inside = np.flatnonzero((self.targets >= rows.start) & (self.targets < rows.stop))
        self.own[checkpoint, inside] = scores[self.targets[inside] - rows.start, inside]

    def summary(self, mean: Numbers) -> dict[str, Numbers]:
        """Own scores and variances over the checkpoints, 0 where there is only one.

        Args:
            mean: mean of the checkpoints' scores, [train, target, output].

        Returns:
            The mean own score `own`; and the variances of the own row's score `own_variance`, of
            the other rows' scores, added up, `row_variance`, and of the other rows' sum
            `sum_variance`; each [target, output].
        """
        own = self.own.mean(0)
        others = np.square(mean, dtype=np.float64).sum(0) - np.square(own)
        free = max(1, len(self.own) - 1)
        squares = (self.squares - np.square(self.own)).sum(0)
        rows = np.maximum(squares - len(self.own) * others, 0) / free
        if len(self.own) == 1:
            rows = np.zeros_like(own)
        return {
            "own": own,
            "own_variance": self.own.var(0) * len(self.own) / free,
            "row_variance": rows,
            "sum_variance": (self.sums - self.own).var(0) * len(self.own) / free,
        }
