"""Where stores and runs lie: a folder, or a prefix in a bucket; files by name, nothing else."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from zarr.abc.store import Store as ZarrStore

Where: TypeAlias = "str | os.PathLike[str] | Place"
"""What names a place: a path, an address such as s3://bucket/prefix, or a place itself."""

Range: TypeAlias = tuple[str, int]
"""Name of a file and number of a byte in it."""


@dataclass(frozen=True)
class Place(ABC):
    """A folder, or a prefix in a bucket, that holds files by name.

    A name is relative, with "/" between its parts. A file is there as a whole or not at all.

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
        """Whether there is anything at this place, so that a store cannot be created here."""

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
        """Bytes that are best asked for in one call of `read_ranges`."""

    @abstractmethod
    def read_ranges(self, ranges: Sequence[Range], size: int, into: np.ndarray) -> None:
        """Read ranges of equal length from files of equal size.

        Args:
            ranges: Name of the file and first byte of each range; those of one file stand together.
            size: Bytes that each of the files must have.
            into: Bytes, uint8 [range, length], C-contiguous; filled in the order of the ranges.

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
    def write(self, name: str, content: bytes) -> None:
        """Write a file as a whole; one of the same name is replaced at once.

        Raises:
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
    def clear(self) -> None:
        """Remove everything at this place, and the place itself; nothing happens if it is empty."""

    @abstractmethod
    def move(self, to: Place) -> None:
        """Move everything to a free place of the same kind; a folder moves at once.

        In a bucket the root zarr.json is copied last, so that a store appears as a whole.

        Raises:
            OSError: It cannot be written.
        """

    @abstractmethod
    def sync(self, names: Sequence[str]) -> None:
        """Wait until files have reached the disk, so that they survive a loss of power."""

    @abstractmethod
    def zarr(self) -> ZarrStore:
        """The place as zarr sees it."""


def place(where: Where) -> Place:
    """Give the place that a path or an address names.

    Args:
        where: A path, an address such as s3://bucket/prefix, or a place.

    Returns:
        The place; nothing need be there.

    Raises:
        ValueError: The address is of a kind that is not supported.

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
        ValueError: expected 16 bytes in runs/a/scores/c/0, got 12; find the damaged blocks with \
verify() and discard() them
    """
    if found != expected:
        raise ValueError(
            f"expected {expected} bytes in {where}, got {found}; "
            "find the damaged blocks with verify() and discard() them"
        )
