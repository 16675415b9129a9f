"""Blocks as tasks: on worker processes or in this one, with retries and a list of failures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import cloudpickle
from distributed import Client, KilledWorker

from stores.blocks import name_blocks
from stores.cancelling import stop, terminating
from stores.progress import Progress
from stores.sent import BlockFailed, Work, attempt
from stores.tasks import Outcome, Tasks, failure, sent
from stores.watching import watched_too
from stores.workers import local_client, stop_local_workers


class BlocksFailed(RuntimeError):
    """Some blocks failed; the others are finished and kept.

    Args:
        title: What was computed.
        failed: The last error of each block.

    Example:
        >>> BlocksFailed("training", {3: "OSError: disk full"}).failed
        {3: 'OSError: disk full'}
    """

    def __init__(self, title: str, failed: dict[int, str]) -> None:
        """Name the blocks and the first error."""
        super().__init__(title, failed)
        self.title = title
        self.failed = failed

    def __str__(self) -> str:
        """Give the blocks, the first error and the cure."""
        return (
            f"{self.title}: {name_blocks(list(self.failed))} failed, "
            f"first with {next(iter(self.failed.values()))}; "
            "finished blocks are kept, and the same call resumes"
        )


def run_blocks(
    work: Work,
    blocks: Sequence[int],
    *,
    title: str,
    workers: int | None = None,
    scheduler: str | None = None,
    gpus: Sequence[str] | None = None,
    retries: int = 1,
) -> None:
    """Run a function for each block, on worker processes or in this one.

    A block whose function raises is tried again, and then set aside while the others go on; a
    BlockFailed sets it aside at once. A ValueError or TypeError means bad input: it stops the run
    and is raised as it is. Where the call is interrupted, or ends by an error or SIGTERM, it stops
    what it started: local workers are killed; on a scheduler, a block that calls `stores.advance`
    stops by itself, and the worker of any other one is restarted.

    Args:
        work: Computes and writes one block, given its number; it should keep its results in a
            store and return nothing. `stores.in_turns` keeps it apart from other processes.
        blocks: Numbers of the blocks, usually `store.pending()`.
        title: What is computed, for the progress bar.
        workers: Number of local processes with one thread each; 0 runs the blocks one after
            another in this process, None takes one process per core, or per GPU.
        scheduler: Address of a dask scheduler to use in place of local processes; its workers
            must have one thread each.
        gpus: Names of this machine's GPUs, as in CUDA_VISIBLE_DEVICES, where a block needs one:
            each local worker sees one of them alone, and a scheduler's workers are asked for the
            dask resource GPU if some declare it. None where a block needs none.
        retries: How often a failed block is tried again.

    Raises:
        BlocksFailed: Blocks failed or killed their workers; the others are finished.
        ValueError: The arguments are unusable, or `work` raised it.
        TypeError: `work` raised it.

    Example:
        >>> finished = []
        >>> run_blocks(finished.append, [2, 0], title="appending", workers=0)
        >>> finished
        [2, 0]
    """
    where = _Where(workers, scheduler, gpus)
    _check(where, retries)
    wanted = list(dict.fromkeys(blocks))
    if not wanted:
        return
    failed: dict[int, str] = {}
    with (
        Progress(title, len(wanted)) as progress,
        _outcomes(watched_too(work), wanted, where, retries, progress) as outcomes,
    ):
        for block, error in outcomes:
            progress.finish(block)
            if error is not None:
                failed[block] = _describe(error)
    if failed:
        raise BlocksFailed(title, dict(sorted(failed.items())))


def pickle_by_value(module: ModuleType) -> None:
    """Send a module's functions to workers by value, as they cannot import the module.

    Args:
        module: A module loaded from a file by its path.

    Example:
        >>> import textwrap
        >>> pickle_by_value(textwrap)
    """
    cloudpickle.register_pickle_by_value(module)


def _check(where: _Where, retries: int) -> None:
    workers, gpus = where.workers, where.gpus
    if workers is not None and where.scheduler is not None:
        raise ValueError(f"expected workers or a scheduler, got {workers} and {where.scheduler}")
    if workers is not None and workers < 0:
        raise ValueError(f"expected 0 or more workers, got {workers}; 0 runs in this process")
    here = workers == 0 or where.scheduler is not None
    if gpus is not None and not here and (workers or 1) > len(gpus):
        raise ValueError(
            f"expected one visible GPU for each worker, got {len(gpus)} for {workers or 1}; "
            "give fewer workers, workers=0, or a scheduler elsewhere"
        )
    if retries < 0:
        raise ValueError(f"expected 0 or more retries, got {retries}")


@dataclass(frozen=True)
class _Where:
    workers: int | None
    scheduler: str | None
    gpus: Sequence[str] | None

    @property
    def gpu(self) -> bool:
        return self.gpus is not None


@contextmanager
def _outcomes(
    work: Work, blocks: list[int], where: _Where, retries: int, progress: Progress
) -> Iterator[Iterator[Outcome]]:
    if where.workers == 0:
        yield ((block, _tried(work, block, retries, progress)) for block in blocks)
    elif where.scheduler is None:
        with _local(where) as client, sent(client, work, progress, gpu=where.gpu) as tasks:
            yield tasks.outcomes(blocks, retries)
    else:
        with (
            terminating(),
            _connected(where.scheduler) as client,
            sent(client, work, progress, gpu=where.gpu) as tasks,
            _stopping(client, tasks),
        ):
            yield tasks.outcomes(blocks, retries)


@contextmanager
def _local(where: _Where) -> Iterator[Client]:
    try:
        yield local_client(where.workers, where.gpus)
    except BaseException:
        # A cancelled task runs on; only killing its worker stops it.
        stop_local_workers()
        raise


@contextmanager
def _stopping(client: Client, tasks: Tasks) -> Iterator[None]:
    try:
        yield
    except BaseException:
        stop(client, tasks.waiting(), tasks.name)
        raise


def _connected(scheduler: str) -> Client:
    try:
        return Client(scheduler, set_as_default=False)
    except OSError as error:
        raise ValueError(
            f"expected a dask scheduler at {scheduler}, could not connect: {error}; "
            "start one with dask scheduler, or use workers="
        ) from error


def _tried(work: Work, block: int, retries: int, progress: Progress) -> Exception | None:
    for attempted in range(retries + 1):
        progress.begin(block)
        try:
            hopeless = attempt(work, block, partial(progress.add, block))
        except Exception as error:
            if attempted == retries:
                return error
        else:
            break
    return failure(hopeless)


def _describe(error: BaseException) -> str:
    if isinstance(error, KilledWorker):
        return "KilledWorker: it killed its worker process each time (out of memory?)"
    if isinstance(error, BlockFailed):
        return str(error)
    return f"{type(error).__name__}: {error}"
