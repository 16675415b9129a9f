"""Blocks as tasks: on worker processes or in this one, with retries and a list of failures."""

from __future__ import annotations

import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from types import ModuleType
from typing import TypeAlias, cast

import cloudpickle
from distributed import Client, KilledWorker, WorkerPlugin, as_completed, get_worker
from tqdm import tqdm

from stores.blocks import name_blocks
from stores.workers import local_client, stop_local_workers
from stores.writing import BlockDone

_Work: TypeAlias = Callable[[int], None]
_Outcome: TypeAlias = tuple[int, BaseException | None]


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
    work: _Work,
    blocks: Sequence[int],
    *,
    title: str,
    workers: int | None = None,
    scheduler: str | None = None,
    retries: int = 1,
) -> None:
    """Run a function for each block, on worker processes or in this one.

    A block whose function raises is tried again, and then set aside while the others go on. A
    ValueError or TypeError means bad input: it stops the run and is raised as it is.

    Args:
        work: Computes and writes one block, given its number; it should keep its results in a
            store and return nothing.
        blocks: Numbers of the blocks, usually `store.pending()`.
        title: What is computed, for the progress bar.
        workers: Number of local processes with one thread each; 0 runs the blocks one after
            another in this process, None takes one process per core.
        scheduler: Address of a dask scheduler to use in place of local processes.
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
    _check(workers, scheduler, retries)
    wanted = list(dict.fromkeys(blocks))
    if not wanted:
        return
    failed: dict[int, str] = {}
    with _outcomes(work, wanted, workers, scheduler, retries) as outcomes:
        # The bar shows on a terminal only.
        for block, error in tqdm(
            outcomes, total=len(wanted), desc=title, unit="block", disable=None
        ):
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


def _check(workers: int | None, scheduler: str | None, retries: int) -> None:
    if workers is not None and scheduler is not None:
        raise ValueError(f"expected workers or a scheduler, got {workers} and {scheduler}")
    if workers is not None and workers < 0:
        raise ValueError(f"expected 0 or more workers, got {workers}; 0 runs in this process")
    if retries < 0:
        raise ValueError(f"expected 0 or more retries, got {retries}")


@contextmanager
def _outcomes(
    work: _Work, blocks: list[int], workers: int | None, scheduler: str | None, retries: int
) -> Iterator[Iterator[_Outcome]]:
    if workers == 0:
        yield ((block, _tried(work, block, retries)) for block in blocks)
    else:
        with _client(workers, scheduler) as client:
            yield _distributed(client, work, blocks, retries)


@contextmanager
def _client(workers: int | None, scheduler: str | None) -> Iterator[Client]:
    if scheduler is None:
        try:
            yield local_client(workers)
        except BaseException:
            # A cancelled task runs on; only killing its worker stops it.
            stop_local_workers()
            raise
    else:
        with _connected(scheduler) as client:
            yield client


def _connected(scheduler: str) -> Client:
    try:
        return Client(scheduler)
    except OSError as error:
        raise ValueError(
            f"expected a dask scheduler at {scheduler}, could not connect: {error}; "
            "start one with dask scheduler, or use workers="
        ) from error


def _tried(work: _Work, block: int, retries: int) -> Exception | None:
    for attempt in range(retries + 1):
        try:
            refusal = _attempt(work, block)
        except Exception as error:
            if attempt == retries:
                return error
        else:
            break
    if refusal is not None:
        raise refusal
    return None


def _attempt(work: _Work, block: int) -> Exception | None:
    try:
        work(block)
    except BlockDone:
        # The worker was lost after it wrote the block and before it could say so.
        return None
    except (ValueError, TypeError) as error:
        error.add_note(f"raised for block {block}:\n{traceback.format_exc()}")
        return error
    return None


class _SentWork(WorkerPlugin):
    """The work function on a worker; workers that are started later get it too."""

    def __init__(self, name: str, work: _Work) -> None:
        self.name = name
        self.payload = cloudpickle.dumps(work)

    @cached_property
    def work(self) -> _Work:
        # Not before the first block, so that what cannot be imported fails as a block does.
        return cast(_Work, cloudpickle.loads(self.payload))


def _attempt_sent(block: int, name: str) -> Exception | None:
    sent = cast(_SentWork, get_worker().plugins[name])
    return _attempt(sent.work, block)


def _distributed(
    client: Client, work: _Work, blocks: list[int], retries: int
) -> Iterator[_Outcome]:
    name = f"work-{uuid.uuid4().hex}"
    client.register_plugin(_SentWork(name, work))
    try:
        yield from _all_completed(client, name, blocks, retries)
    finally:
        # A scheduler that is lost has forgotten the work already.
        with suppress(OSError):
            client.unregister_worker_plugin(name)


def _all_completed(
    client: Client, name: str, blocks: list[int], retries: int
) -> Iterator[_Outcome]:
    killed = []
    for block, error in _completed(client, name, blocks, retries):
        if isinstance(error, KilledWorker):
            killed.append(block)
        else:
            yield block, error
    # A dying worker takes the blocks that wait for it along; alone, only the guilty ones fail.
    for block in killed:
        yield from _completed(client, name, [block], retries)


def _completed(client: Client, name: str, blocks: list[int], retries: int) -> Iterator[_Outcome]:
    keys = [f"{name}-{uuid.uuid4().hex}-{block}" for block in blocks]
    futures = client.map(_attempt_sent, blocks, name=name, key=keys, retries=retries)
    places = dict(zip(keys, blocks, strict=True))
    pending = as_completed(futures)
    # Whoever holds the futures makes dask compute finished blocks again when a worker dies.
    del futures
    for future in pending:
        error = future.exception()
        refusal = None if error else future.result()
        future.release()
        if refusal is not None:
            raise refusal
        yield places[future.key], error


def _describe(error: BaseException) -> str:
    if isinstance(error, KilledWorker):
        return "KilledWorker: it killed its worker process each time (out of memory?)"
    return f"{type(error).__name__}: {error}"
