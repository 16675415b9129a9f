"""The damped curvature without the forgotten rows, ready to be solved with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.newton.linearised import Map


class TooLittleDamping(ValueError):
    """The damped curvature is not positive definite."""


@dataclass(frozen=True)
class Factor:
    """Cholesky factor of H + lambda I for all training rows.

    Args:
        curvature: H, [feature, feature], float64.
        damping: lambda.
        lower: the factor L, H + lambda I = L L^T.
    """

    curvature: Tensor
    damping: float
    lower: Tensor


def factorise(curvature: Tensor, damping: float) -> Factor:
    """Factorises the damped curvature.

    Args:
        curvature: H, [feature, feature], float64.
        damping: lambda.

    Returns:
        The factor.

    Raises:
        TooLittleDamping: the matrix is not positive definite.

    Example:
        >>> factorise(3 * torch.eye(2, dtype=torch.float64), 1.0).lower.diagonal()
        tensor([2., 2.], dtype=torch.float64)
    """
    return Factor(curvature, damping, _cholesky(curvature, damping))


def without(factor: Factor, removed: Tensor) -> Map:
    """Applies (H - A^T A + lambda I)^-1, where A^T A is the curvature of the removed rows.

    With few removed rows by Woodbury's identity in the space of A's rows, from the factor of all
    rows; with many by a new factor, whichever takes fewer multiplications.

    Args:
        factor: of all rows.
        removed: A = R^(1/2) J of the removed rows, [direction, feature].

    Returns:
        A function of [feature] vectors, of any dtype.

    Raises:
        TooLittleDamping: what is left is not positive definite.

    Example:
        >>> factor = factorise(2 * torch.eye(2, dtype=torch.float64), 1.0)
        >>> without(factor, torch.tensor([[1.0, 0.0]]))(torch.ones(2))
        tensor([0.5000, 0.3333])
    """
    directions, size = removed.shape
    # k^2 d + k d^2 multiplications against k^2 d + k^3 / 3.
    if 3 * directions**2 < size**2:
        return _woodbury(factor, removed.to(factor.curvature))
    # The product in the features' own precision: they know no better.
    lower = _cholesky(factor.curvature - (removed.T @ removed).double(), factor.damping)
    return lambda v: _solved(lower, v.to(lower)).to(v)


def _woodbury(factor: Factor, a: Tensor) -> Map:
    spread = torch.linalg.solve_triangular(factor.lower, a.T, upper=False)
    inner = _cholesky(-(spread.T @ spread), 1.0)

    def apply(v: Tensor) -> Tensor:
        x = torch.linalg.solve_triangular(factor.lower, v.to(a)[:, None], upper=False)
        x = x + spread @ torch.cholesky_solve(spread.T @ x, inner)
        solved: Tensor = torch.linalg.solve_triangular(factor.lower.T, x, upper=True)
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
