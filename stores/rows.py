"""Gather, sum and map rows of the first axis: the query path.

An uncompressed zarr object is a raw array in C order, so a row of it is one range of bytes. Reading
that range is tens of times faster than asking zarr for it.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np

from stores.blocks import object_files, refuse_unreadable
from stores.store import Store

_ROW_AXIS = "train"
_BATCH_BYTES = 4 * 2**20  # read before it is consumed; fits a CPU's cache

_Piece: TypeAlias = tuple[np.ndarray, tuple[slice, ...], np.ndarray]
"""Positions in the answer, the part of the other axes, and the values read for them."""


def gather(store: Store, name: str, rows: np.ndarray) -> np.ndarray:
    """Read rows along the first axis.

    Args:
        store: A store; blocks that hold a part of the rows must be done.
        name: Name of an array.
        rows: Positions, shape [k], in any order; duplicates are allowed.

    Returns:
        The rows in the order asked for, shape [k, ...], in the stored dtype.

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
    for positions, part, values in _pieces(store, name, rows):
        place: tuple[Any, ...] = (positions, *part)
        found[place] = values
    return found


def total(store: Store, name: str, rows: np.ndarray) -> np.ndarray:
    """Sum rows along the axis "train", in float32 unless the dtype is wider.

    Args:
        store: A store whose blocks are done.
        name: Name of an array whose first axis is "train".
        rows: Positions, shape [k], in any order; a duplicate counts twice.

    Returns:
        The sum over the rows, of the shape of one row.

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
    dtype = np.promote_types(array.dtype, np.float32)
    found = np.zeros(array.shape[1:], dtype)
    for _, part, values in _pieces(store, name, rows):
        found[part] += values.sum(axis=0, dtype=dtype)
    return found


def mapped(store: Store, name: str, block: int) -> np.ndarray:
    """Map one block of an array from disk, without a copy where it is one raw object.

    Args:
        store: A store.
        name: Name of an array.
        block: Number of a block that is done.

    Returns:
        The values, of the shape of the block; writing to them does not reach the disk.

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
    refuse_unreadable(store.path, store.spec, name, [block])
    files = object_files(store.spec, name, block)
    if store.spec.array(name).compress or sys.byteorder != "little" or len(files) > 1:
        return store.numpy(name, block)
    file, chunk = f"{store.path}/{files[0]}", store.spec.chunks(name)
    dtype = np.dtype(store.spec.array(name).dtype)
    _check_size(file, os.stat(file).st_size, int(np.prod(chunk)) * dtype.itemsize)
    # Writable without effect on the file: torch takes no read-only arrays.
    values = np.asarray(np.memmap(file, dtype, mode="c", shape=chunk))
    # A trailing object is padded to the full chunk.
    return values[tuple(slice(0, length) for length in store.spec.block_shape(name, block))]


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
    refuse_unreadable(store.path, store.spec, name, _blocks(store, name, rows))
    return rows.astype(np.int64)


def _blocks(store: Store, name: str, rows: np.ndarray) -> list[int] | None:
    if store.spec.block_axis(name) != 0:
        return None
    return [int(block) for block in np.unique(rows // store.spec.block)]


def _pieces(store: Store, name: str, rows: np.ndarray) -> Iterator[_Piece]:
    raw = not store.spec.array(name).compress and sys.byteorder == "little"
    if raw and hasattr(os, "preadv") and hasattr(os, "posix_fadvise"):
        return _pieces_direct(store, name, rows)
    return _pieces_zarr(store, name, rows)


def _pieces_zarr(store: Store, name: str, rows: np.ndarray) -> Iterator[_Piece]:
    # zarr reads each row once, in order; the duplicates are put back afterwards.
    unique, inverse = np.unique(rows, return_inverse=True)
    if rows.size:
        values = np.asarray(store.array(name).oindex[(unique,)])
        yield np.arange(len(rows)), _whole(values.shape[1:]), values[inverse]


def _whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, length) for length in shape)


def _pieces_direct(store: Store, name: str, rows: np.ndarray) -> Iterator[_Piece]:
    array, chunk = store.spec.array(name), store.spec.chunks(name)
    values_type = np.dtype((array.dtype, chunk[1:]))
    for number, positions in _by_object(rows, chunk[0]):
        for place, part in _grid(array.shape[1:], chunk[1:]):
            file = "/".join([store.path, name, "c", str(number), *map(str, place)])
            with _opened(file, chunk[0] * values_type.itemsize) as handle:
                for few in _batches(positions, values_type.itemsize):
                    values = _read_rows(handle, rows[few] % chunk[0], values_type)
                    yield few, part, values[(slice(None), *_unpadded(part))]


def _by_object(rows: np.ndarray, height: int) -> Iterator[tuple[int, np.ndarray]]:
    order = np.argsort(rows, kind="stable")
    numbers, starts = np.unique(rows[order] // height, return_index=True)
    bounds = itertools.pairwise([*starts, len(rows)])
    for number, (start, end) in zip(numbers, bounds, strict=True):
        yield int(number), order[start:end]


def _grid(
    shape: tuple[int, ...], chunk: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    cuts = [range(0, length, size) for length, size in zip(shape, chunk, strict=True)]
    for starts in itertools.product(*cuts):
        place = tuple(start // size for start, size in zip(starts, chunk, strict=True))
        ends = [
            min(start + size, length)
            for start, size, length in zip(starts, chunk, shape, strict=True)
        ]
        yield place, tuple(map(slice, starts, ends))


def _unpadded(part: tuple[slice, ...]) -> tuple[slice, ...]:
    # Trailing objects are padded to the full chunk; the answer is not.
    return tuple(slice(0, cut.stop - cut.start) for cut in part)


@contextmanager
def _opened(file: str, nbytes: int) -> Iterator[int]:
    handle = os.open(file, os.O_RDONLY)
    try:
        _check_size(file, os.fstat(handle).st_size, nbytes)
        yield handle
    finally:
        os.close(handle)


def _check_size(file: str, found: int, nbytes: int) -> None:
    if found != nbytes:
        raise ValueError(
            f"expected {nbytes} bytes in {file}, got {found}; "
            "find the damaged blocks with verify() and discard() them"
        )


def _batches(positions: np.ndarray, row_bytes: int) -> list[np.ndarray]:
    rows = max(1, _BATCH_BYTES // row_bytes)
    return np.split(positions, range(rows, len(positions), rows))


def _read_rows(handle: int, rows: np.ndarray, values_type: np.dtype) -> np.ndarray:
    values = np.empty(len(rows), values_type)
    buffers = values.reshape(len(rows), -1).view(np.uint8)
    size = values_type.itemsize
    for row in rows:
        os.posix_fadvise(handle, int(row) * size, size, os.POSIX_FADV_WILLNEED)
    for buffer, row in zip(buffers, rows, strict=True):
        os.preadv(handle, [buffer.data], int(row) * size)
    return values
