"""One block of a store: its region, its files, its mark and the checks before it is written."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from stores.schema import StoreSpec

_MOST_NAMED = 10  # blocks listed in a message


def region(spec: StoreSpec, name: str, block: int) -> tuple[slice, ...]:
    """Give the part of an array that one block covers.

    Args:
        spec: The store's layout.
        name: Name of the array.
        block: Number of the block.

    Returns:
        One slice for each dimension.

    Example:
        >>> from stores.schema import ArraySpec
        >>> spec = StoreSpec("masks", "model", 2, {"mask": ArraySpec(("model",), (3,), "bool")})
        >>> region(spec, "mask", 1)
        (slice(2, 3, None),)
    """
    parts = [slice(0, length) for length in spec.array(name).shape]
    parts[spec.block_axis(name)] = spec.span(block)
    return tuple(parts)


def object_files(spec: StoreSpec, name: str, block: int) -> list[str]:
    """Give the storage objects that hold one block of an array.

    Args:
        spec: The store's layout.
        name: Name of the array.
        block: Number of the block.

    Returns:
        Paths inside the store.

    Example:
        >>> from stores.schema import ArraySpec
        >>> outputs = ArraySpec(("model", "target"), (3, 4), "float32", rows=2)
        >>> object_files(StoreSpec("outputs", "model", 2, {"outputs": outputs}), "outputs", 1)
        ['outputs/c/1/0', 'outputs/c/1/1']
    """
    lengths = zip(spec.array(name).shape, spec.chunks(name), strict=True)
    grid = [range(-(-length // chunk)) for length, chunk in lengths]
    grid[spec.block_axis(name)] = range(block, block + 1)
    return ["/".join([name, "c", *map(str, place)]) for place in itertools.product(*grid)]


def mark_file(path: str, block: int) -> str:
    """Give the file whose existence says that a block is done.

    Args:
        path: Folder of the store.
        block: Number of the block.

    Returns:
        Path of the file.

    Example:
        >>> mark_file("runs/a", 3)
        'runs/a/done/c/3'
    """
    return f"{path}/done/c/{block}"


def marked(path: str) -> set[int]:
    """Give the blocks that are marked done, from one listing of a folder.

    Args:
        path: Folder of the store.

    Returns:
        Numbers of the blocks.

    Example:
        >>> marked("nowhere")
        set()
    """
    try:
        with os.scandir(f"{path}/done/c") as entries:
            # A mark that is being written has a longer name until it is renamed.
            return {int(entry.name) for entry in entries if entry.name.isdecimal()}
    except FileNotFoundError:
        return set()


def checksum(arrays: Mapping[str, np.ndarray]) -> int:
    """Give the CRC-32 over the bytes of a block's arrays, in the order of their names.

    Args:
        arrays: The arrays by name.

    Returns:
        An unsigned 32-bit number.

    Example:
        >>> checksum({"a": np.zeros(2, np.uint8)}) == zlib.crc32(bytes(2))
        True
    """
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).data, total)
    return total


def name_blocks(blocks: Sequence[int]) -> str:
    """Name blocks in a message, a few of them if they are many.

    Args:
        blocks: Their numbers.

    Returns:
        The text.

    Example:
        >>> name_blocks([3]), name_blocks(range(12))
        ('block 3', 'blocks 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more')
    """
    named = ", ".join(map(str, blocks[:_MOST_NAMED]))
    more = f" and {len(blocks) - _MOST_NAMED} more" if len(blocks) > _MOST_NAMED else ""
    return f"block{'s' if len(blocks) > 1 else ''} {named}{more}"


def refuse_unreadable(
    path: str, spec: StoreSpec, name: str, blocks: Sequence[int] | None = None
) -> None:
    """Refuse to read blocks of an array that are pending or lack a storage object.

    Args:
        path: Folder of the store.
        spec: Its layout.
        name: Name of the array.
        blocks: Numbers of the blocks; None means all.

    Raises:
        ValueError: A block is pending, or an object is missing.

    Example:
        >>> from stores.schema import ArraySpec
        >>> spec = StoreSpec("masks", "model", 2, {"mask": ArraySpec(("model",), (3,), "bool")})
        >>> refuse_unreadable("nowhere", spec, "mask", [1])
        Traceback (most recent call last):
            ...
        ValueError: block 1 of nowhere is pending; run the same computation again
    """
    spec.array(name)
    blocks = range(spec.blocks) if blocks is None else blocks
    refuse_pending(path, blocks)
    for block in blocks:
        # zarr reads a missing object as fill values.
        for file in object_files(spec, name, block):
            if not os.path.exists(f"{path}/{file}"):
                raise ValueError(
                    f"{path}/{file} is missing; discard block {block} and compute it again"
                )


def refuse_pending(path: str, blocks: Sequence[int]) -> None:
    """Refuse blocks that are pending, naming them.

    Args:
        path: Folder of the store.
        blocks: Numbers of the blocks that should be done.

    Raises:
        ValueError: A block is pending.

    Example:
        >>> refuse_pending("nowhere", [])
    """
    done = marked(path)
    pending = [block for block in blocks if block not in done]
    if pending:
        raise ValueError(
            f"{name_blocks(pending)} of {path} {'is' if len(pending) == 1 else 'are'} pending; "
            "run the same computation again"
        )


def check_block(spec: StoreSpec, block: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse arrays that are not exactly one block.

    Args:
        spec: The store's layout.
        block: Number of the block.
        arrays: The arrays by name.

    Raises:
        ValueError: There is no such block, or a name, shape, dtype or value is wrong.
        TypeError: A value is no numpy array.

    Example:
        >>> from stores.schema import ArraySpec
        >>> spec = StoreSpec("masks", "model", 2, {"mask": ArraySpec(("model",), (3,), "bool")})
        >>> check_block(spec, 1, {"mask": np.ones(1, bool)})
    """
    spec.span(block)
    if set(arrays) != set(spec.arrays):
        raise ValueError(
            f"expected the arrays {sorted(spec.arrays)} for block {block}, got {sorted(arrays)}"
        )
    for name, value in arrays.items():
        _check_form(spec, block, name, value)
        _check_finite(block, name, value)


def _check_form(spec: StoreSpec, block: int, name: str, value: np.ndarray) -> None:
    if not isinstance(value, np.ndarray):
        raise TypeError(
            f"expected a numpy array as {name!r} of block {block}, got {type(value).__name__}; "
            "convert it with numpy.asarray"
        )
    shape, dtype = spec.block_shape(name, block), np.dtype(spec.arrays[name].dtype)
    if value.shape != shape:
        raise ValueError(f"expected {name!r} of block {block} of shape {shape}, got {value.shape}")
    if value.dtype != dtype:
        raise ValueError(
            f"expected {name!r} of block {block} of dtype {dtype}, got {value.dtype}; "
            f"convert it with .astype({dtype.name!r})"
        )


def _check_finite(block: int, name: str, value: np.ndarray) -> None:
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise ValueError(
            f"expected finite values in {name!r} of block {block}, got NaN or infinity; "
            "look for a diverged computation, or scale what overflows its dtype"
        )
