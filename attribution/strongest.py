"""The rows with the largest effects of both signs, found while effects stream by."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Strongest:
    """The highest and the lowest effects so far, the farthest out first.

    Args:
        rows: positions of the rows with the highest effects, then the lowest, [2, target, count].
        values: the highest effects, then the lowest with their sign turned, [2, target, count];
            minus infinity where fewer rows have come by.
    """

    rows: Tensor
    values: Tensor

    @classmethod
    def empty(cls, targets: int, count: int, dtype: torch.dtype) -> "Strongest":
        """Nothing seen yet.

        Args:
            targets: how many.
            count: rows of each sign to keep.
            dtype: of the effects.

        Returns:
            It.
        """
        shape = 2, targets, count
        return cls(torch.zeros(shape, dtype=torch.long), torch.full(shape, -torch.inf, dtype=dtype))

    def add(self, first: int, effects: Tensor) -> None:
        """Takes in the next rows; of equal effects the first to come by stand first.

        Args:
            first: position of the first of these rows; they follow those that came before.
            effects: of these rows, [row, target].
        """
        start = 0
        while start < len(effects):
            # No more rows at a time than before: few of them are then among the highest so far.
            piece = effects[start : start + max(4 * self.rows.shape[2], first + start)]
            for rows, values, sign in zip(self.rows, self.values, (1, -1), strict=True):
                _merge(rows, values, first + start, piece, sign)
            start += len(piece)

    def found(self) -> tuple[Numbers, Numbers]:
        """Rows and their effects, each [target, 2, count]: the highest, then the lowest."""
        values = torch.stack([self.values[0], -self.values[1]], 1)
        return self.rows.permute(1, 0, 2).contiguous().numpy(), values.numpy()


def _merge(rows: Tensor, values: Tensor, first: int, effects: Tensor, sign: int) -> None:
    last, count = values[:, -1], values.shape[1]
    passing = effects > last if sign > 0 else effects < -last
    targets, places = passing.T.contiguous().nonzero(as_tuple=True)
    if not len(targets):
        return
    touched, ranks, width = _ranks(targets)
    more = torch.full((len(touched), width), -torch.inf, dtype=values.dtype)
    those = torch.zeros(len(touched), width, dtype=torch.long)
    more[ranks] = sign * effects[places, targets]
    those[ranks] = places + first
    # The sort keeps the order of equal ones, and rows that came before stand before.
    merged = torch.cat([values[touched], more], 1).sort(stable=True, dim=1, descending=True)
    kept = merged.indices[:, :count]
    values[touched] = merged.values[:, :count]
    rows[touched] = torch.cat([rows[touched], those], 1).gather(1, kept)


def _ranks(targets: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], int]:
    """Targets in an ordered list, where each entry goes in a table of them, and its width."""
    touched, which, counts = targets.unique_consecutive(return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    return touched, (which, torch.arange(len(targets)) - starts[which]), int(counts.max())


def strongest(effects: Numbers, count: int) -> tuple[Numbers, Numbers]:
    """The rows with the highest and the lowest effects on each target, the farthest out first.

    Args:
        effects: [train, target].
        count: rows of each sign; at most as many as there are. Of equal ones the first come first.

    Returns:
        Rows and their effects, each [target, 2, count]: the highest, then the lowest.

    Example:
        >>> rows, values = strongest(np.array([[0.5], [-2.0], [0.0]]), 2)
        >>> rows.tolist(), values.tolist()
        ([[[0, 2], [1, 2]]], [[[0.5, 0.0], [-2.0, 0.0]]])
    """
    values = torch.from_numpy(effects)
    found = Strongest.empty(values.shape[1], count, values.dtype)
    found.add(0, values)
    return found.found()
