"""Effects [train, target, output] on disk: their layout, and blocks of them that stream there."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from attribution.strongest import Strongest
from stores import ArraySpec, BlockWriter

OBJECT_BYTES = 2**24  # of the effects in one storage object
PIECE_BYTES = 2**23  # of the effects that are computed at once
DTYPES = ("float16", "float32", "float64")

Numbers = np.ndarray[Any, Any]


def check_dtype(dtype: str) -> None:
    """Refuses a type that effects are not stored in.

    Args:
        dtype: its name.

    Raises:
        ValueError: it is none of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(map(repr, DTYPES))}, got {dtype!r}")


def arithmetic(dtype: str) -> torch.dtype:
    """The type that effects are computed in: that of the stored ones, but at least float32.

    Args:
        dtype: name of the stored type.

    Returns:
        float32 or float64.

    Example:
        >>> arithmetic("float16")
        torch.float32
    """
    return torch.float64 if dtype == "float64" else torch.float32


def stored_wide(dtype: str) -> str:
    """Name of the type of what stands beside the effects.

    Args:
        dtype: name of the effects' stored type.

    Returns:
        "float32" or "float64".

    Example:
        >>> stored_wide("float16")
        'float32'
    """
    return "float64" if dtype == "float64" else "float32"


def object_rows(train: int, width: int, dtype: str) -> int:
    """Training rows of one storage object of effects, in equal cuts.

    Args:
        train: number of training rows.
        width: numbers of one row in a block.
        dtype: name of the stored type.

    Returns:
        As many as take 16 MiB at most, but at least 1.

    Example:
        >>> object_rows(50_000, 8192, "float32")
        511
    """
    most = max(1, OBJECT_BYTES // (width * np.dtype(dtype).itemsize))
    return -(-train // -(-train // most))


def effect_arrays(
    train: int, targets: int, outputs: int, dtype: str, *, top: int, rows: int, sparse: bool = False
) -> dict[str, ArraySpec]:
    """What a store of effects holds of every kind of them.

    Args:
        train: number of training rows.
        targets: number of targets.
        outputs: number of outputs.
        dtype: of the effects on disk; float16 with a scale for each target and output.
        top: rows of either sign that are kept for each target.
        rows: of one storage object.
        sparse: whether most effects are zero.

    Returns:
        The arrays by name: `effects`; the sum over all rows `sum`; the rows that change the margin
        most, `top_rows`, and their effects on it, `top_values`, as `Strongest` gives them.

    Example:
        >>> sorted(effect_arrays(50, 7, 2, "float16", top=3, rows=50))
        ['effects', 'scale', 'sum', 'top_rows', 'top_values']
    """
    each, wide = ("target", "output"), stored_wide(dtype)
    scale = "scale" if dtype == "float16" else None
    effects = ("train", *each), (train, targets, outputs)
    kept = ("target", None, None), (targets, 2, top)
    arrays = {
        "effects": ArraySpec(*effects, dtype, rows, sparse, scale, sum="sum"),
        "sum": ArraySpec(each, (targets, outputs), wide),
        "top_rows": ArraySpec(*kept, "int64"),
        "top_values": ArraySpec(*kept, wide),
    }
    if scale:
        arrays[scale] = ArraySpec(each, (targets, outputs), wide)
    return arrays


def half_scale(largest: Tensor) -> Tensor:
    """Power of two by which numbers are divided before they are rounded to float16.

    The bound then lies in [2^14, 2^15), so that what is 2^28 times smaller still has all 11 bits,
    and dividing by it rounds nothing.

    Args:
        largest: bound of the numbers' sizes, any shape.

    Returns:
        Scales of the same shape; 1 where the bound is 0, and no less than the least normal number:
        its inverse is finite, and what a bound below it measures has fewer bits anyway.

    Example:
        >>> half_scale(torch.tensor([5.0, 0.0])).tolist()
        [0.000244140625, 1.0]
    """
    exponent = torch.frexp(largest).exponent - 15
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return torch.where(largest > 0, scale.clamp(min=torch.finfo(largest.dtype).tiny), 1)


def row_pieces(writer: BlockWriter, *, whole: bool = False) -> Iterator[slice]:
    """Rows of a block that are computed at once.

    Args:
        writer: of the block.
        whole: as many as a storage object has; otherwise few enough for a processor's cache.

    Yields:
        Positions of rows, in order, that lie in one storage object each.
    """
    spec = writer.spec
    train, height = spec.array("effects").shape[0], spec.chunks("effects")[0]
    width = int(np.prod(spec.block_shape("effects", writer.block)[1:]))
    step = height if whole else max(1, PIECE_BYTES // (4 * width))
    for first in range(0, train, height):
        end = min(train, first + height)
        for start in range(first, end, step):
            yield slice(start, min(end, start + step))


@final
class ObjectWriter:
    """Collects rows of an array until they fill a storage object, and writes that.

    It is written while the next one is filled, by a thread of its own, and is done when the body
    of `with` ends.

    Args:
        writer: of the block.
        name: of the array.
        scale: what values are divided by where they are rounded to float16, of one row's shape.
    """

    def __init__(self, writer: BlockWriter, name: str, scale: Tensor) -> None:
        array, height = writer.spec.array(name), writer.spec.chunks(name)[0]
        self.writer, self.name = writer, name
        self.scale = scale if array.dtype == "float16" else None
        self.left, self.filled = array.shape[0], 0
        shape = height, *writer.spec.block_shape(name, writer.block)[1:]
        # One to fill and one to write.
        self.object, self.other = torch.empty(2, *shape, dtype=getattr(torch, array.dtype))
        self.thread = ThreadPoolExecutor(1)
        self.written: Future[None] | None = None

    def add(self, values: Tensor) -> None:
        """Takes the next rows, [row, ...]; they end where an object ends, or before."""
        part = self.object[self.filled : self.filled + len(values)]
        if self.scale is None:
            part.copy_(values)
        else:
            torch.div(values, self.scale, out=part)
        self.filled += len(values)
        if self.filled == min(len(self.object), self.left):
            self._wait()
            whole = self.object[: self.filled].numpy()
            self.written = self.thread.submit(self.writer.append, self.name, whole)
            self.object, self.other = self.other, self.object
            self.left, self.filled = self.left - self.filled, 0

    def _wait(self) -> None:
        if self.written is not None:
            self.written.result()

    def __enter__(self) -> "ObjectWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.thread.shutdown()
        if error is None:
            self._wait()


def write_effects(
    writer: BlockWriter, pieces: Iterable[tuple[Tensor, Tensor]], bound: Tensor, top: int
) -> None:
    """Writes a block of effects piece by piece, and what is told of all rows of it.

    Args:
        writer: of the block.
        pieces: effects [row, target, output] of the rows of `row_pieces`, and their effects on the
            margins [row, target].
        bound: of the effects' sizes, [target, output].
        top: rows of either sign that are kept for each target.
    """
    scale = half_scale(bound)
    summed = torch.zeros(bound.shape, dtype=torch.float64)
    kept, first = Strongest.empty(len(bound), top, bound.dtype), 0
    ones = torch.ones(writer.spec.chunks("effects")[0], dtype=bound.dtype)
    with ObjectWriter(writer, "effects", scale) as objects:
        for effects, margins in pieces:
            objects.add(effects)
            kept.add(first, margins)
            summed += torch.mv(effects.flatten(1).T, ones[: len(effects)]).reshape(bound.shape)
            first += len(effects)
    found = {"sum": summed.numpy(), "scale": scale.numpy()}
    found |= zip(("top_rows", "top_values"), kept.found(), strict=True)
    append(writer, {name: found[name] for name in found if name in writer.spec.arrays})


def append(writer: BlockWriter, arrays: dict[str, Numbers]) -> None:
    """Writes whole arrays of a block in the types that its store holds them in.

    Args:
        writer: of the block.
        arrays: by name.
    """
    for name, value in arrays.items():
        writer.append(name, value.astype(writer.spec.array(name).dtype, copy=False))
