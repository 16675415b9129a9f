"""What a work function and its driver tell each other while a block is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

Listener: TypeAlias = Callable[[float], None]
"""Takes the share of a block that was done since it was told last, from 0 to 1."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


class BlockCancelled(BaseException):
    """The driver has cancelled the block that is being computed, or is gone.

    It is no Exception, so that a work function that survives its own errors ends all the same.

    Example:
        >>> issubclass(BlockCancelled, Exception)
        False
    """


def advance(share: float = 0.0) -> None:
    """Tell the driver that a further share of the block is done; stop here if it has cancelled.

    A work function calls it as often as it likes, say once a step: it costs a microsecond and
    sends nothing more than once a second. Outside of a block it does nothing.

    Args:
        share: Of the whole block, from 0 to 1; 0 only looks whether to stop.

    Raises:
        BlockCancelled: The driver was interrupted, has failed or is gone.

    Example:
        >>> told = []
        >>> with listening(told.append):
        ...     advance(0.25)
        >>> told
        [0.25]
        >>> advance(0.25)
    """
    listener = _listener.get()
    if listener is not None:
        listener(share)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Run the body with a listener to `advance`, in this thread.

    Args:
        listener: Is told every share; what it raises ends the work.

    Example:
        >>> with listening(print):
        ...     advance(0.5)
        0.5
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
