"""Whether blocks are what their marks say, and what follows: taken back, or declared complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from stores.blocks import mark_file, refuse_unreadable, region
from stores.metadata import DONE, open_array
from stores.places import Place
from stores.roots import DISCARDS, read_root, write_attributes
from stores.schema import StoreSpec
from stores.writing import checksum, mark_of

if TYPE_CHECKING:
    from stores.contents import Contents
    from stores.store import Store

_CHAINED = 1  # the last schema version whose marks are one CRC-32 over all arrays


def unsound(store: Store, blocks: Iterable[int]) -> list[int]:
    """Read done blocks again and compare them with what was written.

    Args:
        store: The store.
        blocks: Numbers of the blocks.

    Returns:
        Those of which an object is missing, cut short or changed; all of them where an array's
        zarr.json is, or that of the marks.

    Raises:
        ConnectionError: The service of a bucket does not answer, which tells nothing of a block.
    """
    try:
        marks = open_array(store.place, store.spec, DONE)
    except ConnectionError:
        raise
    except (ValueError, RuntimeError, OSError):
        return list(blocks)
    return [block for block in blocks if not _is_sound(store, marks, block)]


def _is_sound(store: Store, marks: zarr.Array[Any], block: int) -> bool:
    try:
        return int(np.asarray(marks[block])) in _marks(store, block)
    except ConnectionError:
        raise
    except (ValueError, RuntimeError, OSError):
        return False


def damaged_constants(store: Contents) -> list[str]:
    """Read all constants and ids again and compare them with their checksums.

    Args:
        store: The store.

    Returns:
        Names of what is missing or damaged, ids as the axis and "_id"; nothing but the computation
        of the whole store writes them again.

    Raises:
        ConnectionError: The service of a bucket does not answer.

    Example:
        >>> import tempfile
        >>> from stores import ArraySpec, Provenance, Store
        >>> spec = StoreSpec("masks", "model", 2, {"mask": ArraySpec(("model",), (3,), "bool")})
        >>> path = tempfile.mkdtemp() + "/masks"
        >>> store = Store.create(path, spec, Provenance({}), {"scale": np.ones(2)})
        >>> store.place.remove("scale/c/0")
        >>> damaged_constants(store)
        ['scale']
    """
    root = read_root(store.place)
    reads: dict[str, Callable[[], object]]
    reads = {name: partial(store.constant, name) for name in root["constants"]}
    reads.update((f"{axis}_id", partial(store.ids, axis)) for axis in root["ids"])
    return [name for name, read in reads.items() if not _readable(read)]


def _readable(read: Callable[[], object]) -> bool:
    try:
        read()
    except (ValueError, FileNotFoundError):
        return False
    return True


def _marks(store: Store, block: int) -> list[int]:
    names = sorted(store.spec.arrays)
    found = [mark_of({name: _checksum(store, name, block, 0) for name in names})]
    if store.schema_version <= _CHAINED:
        # Blocks that were still pending then have a mark of now.
        chain = 0
        for name in names:
            chain = _checksum(store, name, block, chain)
        found.append(chain)
    return found


def _checksum(store: Store, name: str, block: int, before: int) -> int:
    refuse_unreadable(store.place, store.spec, name, [block])
    array = store.array(name)
    for part in slabs(store.spec, name, block):
        before = checksum(np.asarray(array[part]), before)
    return before


def slabs(spec: StoreSpec, name: str, block: int) -> list[tuple[slice, ...]]:
    """Give the regions in which one block of an array can be read piece by piece.

    An array whose first axis is not the store's block axis is cut along it, one storage object
    after the other; any other block is one slab.

    Args:
        spec: The store's layout.
        name: Name of the array.
        block: Number of the block.

    Returns:
        Regions of the array, in the order of the block's elements in memory.

    Example:
        >>> from stores.schema import ArraySpec
        >>> scores = ArraySpec(("train", "target"), (5, 4), "float32", rows=2)
        >>> slabs(StoreSpec("scores", "target", 3, {"scores": scores}), "scores", 1)[-1]
        (slice(4, 5, None), slice(3, 4, None))
    """
    whole = region(spec, name, block)
    if spec.block_axis(name) == 0:
        return [whole]
    length, height = spec.array(name).shape[0], spec.chunks(name)[0]
    cuts = (slice(start, min(length, start + height)) for start in range(0, length, height))
    return [(cut, *whole[1:]) for cut in cuts]


def discard(place: Place, block: int) -> None:
    """Take the mark off a block, so that it is pending and can be written again.

    Args:
        place: Where the store lies.
        block: Number of a done block.

    Raises:
        ValueError: The block is not done.
    """
    if not place.exists(mark_file(block)):
        raise ValueError(f"expected a done block to discard, got block {block}")
    # Before the mark goes, so that nobody who remembers a complete store trusts the block.
    root = _count_discard(place)
    place.remove(mark_file(block))
    # Again for who read the root and the marks in between, unless somebody wrote the root since.
    if read_root(place) == root:
        _count_discard(place)


def _count_discard(place: Place) -> dict[str, Any]:
    # Each time another root, or what tells of its generation in a bucket would stay the same.
    count = int(read_root(place).get(DISCARDS, 0)) + 1
    return write_attributes(place, {"state": "open", DISCARDS: count})


def complete(place: Place, spec: StoreSpec) -> None:
    """Declare a store complete and sweep what killed writers left behind; once is enough.

    Args:
        place: Where the store lies; no block is pending.
        spec: Its layout.
    """
    if read_root(place)["state"] == "complete":
        return
    for leftover in place.walk():
        if _is_swept(spec, leftover):
            # Another process may sweep at the same time.
            with suppress(FileNotFoundError):
                place.remove(leftover)
    write_attributes(place, {"state": "complete"})


def _is_swept(spec: StoreSpec, file: str) -> bool:
    # The root and marks may be in another process's hands, which needs the file to rename it.
    array = file.split("/", maxsplit=1)[0]
    return file.endswith(".partial") and (array in spec.arrays or file.endswith(".lock.partial"))
