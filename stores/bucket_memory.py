"""What this process has read from buckets: blocks do not change, and asking again is slow."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

import numpy as np

_FRESH_SECONDS = 5.0  # what other processes write shows after this time
_MOST_BYTES = 2**30

_tags: dict[str, tuple[float, str | None]] = {}
_files: OrderedDict[tuple[str, str], tuple[object, np.ndarray]] = OrderedDict()
_lock = Lock()


def remembered_tag(url: str, ask: Callable[[], str | None]) -> str | None:
    """Give the tag of a store's root, asked for again after some seconds.

    Args:
        url: Address of the store.
        ask: Asks the service.

    Returns:
        The tag; None where there is no store.

    Example:
        >>> remembered_tag("s3://bucket/a", lambda: "1"), remembered_tag("s3://bucket/a", None)
        ('1', '1')
        >>> forget("s3://bucket/a")
    """
    when, tag = _tags.get(url, (0.0, None))
    if tag is None or time.monotonic() - when > _FRESH_SECONDS:
        asked, tag = time.monotonic(), ask()
        with _lock:
            _tags[url] = asked, tag
    return tag


def remembered_file(
    url: str, name: str, generation: object, read: Callable[[], np.ndarray]
) -> np.ndarray:
    """Give the content of a file, read once for each generation of its store.

    The files that were used last are kept, 1 GiB of them.

    Args:
        url: Address of the store.
        name: Name of the file.
        generation: What changes when the file may have; None keeps nothing.
        read: Reads the file.

    Returns:
        The bytes, a copy that may be written to.

    Example:
        >>> remembered_file("s3://bucket/a", "c/0", "1", lambda: np.zeros(2, np.uint8))
        array([0, 0], dtype=uint8)
        >>> remembered_file("s3://bucket/a", "c/0", "1", None)
        array([0, 0], dtype=uint8)
        >>> forget("s3://bucket/a")
    """
    with _lock:
        known, found = _files.pop((url, name), (None, None))
    if found is None or known != generation:
        found = read()
    if generation is not None:
        with _lock:
            _files[url, name] = generation, found
            while len(_files) > 1 and sum(kept.nbytes for _, kept in _files.values()) > _MOST_BYTES:
                _files.popitem(last=False)
    # Whoever writes to it must not change what the next one gets.
    return found.copy()


def forget(url: str) -> None:
    """Forget what this process writes to, or removes.

    Args:
        url: Address of the place, of one in it or of one that it lies in.

    Example:
        >>> forget("s3://bucket/a")
    """
    with _lock:
        for known in [known for known in _tags if _overlap(known, url)]:
            del _tags[known]
        for kept in [kept for kept in _files if _overlap(kept[0], url)]:
            del _files[kept]


def _overlap(one: str, two: str) -> bool:
    return f"{one}/".startswith(f"{two}/") or f"{two}/".startswith(f"{one}/")
