"""Files that stay open between queries: opening one costs more than reading a row from it."""

from __future__ import annotations

import errno
import os
import resource
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from threading import RLock
from typing import final

import numpy as np

from stores.places import Ranges, check_size

_MOST = 512  # open files of all folders
_FOLDERS = 4  # folders whose files stay open
_AHEAD = 4  # batches that the system is told of before they are read
_SHARE = 4  # a quarter of the files that the system allows; others are the caller's
_NOT_NOW = (errno.EAGAIN, errno.EOPNOTSUPP)
_TOO_MANY = (errno.EMFILE, errno.ENFILE)


@final
class OpenFile:
    """A file that is open for reading until nothing refers to it any more.

    Args:
        path: Its path.
        size: Bytes that it must have.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It has another size.
    """

    def __init__(self, path: str, size: int) -> None:
        """Open it; reads are scattered, so the system need not read on by itself."""
        self.path, self.expected = path, size
        self.number = os.open(path, os.O_RDONLY)
        check_size(path, os.fstat(self.number).st_size, size)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.number, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        """Close it, unless it could not be opened."""
        if hasattr(self, "number"):
            os.close(self.number)

    def refuse_change(self) -> None:
        """Refuse a file of which less could be read than it holds."""
        check_size(self.path, os.fstat(self.number).st_size, self.expected)
        raise ValueError(f"{self.path} changed while it was read; try again")

    def announce(self, starts: Sequence[int], length: int) -> None:
        """Let the system read ranges ahead."""
        for start in starts:
            os.posix_fadvise(self.number, start, length, os.POSIX_FADV_WILLNEED)


@final
class OpenFiles:
    """Files of one folder; when too many are open, those of the folder asked longest ago close.

    Args:
        folder: Path of the folder.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "a").write_bytes(b"1234")
        >>> [bytes(batch) for batch in OpenFiles(str(folder)).read([{"a": [2, 0]}], 4, 2)]
        [b'3412']
    """

    def __init__(self, folder: str) -> None:
        """Open nothing yet."""
        self.folder = folder
        self.files: dict[str, OpenFile] = {}
        self.buffers: list[np.ndarray] = []

    def read(self, batches: Sequence[Ranges], size: int, length: int) -> Iterator[np.ndarray]:
        """Read ranges; see `Place.read_batches`."""
        most = max((sum(map(len, ranges.values())) for ranges in batches), default=0)
        buffer = self._take_buffer(most * length)
        # What is in memory is read at once. The first range that is not tells that the disk must
        # be asked, and then for many ranges together.
        warm = hasattr(os, "RWF_NOWAIT")
        if not warm:
            self._announce(batches[: _AHEAD - 1], size, length)
        for number, ranges in enumerate(batches):
            count = sum(map(len, ranges.values()))
            found = buffer[: count * length].reshape(count, length)
            if not (warm and self._fill(ranges, size, found, wait=False)):
                last = batches[number + _AHEAD - 1 : number + _AHEAD]
                self._announce(batches[number : number + _AHEAD] if warm else last, size, length)
                warm = False
                self._fill(ranges, size, found, wait=True)
            yield found
        self.buffers.append(buffer)

    def _take_buffer(self, nbytes: int) -> np.ndarray:
        # Kept ones alone can be filled without waiting: the system must not have to find memory.
        with suppress(IndexError):  # none left, or another thread took the last one
            while True:
                buffer = self.buffers.pop()
                if len(buffer) >= nbytes:
                    return buffer
        buffer = np.empty(nbytes, np.uint8)
        buffer.fill(0)
        return buffer

    def _fill(self, ranges: Ranges, size: int, into: np.ndarray, *, wait: bool) -> bool:
        """Read one batch; without waiting only what is in memory, and tell whether that was all."""
        buffer, length, place = into.data.cast("B"), into.shape[1], 0
        flags = 0 if wait else os.RWF_NOWAIT
        try:
            for name, starts in ranges.items():
                file = self._open(name, size)
                for start in starts:
                    part = buffer[place : place + length]
                    if os.preadv(file.number, [part], start, flags) != length:
                        if wait:
                            file.refuse_change()
                        return False
                    place += length
        except OSError as error:
            if wait or error.errno not in _NOT_NOW:
                raise
            return False
        return True

    def _announce(self, batches: Sequence[Ranges], size: int, length: int) -> None:
        if hasattr(os, "posix_fadvise"):
            for ranges in batches:
                for name, starts in ranges.items():
                    self._open(name, size).announce(starts, length)

    def _open(self, name: str, size: int) -> OpenFile:
        file = self.files.get(name)
        if file is None:
            with _lock:
                self.files[name] = file = self._opened(name, size)
                _close_some(self)
        return file

    def _opened(self, name: str, size: int) -> OpenFile:
        path = f"{self.folder}/{name}"
        try:
            return OpenFile(path, size)
        except OSError as error:
            if error.errno not in _TOO_MANY:
                raise
        _close_some(self, most=0)
        return OpenFile(path, size)


def _close_some(last: OpenFiles, most: int | None = None) -> None:
    """Close files until few enough are open; those that are being read from close afterwards."""
    groups = [*(files for _, files in _kept.values() if files is not last), last]
    count = sum(len(group.files) for group in groups)
    for group in groups:
        for name in list(group.files)[: max(0, count - (_most() if most is None else most))]:
            # Whoever still reads from the file that is dropped keeps it open by his reference.
            del group.files[name]
            count -= 1


def _most() -> int:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = allowed == resource.RLIM_INFINITY
    return _MOST if unlimited else min(_MOST, max(1, allowed // _SHARE))


_lock = RLock()  # of the files that are kept; one thread may close what another has opened
_kept: OrderedDict[str, tuple[object, OpenFiles]] = OrderedDict()


def opened_files(folder: str, generation: object) -> OpenFiles:
    """Give the open files of a folder.

    Args:
        folder: Its path.
        generation: What changes when files of the folder may have been replaced; None keeps no
            file open after the query.

    Returns:
        The files.

    Example:
        >>> first = opened_files("a", 1)
        >>> opened_files("a", 1) is first, opened_files("a", 2) is first
        (True, False)
    """
    with _lock:
        known, files = _kept.pop(folder, (None, OpenFiles(folder)))
        if generation is None:
            return OpenFiles(folder)
        if known != generation:
            files = OpenFiles(folder)
        _kept[folder] = generation, files
        if len(_kept) > _FOLDERS:
            _kept.popitem(last=False)
        return files


def close_files(folder: str) -> None:
    """Close the files of a folder and of the folders below it.

    Args:
        folder: Its path.

    Example:
        >>> close_files("a")
    """
    with _lock:
        for path in list(_kept):
            if path == folder or path.startswith(f"{folder}/"):
                _kept.pop(path, None)
