"""Reads features of stored checkpoints: rows, products, and the factors that J is made of."""

from typing import Any, Literal

import numpy as np
import torch

from attribution.gradients.jacobian import Dense, Factored, Factors, Jacobian
from attribution.gradients.projection import SparseProjection
from attribution.task import Task
from stores import Store, StoreSpec, gather, mapped

CACHE_BYTES = 2**20  # of rows that are converted at once; fits a core's cache
FACTOR_BYTES = 16 * 2**20  # of the factors of all training rows that are kept in memory
Which = Literal["all", "train"]

Numbers = np.ndarray[Any, Any]


def stored_factors(store: Store) -> Factors | None:
    """How a store's features are made of the factors it keeps.

    Args:
        store: of a checkpoint's features.

    Returns:
        Sizes and S of each layer; None where no factors are kept.
    """
    if "factors" not in store.spec.arrays:
        return None
    outputs, inputs, sizes = zip(*store.attributes["factors"], strict=True)
    widths = [a * b for a, b in zip(outputs, inputs, strict=True)]
    dealt = torch.from_numpy(store.constant("dealt")).split(widths)
    sparse = [
        SparseProjection(width, width)
        if size == width
        else SparseProjection(width, size, part.abs() - 1, part.sign().float())
        for width, size, part in zip(widths, sizes, dealt, strict=True)
    ]
    return Factors(inputs, outputs, tuple(sparse))


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


def all_outputs(store: Store, rows: Numbers) -> Numbers:
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


def factored_rows(store: Store, factors: Factors, rows: int) -> Factored | None:
    """J of the first rows in one piece, where their factors fit into a few MiB.

    Args:
        store: of a checkpoint's features, which keeps factors.
        factors: how they are made of them.
        rows: how many.

    Returns:
        J; None where the factors are larger.

    Raises:
        ValueError: a block is pending or damaged.
    """
    array = store.spec.array("factors")
    if rows * array.shape[1] * np.dtype(array.dtype).itemsize > FACTOR_BYTES:
        return None
    blocks = range(-(-rows // store.spec.block))
    parts = [torch.from_numpy(mapped(store, "factors", block)) for block in blocks]
    return Factored(factors, torch.cat(parts)[:rows])


def block_jacobian(
    store: Store, factors: Factors | None, block: int, rows: Numbers | slice
) -> Jacobian:
    """J of some rows of one block, mapped from the disk where it can be.

    Args:
        store: of a checkpoint's features.
        factors: how they are made of the factors it keeps; None where it keeps none.
        block: number of a block.
        rows: positions within the block.

    Returns:
        J, not to be written to.

    Raises:
        ValueError: the block is pending or damaged.
    """
    if factors is not None:
        return Factored(factors, torch.from_numpy(mapped(store, "factors", block)[rows]))
    if "scale" in store.spec.arrays:
        return Dense(torch.from_numpy(block_features(store, block)[rows]))
    return Dense(torch.from_numpy(mapped(store, "features", block)[rows]))


def block_product(
    store: Store, factors: Factors | None, block: int, direction: Numbers, rows: Numbers
) -> Numbers:
    """J d for some rows of one block; a block of which most is wanted is read as a whole.

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
        found = block_jacobian(store, factors, block, rows).times(torch.from_numpy(direction))
        return np.asarray(found.numpy())
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
