"""The work function on the workers of a scheduler: how it gets there, runs and reports."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TypeAlias, cast, final

import cloudpickle
from distributed import Worker, WorkerPlugin, get_worker

from stores.advance import BlockCancelled, Listener, listening
from stores.writing import BlockDone

Work: TypeAlias = Callable[[int], None]


class BlockFailed(RuntimeError):
    """A work function raises it where a block cannot be computed, and never could be.

    The block is not tried again; the others go on.

    Example:
        >>> BlockFailed("model 3 diverged").args
        ('model 3 diverged',)
    """


TOPIC = "stores"  # of the workers' reports; one for all, as schedulers keep topics for ever
_EVERY = 1.0  # seconds between two reports on a block


def attempt(work: Work, block: int, listener: Listener) -> Exception | None:
    """Run the work function for a block.

    Args:
        work: The function.
        block: Number of the block.
        listener: Is told how the work advances.

    Returns:
        An error that trying again would not cure, or None: a BlockFailed, or one that means bad
        input.

    Example:
        >>> attempt(print, 3, print)
        3
    """
    try:
        with listening(listener):
            work(block)
    except BlockDone:
        # The worker was lost after it wrote the block and before it could say so.
        return None
    except BlockFailed as error:
        return error
    except (ValueError, TypeError) as error:
        error.add_note(f"raised for block {block}:\n{traceback.format_exc()}")
        return error
    return None


@final
class SentWork(WorkerPlugin):
    """The work function on a worker; workers that are started later get it too.

    Args:
        name: Names this call among others on the same scheduler.
        work: The function.
    """

    def __init__(self, name: str, work: Work) -> None:
        """Pickle the function, for whoever cannot import it."""
        self.name = name
        self.payload = cloudpickle.dumps(work)

    @cached_property
    def work(self) -> Work:
        """The function, unpickled at the first block: what cannot be imported fails as one."""
        return cast(Work, cloudpickle.loads(self.payload))


@dataclass(frozen=True)
class Report:
    """What a worker tells of a block.

    Args:
        name: Of the call.
        block: Number of the block.
        event: "begins", "advances" or "ends".
        share: Of the block, done since the last report.
    """

    name: str
    block: int
    event: str
    share: float


def attempt_sent(block: int, name: str) -> Exception | None:
    """Run the work that was sent under a name, on a worker.

    Args:
        block: Number of the block.
        name: Of the call.

    Returns:
        As `attempt`.
    """
    worker = get_worker()
    if worker.state.nthreads != 1:
        return _too_many_threads(worker)
    reporting = _Reporting(worker, name, block)
    reporting.send("begins")
    try:
        return attempt(cast(SentWork, worker.plugins[name]).work, block, reporting)
    finally:
        reporting.send("ends")


def _too_many_threads(worker: Worker) -> ValueError:
    return ValueError(
        f"expected workers with one thread each, got {worker.state.nthreads} threads at "
        f"{worker.address}; start them with dask worker --nthreads 1 --nworkers N, as blocks "
        "computed side by side in one process would change each other's numbers"
    )


@final
class _Reporting:
    """Reports on one block, and ends it where its task was cancelled."""

    def __init__(self, worker: Worker, name: str, block: int) -> None:
        self.worker, self.name, self.block = worker, name, block
        # A task that is cancelled, or whose driver is gone, changes its state here and runs on.
        self.task = worker.state.tasks[worker.get_current_task()]
        self.share = 0.0
        self.next = 0.0

    def __call__(self, share: float) -> None:
        if self.task.state == "cancelled":
            raise BlockCancelled
        self.share += share
        now = time.monotonic()
        if now >= self.next:
            self.next = now + _EVERY
            self.send("advances")

    def send(self, event: str) -> None:
        report = Report(self.name, self.block, event, self.share)
        self.share = 0.0
        self.worker.log_event(TOPIC, asdict(report))
