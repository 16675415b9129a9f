"""The damped curvature without the forgotten rows, ready to be solved with."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from attribution.gradients.jacobian import Jacobian
from attribution.newton.conjugate import Map, conjugate

# An iteration reads the factor twice: it takes the time of so many directions of Woodbury's.
FEW = 400
MOST_ITERATIONS = 60  # above that a new factor is cheaper


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


@dataclass(frozen=True)
class Removed:
    """The curvature C = sum_i J_i^T R_i J_i of the removed rows.

    Args:
        j: J, [row, output, feature].
        hessians: R, symmetric and positive semidefinite, [row, output, output].

    Example:
        >>> from attribution.gradients.jacobian import Dense
        >>> one = torch.ones(1, 1, 1)
        >>> Removed(Dense(3 * one), one).times(torch.ones(1))
        tensor([9.])
    """

    j: Jacobian = field(repr=False)
    hessians: Tensor = field(repr=False)

    @property
    def directions(self) -> int:
        """Number of rows of A, where C = A^T A."""
        return self.hessians.shape[0] * self.hessians.shape[1]

    def times(self, v: Tensor) -> Tensor:
        """C v, of [feature] vectors."""
        return self.j.pulled(torch.einsum("rab,rb->ra", self.hessians, self.j.times(v)))

    def root(self) -> Tensor:
        """A = R^(1/2) J, [direction, feature]."""
        return torch.einsum("rab,rbk->rak", _root(self.hessians), self.j.values).flatten(0, 1)


@dataclass(frozen=True)
class Inverse:
    """Applies (H - C + lambda I)^-1 to [feature] vectors of any dtype.

    Args:
        exact: to the precision of the vectors.
        rough: nearly, and faster.
    """

    exact: Map
    rough: Map


def without(damped: Damped, removed: Removed) -> Inverse:
    """Solves with the damped curvature less the curvature C of the removed rows.

    For few rows by Woodbury's identity in the space of the rows of A, where C = A^T A; for many by
    conjugate gradients, for which the factor of all rows is the preconditioner and the rough
    inverse. Both need no other factor. Where gradients do not settle, a factor of H - C + lambda I
    is made.

    Args:
        damped: of all rows.
        removed: C.

    Returns:
        The inverse; its maps raise TooLittleDamping where what is left is not positive definite.

    Raises:
        TooLittleDamping: so it is with all rows, or by Woodbury's identity.

    Example:
        >>> from attribution.gradients.jacobian import Dense
        >>> damped = Damped(2 * torch.eye(2, dtype=torch.float64), 1.0)
        >>> gone = Removed(Dense(torch.tensor([[[1.0, 0.0]]])), torch.ones(1, 1, 1))
        >>> without(damped, gone).exact(torch.ones(2))
        tensor([0.5000, 0.3333])
    """
    if removed.directions < FEW:
        apply = _woodbury(damped.lower, removed.root().to(damped.curvature))
        return Inverse(apply, apply)
    return Inverse(lambda v: _downdated(damped, removed, v), lambda v: solved(damped.lower, v))


def _woodbury(lower: Tensor, a: Tensor) -> Map:
    spread = torch.linalg.solve_triangular(lower, a.T, upper=False)
    inner = _cholesky(-(spread.T @ spread), 1.0)

    def apply(v: Tensor) -> Tensor:
        x = _half(lower, v.to(a))
        x = x + spread @ solved(inner, spread.T @ x)
        return _other_half(lower, x).to(v)

    return apply


def _downdated(damped: Damped, removed: Removed, v: Tensor) -> Tensor:
    # With H + lambda I = L L^T the matrix is L (I - L^-1 C L^-T) L^T.
    lower = damped.lower

    def apply(y: Tensor) -> Tensor:
        return y - _half(lower, removed.times(_other_half(lower, y).to(v)).to(lower))

    right = _half(lower, v.to(lower))
    enough = 10 * torch.finfo(v.dtype).eps
    found, settled = conjugate(apply, right, lambda y: y, enough=enough, most=MOST_ITERATIONS)
    if settled:
        return _other_half(lower, found).to(v)
    a = removed.root()
    return solved(_cholesky(damped.curvature - (a.T @ a).double(), damped.damping), v)


def solved(lower: Tensor, v: Tensor) -> Tensor:
    """Solves L L^T x = v.

    Args:
        lower: Cholesky factor L, [feature, feature].
        v: [feature], of any dtype.

    Returns:
        x, in the dtype of v.

    Example:
        >>> solved(torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([3.0, 8.0]))
        tensor([3., 2.])
    """
    return _other_half(lower, _half(lower, v.to(lower))).to(v)


def _half(lower: Tensor, v: Tensor) -> Tensor:
    # One after the other they take a quarter of the time of torch.cholesky_solve.
    solved: Tensor = torch.linalg.solve_triangular(lower, v[:, None], upper=False)
    return solved[:, 0]


def _other_half(lower: Tensor, v: Tensor) -> Tensor:
    solved: Tensor = torch.linalg.solve_triangular(lower.T, v[:, None], upper=True)
    return solved[:, 0]


def _root(hessians: Tensor) -> Tensor:
    """Square roots A of symmetric matrices, A^T A = R; semidefinite ones too."""
    values, vectors = torch.linalg.eigh(hessians.double())
    root: Tensor = values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT
    return root.to(hessians.dtype)


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
