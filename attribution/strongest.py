"""The rows with the largest effects of both signs, found while effects stream by."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.task import Rows

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
    # Numpy runs through false entries, and picks single ones, several times as fast as torch.
    found = np.flatnonzero((effects > last if sign > 0 else effects < -last).numpy())
    if not len(found):
        return
    found = found[np.argsort(found % len(values), kind="stable")]
    touched, places, width = _table(found % len(values))
    more = np.full(len(touched) * width, -np.inf, values.numpy().dtype)
    those = np.zeros(len(more), np.int64)
    more[places] = sign * effects.numpy().ravel().take(found)
    those[places] = found // len(values) + first
    shape, columns = (len(touched), width), torch.from_numpy(touched)
    # The sort keeps the order of equal ones, and rows that came before stand before.
    both = torch.cat([values[columns], torch.from_numpy(more.reshape(shape))], 1)
    merged = both.sort(stable=True, dim=1, descending=True)
    positions = torch.cat([rows[columns], torch.from_numpy(those.reshape(shape))], 1)
    values[columns] = merged.values[:, :count]
    rows[columns] = positions.gather(1, merged.indices[:, :count])


def _table(targets: Rows) -> tuple[Rows, Rows, int]:
    """Targets that occur in an ordered list, each entry's place in a table of them, its width."""
    touched, starts, counts = np.unique(targets, return_index=True, return_counts=True)
    width = int(counts.max())
    ranks = np.arange(len(targets)) - np.repeat(starts, counts)
    return touched, np.repeat(np.arange(len(touched)), counts) * width + ranks, width


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
