"""Locks of the system on open files, where the file system has them."""

from __future__ import annotations

import errno
import fcntl

# NFS refuses a lock for one alone on what is open for reading only.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


def lock_file(handle: int, *, alone: bool) -> bool:
    """Lock an open file until it is closed, or its process dies; without waiting.

    On a file system without locks everyone has the lock.

    Args:
        handle: Number of the open file, or of a folder.
        alone: Whether nobody else may have a lock on it; else only nobody who is alone.

    Returns:
        Whether the file system has locks.

    Raises:
        BlockingIOError: Another one has it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as file:
        ...     lock_file(file.fileno(), alone=True)
        True
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True
