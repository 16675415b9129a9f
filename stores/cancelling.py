"""Stopping what a driver started on a scheduler, where a cancelled task would run on."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from distributed import Client, Future, Worker

_GRACE = 1.5  # seconds in which work that calls `advance` stops by itself
_RESTART = 5.0  # seconds for a restarted worker to be back; it is killed well before
_PAUSE = 0.05  # seconds between two looks at the workers
_LOOKS = 2


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


def stop(client: Client, futures: list[Future[Any]], name: str) -> None:
    """Stop tasks: those that wait at once, those that run by themselves or with their worker.

    A worker whose block does not stop by itself is restarted. It has one thread, so no task of
    others runs on it; results of others that lie on it are computed again by dask.

    Args:
        client: Of the scheduler.
        futures: The tasks.
        name: What their keys begin with.
    """
    # A scheduler that is lost has no tasks left, nor workers.
    with suppress(OSError):
        given = [worker for worker, keys in client.processing().items() if _among(keys, name)]
        client.cancel(futures)
        _restart(client, _still_busy(client, given, name))


def _still_busy(client: Client, given: list[str], name: str) -> list[str]:
    """The workers that compute such a task after a while."""
    end, busy, quiet = time.monotonic() + _GRACE, given, 0
    # Twice, as a task may just be on its way to its worker.
    while busy and quiet < _LOOKS and time.monotonic() < end:
        time.sleep(_PAUSE)
        busy = _busy(client, given, name, end - time.monotonic())
        quiet, busy = (quiet, busy) if busy else (quiet + 1, given)
    return [] if quiet == _LOOKS else busy


def _busy(client: Client, given: list[str], name: str, patience: float) -> list[str]:
    """The workers that compute such a task, or are too busy to tell."""
    answers: dict[str, bool] = dict.fromkeys(given, True)

    def ask() -> None:
        # One that is gone computes nothing.
        with suppress(OSError):
            told = client.run(_computes, name, workers=given, on_error="ignore")
            answers.clear()
            answers.update(told)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(max(patience, _PAUSE))
    return [worker for worker, computes in list(answers.items()) if computes]


def _computes(name: str, dask_worker: Worker) -> bool:
    return _among(dask_worker.active_keys, name)


def _among(keys: Iterable[object], name: str) -> bool:
    return any(str(key).startswith(name) for key in keys)


def _restart(client: Client, busy: list[str]) -> None:
    workers = client.scheduler_info()["workers"]
    present = [address for address in busy if address in workers]
    bare = [address for address in present if not workers[address]["nanny"]]
    if bare:
        warnings.warn(
            f"the workers {', '.join(bare)} have no nanny that would restart them: each goes on "
            "with its block until it has written it",
            stacklevel=2,
        )
    watched = [address for address in present if address not in bare]
    if watched:
        # One of them may be gone by now.
        with suppress(KeyError):
            client.restart_workers(watched, timeout=_RESTART, raise_for_error=False)
