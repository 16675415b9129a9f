"""Pieces of rows read straight from storage objects: what the query path is built on.

An uncompressed zarr object is a raw array in C order, so a row of it is one range of bytes. Reading
that range is tens of times faster than asking zarr for it.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from stores.blocks import missing_object
from stores.store import Store

_AT_ONCE = 512  # ranges of one batch

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


@dataclass(frozen=True)
class _Plan:
    """What reading rows of an array needs to know of its layout.

    Args:
        dtype: Of the stored values.
        chunk: Shape of an object.
        length: Bytes of a row's piece in one object.
        parts: Parts of the axes behind the first, how the names of their objects end, and how the
            padding of their objects is cut off.
    """

    dtype: np.dtype
    chunk: tuple[int, ...]
    length: int
    parts: tuple[tuple[tuple[slice, ...], str, tuple[slice, ...]], ...]

    @property
    def size(self) -> int:
        """Bytes of an object."""
        return self.chunk[0] * self.length


def _plan(store: Store, name: str) -> _Plan:
    # Small queries take less time than working this out.
    if name not in store.plans:
        array, chunk = store.spec.array(name), store.spec.chunks(name)
        dtype = np.dtype(array.dtype)
        parts = tuple(
            (part, end, (slice(None), *_unpadded(part)))
            for part, end in _grid(array.shape[1:], chunk[1:])
        )
        store.plans[name] = _Plan(dtype, chunk, int(np.prod(chunk[1:])) * dtype.itemsize, parts)
    found = store.plans[name]
    assert isinstance(found, _Plan)
    return found


def _pieces_direct(store: Store, name: str, rows: np.ndarray) -> Iterator[Piece]:
    plan = _plan(store, name)
    order = np.argsort(rows, kind="stable")
    batches = _batches(rows[order], plan.chunk[0], plan.length, store.place.at_once)
    wanted = [
        (part, few, cut, {f"{name}/c/{number}{end}": starts for number, starts in ranges.items()})
        for part, end, cut in plan.parts
        for few, ranges in batches
    ]
    try:
        found = store.place.read_batches([ranges for *_, ranges in wanted], plan.size, plan.length)
        for (part, few, cut, _), values in zip(wanted, found, strict=True):
            yield order[few], part, values.view(plan.dtype).reshape(-1, *plan.chunk[1:])[cut]
    except FileNotFoundError as error:
        files = [file for *_, ranges in wanted for file in ranges]
        lost = next(file for file in files if not store.place.exists(file))
        block = int(lost.split("/")[2 + store.spec.block_axis(name)])
        raise missing_object(store.place, lost, block) from error


def _batches(
    rows: np.ndarray, height: int, row_bytes: int, at_once: int
) -> list[tuple[slice, dict[int, list[int]]]]:
    """Rows in few calls: their places in the order, and first bytes by number of the object."""
    many = max(1, min(_AT_ONCE, at_once // row_bytes))
    found = []
    for first in range(0, len(rows), many):
        ranges: dict[int, list[int]] = {}
        for row in rows[first : first + many].tolist():
            number, place = divmod(row, height)
            ranges.setdefault(number, []).append(place * row_bytes)
        found.append((slice(first, min(len(rows), first + many)), ranges))
    return found


def _grid(shape: tuple[int, ...], chunk: tuple[int, ...]) -> list[tuple[tuple[slice, ...], str]]:
    """Parts of the axes behind the first, and how the names of their objects end."""
    counts = [range(-(-length // size)) for length, size in zip(shape, chunk, strict=True)]
    found = []
    for place in itertools.product(*counts):
        part = tuple(
            slice(index * size, min((index + 1) * size, length))
            for index, size, length in zip(place, chunk, shape, strict=True)
        )
        found.append((part, "".join(f"/{index}" for index in place)))
    return found


def _unpadded(part: tuple[slice, ...]) -> tuple[slice, ...]:
    # Trailing objects are padded to the full chunk; the answer is not.
    return tuple(slice(0, cut.stop - cut.start) for cut in part)
