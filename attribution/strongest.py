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
        waiting: candidates of either sign that are still to be sorted in among them.
    """

    rows: Tensor
    values: Tensor
    waiting: tuple["_Waiting", "_Waiting"]

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
        values = torch.full(shape, -torch.inf, dtype=dtype)
        return cls(torch.zeros(shape, dtype=torch.long), values, (_Waiting([]), _Waiting([])))

    def add(self, first: int, effects: Tensor) -> None:
        """Takes in the next rows; of equal effects the first to come by stand first.

        Args:
            first: position of the first of these rows; they follow those that came before.
            effects: of these rows, [row, target].
        """
        start = 0
        while start < len(effects):
            # No more rows at a time than before: few of them are then among the highest so far.
            piece = effects[start : start + max(self.rows.shape[2], first + start)]
            for kind, sign in enumerate((1, -1)):
                self._notice(kind, sign, first + start, piece)
            start += len(piece)

    def _notice(self, kind: int, sign: int, first: int, effects: Tensor) -> None:
        values, waiting = self.values[kind], self.waiting[kind]
        last = values[:, -1]
        # Numpy runs through false entries, and picks single ones, several times as fast as torch.
        found = np.flatnonzero((effects > last if sign > 0 else effects < -last).numpy())
        rows, targets = np.divmod(found, len(values))
        waiting.append((targets, rows + first, sign * effects.numpy().ravel().take(found)))
        # Sorting them in makes later ones fewer, but is costly: it waits until it changes much.
        if len(waiting) > values.numel() // 2:
            waiting.merge(self.rows[kind], values)

    def found(self) -> tuple[Numbers, Numbers]:
        """Rows and their effects, each [target, 2, count]: the highest, then the lowest."""
        for kind, waiting in enumerate(self.waiting):
            waiting.merge(self.rows[kind], self.values[kind])
        values = torch.stack([self.values[0], -self.values[1]], 1)
        return self.rows.permute(1, 0, 2).contiguous().numpy(), values.numpy()


@dataclass(frozen=True)
class _Waiting:
    """Targets, rows and effects, in the order of the rows."""

    parts: list[tuple[Rows, Rows, Numbers]]

    def __len__(self) -> int:
        return sum(len(targets) for targets, _, _ in self.parts)

    def append(self, part: tuple[Rows, Rows, Numbers]) -> None:
        if len(part[0]):
            self.parts.append(part)

    def merge(self, rows: Tensor, values: Tensor) -> None:
        if self.parts:
            targets, places, effects = map(np.concatenate, zip(*self.parts, strict=True))
            self.parts.clear()
            # Numpy sorts numbers of two bytes, which targets of a block fit, by their digits.
            small = targets.astype(np.min_scalar_type(len(values) - 1))
            order = np.argsort(small, kind="stable")
            _merge(rows, values, targets[order], places[order], effects[order])


def _merge(rows: Tensor, values: Tensor, targets: Rows, places: Rows, effects: Numbers) -> None:
    touched, cells, width = _table(targets)
    more = np.full(len(touched) * width, -np.inf, effects.dtype)
    those = np.zeros(len(more), np.int64)
    more[cells], those[cells] = effects, places
    count, shape, columns = values.shape[1], (len(touched), width), torch.from_numpy(touched)
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
