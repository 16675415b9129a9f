"""The progress bar: blocks done, those under way in part, rate and time left, on a terminal."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import final

from tqdm import tqdm

_EVERY = 1.0  # seconds between two looks of the bar, so that a long block shows life


@final
class Progress:
    """A bar on stderr; without a terminal it is silent.

    Args:
        title: What is computed.
        total: Number of blocks.

    Example:
        >>> with Progress("training", 2) as progress:
        ...     progress.add(0, 0.5)
        ...     progress.finish(1)
        ...     progress.done
        1.5
    """

    def __init__(self, title: str, total: int) -> None:
        """Show nothing yet."""
        self.title, self.total = title, total
        self._finished: set[int] = set()
        self._shares: dict[int, float] = {}
        self._ended = threading.Event()

    @property
    def done(self) -> float:
        """Blocks done, with the shares of those under way."""
        # Another thread may add one meanwhile.
        shares = sum(min(share, 1.0) for share in list(self._shares.values()))
        return len(self._finished) + round(shares, 1)

    def add(self, block: int, share: float) -> None:
        """Count a further share of a block that is under way.

        Args:
            block: Its number.
            share: From 0 to 1.
        """
        if block not in self._finished:
            self._shares[block] = self._shares.get(block, 0.0) + share

    def begin(self, block: int) -> None:
        """Count nothing of a block that begins, perhaps again.

        Args:
            block: Its number.
        """
        self._shares.pop(block, None)

    def finish(self, block: int) -> None:
        """Count a block as done.

        Args:
            block: Its number.
        """
        self._finished.add(block)
        self.begin(block)
        self._show()

    def __enter__(self) -> Progress:
        """Show the bar."""
        # No smoothing: blocks end in bursts, as many at once as there are workers.
        self._bar = tqdm(total=self.total, desc=self.title, unit="block", disable=None, smoothing=0)
        if not self._bar.disable:
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bar as it is."""
        self._ended.set()
        self._show()
        self._bar.close()

    def _tick(self) -> None:
        while not self._ended.wait(_EVERY):
            self._show()

    def _show(self) -> None:
        self._bar.n = self.done
        self._bar.refresh()
