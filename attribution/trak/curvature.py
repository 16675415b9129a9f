"""The damped curvature that TRAK divides by, and how well it can be divided by."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.gradients import Features, output_cotangents
from attribution.losses import Loss
from attribution.newton.inverse import solved
from attribution.seeds import generator
from attribution.task import Rows, Task

Matrix = np.ndarray[Any, np.dtype[np.float64]]

ROWS_BYTES = 2**24  # of the features that are read at once
WORST = {"float32": 1e6, "float64": 1e13}  # leaves one digit of the scores
ITERATIONS = 30


def row_pieces(features: Features, count: int) -> Iterator[Rows]:
    """Positions of the first targets in pieces whose features take 16 MiB at most.

    Args:
        features: give the size of a row.
        count: how many targets; the training rows come first.

    Yields:
        Positions, [row].
    """
    _, outputs, width = features.stores[0].spec.array("features").shape
    size = max(1, ROWS_BYTES // (outputs * width * 4))
    for start in range(0, count, size):
        yield np.arange(start, min(count, start + size))


def gram_matrix(features: Features, checkpoint: int, *, weighting: bool, dtype: str) -> Matrix:
    """Gram matrix of the training rows' features, streamed.

    With weighting it is the Gauss-Newton curvature H = sum_i J_i^T R_i J_i, R_i the loss's Hessian
    with respect to the outputs; without, H = sum_i phi_i phi_i^T of the margins' gradients phi_i.

    Args:
        features: projected gradients.
        checkpoint: number of the checkpoint.
        weighting: whether R stands in the sum.
        dtype: float32 or float64, of the products; sums over pieces are in float64.

    Returns:
        H, [k, k].
    """
    if is_stored(weighting=weighting, dtype=dtype):
        return features.curvature(checkpoint)
    number = torch.float64 if dtype == "float64" else torch.float32
    found = torch.zeros(features.width, features.width, dtype=torch.float64)
    for rows in row_pieces(features, len(features.task.train_ids)):
        j = torch.from_numpy(features.gather(checkpoint, rows)).to(number)
        outputs = torch.from_numpy(features.outputs(checkpoint, rows)).to(number)
        weights = _weights(features.task.loss, outputs, features.task.targets(rows)[1], weighting)
        found += (j.flatten(0, 1).T @ (weights @ j).flatten(0, 1)).double()
    return ((found + found.T) / 2).numpy()


def is_stored(*, weighting: bool, dtype: str) -> bool:
    """Whether `gram_matrix` takes the curvature that is kept beside the features.

    Args:
        weighting: whether R stands in the sum.
        dtype: of the products.

    Returns:
        True where it does.

    Example:
        >>> is_stored(weighting=True, dtype="float32"), is_stored(weighting=True, dtype="float64")
        (True, False)
    """
    return weighting and dtype == "float32"


def _weights(loss: Loss, outputs: Tensor, labels: Tensor, weighting: bool) -> Tensor:
    if weighting:
        return loss.hessian(outputs)
    margin = output_cotangents(loss, outputs, labels, "margin")
    return margin.mT @ margin


def natural_damping(task: Task) -> float:
    """Lambda of models that were trained with weight decay: number of rows x weight decay.

    Args:
        task: tells both.

    Returns:
        Lambda, in the unit of a sum of losses.

    Raises:
        ValueError: the task has no recipe, or one without weight decay.

    Example:
        >>> from examples.digits import task
        >>> natural_damping(task)
        0.7185
    """
    if task.recipe is None or not task.recipe.weight_decay:
        raise ValueError(f"task {task.name!r} tells no weight decay: give a damping for its TRAK")
    return len(task.train_ids) * task.recipe.weight_decay


def condition_number(lower: Tensor, seed: int = 0) -> float:
    """Estimates largest over smallest eigenvalue of L L^T, rather too low, by power iterations.

    Args:
        lower: Cholesky factor L, [k, k].
        seed: of the vectors that the iterations start from.

    Returns:
        The estimate.

    Example:
        >>> matrix = torch.diag(torch.tensor([8.0, 2.0, 0.5], dtype=torch.float64))
        >>> round(condition_number(torch.linalg.cholesky(matrix)), 3)
        16.0
    """
    start = generator(seed, "condition number").standard_normal(len(lower))
    high = low = torch.from_numpy(start).to(lower)
    for _ in range(ITERATIONS):
        high, low = high / high.norm(), low / low.norm()
        high, low = lower @ (lower.T @ high), solved(lower, low)
    return float(high.norm() * low.norm())


def warn_if_ill_conditioned(condition: float, damping: float, dtype: str, checkpoint: int) -> None:
    """Warns where rounding of the Gram matrix would show in the scores.

    Args:
        condition: largest over smallest eigenvalue of the damped curvature.
        damping: lambda.
        dtype: of the Gram matrix.
        checkpoint: number of the checkpoint.
    """
    if condition <= WORST[dtype]:
        return
    better = "give a larger damping" + (" or dtype='float64'" if dtype == "float32" else "")
    warnings.warn(
        f"the curvature of checkpoint {checkpoint} has condition number {condition:.0e} at damping"
        f" {damping:g}: {dtype} cannot tell its small directions from rounding, and the scores may"
        f" be off by a tenth or more; {better}",
        stacklevel=3,
    )
