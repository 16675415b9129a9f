"""Blocks as tasks on the workers of a scheduler, seen from the driver."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from typing import Any, TypeAlias, final

from distributed import Client, Future, KilledWorker, Worker, as_completed

from stores.progress import Progress
from stores.sent import TOPIC, BlockFailed, Report, SentWork, Work, attempt_sent

Outcome: TypeAlias = tuple[int, BaseException | None]
"""A block and its last error, if it failed."""

_PAUSES = (0.2, 0.5, 1.0)  # seconds
GPU = "GPU"  # the dask resource that a worker with a GPU declares, as dask-cuda's users do


@final
class Tasks:
    """The tasks of one call, and what the workers report on them.

    Args:
        client: Of the scheduler.
        name: Names the call on the workers.
        progress: Is told what the workers report.
        gpu: Whether a block needs a GPU.
    """

    def __init__(self, client: Client, name: str, progress: Progress, *, gpu: bool) -> None:
        """Start nothing yet."""
        self.client, self.name, self.progress = client, name, progress
        self._resources = {GPU: 1} if gpu and _declared(client, GPU) else None
        self._completed: as_completed | None = None

    def hear(self, event: tuple[float, dict[str, object]]) -> None:
        """Take a report of a worker; it may be on the blocks of another call.

        Args:
            event: Time and content.
        """
        if event[1].get("name") != self.name:
            return
        # dask adds the worker's address.
        report = Report(**{each.name: event[1][each.name] for each in fields(Report)})  # type: ignore[arg-type]
        if report.event == "begins":
            self.progress.begin(report.block)
        self.progress.add(report.block, report.share)

    def waiting(self) -> list[Future[Any]]:
        """Give the tasks that are not finished."""
        return list(self._completed.futures) if self._completed is not None else []

    def outcomes(self, blocks: Sequence[int], retries: int) -> Iterator[Outcome]:
        """Compute blocks and give each as it ends, well or not.

        Args:
            blocks: Their numbers.
            retries: How often a block that raises is tried again.

        Yields:
            Each block with its last error, or None.

        Raises:
            ValueError: The work raised it, or a worker has several threads.
            TypeError: The work raised it.
        """
        killed = []
        for block, error in self._ended(blocks, retries):
            if isinstance(error, KilledWorker):
                killed.append(block)
            else:
                yield block, error
        # A dying worker takes the blocks that wait for it along; alone, only the guilty ones fail.
        for block in killed:
            yield from self._ended([block], retries)

    def _ended(self, blocks: Sequence[int], retries: int) -> Iterator[Outcome]:
        keys = [f"{self.name}-{uuid.uuid4().hex}-{block}" for block in blocks]
        places = dict(zip(keys, blocks, strict=True))
        futures = self.client.map(
            attempt_sent,
            blocks,
            name=self.name,
            key=keys,
            retries=retries,
            resources=self._resources,
        )
        self._completed = as_completed(futures, loop=self.client.loop)
        # Whoever holds the futures makes dask compute finished blocks again when a worker dies.
        del futures
        for future in self._completed:
            error = future.exception()
            hopeless = None if error else future.result()
            future.release()
            yield places[future.key], error or failure(hopeless)


def failure(hopeless: Exception | None) -> Exception | None:
    """Give the error of a block that has failed for good, and raise what means bad input.

    Args:
        hopeless: What `attempt` gave.

    Returns:
        A BlockFailed, or None.

    Raises:
        ValueError: It is one.
        TypeError: It is one.

    Example:
        >>> failure(BlockFailed("model 3 diverged"))
        BlockFailed('model 3 diverged')
    """
    if hopeless is not None and not isinstance(hopeless, BlockFailed):
        raise hopeless
    return hopeless


@contextmanager
def sent(client: Client, work: Work, progress: Progress, *, gpu: bool) -> Iterator[Tasks]:
    """Send a work function to all workers for as long as the body runs.

    Args:
        client: Of the scheduler.
        work: Computes and writes a block, given its number.
        progress: Is told what the workers report.
        gpu: Whether a block needs a GPU.

    Yields:
        What starts its tasks.
    """
    name = f"work-{uuid.uuid4().hex}"
    _insisting(partial(client.register_plugin, SentWork(name, work)))
    tasks = Tasks(client, name, progress, gpu=gpu)
    client.subscribe_topic(TOPIC, tasks.hear)
    try:
        yield tasks
    finally:
        # A scheduler that is lost has forgotten the work already.
        with suppress(OSError):
            client.unsubscribe_topic(TOPIC)
            client.unregister_worker_plugin(name)


def _insisting(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    # It speaks to every worker, and fails where one of them dies meanwhile.
    for pause in _PAUSES:
        try:
            return call()
        except OSError:
            time.sleep(pause)
    return call()


def _declared(client: Client, resource: str) -> bool:
    return any(_insisting(partial(client.run, _resource, resource)).values())


def _resource(name: str, dask_worker: Worker) -> float:
    return float(dask_worker.state.total_resources.get(name, 0))
