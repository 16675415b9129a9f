"""The rows with the largest effects, of both signs."""

from typing import Any

import numpy as np

from attribution.task import Rows

Numbers = np.ndarray[Any, Any]


def strongest(effects: Numbers, count: int) -> tuple[Rows, Numbers]:
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
    # Whole sorts, because a partial one settles ties as it likes.
    ends = [np.argsort(sign * effects, axis=0, kind="stable")[:count] for sign in (-1, 1)]
    values = [np.take_along_axis(effects, rows, axis=0) for rows in ends]
    return np.stack(ends).transpose(2, 0, 1), np.stack(values).transpose(2, 0, 1)
