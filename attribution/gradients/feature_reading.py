"""Reads features of stored checkpoints: rows, products, and the factors that J is made of."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch

from attribution.gradients.jacobian import Dense, Factored, Factors
from attribution.task import Task
from stores import Store, StoreSpec, gather, mapped

CACHE_BYTES = 2**20  # of rows that are converted at once; fits a core's cache
PIECE_BYTES = 16 * 2**20  # of the factors of rows that are read at once
Which = Literal["all", "train"]

Numbers = np.ndarray[Any, Any]


def in_full(stored: Numbers, scale: Numbers | None) -> Numbers:
    """Features as they are computed with: float16 times its scale, others as they are.

    Args:
        stored: [row, output, k], in the dtype on disk.
        scale: [row, output]; None without one.

    Returns:
        [row, output, k], float32 or wider.
    """
    return stored if scale is None else _widened(stored) * scale[..., None]


def blocks_of(task: Task, spec: StoreSpec, which: Which) -> range:
    """Numbers of the blocks that hold all targets, or training rows.

    Args:
        task: gives the number of training rows; they come first.
        spec: layout of the store.
        which: "all" or "train".

    Returns:
        The numbers.
    """
    return range(spec.blocks if which == "all" else -(-len(task.train_ids) // spec.block))


def block_features(store: Store, block: int) -> Numbers:
    """Features of one block as they are computed with, a copy, [row, output, k].

    Args:
        store: of a checkpoint's features.
        block: number of a block.

    Returns:
        The features.

    Raises:
        ValueError: the block is pending or damaged.
    """
    scale = store.numpy("scale", block) if "scale" in store.spec.arrays else None
    return in_full(store.numpy("features", block), scale)


def stored_outputs(store: Store, rows: Numbers) -> Numbers:
    """Outputs of rows, whole blocks at a time where most of their rows are wanted.

    Args:
        store: of a checkpoint's features.
        rows: positions of targets, in any order.

    Returns:
        [row, output].

    Raises:
        ValueError: a block is pending or damaged.
    """
    if 2 * len(rows) < store.spec.length:
        return gather(store, "outputs", rows)
    array = store.spec.array("outputs")
    found = np.empty((len(rows), *array.shape[1:]), array.dtype)
    of = rows // store.spec.block
    for block in np.unique(of):
        places = np.flatnonzero(of == block)
        inside = rows[places] - block * store.spec.block
        found[places] = mapped(store, "outputs", int(block))[inside]
    return found


def factored_pieces(store: Store, factors: Factors, rows: int) -> Iterator[tuple[slice, Factored]]:
    """J of the first rows, consecutive blocks joined as long as their factors take 16 MiB or less.

    Args:
        store: of a checkpoint's features, which keeps factors.
        factors: how they are made of them.
        rows: how many.

    Yields:
        Positions of some rows, in order, and their J.

    Raises:
        ValueError: a block is pending or damaged.
    """
    size = store.spec.block
    together = max(1, PIECE_BYTES // (size * factor_bytes(store, 1)))
    for first in range(0, -(-rows // size), together):
        span = slice(first * size, min((first + together) * size, rows))
        blocks = range(first, -(-span.stop // size))
        parts = [torch.from_numpy(mapped(store, "factors", block)) for block in blocks]
        yield span, Factored(factors, torch.cat(parts)[: span.stop - span.start])


def factor_bytes(store: Store, rows: int) -> int:
    """Bytes of the factors of so many rows.

    Args:
        store: of a checkpoint's features, which keeps factors.
        rows: how many.

    Returns:
        The bytes.
    """
    array = store.spec.array("factors")
    return rows * array.shape[1] * np.dtype(array.dtype).itemsize


def block_dense(store: Store, block: int, rows: Numbers | slice) -> Dense:
    """J of some rows of one block as it is stored, mapped from the disk where it can be.

    Args:
        store: of a checkpoint's features.
        block: number of a block.
        rows: positions within the block.

    Returns:
        J, not to be written to.

    Raises:
        ValueError: the block is pending or damaged.
    """
    if "scale" in store.spec.arrays:
        return Dense(torch.from_numpy(block_features(store, block)[rows]))
    return Dense(torch.from_numpy(mapped(store, "features", block)[rows]))


def block_product(
    store: Store, factors: Factors | None, block: int, direction: Numbers, rows: Numbers
) -> Numbers:
    """J d for some rows of one block, from factors where they are kept.

    Without factors a block of which most is wanted is read as a whole.

    Args:
        store: of a checkpoint's features.
        factors: how they are made of the factors it keeps; None where it keeps none.
        block: number of a block.
        direction: d, [k], of the dtype that features are computed with.
        rows: positions within the block, [row].

    Returns:
        [row, output].

    Raises:
        ValueError: the block is pending or damaged.
    """
    if factors is not None:
        few = torch.from_numpy(mapped(store, "factors", block)[rows])
        return np.asarray(Factored(factors, few).times(torch.from_numpy(direction)).numpy())
    values = mapped(store, "features", block)
    scale = mapped(store, "scale", block) if "scale" in store.spec.arrays else None
    some = 2 * len(rows) < len(values)
    if some:
        values, scale = values[rows], None if scale is None else scale[rows]
    product = _times(values.reshape(-1, len(direction)), direction).reshape(values.shape[:2])
    product = product if scale is None else product * scale
    return product if some else product[rows]


def _times(rows: Numbers, direction: Numbers) -> Numbers:
    if rows.dtype == direction.dtype:
        return rows @ direction
    found = np.empty(len(rows), direction.dtype)
    height = max(1, CACHE_BYTES // direction.nbytes)
    for start in range(0, len(rows), height):
        piece = slice(start, start + height)
        found[piece] = _widened(rows[piece]) @ direction
    return found


def _widened(halves: Numbers) -> Numbers:
    # numpy converts float16 number by number.
    return torch.from_numpy(halves).float().numpy()
