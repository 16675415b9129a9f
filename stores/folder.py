"""A folder on disk as a place."""

from __future__ import annotations

import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import numpy as np
from zarr.storage import LocalStore

from stores.places import Place

# Ranges that the system is told of before they are read, so that it reads ahead on a slow disk.
_AHEAD = 256


@final
@dataclass(frozen=True)
class Folder(Place):
    """A folder on disk.

    Args:
        url: Its absolute path.

    Example:
        >>> import tempfile
        >>> folder = Folder(tempfile.mkdtemp())
        >>> folder.write("a/b", b"123")
        >>> folder.read("a/b"), folder.names("a"), folder.walk()
        (b'123', ['b'], ['a/b'])
    """

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return os.path.isfile(self._path(name))

    def taken(self) -> bool:
        """Whether there is anything at this path, a dangling link too."""
        return os.path.lexists(self.url)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return os.stat(self._path(name)).st_size

    def read(self, name: str) -> bytes:
        """Content of a file."""
        return pathlib.Path(self._path(name)).read_bytes()

    def read_ranges(self, name: str, starts: Sequence[int], into: np.ndarray) -> None:
        """Read ranges of equal length from a file."""
        length = into.shape[1]
        with _opened(self._path(name)) as handle:
            for first in range(0, len(starts), _AHEAD):
                part = starts[first : first + _AHEAD]
                if hasattr(os, "posix_fadvise"):
                    for start in part:
                        os.posix_fadvise(handle, start, length, os.POSIX_FADV_WILLNEED)
                for start, row in zip(part, into[first : first + _AHEAD], strict=True):
                    _read_whole(handle, start, row.data, self._path(name))

    def mapped(self, name: str) -> np.ndarray:
        """Content of a file, mapped from the disk."""
        # Writable without effect on the file: torch takes no read-only arrays.
        return np.asarray(np.memmap(self._path(name), np.uint8, mode="c"))

    def write(self, name: str, content: bytes) -> None:
        """Write a file under another name, then rename it."""
        path = self._path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        aside = f"{path}.{uuid.uuid4().hex}.partial"
        try:
            pathlib.Path(aside).write_bytes(content)
            os.replace(aside, path)
        finally:
            pathlib.Path(aside).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a file."""
        os.remove(self._path(name))

    def names(self, folder: str = "") -> list[str]:
        """Names of the files directly in a folder below."""
        try:
            with os.scandir(self._path(folder)) as entries:
                return sorted(entry.name for entry in entries if entry.is_file())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self) -> list[str]:
        """Names of all files below."""
        found = (
            os.path.relpath(os.path.join(folder, file), self.url)
            for folder, _, files in os.walk(self.url)
            for file in files
        )
        return sorted(name.replace(os.sep, "/") for name in found)

    def clear(self) -> None:
        """Remove the folder and everything in it."""
        if self.taken():
            shutil.rmtree(self.url)

    def move(self, to: Place) -> None:
        """Rename the folder."""
        os.makedirs(os.path.dirname(to.url), exist_ok=True)
        os.rename(self.url, to.url)

    def sync(self, names: Sequence[str]) -> None:
        """Flush files and the folders that hold them."""
        paths = [self._path(name) for name in names]
        for path in dict.fromkeys([*paths, *map(os.path.dirname, paths)]):
            with _opened(path) as handle:
                os.fsync(handle)

    def zarr(self) -> LocalStore:
        """The folder as zarr sees it."""
        return LocalStore(self.url)

    def _path(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url


@contextmanager
def _opened(path: str) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _read_whole(handle: int, start: int, into: memoryview, path: str) -> None:
    while len(into):
        count = os.preadv(handle, [into], start)
        if not count:
            raise ValueError(
                f"expected {len(into)} more bytes at {start} in {path}, got its end; "
                "find the damaged blocks with verify() and discard() them"
            )
        start, into = start + count, into[count:]
