"""Rows and columns of stored arrays: gather, sum and map them without zarr's detour."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from stores.blocks import missing_object, object_files, refuse_unreadable
from stores.halves import sum_halves, widen
from stores.pieces import is_raw, pieces
from stores.places import check_size
from stores.store import Store
from stores.verification import slabs

_ROW_AXIS = "train"


def gather(store: Store, name: str, rows: np.ndarray) -> np.ndarray:
    """Read rows along the first axis.

    Args:
        store: A store; blocks that hold a part of the rows must be done.
        name: Name of an array.
        rows: Positions, shape [k], in any order; duplicates are allowed.

    Returns:
        The rows in the order asked for, shape [k, ...], in the stored dtype; multiplied by the
        array's scale, in float32 or wider, where it has one.

    Raises:
        ValueError: A position is out of range, a block is pending, or an object is damaged.
        TypeError: The positions are no integers.

    Example:
        >>> import tempfile
        >>> from stores.provenance import Provenance
        >>> from stores.schema import ArraySpec, StoreSpec
        >>> scores = ArraySpec(("train", "target"), (3, 2), "float32")
        >>> spec = StoreSpec("scores", "target", 2, {"scores": scores})
        >>> store = Store.create(tempfile.mkdtemp() + "/scores", spec, Provenance({}))
        >>> store.write_block(0, {"scores": np.arange(6, dtype=np.float32).reshape(3, 2)})
        >>> gather(store, "scores", np.array([2, 0]))
        array([[4., 5.],
               [0., 1.]], dtype=float32)
    """
    rows = _checked(store, name, rows)
    array = store.spec.array(name)
    found = np.empty((len(rows), *array.shape[1:]), array.dtype)
    for positions, part, values in pieces(store, name, rows):
        place: tuple[Any, ...] = (positions, *part)
        found[place] = values
    return _scaled(store, name, found)


def total(store: Store, name: str, rows: np.ndarray) -> np.ndarray:
    """Sum rows along the axis "train", in float32 unless the dtype is wider.

    Where the array has a stored sum over all rows and more than half of them are asked for, the
    others are subtracted from it.

    Args:
        store: A store whose blocks are done.
        name: Name of an array whose first axis is "train".
        rows: Positions, shape [k], in any order; a duplicate counts twice.

    Returns:
        The sum over the rows, of the shape of one row, multiplied by the array's scale.

    Raises:
        ValueError: A position is out of range, a block is pending, or an object is damaged.
        TypeError: The positions are no integers.

    Example:
        >>> import tempfile
        >>> from stores.provenance import Provenance
        >>> from stores.schema import ArraySpec, StoreSpec
        >>> scores = ArraySpec(("train", "target"), (3, 2), "float16")
        >>> spec = StoreSpec("scores", "target", 2, {"scores": scores})
        >>> store = Store.create(tempfile.mkdtemp() + "/scores", spec, Provenance({}))
        >>> store.write_block(0, {"scores": np.arange(6, dtype=np.float16).reshape(3, 2)})
        >>> total(store, "scores", np.array([2, 0]))
        array([4., 6.], dtype=float32)
    """
    array = store.spec.array(name)
    if array.axes[0] != _ROW_AXIS:
        raise ValueError(f"expected {_ROW_AXIS!r} as first axis of {name!r}, got {array.axes}")
    rows = _checked(store, name, rows)
    if array.sum is not None and 2 * len(rows) > array.shape[0]:
        others = np.setdiff1d(np.arange(array.shape[0]), rows)
        if len(others) + len(rows) == array.shape[0]:
            everything = store.numpy(array.sum)
            return np.asarray(everything - _total(store, name, others), everything.dtype)
    return _total(store, name, rows)


def column(store: Store, name: str, position: int) -> np.ndarray:
    """Read all rows of an array for one place of the store's block axis.

    Args:
        store: A store; the block that holds the place must be done.
        name: Name of an array.
        position: The place along the block axis, such as a target's.

    Returns:
        The values, the block axis left out; multiplied by the array's scale where it has one.

    Raises:
        ValueError: There is no such place, the block is pending or damaged.

    Example:
        >>> import tempfile
        >>> from stores.provenance import Provenance
        >>> from stores.schema import ArraySpec, StoreSpec
        >>> scores = ArraySpec(("train", "target"), (3, 2), "float32")
        >>> spec = StoreSpec("scores", "target", 2, {"scores": scores})
        >>> store = Store.create(tempfile.mkdtemp() + "/scores", spec, Provenance({}))
        >>> store.write_block(0, {"scores": np.arange(6, dtype=np.float32).reshape(3, 2)})
        >>> column(store, "scores", 1)
        array([1., 3., 5.], dtype=float32)
    """
    if not 0 <= position < store.spec.length:
        raise ValueError(
            f"expected a position from 0 to {store.spec.length - 1} along "
            f"{store.spec.axis!r}, got {position}"
        )
    rows = store.spec.block_axis(name) == 0
    found = _row(store, name, position) if rows else _column(store, name, position)
    scale = store.spec.array(name).scale
    return found if scale is None else _times(found, column(store, scale, position))


def mapped(store: Store, name: str, block: int) -> np.ndarray:
    """Map one block of an array from disk, without a copy where it is one raw object.

    Args:
        store: A store.
        name: Name of an array.
        block: Number of a block that is done.

    Returns:
        The values as stored, of the shape of the block; writing to them does not reach the disk.

    Raises:
        ValueError: The block is pending or damaged.

    Example:
        >>> import tempfile
        >>> from stores.provenance import Provenance
        >>> from stores.schema import ArraySpec, StoreSpec
        >>> spec = StoreSpec("a", "target", 2, {"a": ArraySpec(("target",), (3,), "float32")})
        >>> store = Store.create(tempfile.mkdtemp() + "/a", spec, Provenance({}))
        >>> store.write_block(1, {"a": np.ones(1, np.float32)})
        >>> float(mapped(store, "a", 1).sum())
        1.0
    """
    files = object_files(store.spec, name, block)
    if not is_raw(store, name) or len(files) > 1:
        return store.numpy(name, block)
    store.refuse_pending([block])
    # A trailing object is padded to the full chunk.
    cuts = tuple(slice(0, length) for length in store.spec.block_shape(name, block))
    return _mapped_object(store, name, files[0], block)[cuts]


def _mapped_object(store: Store, name: str, file: str, block: int) -> np.ndarray:
    chunk, dtype = store.spec.chunks(name), np.dtype(store.spec.array(name).dtype)
    try:
        values = store.place.mapped(file)
    except FileNotFoundError as error:
        raise missing_object(store.place, file, block) from error
    check_size(f"{store.place}/{file}", values.size, int(np.prod(chunk)) * dtype.itemsize)
    return values.view(dtype).reshape(chunk)


def _row(store: Store, name: str, position: int) -> np.ndarray:
    array, row = store.spec.array(name), _checked(store, name, np.array([position]))
    found = np.empty(array.shape[1:], array.dtype)
    for _, part, values in pieces(store, name, row):
        found[part] = values[0]
    return found


def _column(store: Store, name: str, position: int) -> np.ndarray:
    array, axis = store.spec.array(name), store.spec.block_axis(name)
    block, place = divmod(position, store.spec.block)
    found = np.empty((*array.shape[:axis], *array.shape[axis + 1 :]), array.dtype)
    for cut, slab in _slabs(store, name, block):
        # Padding behind the last row is left out.
        found[cut] = slab[: cut.stop - cut.start].take(place, axis)
    return found


def _slabs(store: Store, name: str, block: int) -> Iterator[tuple[slice, np.ndarray]]:
    """One storage object after the other, so that a block need not fit into memory."""
    parts = slabs(store.spec, name, block)
    if is_raw(store, name):
        store.refuse_pending([block])
        files = object_files(store.spec, name, block)
        for part, file in zip(parts, files, strict=True):
            yield part[0], _mapped_object(store, name, file, block)
    else:
        refuse_unreadable(store.place, store.spec, name, [block])
        for part in parts:
            yield part[0], np.asarray(store.array(name)[part])


def _total(store: Store, name: str, rows: np.ndarray) -> np.ndarray:
    array = store.spec.array(name)
    shape, dtype = array.shape[1:], np.promote_types(array.dtype, np.float32)
    found: np.ndarray | None = None
    for _, part, values in pieces(store, name, rows):
        halves = values.dtype == np.float16
        summed = sum_halves(values) if halves else values.sum(axis=0, dtype=dtype)
        if found is None:
            # Few rows in one piece are the usual query, and need no zeros to be added to.
            found = summed if summed.shape == shape else np.zeros(shape, dtype)
            if found is summed:
                continue
        found[part] += summed
    return _scaled(store, name, np.zeros(shape, dtype) if found is None else found)


def _scaled(store: Store, name: str, values: np.ndarray) -> np.ndarray:
    scale = store.spec.array(name).scale
    return values if scale is None else _times(values, store.numpy(scale))


def _times(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.asarray((widen(values) if values.dtype == np.float16 else values) * scale)


def _checked(store: Store, name: str, rows: np.ndarray) -> np.ndarray:
    array = store.spec.array(name)
    rows = np.asarray(rows)
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
        raise TypeError(
            f"expected positions as a 1-D array of integers, got {rows.dtype} {rows.shape}; "
            "convert a mask with numpy.flatnonzero"
        )
    outside = rows[(rows < 0) | (rows >= array.shape[0])]
    if outside.size:
        raise ValueError(f"expected positions from 0 to {array.shape[0] - 1}, got {outside[0]}")
    blocks = _blocks(store, name, rows)
    if is_raw(store, name):
        # Reading a lost object raises by itself.
        store.refuse_pending(range(store.spec.blocks) if blocks is None else blocks)
    else:
        refuse_unreadable(store.place, store.spec, name, blocks)
    return rows.astype(np.int64)


def _blocks(store: Store, name: str, rows: np.ndarray) -> list[int] | None:
    if store.spec.block_axis(name) != 0:
        return None
    return [int(block) for block in np.unique(rows // store.spec.block)]
