"""Where stores and runs lie: a folder, or a prefix in a bucket; files by name, nothing else."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from zarr.abc.store import Store as ZarrStore

Ranges: TypeAlias = Mapping[str, Sequence[int]]
"""Numbers of the first bytes by name of the file."""

Bytes: TypeAlias = bytes | bytearray | memoryview
"""Content of a file."""


@dataclass(frozen=True)
class Place(ABC):
    """A folder, or a prefix in a bucket, that holds files by name.

    A name is relative, with "/" between its parts. A file is there as a whole or not at all. Where
    a service does not answer, or refuses, every method raises ConnectionError.

    Args:
        url: Absolute path of the folder, or address of the prefix; it names the place in messages.
    """

    url: str

    def __str__(self) -> str:
        """Give the path or the address."""
        return self.url

    def __truediv__(self, name: str) -> Place:
        """Give the place below this one."""
        return type(self)(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path or the address."""
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> Place:
        """The place that this one lies in."""
        return type(self)(self.url.rstrip("/").rsplit("/", 1)[0])

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""

    @abstractmethod
    def taken(self) -> bool:
        """Whether a store cannot be created here: a folder exists, or a bucket has zarr.json."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: There is none.
        """

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            FileNotFoundError: There is none.
        """

    @property
    @abstractmethod
    def at_once(self) -> int:
        """Bytes that are best read as one batch."""

    @abstractmethod
    def generation(self) -> object:
        """What changes whenever the root zarr.json is written anew; None where there is none.

        While it stays the same, no file that was read has been replaced. Where asking is costly,
        what another process writes may show some seconds later.
        """

    @abstractmethod
    def read_batches(
        self, batches: Sequence[Ranges], size: int, length: int
    ) -> Iterator[np.ndarray]:
        """Read ranges of equal length from files of equal size, batch by batch.

        Args:
            batches: First byte of each range by name of the file, some ranges a batch.
            size: Bytes that each of the files must have.
            length: Bytes of a range.

        Returns:
            Bytes of each batch in the order of its ranges, uint8 [range, length]; good until the
            next batch is asked for.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: A file has another size.
        """

    @abstractmethod
    def mapped(self, name: str) -> np.ndarray:
        """Content of a file as bytes, uint8 [byte], read when touched where that is possible.

        Writing to the array does not reach the file.

        Raises:
            FileNotFoundError: There is none.
        """

    @abstractmethod
    def write(self, name: str, content: Bytes) -> None:
        """Write a file as a whole; one of the same name is replaced at once.

        Raises:
            OSError: It cannot be written.
        """

    @abstractmethod
    def create(self, name: str, content: Bytes) -> None:
        """Write a file as a whole where there is none; of several at once, one writes.

        Raises:
            FileExistsError: There is one of this name.
            OSError: It cannot be written.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file.

        Raises:
            FileNotFoundError: There is none.
        """

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Names of the files directly in a folder below, without its name; [] if there is none."""

    @abstractmethod
    def walk(self) -> list[str]:
        """Names of all files below this place, in order."""

    @abstractmethod
    def links(self) -> list[str]:
        """Names of the symbolic links below this place, in order; `walk` follows none of them."""

    @abstractmethod
    def clear(self) -> None:
        """Remove everything at this place, and the place itself; nothing happens if it is empty."""

    @abstractmethod
    def fill(self, files: Mapping[str, Bytes]) -> None:
        """Write the files of a free place, which is taken only once all of them are there.

        In a bucket the root zarr.json is written last. What a call leaves there that fails or is
        killed counts for nothing, and may be written again by the same call.

        Raises:
            OSError: They cannot be written, or files that differ are there already.
        """

    @abstractmethod
    def move(self, to: Place) -> None:
        """Move everything to a free place of the same kind; a folder moves at once.

        In a bucket the root zarr.json is written last, so that a store appears as a whole.

        Raises:
            OSError: It cannot be written, or files that differ are there already.
        """

    @abstractmethod
    def locked(self, *, alone: bool) -> AbstractContextManager[bool]:
        """Give a context in which nobody is alone here, or this one is; it never waits.

        The lock ends with its process. Where nothing can be locked, as in a bucket, or nothing is
        there, everyone has it.

        Args:
            alone: Whether nobody else may have the lock at the same time.

        Raises:
            BlockingIOError: Another one has it, on entering.

        Returns:
            A context that gives whether the lock is one.
        """

    @abstractmethod
    def sync(self, names: Sequence[str]) -> None:
        """Wait until files have reached the disk, so that they survive a loss of power."""

    @abstractmethod
    def zarr(self) -> ZarrStore:
        """The place as zarr sees it."""


Where: TypeAlias = str | os.PathLike[str] | Place
"""What names a place: a path, an address such as s3://bucket/prefix, or a place itself."""


def place(where: Where) -> Place:
    """Give the place that a path or an address names.

    Args:
        where: A path, an address such as s3://bucket/prefix, or a place.

    Returns:
        The place; nothing need be there.

    Raises:
        ValueError: The address is of a kind that is not supported, or its bucket is out of reach.
        ImportError: The address needs a package that is not installed.

    Example:
        >>> place("runs/digits").name
        'digits'
        >>> place("ftp://host/run")
        Traceback (most recent call last):
            ...
        ValueError: expected a path or an address s3://bucket/prefix, got 'ftp://host/run'
    """
    if isinstance(where, Place):
        return where
    text = os.fspath(where)
    if text.startswith("s3://"):
        from stores.bucket import Bucket

        return Bucket.at(text)
    if "://" in text:
        raise ValueError(f"expected a path or an address s3://bucket/prefix, got {text!r}")
    from stores.folder import Folder

    return Folder(os.path.abspath(text))


def read_file(where: Where) -> bytes:
    """Read one file.

    Args:
        where: Path or address of the file.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: There is none.
        ValueError: As for `place`.

    Example:
        >>> import tempfile
        >>> file = tempfile.mkdtemp() + "/run.json"
        >>> write_file(file, b"{}")
        >>> read_file(file)
        b'{}'
    """
    at = place(where)
    return at.parent.read(at.name)


def write_file(where: Where, content: bytes) -> None:
    """Write one file as a whole; one of the same name is replaced at once.

    Args:
        where: Path or address of the file.
        content: What to write.

    Raises:
        OSError: It cannot be written.
        ValueError: As for `place`.

    Example:
        >>> import tempfile
        >>> write_file(tempfile.mkdtemp() + "/run.json", b"{}")
    """
    at = place(where)
    at.parent.write(at.name, content)


def check_size(where: str, found: int, expected: int) -> None:
    """Refuse a file of another size than it must have.

    Args:
        where: The file, for the message.
        found: Its bytes.
        expected: The bytes it must have.

    Raises:
        ValueError: They differ.

    Example:
        >>> check_size("runs/a/scores/c/0", 12, 16)
        Traceback (most recent call last):
            ...
        ValueError: expected 16 bytes in runs/a/scores/c/0, got 12; dmm status --verify (verify()) \
finds damaged blocks, --discard (discard()) makes them pending, and what made them makes them again
    """
    if found != expected:
        raise ValueError(
            f"expected {expected} bytes in {where}, got {found}; "
            "dmm status --verify (verify()) finds damaged blocks, --discard (discard()) makes them"
            " pending, and what made them makes them again"
        )
