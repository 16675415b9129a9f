"""Who may change a run: any number of commands that fill it, or one that purges it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from attribution.purging.journal import FILE as JOURNAL
from attribution.purging.journal import refuse_unfinished
from attribution.purging.tombstones import FILE as TOMBSTONES
from stores import Where, place, refuse_changes, watch, watching


@contextmanager
def writers_turn(where: Where) -> Iterator[None]:
    """Runs the body while no rows are purged from a run.

    In a folder a purge has to wait, and the body is refused while one is under way. In a bucket,
    and on a file system without locks, nothing makes a purge wait: there the body is refused once
    a purge has begun, at its start, before each block and mark, and at its end.

    Args:
        where: the run's folder; where there is none, there is nothing to purge.

    Raises:
        ValueError: rows are purged from the run, were since the body began, or a purge was
            interrupted.

    Example:
        >>> with writers_turn("nowhere"):
        ...     pass
    """
    run = place(where)
    why = f"rows are purged from {run}, or were meanwhile: wait for it, then call this again"
    with ExitStack() as turn:
        try:
            turn.enter_context(run.locked(alone=False))
        except BlockingIOError as error:
            raise ValueError(why) from error
        refuse_unfinished(run)
        # Tombstones come before the journal goes: read in this order, no purge is overlooked.
        turn.enter_context(watching(watch(run, (JOURNAL, TOMBSTONES), why)))
        yield
        refuse_changes()


@contextmanager
def purgers_turn(where: Where) -> Iterator[None]:
    """Runs the body while nobody else changes a run, as far as that can be known.

    Args:
        where: the run's folder.

    Raises:
        ValueError: a command writes to the run, or purges rows from it.

    Example:
        >>> with purgers_turn("nowhere"):
        ...     pass
    """
    run = place(where)
    with ExitStack() as turn:
        try:
            turn.enter_context(run.locked(alone=True))
        except BlockingIOError as error:
            raise ValueError(
                f"another command writes to {run}: wait until it has ended, then purge"
            ) from error
        yield
