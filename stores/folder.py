"""A folder on disk as a place."""

from __future__ import annotations

import glob
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import final

import numpy as np
from zarr.storage import LocalStore

from stores.durability import durable
from stores.handles import close_files, opened_files
from stores.locks import lock_file
from stores.places import Bytes, Place, Ranges


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

    def __fspath__(self) -> str:
        """Give the path, so that the folder can stand wherever Python takes one."""
        return self.url

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

    @property
    def at_once(self) -> int:
        """Bytes that are best asked for at once: what fits a processor's cache."""
        return 4 * 2**20

    def generation(self) -> object:
        """Identity and time of the root zarr.json, which is always replaced, never changed.

        On a network disk the system may remember it for some seconds.
        """
        try:
            told = os.stat(f"{self.url}/zarr.json")
        except OSError:
            return None
        return told.st_dev, told.st_ino, told.st_mtime_ns

    def read_batches(
        self, batches: Sequence[Ranges], size: int, length: int
    ) -> Iterator[np.ndarray]:
        """Read ranges of equal length from files of equal size, batch by batch."""
        return opened_files(self.url, self.generation()).read(batches, size, length)

    def mapped(self, name: str) -> np.ndarray:
        """Content of a file, mapped from the disk."""
        if not self.size(name):
            return np.empty(0, np.uint8)  # the system maps no empty file
        # Writable without effect on the file: torch takes no read-only arrays.
        return np.asarray(np.memmap(self._path(name), np.uint8, mode="c"))

    def write(self, name: str, content: Bytes) -> None:
        """Write a file under another name, then rename it."""
        path = self._path(name)
        with _written_aside(path, content) as aside:
            os.replace(aside, path)
        self._settle(path)

    def create(self, name: str, content: Bytes) -> None:
        """Write a file under another name, then give it its own, which must be free."""
        path = self._path(name)
        with _written_aside(path, content) as aside:
            # Renaming would replace a file, and opening a new one would show it half written.
            os.link(aside, path)
        self._settle(path)

    def remove(self, name: str) -> None:
        """Remove a file."""
        os.remove(self._path(name))
        self._settle(self._path(name))

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

    def links(self) -> list[str]:
        """Names of all symbolic links below."""
        found = (
            os.path.relpath(path, self.url)
            for folder, folders, files in os.walk(self.url)
            for path in (os.path.join(folder, name) for name in (*folders, *files))
            if os.path.islink(path)
        )
        return sorted(name.replace(os.sep, "/") for name in found)

    def clear(self) -> None:
        """Remove the folder and everything in it."""
        close_files(self.url)
        if self.taken():
            shutil.rmtree(self.url)
            self._settle(self.url)

    def fill(self, files: Mapping[str, Bytes]) -> None:
        """Write the files to a folder of another name, then rename it."""
        with self.aside() as made:
            for name, content in files.items():
                path = pathlib.Path(made._path(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            made.move(self)

    def move(self, to: Place) -> None:
        """Rename the folder."""
        close_files(self.url)
        if durable():
            self.sync(self.walk())
        os.makedirs(os.path.dirname(to.url), exist_ok=True)
        os.rename(self.url, to.url)
        Folder(to.url)._settle(to.url)
        self._settle(self.url)

    @contextmanager
    def locked(self, *, alone: bool) -> Iterator[bool]:
        """Lock the folder itself, so that no file is left behind."""
        real = False
        with ExitStack() as stack:
            with suppress(FileNotFoundError, NotADirectoryError):
                real = lock_file(stack.enter_context(_opened(self.url)), alone=alone)
            yield real

    @contextmanager
    def aside(self) -> Iterator[Folder]:
        """Make a folder beside this one and lock it, so that nobody takes it for one that was left.

        What is left of it goes at the end, and first what killed processes left of theirs.
        """
        self._sweep()
        with ExitStack() as stack:
            made = self._locked_aside(stack)
            stack.callback(made.clear)
            yield made

    def _locked_aside(self, stack: ExitStack) -> Folder:
        while True:
            made = Folder(f"{self.url}.{uuid.uuid4().hex}.tmp")
            os.makedirs(made.url)
            # Another process may have swept it before it was locked.
            with suppress(BlockingIOError):
                stack.enter_context(made.locked(alone=False))
                if made.taken():
                    return made

    def _sweep(self) -> None:
        for path in glob.glob(f"{glob.escape(self.url)}.{'[0-9a-f]' * 32}.tmp"):
            left = Folder(path)
            with suppress(BlockingIOError, FileNotFoundError), left.locked(alone=True) as real:
                if real:
                    left.clear()

    def sync(self, names: Sequence[str]) -> None:
        """Flush files and the folders that hold them, up to the one around this one."""
        paths = [self._path(name) for name in names]
        _flush([*paths, *(folder for path in paths for folder in self._folders(path))])

    def zarr(self) -> LocalStore:
        """The folder as zarr sees it."""
        return LocalStore(self.url)

    def _settle(self, path: str) -> None:
        """Waits until the disk knows under which names there are files, if that is asked for."""
        if durable():
            _flush(self._folders(path))

    def _folders(self, path: str) -> list[str]:
        found = [os.path.dirname(path)]
        while found[-1].startswith(self.url):
            found.append(os.path.dirname(found[-1]))
        return found

    def _path(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url


@contextmanager
def _written_aside(path: str, content: Bytes) -> Iterator[str]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    aside = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        pathlib.Path(aside).write_bytes(content)
        if durable():
            _flush([aside])
        yield aside
    finally:
        pathlib.Path(aside).unlink(missing_ok=True)


def _flush(paths: Sequence[str]) -> None:
    for path in dict.fromkeys(paths):
        with _opened(path) as handle:
            os.fsync(handle)


@contextmanager
def _opened(path: str) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
