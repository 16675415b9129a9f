"""Numbers of many targets that a block needs again and again: in memory, or in a temporary file."""

import math
import tempfile
from collections.abc import Callable, Iterator
from io import FileIO
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor


@final
class Columns:
    """Numbers of the targets of a block, made some targets at a time and then read many times.

    What is too large for memory goes to a file in the folder of temporary files (TMPDIR). It has
    no name, so that the system frees it when this process ends, however it ends.

    Args:
        shape: of all numbers together.
        axis: which axis the targets are.
        dtype: of the numbers.
        most: bytes that may be kept in memory.

    Example:
        >>> with Columns((2, 3), 1, torch.float32, most=0) as columns:
        ...     columns.add(torch.tensor([[1.0, 2.0], [4.0, 5.0]]))
        ...     columns.add(torch.tensor([[3.0], [6.0]]))
        ...     [part.tolist() for part in columns.read(slice(1, 2))]
        [[[4.0, 5.0]], [[6.0]]]
    """

    def __init__(self, shape: tuple[int, ...], axis: int, dtype: torch.dtype, most: int) -> None:
        self.axis, self.filled, self.shapes = axis, 0, list[tuple[int, ...]]()
        self.nbytes = math.prod(shape) * dtype.itemsize
        fits = self.nbytes <= most
        self.whole = torch.empty(shape, dtype=dtype) if fits else None
        self.file: FileIO | None = None if fits else _nameless_file()
        self.dtype = dtype

    @property
    def on_disk(self) -> bool:
        """Whether they are read from a file, which is better done for many rows at a time."""
        return self.file is not None

    def add(self, values: Tensor) -> None:
        """Takes the numbers of the next targets.

        Args:
            values: of the shape of all, but for the number of targets.

        Raises:
            OSError: the temporary file cannot be written.
        """
        count = values.shape[self.axis]
        if self.whole is not None:
            self.whole.narrow(self.axis, self.filled, count).copy_(values)
        else:
            self._append(values.contiguous())
            self.shapes.append(tuple(values.shape))
        self.filled += count

    def read(self, rows: slice = slice(None)) -> Iterator[Tensor]:
        """Gives all numbers again.

        Args:
            rows: along the first axis, which must not be that of the targets; all by default.

        Yields:
            What was added, in that order, or everything at once where it is in memory; each is
            good until the next one is asked for.
        """
        if self.whole is not None:
            yield self.whole[rows]
            return
        begin, buffer = 0, torch.empty(0, dtype=self.dtype)
        for shape in self.shapes:
            first, last, _ = rows.indices(shape[0])
            wanted, row = (last - first, *shape[1:]), math.prod(shape[1:])
            if buffer.numel() < math.prod(wanted):
                buffer = torch.empty(math.prod(wanted), dtype=self.dtype)
            part = buffer[: math.prod(wanted)].view(wanted)
            self._fill(part, begin + first * row * self.dtype.itemsize)
            begin += math.prod(shape) * self.dtype.itemsize
            yield part

    def through(self, work: Callable[[Tensor], Tensor], rows: slice = slice(None)) -> Tensor:
        """Applies a function to all numbers, part by part, and puts what it gives side by side.

        Args:
            work: gives numbers [row, target, ...] of those of some targets.
            rows: as for `read`.

        Returns:
            What it gives of all targets.
        """
        if self.whole is not None:
            return work(self.whole[rows])
        found, place = torch.empty(0), 0
        for part in self.read(rows):
            made = work(part)
            if not place:
                found = made.new_empty(len(made), self.filled, *made.shape[2:])
            found[:, place : place + made.shape[1]] = made
            place += made.shape[1]
        return found

    def _append(self, values: Tensor) -> None:
        left = _bytes(values)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: a block needs {self.nbytes} bytes for a temporary file in"
                f" {tempfile.gettempdir()}; name another folder in TMPDIR",
            ) from error

    @property
    def _file(self) -> FileIO:
        assert self.file is not None
        return self.file

    def _fill(self, into: Tensor, begin: int) -> None:
        self._file.seek(begin)
        left = _bytes(into)
        while left:
            found = self._file.readinto(left)
            if not found:
                raise OSError(f"the temporary file lacks {len(left)} bytes of {into.nbytes}")
            left = left[found:]

    def __enter__(self) -> "Columns":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.file is not None:
            self.file.close()


def _nameless_file() -> FileIO:
    # Without a buffer, which would hold what a full disk refused until it is closed.
    return tempfile.TemporaryFile(buffering=0)


def _bytes(values: Tensor) -> memoryview:
    numbers: Any = values.numpy()
    return memoryview(numbers).cast("B")
