"""A prefix in a bucket of an S3 service as a place."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias, final

import numpy as np

from stores.bucket_client import BucketStore, check_bucket, client, plain_errors
from stores.bucket_memory import forget, remembered_file, remembered_tag
from stores.places import Bytes, Place, Ranges, check_size

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import S3Store

_ADDRESS = re.compile(r"s3://([^/]+)((?:/[^/]+)*)")
# Ranges nearer than this are read as one: what a connection carries in the time of one request.
_GAP_BYTES = 128 * 2**10
_MOST_BYTES = 4 * 2**20  # of one request, so that several share the line
_REQUESTS = 128  # at a time; a service answers each after the same while
_THREADS = 16
_ROOT = "zarr.json"

_Range: TypeAlias = tuple[str, int]


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

    @property
    def at_once(self) -> int:
        """Bytes that are best read as one batch: enough to share among many requests."""
        return 64 * 2**20

    def generation(self) -> object:
        """Tag of the root zarr.json, asked for every few seconds."""
        return remembered_tag(self.url, self._tag)

    def read_batches(
        self, batches: Sequence[Ranges], size: int, length: int
    ) -> Iterator[np.ndarray]:
        """Read ranges of equal length from files of equal size, many at a time."""
        for window in _windows(batches, self.at_once // length):
            found = np.empty((sum(map(_count, window)), length), np.uint8)
            _waited(self._read_into(window, size, found))
            yield from np.split(found, np.cumsum([_count(ranges) for ranges in window])[:-1])

    def mapped(self, name: str) -> np.ndarray:
        """Content of a file, read as a whole and kept as long as the generation stays the same."""
        return remembered_file(
            self.url, name, self.generation(), lambda: np.frombuffer(self.read(name), np.uint8)
        )

    def write(self, name: str, content: Bytes) -> None:
        """Write a file in one request, which the service does as a whole or not at all."""
        with plain_errors(f"writing {self.url}/{name}"):
            self._client.put(self._key(name), content, use_multipart=False)
        forget(self.url)

    def create(self, name: str, content: Bytes) -> None:
        """Write a file in one request, which the service refuses where there is one."""
        from obstore.exceptions import AlreadyExistsError

        try:
            with plain_errors(f"writing {self.url}/{name}"):
                self._client.put(self._key(name), content, mode="create", use_multipart=False)
        except ConnectionError as error:
            if not isinstance(error.__cause__, AlreadyExistsError):
                raise
            raise FileExistsError(f"{self.url}/{name} is there already") from error
        forget(self.url)

    def remove(self, name: str) -> None:
        """Remove a file."""
        # The service does not tell whether there was one.
        self.size(name)
        with plain_errors(f"removing {self.url}/{name}"):
            self._client.delete(self._key(name))
        forget(self.url)

    def names(self, folder: str = "") -> list[str]:
        """Names of the files directly in a folder below."""
        start = self._key(folder)
        with plain_errors(f"listing {self.url}/{folder}"):
            found = self._client.list_with_delimiter(start or None)["objects"]
        return sorted(file["path"].rsplit("/", 1)[-1] for file in found)

    def walk(self) -> list[str]:
        """Names of all files below."""
        return sorted(key.removeprefix(f"{self._prefix}/") for key in self._keys())

    def links(self) -> list[str]:
        """Give none: a bucket has no links."""
        return []

    def clear(self) -> None:
        """Remove all files below."""
        keys = self._keys()
        if keys:
            with plain_errors(f"removing {self.url}"):
                self._client.delete(keys)
        forget(self.url)

    def fill(self, files: Mapping[str, Bytes]) -> None:
        """Write the files, the root zarr.json last; what a failure leaves stays."""
        _each(files, lambda name: self._write_once(name, files[name]))

    def move(self, to: Place) -> None:
        """Write all files anew, the root zarr.json last, then remove the old ones."""
        target = Bucket(to.url)
        _each(self.walk(), lambda name: target._write_once(name, self.read(name)))
        self.clear()

    def locked(self, *, alone: bool) -> AbstractContextManager[bool]:
        """Do nothing: a service has no locks."""
        del alone
        return nullcontext(False)

    def sync(self, names: Sequence[str]) -> None:
        """Do nothing: what the service has taken is safe."""

    def zarr(self) -> BucketStore:
        """The prefix as zarr sees it."""
        return BucketStore(client(*_parts(self.url)))

    def _write_once(self, name: str, content: Bytes) -> None:
        # Two that create the same store at once, or one after a kill, write the same files; of
        # two that differ, the second must not touch what the first has written.
        try:
            self.create(name, content)
        except FileExistsError as error:
            if name == _ROOT or self.read(name) != content:
                raise FileExistsError(
                    f"{self.url}/{name} is there already and differs; remove {self.url} if it is "
                    "left over from a killed creation, or give another address"
                ) from error

    def _tag(self) -> str | None:
        try:
            with plain_errors(f"looking for {self.url}/{_ROOT}"):
                told = self._client.head(self._key(_ROOT))
        except FileNotFoundError:
            return None
        return f"{told['e_tag']} {told['last_modified']}"

    async def _read_into(self, window: Sequence[Ranges], size: int, into: np.ndarray) -> None:
        ranges = [
            (name, start) for batch in window for name, starts in batch.items() for start in starts
        ]
        length, turn = into.shape[1], asyncio.Semaphore(_REQUESTS)

        async def read(group: list[int]) -> None:
            (name, first), (_, last) = ranges[group[0]], ranges[group[-1]]
            async with turn:
                content = await self._part(name, first, last + length, size)
            for number in group:
                at = ranges[number][1] - first
                into[number] = content[at : at + length]

        await asyncio.gather(*map(read, _near(ranges, length)))

    async def _part(self, name: str, first: int, end: int, size: int) -> np.ndarray:
        file = f"{self.url}/{name}"
        try:
            with plain_errors(f"reading {file}"):
                options: GetOptions = {"range": (first, end)}
                found = await self._client.get_async(self._key(name), options=options)
                content = await found.bytes_async()
        except ConnectionError as error:
            if "416 Range" not in str(error.__cause__):
                raise
            check_size(file, self.size(name), size)
            raise
        check_size(file, found.meta["size"], size)
        return np.frombuffer(memoryview(content), np.uint8)

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


def _each(names: Iterable[str], write: Callable[[str], None]) -> None:
    """Writes files: what tells of arrays before these, and the root after all others."""
    with ThreadPoolExecutor(_THREADS) as threads:
        for _, wave in groupby(sorted(names, key=_wave), _wave):
            list(threads.map(write, wave))


def _wave(name: str) -> int:
    if name == _ROOT:
        return 2
    return 0 if name.endswith(f"/{_ROOT}") else 1


def _parts(url: str) -> tuple[str, str]:
    found = _ADDRESS.fullmatch(url)
    if not found or {".", ".."} & set(url.split("/")):
        raise ValueError(f"expected an address s3://bucket/prefix, got {url!r}")
    return found[1], found[2].lstrip("/")


def _near(ranges: Sequence[_Range], length: int) -> list[list[int]]:
    groups: list[list[int]] = []
    first = last = ("", 0)
    for number in sorted(range(len(ranges)), key=ranges.__getitem__):
        name, start = ranges[number]
        far = start - last[1] > length + _GAP_BYTES or start - first[1] > _MOST_BYTES
        if name != last[0] or far:
            groups.append([])
            first = name, start
        groups[-1].append(number)
        last = name, start
    return groups


def _windows(batches: Sequence[Ranges], most: int) -> Iterator[list[Ranges]]:
    window: list[Ranges] = []
    for ranges in batches:
        if window and sum(map(_count, window)) + _count(ranges) > most:
            yield window
            window = []
        window.append(ranges)
    if window:
        yield window


def _count(ranges: Ranges) -> int:
    return sum(map(len, ranges.values()))


def _waited(work: Coroutine[Any, Any, None]) -> None:
    # On a thread of its own, as the caller's may run an event loop already; notebooks do.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()
