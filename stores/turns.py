"""Turns at a block: of two that would compute the same block at once, the second waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stores.advance import advance
from stores.blocks import mark_file
from stores.folder import Folder
from stores.locks import lock_file
from stores.places import place
from stores.store import Store

_PATIENCE = 0.1  # seconds between two attempts to have the turn


@dataclass(frozen=True)
class _InTurns:
    work: Callable[[int], None]
    paths: tuple[str, ...]
    blocks: int

    def __call__(self, number: int) -> None:
        which, block = divmod(number, self.blocks)
        with turn(self.paths[which], block) as pending:
            if pending:
                self.work(number)


def in_turns(work: Callable[[int], None], *stores: Store) -> Callable[[int], None]:
    """Give a work function that leaves alone what another process computes or has computed.

    Two commands that fill the same store share its blocks so: whoever comes second to a block
    waits for it, takes it over where the first one dies, and skips it where it is done.

    Args:
        work: Computes and writes a block, given its number.
        stores: Where to. With several, all of the same blocks, number b of the work is block
            b % blocks of store b // blocks.

    Returns:
        The work function for `run_blocks`.

    Example:
        >>> import tempfile, numpy as np
        >>> from stores import ArraySpec, Provenance, StoreSpec
        >>> spec = StoreSpec("masks", "model", 1, {"mask": ArraySpec(("model",), (2,), "bool")})
        >>> store = Store.create(tempfile.mkdtemp() + "/masks", spec, Provenance({}))
        >>> store.write_block(0, {"mask": np.ones(1, bool)})
        >>> work = in_turns(print, store)
        >>> work(0), work(1)
        1
        (None, None)
    """
    return _InTurns(work, tuple(store.path for store in stores), stores[0].spec.blocks)


@contextmanager
def turn(path: str, block: int) -> Iterator[bool]:
    """Run the body while no other process has the turn at a block.

    The system ends the turn of a process that dies. In a bucket, and on a file system without
    locks, every process has the turn at once: there the same block may be computed twice.

    Args:
        path: Folder or address of the store.
        block: Number of the block.

    Yields:
        Whether the block is pending.

    Raises:
        OSError: The folder cannot be written.

    Example:
        >>> import tempfile
        >>> from stores import ArraySpec, Provenance, StoreSpec
        >>> spec = StoreSpec("masks", "model", 1, {"mask": ArraySpec(("model",), (2,), "bool")})
        >>> store = Store.create(tempfile.mkdtemp() + "/masks", spec, Provenance({}))
        >>> with turn(store.path, 1) as pending:
        ...     pending
        True
    """
    if not isinstance(place(path), Folder):
        yield _pending(path, block)
        return
    # Named so that `finalize` sweeps what a process left that was killed behind its mark.
    file = Path(path, "done", f"{block}.lock.partial")
    with file.open("ab") as handle:
        while not _taken(handle):
            advance()
            time.sleep(_PATIENCE)
        yield _pending(path, block)
        # Only of a block that is done: whoever still waits for this file must find it so.
        if not _pending(path, block):
            file.unlink(missing_ok=True)


def _pending(path: str, block: int) -> bool:
    # The one mark and no listing, which a bucket takes payment for.
    return not place(path).exists(mark_file(block))


def _taken(handle: BinaryIO) -> bool:
    try:
        lock_file(handle.fileno(), alone=True)
    except BlockingIOError:
        return False
    return True
