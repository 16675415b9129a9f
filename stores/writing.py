"""Writing one block: array by array, or slab by slab where arrays are too large for memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import zarr

from stores.blocks import mark_file, object_files, region
from stores.durability import durable
from stores.metadata import DONE, open_array
from stores.places import Place
from stores.schema import StoreSpec
from stores.watching import refuse_changes


class BlockDone(ValueError):
    """A block is written already; blocks are write-once."""


def checksum(values: np.ndarray, before: int = 0) -> int:
    """Give the CRC-32 over the bytes of values, or carry one on over further values.

    Args:
        values: The values.
        before: The CRC-32 of the values that came before.

    Returns:
        An unsigned 32-bit number.

    Example:
        >>> checksum(np.zeros(2, np.uint8)) == zlib.crc32(bytes(2))
        True
    """
    return zlib.crc32(np.ascontiguousarray(values).data, before)


def mark_of(checksums: Mapping[str, int]) -> int:
    """Give the mark of a block: the CRC-32 over its arrays' checksums in the order of their names.

    Args:
        checksums: CRC-32 of each array.

    Returns:
        An unsigned 32-bit number.

    Example:
        >>> mark_of({"b": 2, "a": 1}) == mark_of({"a": 1, "b": 2})
        True
    """
    return checksum(np.array([checksums[name] for name in sorted(checksums)], "<u4"))


@final
@dataclass(frozen=True)
class BlockWriter:
    """Writes the arrays of one block; `Store.writing` makes one.

    Args:
        spec: The store's layout.
        block: Number of the block.
        handles: Writable zarr arrays by name.
    """

    spec: StoreSpec
    block: int
    handles: Mapping[str, zarr.Array[Any]]
    rows: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)

    def append(self, name: str, values: np.ndarray) -> None:
        """Write an array's block, or the next slab of it.

        A slab is a piece along the first axis, of whole storage objects: `spec.chunks(name)[0]`
        rows or a multiple of it; the last one ends the array. Arrays whose first axis is the
        store's block axis are written whole.

        Args:
            name: Name of the array.
            values: The values, in the stored dtype.

        Raises:
            ValueError: The name, shape or dtype is wrong, or a value is not finite.
            TypeError: The values are no numpy array.
        """
        where = self._next(name, values)
        _check(self.spec, self.block, name, values, where)
        self.handles[name][where] = values
        self.rows[name] = where[0].stop
        self.checksums[name] = checksum(values, self.checksums.get(name, 0))

    def mark(self) -> int:
        """The mark of the block, now that it is written.

        Raises:
            ValueError: A part of an array is missing.
        """
        for name in self.spec.arrays:
            expected = region(self.spec, name, self.block)[0].stop
            if self.rows.get(name) != expected:
                raise ValueError(
                    f"expected {name!r} of block {self.block} up to row {expected} of its first "
                    f"axis, got {self.rows.get(name, 'nothing')}"
                )
        return mark_of(self.checksums)

    def _next(self, name: str, values: np.ndarray) -> tuple[slice, ...]:
        whole = region(self.spec, name, self.block)
        if self.spec.block_axis(name) == 0 or not isinstance(values, np.ndarray):
            return whole
        length, height = whole[0].stop, self.spec.chunks(name)[0]
        start = self.rows.get(name, 0)
        end = start + len(values)
        if end > length or (end < length and len(values) % height):
            raise ValueError(
                f"expected {name!r} of block {self.block} of shape {self._shape(whole)}, or slabs "
                f"of it of {height} rows or a multiple; got {len(values)} rows from row {start} on"
            )
        return (slice(start, end), *whole[1:])

    def _shape(self, where: tuple[slice, ...]) -> tuple[int, ...]:
        return tuple(cut.stop - cut.start for cut in where)


def _check(
    spec: StoreSpec, block: int, name: str, value: np.ndarray, where: tuple[slice, ...]
) -> None:
    if not isinstance(value, np.ndarray):
        raise TypeError(
            f"expected a numpy array as {name!r} of block {block}, got {type(value).__name__}; "
            "convert it with numpy.asarray"
        )
    shape, dtype = tuple(cut.stop - cut.start for cut in where), np.dtype(spec.arrays[name].dtype)
    if value.shape != shape:
        raise ValueError(f"expected {name!r} of block {block} of shape {shape}, got {value.shape}")
    if value.dtype != dtype:
        raise ValueError(
            f"expected {name!r} of block {block} of dtype {dtype}, got {value.dtype}; "
            f"convert it with .astype({dtype.name!r})"
        )
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise ValueError(
            f"expected finite values in {name!r} of block {block}, got NaN or infinity; "
            "look for a diverged computation, or scale what overflows its dtype"
        )


@contextmanager
def writing(place: Place, spec: StoreSpec, block: int) -> Iterator[BlockWriter]:
    """Write one block of every array, then mark it done.

    Args:
        place: Where the store lies.
        spec: Its layout.
        block: Number of a pending block.

    Yields:
        The writer.

    Raises:
        ValueError: There is no such block, it is done already, a part is missing at the end, or a
            watched file has changed; or the zarr.json of an array is damaged.
    """
    spec.span(block)
    if place.exists(mark_file(block)):
        raise BlockDone(
            f"block {block} of {place} is done already and blocks are write-once; "
            "write pending() blocks only, or discard() it first"
        )
    refuse_changes()
    writer = BlockWriter(spec, block, {name: _writable(place, spec, name) for name in spec.arrays})
    yield writer
    mark = writer.mark()
    if durable():
        place.sync([file for name in spec.arrays for file in object_files(spec, name, block)])
    refuse_changes()
    _writable(place, spec, DONE)[block] = mark
    if durable():
        place.sync([mark_file(block)])


def _writable(place: Place, spec: StoreSpec, name: str) -> zarr.Array[Any]:
    # zarr does not persist this setting, and skips objects that hold fill values only.
    return open_array(place, spec, name, mode="r+").with_config({"write_empty_chunks": True})
