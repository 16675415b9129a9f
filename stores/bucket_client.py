"""The connection to a bucket: settings from the environment, and errors in our own words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from stores.bucket_memory import forget

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Store
    from zarr.abc.store import ByteRequest

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_TIMEOUT = timedelta(minutes=5)  # of one request: a block on a slow line
_RETRIES: RetryConfig = {}  # obstore's own: ten, within three minutes
_FIRST_TRY: RetryConfig = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
# What the service says, and what to do about it; the first that occurs counts.
_CURES = {
    "NoSuchBucket": "create the bucket, or correct its name",
    "/latest/api/token": "expected credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "or AWS_SKIP_SIGNATURE=true for a public bucket",
    "403 Forbidden": "use credentials that may list, read and write there",
    "401 Unauthorized": "use credentials that may list, read and write there",
    "redirect": "set AWS_REGION to the region of the bucket",
    "400 Bad Request": "set AWS_REGION to the region of the bucket, and check the credentials",
    "error sending request": "start the service, or correct AWS_ENDPOINT_URL",
}


def client(bucket: str, prefix: str = "") -> S3Store:
    """Give a connection to a prefix of a bucket; the same one as long as the settings stay.

    Args:
        bucket: Name of the bucket.
        prefix: What all names of files start with, without a slash at its ends.

    Returns:
        The connection; nothing is asked of the service yet.

    Raises:
        ImportError: obstore is not installed.
        ValueError: A setting in the environment is unusable.

    Example:
        >>> client("bucket") is client("bucket")
        True
    """
    return _client(bucket, prefix, _settings())


def check_bucket(bucket: str, prefix: str) -> None:
    """Refuse a bucket that cannot be listed, once for the same settings in the environment.

    Args:
        bucket: Name of the bucket.
        prefix: The prefix to list.

    Raises:
        ImportError: obstore is not installed.
        ValueError: There is no such bucket or service, or it refuses the credentials.
    """
    _check(bucket, prefix.split("/", maxsplit=1)[0], _settings())


@contextmanager
def plain_errors(what: str) -> Iterator[None]:
    """Turn errors of the service into ConnectionError: one line on what failed and why.

    Args:
        what: What is done to which file.

    Raises:
        FileNotFoundError: There is no such file.
        ConnectionError: The service refused, or cannot be reached; the file may be sound.

    Example:
        >>> from obstore.exceptions import GenericError
        >>> with plain_errors("reading s3://bucket/a"):
        ...     raise GenericError("Generic S3 error: 503 Slow Down")
        Traceback (most recent call last):
            ...
        ConnectionError: reading s3://bucket/a failed: Generic S3 error: 503 Slow Down
    """
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what} failed: there is no such file") from error
    except BaseError as error:
        raise ConnectionError(f"{what} failed: {_reason(error)}") from error


class BucketStore(ObjectStore[Any]):
    """A prefix of a bucket as zarr sees it: plain errors, and each object put in one request."""

    def __reduce__(self) -> tuple[object, tuple[str, str, bool]]:
        """Pickle the address only: credentials stay in the environment."""
        return _opened, (self.store.config["bucket"], self.store.prefix or "", self.read_only)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read an object, or a part of it; None if there is none."""
        with plain_errors(f"reading {key}"):
            return await super().get(key, prototype, byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object."""
        with plain_errors(f"writing {key}"):
            # An upload in parts that is killed leaves parts that nobody sees and somebody pays.
            await self.store.put_async(key, value.as_buffer_like(), use_multipart=False)
        forget(f"s3://{self.store.config['bucket']}/{self.store.prefix or ''}".rstrip("/"))


def _opened(bucket: str, prefix: str, read_only: bool) -> BucketStore:
    return BucketStore(client(bucket, prefix), read_only=read_only)


def _settings() -> tuple[tuple[str, str], ...]:
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


@lru_cache
def _client(bucket: str, prefix: str, settings: tuple[tuple[str, str], ...]) -> S3Store:
    return _connected(bucket, prefix, settings, _RETRIES)


@lru_cache
def _check(bucket: str, prefix: str, settings: tuple[tuple[str, str], ...]) -> None:
    store = _connected(bucket, prefix, settings, _FIRST_TRY)
    from obstore.exceptions import BaseError

    try:
        # A wrong address should fail at once, not after the minutes that a long run may wait.
        next(iter(store.list(chunk_size=1)), None)
    except BaseError as error:
        endpoint = next((dict(settings)[name] for name in _ENDPOINTS if name in dict(settings)), "")
        raise ValueError(
            f"expected the bucket s3://{bucket}{f' at {endpoint}' if endpoint else ''}, "
            f"got: {_reason(error)}; {_cure(error)}"
        ) from error


def _connected(
    bucket: str, prefix: str, settings: tuple[tuple[str, str], ...], retries: RetryConfig
) -> S3Store:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store
    except ImportError as error:
        raise ImportError(
            f"expected obstore for s3://{bucket}; install it with "
            "pip install 'datamodel-matching[s3]'"
        ) from error
    plain = any(name in _ENDPOINTS and value.startswith("http://") for name, value in settings)
    options: ClientConfig = {"allow_http": plain, "timeout": _TIMEOUT}
    try:
        return S3Store(bucket, prefix=prefix or None, client_options=options, retry_config=retries)
    except BaseError as error:
        raise ValueError(
            f"expected settings for s3://{bucket} in AWS_ variables of the environment, "
            f"got: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    text = str(error).split("\n\nDebug source")[0]
    told = re.search(r"<Code>(.*?)</Code>(?:\s*<Message>(.*?)</Message>)?", text, re.DOTALL)
    if told:
        return ": ".join(part for part in told.groups() if part)
    return " ".join(text.split())


def _cure(error: Exception) -> str:
    text = str(error)
    return next((cure for sign, cure in _CURES.items() if sign in text), "check the AWS_ variables")
