"""Gradients J of the outputs on some rows, as what products with them need."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from attribution.gradients.projection import SparseProjection


class Jacobian(ABC):
    """Projected gradients J_i of every output on some rows, [row, output, feature].

    Example:
        >>> Dense(torch.ones(2, 1, 3)).times(torch.ones(3))
        tensor([[3.],
                [3.]])
    """

    @abstractmethod
    def dense(self) -> Tensor:
        """J itself, [row, output, feature]."""

    @abstractmethod
    def times(self, direction: Tensor) -> Tensor:
        """First-order change J_i d of the outputs, [row, output], of d [feature]."""

    @abstractmethod
    def pulled(self, weights: Tensor) -> Tensor:
        """sum_i J_i^T w_i, [feature], of w [row, output]."""


@final
@dataclass(frozen=True)
class Dense(Jacobian):
    """Gradients as they are.

    Args:
        values: J, [row, output, feature].
    """

    values: Tensor = field(repr=False)

    def dense(self) -> Tensor:
        """J itself."""
        return self.values

    def times(self, direction: Tensor) -> Tensor:
        """J_i d."""
        return self.values @ direction

    def pulled(self, weights: Tensor) -> Tensor:
        """sum_i J_i^T w_i."""
        return self.values.flatten(0, 1).T @ weights.flatten()


@final
@dataclass(frozen=True)
class Factors:
    """How gradients of a model of Linear layers are made of two vectors a layer.

    A layer that sees one position a row has the features S vec(b a^T), where a are its projected
    inputs and b the projected gradients of its outputs. A row in one piece is a of all layers,
    then b of all layers for each output: [sum of k_in + outputs x sum of k_out].

    Args:
        inputs: k_in of each layer.
        outputs: k_out of each layer.
        sparse: S of each layer.

    Example:
        >>> from attribution.gradients.projection import SparseProjection
        >>> factors = Factors((2,), (1,), (SparseProjection(2, 2),))
        >>> a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[[10.0]]])
        >>> factors.dense(torch.cat([a, b[0]], 1))
        tensor([[[30., 40.]]])
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    sparse: tuple[SparseProjection, ...]

    def size(self, outputs: int) -> int:
        """Numbers of a row with so many outputs."""
        return sum(self.inputs) + outputs * sum(self.outputs)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors a [row, sum of k_in] and b [row, output, sum of k_out] of rows in one piece."""
        width = sum(self.inputs)
        return rows[:, :width], rows[:, width:].unflatten(1, (-1, sum(self.outputs)))

    def dense(self, rows: Tensor) -> Tensor:
        """J, [row, output, feature]."""
        left, right = self.split(rows)
        # Output by output: all at once would take the room of all products before S.
        return torch.stack([self._of_output(left, b) for b in right.unbind(1)], 1)

    def _of_output(self, left: Tensor, right: Tensor) -> Tensor:
        sides = zip(left.split(self.inputs, 1), right.split(self.outputs, 1), strict=True)
        products = ((b.unsqueeze(2) * a.unsqueeze(1)).flatten(1) for a, b in sides)
        pairs = zip(self.sparse, products, strict=True)
        return torch.cat([sparse.apply(values) for sparse, values in pairs], 1)

    def matrices(self, direction: Tensor) -> list[Tensor]:
        """The matrix [k_out, k_in] of each layer whose product with b and a is J d."""
        parts = direction.split([sparse.size for sparse in self.sparse])
        shapes = zip(self.sparse, parts, self.outputs, self.inputs, strict=True)
        return [sparse.adjoint(part).reshape(k_out, k_in) for sparse, part, k_out, k_in in shapes]


@final
@dataclass(frozen=True)
class Factored(Jacobian):
    """Gradients as factors, of which products read k_in + outputs x k_out numbers a layer and row.

    J itself has outputs x k_in x k_out.

    Args:
        factors: how J is made of them.
        rows: each in one piece, [row, ...].
    """

    factors: Factors
    rows: Tensor = field(repr=False)

    def dense(self) -> Tensor:
        """J itself, made for this call."""
        return self.factors.dense(self.rows)

    def times(self, direction: Tensor) -> Tensor:
        """J_i d, the sum over layers of b^T D a, where D is S^T d as a matrix."""
        left, right = self.factors.split(self.rows)
        sides = zip(
            left.split(self.factors.inputs, 1), self.factors.matrices(direction), strict=True
        )
        moved = torch.cat([a @ matrix.T for a, matrix in sides], 1)
        return (right @ moved.unsqueeze(2)).squeeze(2)

    def pulled(self, weights: Tensor) -> Tensor:
        """S vec(sum_i (sum_o w_io b_io) a_i^T), layer by layer."""
        left, right = self.factors.split(self.rows)
        summed = (weights.unsqueeze(1) @ right).squeeze(1)
        sides = zip(
            summed.split(self.factors.outputs, 1), left.split(self.factors.inputs, 1), strict=True
        )
        pairs = zip(self.factors.sparse, sides, strict=True)
        return torch.cat([sparse.apply((b.T @ a).flatten()) for sparse, (b, a) in pairs])
