"""Pieces of rows read straight from storage objects: what the query path is built on.

An uncompressed zarr object is a raw array in C order, so a row of it is one range of bytes. Reading
that range is tens of times faster than asking zarr for it.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from stores.blocks import missing_object
from stores.places import Range
from stores.store import Store

_AT_ONCE = 512  # ranges of one call; as many files may be open

Piece: TypeAlias = tuple[np.ndarray, tuple[slice, ...], np.ndarray]
"""Positions in the answer, the part of the other axes, and the values read for them."""


def pieces(store: Store, name: str, rows: np.ndarray) -> Iterator[Piece]:
    """Read rows along the first axis piece by piece.

    Args:
        store: A store whose blocks are done.
        name: Name of an array.
        rows: Positions, shape [k], in any order; duplicates are allowed.

    Returns:
        Pieces as stored; those of one part come in the order of the rows on the disk.

    Raises:
        ValueError: An object is damaged.
    """
    if is_raw(store, name):
        return _pieces_direct(store, name, rows)
    return _pieces_zarr(store, name, rows)


def is_raw(store: Store, name: str) -> bool:
    """Whether the storage objects of an array hold its values as they lie in memory.

    Args:
        store: A store.
        name: Name of an array.

    Returns:
        False for compressed arrays, and where this machine cannot read them so.
    """
    raw = not store.spec.array(name).compress and sys.byteorder == "little"
    return raw and hasattr(os, "preadv")


def _pieces_zarr(store: Store, name: str, rows: np.ndarray) -> Iterator[Piece]:
    # zarr reads each row once, in order; the duplicates are put back afterwards.
    unique, inverse = np.unique(rows, return_inverse=True)
    if rows.size:
        values = np.asarray(store.array(name).oindex[(unique,)])
        whole = tuple(slice(0, length) for length in values.shape[1:])
        yield np.arange(len(rows)), whole, values[inverse]


def _pieces_direct(store: Store, name: str, rows: np.ndarray) -> Iterator[Piece]:
    array, chunk = store.spec.array(name), store.spec.chunks(name)
    row_type = np.dtype((array.dtype, chunk[1:]))
    order = np.argsort(rows, kind="stable")
    numbers, places = np.divmod(rows[order], chunk[0])
    files = [f"{name}/c/{number}" for number in numbers]
    starts = (places * row_type.itemsize).tolist()
    many = max(1, min(_AT_ONCE, store.place.at_once // row_type.itemsize))
    for place, part in _grid(array.shape[1:], chunk[1:]):
        end = "".join(f"/{index}" for index in place)
        for first in range(0, len(order), many):
            few = slice(first, first + many)
            ranges = [
                (f"{file}{end}", at) for file, at in zip(files[few], starts[few], strict=True)
            ]
            values = _read(store, name, ranges, row_type)
            yield order[few], part, values[(slice(None), *_unpadded(part))]


def _read(store: Store, name: str, ranges: Sequence[Range], row_type: np.dtype) -> np.ndarray:
    values = np.empty(len(ranges), row_type)
    into = values.reshape(len(ranges), -1).view(np.uint8)
    try:
        store.place.read_ranges(ranges, store.spec.chunks(name)[0] * row_type.itemsize, into)
    except FileNotFoundError as error:
        lost = next(file for file, _ in ranges if not store.place.exists(file))
        block = int(lost.split("/")[2 + store.spec.block_axis(name)])
        raise missing_object(store.place, lost, block) from error
    return values


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
