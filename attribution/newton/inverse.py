"""The damped curvature without the forgotten rows, ready to be solved with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attribution.newton.linearised import Map


class TooLittleDamping(ValueError):
    """The damped curvature is not positive definite."""


@dataclass(frozen=True)
class Damped:
    """The damped curvature H + lambda I of all training rows; its factor is kept once asked for.

    Args:
        curvature: H, [feature, feature], float64.
        damping: lambda.

    Example:
        >>> Damped(3 * torch.eye(2, dtype=torch.float64), 1.0).lower.diagonal()
        tensor([2., 2.], dtype=torch.float64)
    """

    curvature: Tensor
    damping: float

    @cached_property
    def lower(self) -> Tensor:
        """The Cholesky factor L, H + lambda I = L L^T.

        Raises:
            TooLittleDamping: the matrix is not positive definite.
        """
        return _cholesky(self.curvature, self.damping)


def without(curvature: Tensor, removed: Tensor) -> Callable[[Damped], Map]:
    """Prepares to apply (H - A^T A + lambda I)^-1, where A^T A is the removed rows' curvature.

    With few removed rows by Woodbury's identity in the space of A's rows, from the factor of all
    rows; with many by a new factor of H - A^T A, which serves any damping. Whichever takes fewer
    multiplications.

    Args:
        curvature: H of all rows, [feature, feature], float64.
        removed: A = R^(1/2) J of the removed rows, [direction, feature].

    Returns:
        A function of H + lambda I, which gives a function of [feature] vectors of any dtype; it
        raises TooLittleDamping where what is left is not positive definite.

    Example:
        >>> two = 2 * torch.eye(2, dtype=torch.float64)
        >>> without(two, torch.tensor([[1.0, 0.0]]))(Damped(two, 1.0))(torch.ones(2))
        tensor([0.5000, 0.3333])
    """
    directions, size = removed.shape
    # k^2 d + k d^2 multiplications against k^2 d + k^3 / 3.
    if 3 * directions**2 < size**2:
        few = removed.to(curvature)
        return lambda damped: _woodbury(damped.lower, few)
    # The product in the features' own precision: they know no better.
    left = curvature - (removed.T @ removed).double()
    return lambda damped: _by_factor(_cholesky(left, damped.damping))


def _by_factor(lower: Tensor) -> Map:
    return lambda v: _solved(lower, v.to(lower)).to(v)


def _woodbury(lower: Tensor, a: Tensor) -> Map:
    spread = torch.linalg.solve_triangular(lower, a.T, upper=False)
    inner = _cholesky(-(spread.T @ spread), 1.0)

    def apply(v: Tensor) -> Tensor:
        x = torch.linalg.solve_triangular(lower, v.to(a)[:, None], upper=False)
        x = x + spread @ torch.cholesky_solve(spread.T @ x, inner)
        solved: Tensor = torch.linalg.solve_triangular(lower.T, x, upper=True)
        return solved[:, 0].to(v)

    return apply


def _solved(lower: Tensor, v: Tensor) -> Tensor:
    solved: Tensor = torch.cholesky_solve(v[:, None], lower)
    return solved[:, 0]


def _cholesky(matrix: Tensor, damping: float) -> Tensor:
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise TooLittleDamping(
            f"the curvature is not positive definite at damping {damping:g}: raise the damping"
        )
    assert isinstance(lower, Tensor)
    return lower
