"""Peak memory of this process and its children above what they held at the start (Linux only)."""

import os
import threading
from pathlib import Path
from types import TracebackType

INTERVAL = 0.02  # seconds between two looks


def held() -> int:
    """Bytes that this process holds, mapped files included, and its descendants hold of their own.

    Of descendants the pages of files, such as those of libraries, do not count, as these are the
    same as this process's.
    """
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        after_name = _read(status).rpartition(")")[2].split()
        if after_name:
            children.setdefault(int(after_name[1]), []).append(int(status.parent.name))
    family = children.get(os.getpid(), [])
    found = _pages(os.getpid())[0]
    for process in family:
        family += children.get(process, [])
        resident, shared = _pages(process)
        found += resident - shared
    return found * os.sysconf("SC_PAGE_SIZE")


def _pages(process: int) -> tuple[int, int]:
    """Pages in memory, and those of them that belong to files."""
    counts = _read(Path(f"/proc/{process}/statm")).split() or ["0"] * 3
    return int(counts[1]), int(counts[2])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended
        return ""


class PeakMemory:
    """Watches memory while its body runs; `peak` is in bytes above the start."""

    def __init__(self) -> None:
        self.start = self.highest = 0
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)

    @property
    def peak(self) -> int:
        """Bytes above the start."""
        return self.highest - self.start

    def __enter__(self) -> "PeakMemory":
        self.start = self.highest = held()
        self._watching.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._watching.join()

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL):
            self.highest = max(self.highest, held())
