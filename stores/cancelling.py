"""Stopping what a driver started on a scheduler, where a cancelled task would run on."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from distributed import Client, Future

_GRACE = 1.5  # seconds in which work that calls `advance` stops by itself
_RESTART = 5.0  # seconds for a restarted worker to be back; it is killed well before


class _Terminated(BaseException):
    """SIGTERM, as an exception."""


@contextmanager
def terminating() -> Iterator[None]:
    """Run the body so that SIGTERM unwinds it first, as Ctrl-C does, and then ends the process.

    It does so only in the main thread, and where the signal would have ended the process anyway.

    Example:
        >>> with terminating():
        ...     pass
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def stop(client: Client, futures: list[Future[Any]], running: dict[str, bool]) -> None:
    """Stop tasks: those that wait at once, those that run by themselves or with their worker.

    A worker whose block does not stop by itself is restarted. It has one thread, so no task of
    others runs on it; results of others that lie on it are computed again by dask.

    Args:
        client: Of the scheduler.
        futures: The tasks.
        running: Addresses of the workers that compute a block, and whether a nanny would restart
            them; reports of the workers keep it up to date.
    """
    # A scheduler that is lost has no tasks left, nor workers.
    with suppress(OSError):
        client.cancel(futures)
        end = time.monotonic() + _GRACE
        while running and time.monotonic() < end:
            time.sleep(0.02)
        _restart(client, dict(running))


def _restart(client: Client, running: dict[str, bool]) -> None:
    present = [address for address in running if address in client.nthreads()]
    bare = [address for address in present if not running[address]]
    if bare:
        warnings.warn(
            f"the workers {', '.join(bare)} have no nanny that would restart them: each goes on "
            "with its block until it has written it",
            stacklevel=2,
        )
    watched = [address for address in present if running[address]]
    if watched:
        # One of them may be gone by now.
        with suppress(KeyError):
            client.restart_workers(watched, timeout=_RESTART, raise_for_error=False)
