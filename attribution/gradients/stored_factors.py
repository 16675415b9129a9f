"""How a store of features tells of the factors that it keeps: sizes and S of each layer."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.gradients.jacobian import Factors
from attribution.gradients.projection import SparseProjection
from stores import Store

Numbers = np.ndarray[Any, Any]


def worth_keeping(
    factors: Factors | None, outputs: int, features: int, dtype: str
) -> Factors | None:
    """Factors where products with them read half as much or less, and nothing is rounded.

    Args:
        factors: of a model's features; None where they are not made of any.
        outputs: number of outputs.
        features: number of features of one output.
        dtype: of the features on disk.

    Returns:
        The factors, or None.

    Example:
        >>> few = Factors((8,), (4,), (SparseProjection(32, 32),))
        >>> worth_keeping(few, 10, 32, "float32") is few, worth_keeping(few, 1, 16, "float32")
        (True, None)
    """
    if factors is None or dtype == "float16":
        return None
    return factors if 2 * factors.size(outputs) <= outputs * features else None


def factor_attributes(factors: Factors) -> dict[str, list[list[int]]]:
    """The sizes of each layer: k_out, k_in and number of features.

    Args:
        factors: that a store keeps.

    Returns:
        Attributes of the store.

    Example:
        >>> factor_attributes(Factors((2,), (3,), (SparseProjection(6, 6),)))
        {'factors': [[3, 2, 6]]}
    """
    sizes = zip(factors.outputs, factors.inputs, factors.sparse, strict=True)
    return {"factors": [[outputs, inputs, sparse.size] for outputs, inputs, sparse in sizes]}


def factor_constants(factors: Factors) -> dict[str, Numbers]:
    """Order and signs of all layers' S in one row: the column counted from 1, times the sign.

    Zeros stand behind those of a layer where S drops columns.

    Args:
        factors: that a store keeps.

    Returns:
        Constants of the store.

    Example:
        >>> factor_constants(Factors((1,), (3,), (SparseProjection(3, 3),)))
        {'dealt': array([1, 2, 3])}
    """
    return {"dealt": torch.cat([_dealt(sparse) for sparse in factors.sparse]).numpy()}


def _dealt(sparse: SparseProjection) -> Tensor:
    if sparse.order is None or sparse.signs is None:
        return 1 + torch.arange(sparse.width)
    dealt = (1 + sparse.order) * sparse.signs.long()
    return torch.nn.functional.pad(dealt, (0, sparse.width - len(dealt)))


def stored_factors(store: Store) -> Factors | None:
    """How a store's features are made of the factors it keeps.

    Args:
        store: of a checkpoint's features.

    Returns:
        Sizes and S of each layer; None where no factors are kept.
    """
    if "factors" not in store.spec.arrays:
        return None
    outputs, inputs, sizes = zip(*store.attributes["factors"], strict=True)
    widths = [a * b for a, b in zip(outputs, inputs, strict=True)]
    dealt = torch.from_numpy(store.constant("dealt")).split(widths)
    sparse = [
        _sparse(width, size, part[part != 0])
        for width, size, part in zip(widths, sizes, dealt, strict=True)
    ]
    return Factors(inputs, outputs, tuple(sparse))


def _sparse(width: int, size: int, dealt: Tensor) -> SparseProjection:
    if size == width:
        return SparseProjection(width, width)
    return SparseProjection(width, size, dealt.abs() - 1, dealt.sign().float())
