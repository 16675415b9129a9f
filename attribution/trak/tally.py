"""How far the checkpoints' scores differ, summed up while they stream past."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attribution.task import Rows

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tally:
    """Sums over training rows of one block's scores.

    Args:
        targets: positions of the targets.
        own: score of each target's own row, 0 for test rows, [checkpoint, target, output].
        sums: of all rows' scores, [checkpoint, target, output].
        spread: squared distances of the checkpoints' scores from their mean, summed over
            checkpoints and rows, [target, output].
    """

    VARIANCES: ClassVar = ("own_variance", "row_variance", "sum_variance")

    targets: Rows
    own: Tensor
    sums: Tensor
    spread: Tensor

    @classmethod
    def empty(cls, checkpoints: int, targets: Rows, outputs: int) -> "Tally":
        """Nothing summed yet."""
        shape = (checkpoints, len(targets), outputs)
        own, sums = torch.zeros(2, *shape, dtype=torch.float64)
        return cls(targets, own, sums, torch.zeros(shape[1:], dtype=torch.float64))

    def mean(self, first: int, scores: Iterator[Tensor]) -> Tensor:
        """Takes in the scores of some rows, one checkpoint after the other.

        Args:
            first: position of the first of these rows.
            scores: of each checkpoint, [row, target, output].

        Returns:
            Their mean, [row, target, output].
        """
        mean = next(scores)
        self._add(0, first, mean)
        if len(self.own) == 1:
            return mean
        mean, squares = mean.clone(), torch.zeros_like(mean)
        for checkpoint, part in enumerate(scores, 1):
            self._add(checkpoint, first, part)
            # Welford's update: a difference of large sums would lose what differs.
            away = part - mean
            mean += away / (checkpoint + 1)
            squares += away.mul_(part - mean)
        self.spread.add_(squares.sum(0))
        return mean

    def _add(self, checkpoint: int, first: int, scores: Tensor) -> None:
        inside = np.flatnonzero((self.targets >= first) & (self.targets < first + len(scores)))
        self.own[checkpoint, inside] = scores[self.targets[inside] - first, inside].double()
        if len(self.own) > 1:
            self.sums[checkpoint] += scores.sum(0)

    def summary(self) -> dict[str, Numbers]:
        """Own scores and variances over the checkpoints, 0 where there is only one.

        Returns:
            The mean own score `own`; and the variances of the own row's score `own_variance`, of
            the other rows' scores, added up, `row_variance`, and of the other rows' sum
            `sum_variance`; each [target, output].
        """
        count = len(self.own)
        free = max(1, count - 1)
        own = self.own.var(0, correction=0) * count
        others = (self.sums - self.own).var(0, correction=0) * count
        found = {
            "own": self.own.mean(0),
            "own_variance": own / free,
            "row_variance": (self.spread - own).clamp_min(0) / free,
            "sum_variance": others / free,
        }
        return {name: value.numpy() for name, value in found.items()}
