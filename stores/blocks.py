"""One block of a store: its region, its files, its mark and the checks before it is written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set

from stores.places import Place
from stores.schema import StoreSpec

MARKS = "done/c"
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


def mark_file(block: int) -> str:
    """Give the file whose existence says that a block is done.

    Args:
        block: Number of the block.

    Returns:
        Path inside the store.

    Example:
        >>> mark_file(3)
        'done/c/3'
    """
    return f"{MARKS}/{block}"


def marked(place: Place) -> set[int]:
    """Give the blocks that are marked done, from one listing.

    Args:
        place: Where the store lies.

    Returns:
        Numbers of the blocks.

    Example:
        >>> from stores.folder import Folder
        >>> marked(Folder("nowhere"))
        set()
    """
    # A mark that is being written has a longer name until it is renamed.
    return {int(name) for name in place.names(MARKS) if name.isdecimal()}


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
    place: Place, spec: StoreSpec, name: str, blocks: Sequence[int] | None = None
) -> None:
    """Refuse to read blocks of an array that are pending or lack a storage object.

    Args:
        place: Where the store lies.
        spec: Its layout.
        name: Name of the array.
        blocks: Numbers of the blocks; None means all.

    Raises:
        ValueError: A block is pending, or an object is missing.

    Example:
        >>> from stores.folder import Folder
        >>> from stores.schema import ArraySpec
        >>> spec = StoreSpec("masks", "model", 2, {"mask": ArraySpec(("model",), (3,), "bool")})
        >>> refuse_unreadable(Folder("nowhere"), spec, "mask", [1])
        Traceback (most recent call last):
            ...
        ValueError: block 1 of nowhere is pending; run the same computation again
    """
    spec.array(name)
    blocks = range(spec.blocks) if blocks is None else blocks
    refuse_pending(place, blocks)
    for block in blocks:
        # zarr reads a missing object as fill values.
        for file in object_files(spec, name, block):
            if not place.exists(file):
                raise missing_object(place, file, block)


def missing_object(place: Place, file: str, block: int) -> ValueError:
    """Give the refusal of a done block that lacks a storage object.

    Args:
        place: Where the store lies.
        file: Path of the object inside the store.
        block: Number of the block.

    Returns:
        The error.

    Example:
        >>> from stores.folder import Folder
        >>> missing_object(Folder("a"), "scores/c/0", 0)
        ValueError('a/scores/c/0 is missing; discard block 0 and compute it again')
    """
    return ValueError(f"{place}/{file} is missing; discard block {block} and compute it again")


def refuse_pending(place: Place, blocks: Sequence[int]) -> None:
    """Refuse blocks that are pending, naming them.

    Args:
        place: Where the store lies.
        blocks: Numbers of the blocks that should be done.

    Raises:
        ValueError: A block is pending.

    Example:
        >>> from stores.folder import Folder
        >>> refuse_pending(Folder("nowhere"), [])
    """
    refuse_unmarked(place, blocks, marked(place))


def refuse_unmarked(place: Place, blocks: Sequence[int], done: Set[int]) -> None:
    """Refuse blocks that are not among the done ones, naming them.

    Args:
        place: Where the store lies.
        blocks: Numbers of the blocks that should be done.
        done: Numbers of those that are.

    Raises:
        ValueError: A block is pending.

    Example:
        >>> from stores.folder import Folder
        >>> refuse_unmarked(Folder("a"), [0, 2], {0, 1})
        Traceback (most recent call last):
            ...
        ValueError: block 2 of a is pending; run the same computation again
    """
    pending = [block for block in blocks if block not in done]
    if pending:
        raise ValueError(
            f"{name_blocks(pending)} of {place} {'is' if len(pending) == 1 else 'are'} pending; "
            "run the same computation again"
        )
