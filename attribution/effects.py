"""Effects [train, target, output] on disk: their layout, and blocks of them that stream there."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.strongest import Strongest
from stores import ArraySpec, BlockWriter, score_block

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


def block_targets(targets: int, outputs: int, dtype: str, column_bytes: int, most: int) -> int:
    """Targets of a block of effects: pieces of rows of a good length, in bounded memory.

    Args:
        targets: how many there are.
        outputs: of each.
        dtype: name of the stored type.
        column_bytes: memory that one target takes while its block is computed.
        most: bytes that a block may take.

    Returns:
        The number.

    Example:
        >>> block_targets(1797, 10, "float32", 10_000, 2**28)
        599
        >>> block_targets(1797, 10, "float32", 10_000, 2**21)
        200
    """
    return score_block(targets, outputs, dtype, most=max(1, most // column_bytes))


def effect_arrays(
    train: int, targets: int, outputs: int, dtype: str, top: int, *, compress: bool = False
) -> dict[str, ArraySpec]:
    """What a store of effects holds of every kind of them.

    Args:
        train: number of training rows.
        targets: number of targets.
        outputs: number of outputs.
        dtype: of the effects on disk; float16 with a scale for each target and output.
        top: rows of either sign that are kept for each target.
        compress: whether most effects are zero.

    Returns:
        The arrays by name: `effects`; the sum over all rows `sum`; the rows that change the margin
        most, `top_rows`, and their effects on it, `top_values`, as `Strongest` gives them.

    Example:
        >>> sorted(effect_arrays(50, 7, 2, "float16", top=3))
        ['effects', 'scale', 'sum', 'top_rows', 'top_values']
    """
    each, wide = ("target", "output"), stored_wide(dtype)
    scale = "scale" if dtype == "float16" else None
    effects = ("train", *each), (train, targets, outputs)
    kept = ("target", None, None), (targets, 2, top)
    arrays = {
        "effects": ArraySpec(*effects, dtype, compress=compress, scale=scale, sum="sum"),
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
        Scales of the same shape; 1 where the bound is 0.

    Example:
        >>> half_scale(torch.tensor([5.0, 0.0])).tolist()
        [0.000244140625, 1.0]
    """
    exponent = torch.frexp(largest).exponent - 15
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 1)


def write_effects(
    writer: BlockWriter, slabs: Iterable[tuple[Tensor, Tensor]], bound: Tensor, top: int
) -> None:
    """Writes a block of effects slab by slab, and what is told of all rows of it.

    Args:
        writer: of the block.
        slabs: effects [row, target, output] of the next rows and their effects on the margins
            [row, target]; each is a whole number of storage objects, but for the last.
        bound: of the effects' sizes, [target, output].
        top: rows of either sign that are kept for each target.
    """
    scale = half_scale(bound)
    summed = torch.zeros(bound.shape, dtype=torch.float64)
    kept, first = Strongest.empty(len(bound), top, bound.dtype), 0
    for effects, margins in slabs:
        kept.add(first, margins)
        summed += effects.sum(0)
        writer.append("effects", stored(effects, writer, "effects", scale))
        first += len(effects)
    found = {"sum": summed.numpy(), "scale": scale.numpy()}
    found |= zip(("top_rows", "top_values"), kept.found(), strict=True)
    append(writer, {name: found[name] for name in found if name in writer.spec.arrays})


def stored(values: Tensor, writer: BlockWriter, name: str, scale: Tensor) -> Numbers:
    """Values as their array holds them: divided by a scale where they are rounded to float16.

    Args:
        values: [row, ...].
        writer: of the block.
        name: of the array.
        scale: of the shape of one row.

    Returns:
        The values, in the type of the array where that is float16.
    """
    if writer.spec.array(name).dtype == "float16":
        values = (values / scale).half()
    return values.numpy()


def append(writer: BlockWriter, arrays: dict[str, Numbers]) -> None:
    """Writes whole arrays of a block in the types that its store holds them in.

    Args:
        writer: of the block.
        arrays: by name.
    """
    for name, value in arrays.items():
        writer.append(name, value.astype(writer.spec.array(name).dtype, copy=False))
