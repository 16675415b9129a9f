"""The damped curvature without the forgotten rows, ready to be solved with."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from attribution.gradients.jacobian import Factored, Jacobian
from attribution.newton.conjugate import Map, conjugate

# Measured with the 1,344 features of the digits on one core of a Xeon: gradients take as long as
# Woodbury's identity with so many directions, 20 ms, and in so many iterations as a factor, 60 ms.
FEW = 400
MOST_ITERATIONS = 60


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
        return torch.einsum("rab,rbk->rak", _root(self.hessians), self.j.dense()).flatten(0, 1)


@dataclass(frozen=True)
class Inverse:
    """What solves with H - C + lambda I; of [feature] vectors of any dtype.

    Args:
        exact: its inverse, to the precision of the vectors.
        rough: a preconditioner for it: its inverse, or that of H + lambda I, which takes less time.

    Example:
        >>> Inverse(exact=lambda v: v / 3, rough=lambda v: v / 4).exact(torch.tensor([6.0]))
        tensor([2.])
    """

    exact: Map
    rough: Map


def without(damped: Damped, removed: Removed) -> Inverse:
    """Prepares to solve with the damped curvature less the curvature C of the removed rows.

    For few rows by Woodbury's identity in the space of the rows of A, where C = A^T A. For many
    whose J is kept as factors, so that products with it cost little, by conjugate gradients, for
    which the factor of all rows is the preconditioner. For others, and where gradients do not
    settle, by a factor of H - C + lambda I.

    Args:
        damped: of all rows.
        removed: C.

    Returns:
        The inverse. Where what is left is not positive definite, `exact` may raise
        TooLittleDamping; gradients notice it only on their way.

    Raises:
        TooLittleDamping: a factor that is made at once does not exist.

    Example:
        >>> from attribution.gradients.jacobian import Dense
        >>> damped = Damped(2 * torch.eye(2, dtype=torch.float64), 1.0)
        >>> gone = Removed(Dense(torch.tensor([[[1.0, 0.0]]])), torch.ones(1, 1, 1))
        >>> without(damped, gone).exact(torch.ones(2))
        tensor([0.5000, 0.3333])
    """
    factored, size = isinstance(removed.j, Factored), len(damped.curvature)
    # k^2 d + k d^2 multiplications against k^2 d + k^3 / 3.
    few = removed.directions < FEW if factored else 3 * removed.directions**2 < size**2
    if few:
        return _both(_woodbury(damped.lower, removed.root().to(damped.curvature)))
    if factored:
        return Inverse(_Gradients(damped, removed), lambda v: solved(damped.lower, v))
    lower = _downdated(damped, removed)
    return _both(lambda v: solved(lower, v))


def _both(apply: Map) -> Inverse:
    return Inverse(apply, apply)


def _woodbury(lower: Tensor, a: Tensor) -> Map:
    spread = torch.linalg.solve_triangular(lower, a.T, upper=False)
    inner = _cholesky(-(spread.T @ spread), 1.0)

    def apply(v: Tensor) -> Tensor:
        x = _half(lower, v)
        x = x + spread @ solved(inner, spread.T @ x)
        return _other_half(lower, x).to(v)

    return apply


@dataclass(frozen=True)
class _Gradients:
    damped: Damped = field(repr=False)
    removed: Removed = field(repr=False)

    def __call__(self, v: Tensor) -> Tensor:
        right = _half(self.damped.lower, v)
        enough = 10 * torch.finfo(self.removed.hessians.dtype).eps
        found, settled = conjugate(
            self._apply, right, lambda y: y, enough=enough, most=MOST_ITERATIONS
        )
        if not settled:
            return solved(self._factor, v)
        return _other_half(self.damped.lower, found).to(v)

    def _apply(self, y: Tensor) -> Tensor:
        # With H + lambda I = L L^T the matrix is L (I - L^-1 C L^-T) L^T.
        lower, narrow = self.damped.lower, self.removed.hessians.dtype
        return y - _half(lower, self.removed.times(_other_half(lower, y).to(narrow)))

    @cached_property
    def _factor(self) -> Tensor:
        return _downdated(self.damped, self.removed)


def _downdated(damped: Damped, removed: Removed) -> Tensor:
    a = removed.root()
    # The product in the features' own precision: they know no better.
    return _cholesky(damped.curvature - (a.T @ a).double(), damped.damping)


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
    return _other_half(lower, _half(lower, v)).to(v)


def _half(lower: Tensor, v: Tensor) -> Tensor:
    # One after the other they take a quarter of the time of torch.cholesky_solve.
    found: Tensor = torch.linalg.solve_triangular(lower, v.to(lower)[:, None], upper=False)
    return found[:, 0]


def _other_half(lower: Tensor, v: Tensor) -> Tensor:
    found: Tensor = torch.linalg.solve_triangular(lower.T, v[:, None], upper=True)
    return found[:, 0]


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
