"""A prefix in a bucket of an S3 service as a place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from stores.bucket_client import BucketStore, check_bucket, client, plain_errors
from stores.places import Place

if TYPE_CHECKING:
    from obstore.store import S3Store

_ADDRESS = re.compile(r"s3://([^/]+)((?:/[^/]+)*)")
# Ranges nearer than this are read as one: what a connection carries in the time of one request.
_GAP_BYTES = 128 * 2**10
_MOST_BYTES = 4 * 2**20  # of one request, so that several share the line
_ROOT = "zarr.json"


@final
@dataclass(frozen=True)
class Bucket(Place):
    """A prefix in a bucket.

    Credentials, region and endpoint come from the environment: AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL, and
    AWS_SKIP_SIGNATURE=true for a public bucket.

    Args:
        url: Its address, s3://bucket/prefix.

    Example:
        >>> Bucket("s3://bucket/runs") / "digits"
        Bucket(url='s3://bucket/runs/digits')
    """

    @staticmethod
    def at(url: str) -> Bucket:
        """Give the place of an address, after a look whether its bucket can be reached.

        Args:
            url: s3://bucket or s3://bucket/prefix.

        Returns:
            The place; nothing need be there.

        Raises:
            ImportError: obstore is not installed.
            ValueError: This is no such address, or its bucket cannot be listed.

        Example:
            >>> Bucket.at("s3:///run")
            Traceback (most recent call last):
                ...
            ValueError: expected an address s3://bucket/prefix, got 's3:///run'
        """
        bucket, prefix = _parts(url.rstrip("/") if url != "s3://" else url)
        check_bucket(bucket, prefix)
        return Bucket(url.rstrip("/"))

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Pickle the address only: credentials stay in the environment."""
        return Bucket.at, (self.url,)

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def taken(self) -> bool:
        """Whether a store is here; what a killed creation left is none."""
        return self.exists(_ROOT)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with plain_errors(f"looking for {self.url}/{name}"):
            return self._client.head(self._key(name))["size"]

    def read(self, name: str) -> bytes:
        """Content of a file."""
        with plain_errors(f"reading {self.url}/{name}"):
            return bytes(self._client.get(self._key(name)).bytes())

    def read_ranges(self, name: str, starts: Sequence[int], into: np.ndarray) -> None:
        """Read ranges of equal length from a file, several at a time."""
        length = into.shape[1]
        groups = _near(starts, length)
        firsts = [starts[group[0]] for group in groups]
        ends = [starts[group[-1]] + length for group in groups]
        for group, first, content in zip(
            groups, firsts, self._parts_of(name, firsts, ends), strict=True
        ):
            for number in group:
                at = starts[number] - first
                into[number] = content[at : at + length]

    def mapped(self, name: str) -> np.ndarray:
        """Content of a file, read as a whole."""
        return np.frombuffer(bytearray(self.read(name)), np.uint8)

    def write(self, name: str, content: bytes) -> None:
        """Write a file in one request, which the service does as a whole or not at all."""
        with plain_errors(f"writing {self.url}/{name}"):
            self._client.put(self._key(name), content, use_multipart=False)

    def remove(self, name: str) -> None:
        """Remove a file."""
        # The service does not tell whether there was one.
        self.size(name)
        with plain_errors(f"removing {self.url}/{name}"):
            self._client.delete(self._key(name))

    def names(self, folder: str = "") -> list[str]:
        """Names of the files directly in a folder below."""
        start = self._key(folder)
        with plain_errors(f"listing {self.url}/{folder}"):
            found = self._client.list_with_delimiter(start or None)["objects"]
        return sorted(file["path"].rsplit("/", 1)[-1] for file in found)

    def walk(self) -> list[str]:
        """Names of all files below."""
        return sorted(key.removeprefix(f"{self._prefix}/") for key in self._keys())

    def clear(self) -> None:
        """Remove all files below."""
        keys = self._keys()
        if keys:
            with plain_errors(f"removing {self.url}"):
                self._client.delete(keys)

    def move(self, to: Place) -> None:
        """Write all files anew, the root zarr.json last, then remove the old ones."""
        names = sorted(self.walk(), key=lambda name: name == _ROOT)
        target = Bucket(to.url)
        for name in names:
            target._write_once(name, self.read(name))
        self.clear()

    def sync(self, names: Sequence[str]) -> None:
        """Do nothing: what the service has taken is safe."""

    def zarr(self) -> BucketStore:
        """The prefix as zarr sees it."""
        return BucketStore(client(*_parts(self.url)))

    def _write_once(self, name: str, content: bytes) -> None:
        # Two that create the same store at once, or one after a kill, write the same files; of
        # two that differ, the second must not touch what the first has written.
        from obstore.exceptions import AlreadyExistsError

        try:
            with plain_errors(f"writing {self.url}/{name}"):
                self._client.put(self._key(name), content, mode="create")
        except OSError as error:
            if not isinstance(error.__cause__, AlreadyExistsError):
                raise
            if name == _ROOT or self.read(name) != content:
                raise FileExistsError(
                    f"{self.url}/{name} is there already and differs; remove {self.url} if it is "
                    "left over from a killed creation, or give another address"
                ) from error

    def _parts_of(self, name: str, firsts: list[int], ends: list[int]) -> list[np.ndarray]:
        try:
            with plain_errors(f"reading {self.url}/{name}"):
                found = self._client.get_ranges(
                    self._key(name), starts=firsts, ends=ends, coalesce=0
                )
        except OSError as error:
            if "416 Range" not in str(error.__cause__):
                raise
            raise ValueError(self._short(name)) from error
        parts = [np.frombuffer(memoryview(part), np.uint8) for part in found]
        # A range over the end is cut without a word.
        if any(len(p) != end - first for p, first, end in zip(parts, firsts, ends, strict=True)):
            raise ValueError(self._short(name))
        return parts

    def _short(self, name: str) -> str:
        return (
            f"expected more bytes in {self.url}/{name}, got its end; "
            "find the damaged blocks with verify() and discard() them"
        )

    def _keys(self) -> list[str]:
        with plain_errors(f"listing {self.url}"):
            pages = self._client.list(self._prefix or None, chunk_size=1000)
            return [file["path"] for page in pages for file in page]

    def _key(self, name: str) -> str:
        return "/".join(part for part in (self._prefix, name) if part)

    @property
    def _prefix(self) -> str:
        return _parts(self.url)[1]

    @property
    def _client(self) -> S3Store:
        return client(_parts(self.url)[0])


def _parts(url: str) -> tuple[str, str]:
    found = _ADDRESS.fullmatch(url)
    if not found or {".", ".."} & set(url.split("/")):
        raise ValueError(f"expected an address s3://bucket/prefix, got {url!r}")
    return found[1], found[2].lstrip("/")


def _near(starts: Sequence[int], length: int) -> list[list[int]]:
    groups: list[list[int]] = []
    for number in sorted(range(len(starts)), key=starts.__getitem__):
        start = starts[number]
        if (
            groups
            and start - starts[groups[-1][-1]] <= length + _GAP_BYTES
            and start - starts[groups[-1][0]] <= _MOST_BYTES
        ):
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups
