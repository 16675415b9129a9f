"""Files that must not change while blocks are written: once one did, no block is marked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from stores.places import Place


@dataclass(frozen=True)
class Watched:
    """Files of a place, as they were when writing began.

    Args:
        place: Where they lie.
        files: Content by name, None where there was no file; read again in this order.
        why: What it means that one has changed, and the cure.
    """

    place: Place
    files: Mapping[str, bytes | None]
    why: str


_watched: ContextVar[tuple[Watched, ...]] = ContextVar("watched", default=())


def watch(place: Place, names: Sequence[str], why: str) -> Watched:
    """Look at files as they are now.

    Args:
        place: Where they lie.
        names: Of the files; they need not be there.
        why: What it means that one has changed, and the cure.

    Returns:
        What they hold.

    Example:
        >>> from stores.folder import Folder
        >>> watch(Folder("nowhere"), ["journal"], "it is being changed; try again").files
        {'journal': None}
    """
    return Watched(place, {name: _content(place, name) for name in names}, why)


@contextmanager
def watching(*watched: Watched) -> Iterator[None]:
    """Run the body so that it creates no store and marks no block once a watched file changed.

    Work that `run_blocks` sends to other processes is bound by it too.

    Args:
        watched: The files, as they were.

    Example:
        >>> from stores.folder import Folder
        >>> with watching(watch(Folder("nowhere"), ["journal"], "it is being changed")):
        ...     refuse_changes()
    """
    token = _watched.set((*_watched.get(), *watched))
    try:
        yield
    finally:
        _watched.reset(token)


def refuse_changes() -> None:
    """Refuse to go on where a watched file has changed.

    Raises:
        ValueError: One has.

    Example:
        >>> refuse_changes()
    """
    for watched in _watched.get():
        for name, content in watched.files.items():
            if _content(watched.place, name) != content:
                raise ValueError(watched.why)


def watched_too(work: Callable[[int], None]) -> Callable[[int], None]:
    """Give a work function that is bound, in any process, by what is watched here.

    Args:
        work: Computes a block, given its number.

    Returns:
        The function; the same one where nothing is watched.

    Example:
        >>> watched_too(print) is print
        True
    """
    watched = _watched.get()
    return _Watching(work, watched) if watched else work


@dataclass(frozen=True)
class _Watching:
    work: Callable[[int], None]
    watched: tuple[Watched, ...]

    def __call__(self, block: int) -> None:
        with watching(*self.watched):
            self.work(block)


def _content(place: Place, name: str) -> bytes | None:
    try:
        return place.read(name)
    except (FileNotFoundError, NotADirectoryError):
        return None
