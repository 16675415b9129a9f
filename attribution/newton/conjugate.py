"""Conjugate gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def conjugate(
    apply: Map, right: Tensor, inverse: Map, *, enough: float, most: int
) -> tuple[Tensor, bool]:
    """Solves A x = b by preconditioned conjugate gradients.

    Args:
        apply: multiplies with A, symmetric and positive definite.
        right: b, [feature].
        inverse: roughly multiplies with A^-1.
        enough: share of |b| that |b - A x| may have.
        most: iterations at most.

    Returns:
        x, and whether it is as near as that.

    Example:
        >>> two = torch.tensor([4.0, 6.0])
        >>> conjugate(lambda v: 2 * v, two, lambda v: v, enough=1e-6, most=5)
        (tensor([2., 3.]), True)
    """
    solution, residual = torch.zeros_like(right), right
    ahead = inverse(residual)
    direction, height = ahead, residual @ ahead
    for _ in range(most):
        if float(residual.norm()) <= enough * float(right.norm()):
            return solution, True
        bent = apply(direction)
        length = height / (direction @ bent)
        if not length > 0:  # A is not positive definite
            return solution, False
        solution, residual = solution + length * direction, residual - length * bent
        ahead = inverse(residual)
        direction, height = ahead + (residual @ ahead / height) * direction, residual @ ahead
    return solution, float(residual.norm()) <= enough * float(right.norm())
