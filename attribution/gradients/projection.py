"""Projections of gradients: settings, and random matrices that depend on their names alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.seeds import derive_seed

GRID = 2.0**14  # entries of a projection are multiples of its inverse


@dataclass(frozen=True)
class Projection:
    """How per-example gradients are projected; settings only.

    The gradient of a layer with a factorised form, sum_t delta_t a_t^T over the positions t of
    its output gradients delta and its inputs a, becomes S vec(P_out (sum_t delta_t a_t^T) P_in^T):
    two projections that are small enough to be wide, so that they lose little, and a sparse one to
    the size that is kept. All three are random, or P_out and P_in are principal directions of the
    model's own gradients and inputs and S keeps some products of them, see `principal_directions`.

    Args:
        inputs: rows of P_in; a side that is not larger is kept as it is.
        outputs: rows of P_out; likewise. A convolution with groups has a pair for each group.
        features: size to which S projects, for each layer and each parameter without a factorised
            form; smaller ones are kept as they are.
        seed: of all projections.
        principal: features of a Linear or convolution layer along principal directions, in the
            mean over these layers; one of them has inputs x outputs at most, for each of its
            groups. 0: they are projected at random, as all other parameters always are.

    Raises:
        ValueError: a size below 1, or a negative seed or number of principal features.
        TypeError: a field is no integer.

    Example:
        >>> Projection(inputs=16).settings()
        {'inputs': 16, 'outputs': 32, 'features': 512, 'seed': 0}
    """

    inputs: int = 32
    outputs: int = 32
    features: int = 512
    seed: int = 0
    principal: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name not in ("seed", "principal"))
            if type(value) is not int:
                raise TypeError(f"projection.{field.name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"projection.{field.name} must be {least} or more, got {value}")

    def settings(self) -> dict[str, Any]:
        """The fields as plain values, for provenance; principal where it is not 0."""
        told = asdict(self)
        # Features that were stored before there were principal directions do not tell of them.
        return told if self.principal else {n: v for n, v in told.items() if n != "principal"}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Projection":
        """The projection of such settings, which are refused where another version made them."""
        names = [field.name for field in fields(cls)]
        if set(settings) | {"principal"} != set(names):
            raise ValueError(
                f"expected the settings {', '.join(names)} of a projection, got"
                f" {', '.join(settings)}: another version made them; remove the features and what"
                " was computed from them, and make them anew"
            )
        return cls(**settings)

    def random(self, checkpoint: int, name: str) -> np.random.Generator:
        """The generator of one matrix: Philox, a counter-based one, keyed by its names.

        Args:
            checkpoint: number of the checkpoint.
            name: which matrix.

        Returns:
            A generator that no other (seed, checkpoint, name) shares.
        """
        seed = derive_seed(self.seed, "projection", checkpoint)
        sequence = np.random.SeedSequence([seed, *name.encode()])
        return np.random.Generator(np.random.Philox(sequence))


def orthogonal_matrices(
    random: np.random.Generator, groups: int, size: int, width: int
) -> Tensor | None:
    """Matrices P with orthogonal rows in uniformly random directions, scaled so that E[P^T P] = I.

    Inner products of projected vectors scatter less than by independent normal entries, the more
    so the less is projected away. The directions are drawn and made orthogonal on the CPU in
    float64, and rounded to multiples of 2^-14, far above what machines differ by, so that the same
    bits are used everywhere, whatever device and dtype they are used on.

    Args:
        random: the generator.
        groups: number of matrices.
        size: rows of each.
        width: columns of each.

    Returns:
        [group, size, width], float32; None, which stands for the identity, if the width is not
        larger than the size.

    Example:
        >>> random = Projection().random(0, "layer.inputs")
        >>> orthogonal_matrices(random, 1, 2, 5).shape
        torch.Size([1, 2, 5])
        >>> orthogonal_matrices(random, 1, 5, 5)
    """
    if width <= size:
        return None
    directions, upper = np.linalg.qr(random.standard_normal((groups, width, size)))
    # Which sign a direction has is the library's choice otherwise.
    signs = np.sign(np.diagonal(upper, axis1=1, axis2=2))
    rows = (directions * signs[:, None]).swapaxes(1, 2) * np.sqrt(width / size)
    return torch.from_numpy(np.ascontiguousarray(np.round(rows * GRID) / GRID, np.float32))


@dataclass(frozen=True)
class SparseProjection:
    """A sparse projection S with one entry, 1 or -1, in each column that it does not drop.

    The columns are put in order, signed and dealt out to the rows in turn, so that each row gets
    equally many; if none is dropped and the order is random, E[S^T S] = I. Nothing is added
    atomically: the same bits on every device.

    Args:
        width: number of columns.
        size: number of rows; `width` if the vectors are kept as they are.
        order: of the columns that are not dropped, [column]; None if all are kept as they are.
        signs: of these columns, [column], float32; None if all are kept as they are.

    Source: sparse Johnson-Lindenstrauss transform, Kane and Nelson (arXiv 1012.1577), with one
    entry a column.
    """

    width: int
    size: int
    order: Tensor | None = None
    signs: Tensor | None = None

    @property
    def matrices(self) -> list[Tensor]:
        """Order and signs; none for the identity."""
        return [part for part in (self.order, self.signs) if part is not None]

    def apply(self, vectors: Tensor) -> Tensor:
        """Projected vectors S x, [..., size], of [..., width]."""
        if self.order is None or self.signs is None:
            return vectors
        signed = vectors[..., self.order.to(vectors.device)] * self.signs.to(vectors)
        turns = self._turns(self.order)
        if turns == 1:
            return signed
        padded = torch.nn.functional.pad(signed, (0, turns * self.size - len(self.order)))
        return padded.reshape(*vectors.shape[:-1], turns, self.size).sum(-2)

    def adjoint(self, features: Tensor) -> Tensor:
        """Transposed projection S^T v, [..., width], of [..., size]."""
        if self.order is None or self.signs is None:
            return features
        turns = self._turns(self.order)
        repeated = features if turns == 1 else features.tile(turns)[..., : len(self.order)]
        dealt = repeated * self.signs.to(features)
        found = dealt.new_zeros(*dealt.shape[:-1], self.width)
        found[..., self.order.to(features.device)] = dealt
        return found

    def _turns(self, order: Tensor) -> int:
        """How many columns a row gets at most."""
        return -(-len(order) // self.size)


def sparse_projection(random: np.random.Generator, size: int, width: int) -> SparseProjection:
    """Draws a sparse projection, or gives the identity where the width is not larger.

    Args:
        random: the generator.
        size: rows asked for.
        width: columns.

    Returns:
        The projection.

    Example:
        >>> random = Projection().random(0, "scale")
        >>> sparse_projection(random, 3, 8).apply(torch.ones(2, 8)).shape
        torch.Size([2, 3])
        >>> sparse_projection(random, 8, 3).apply(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if width <= size:
        return SparseProjection(width, width)
    order = torch.from_numpy(random.permutation(width))
    signs = torch.from_numpy((2 * random.integers(0, 2, width) - 1).astype(np.float32))
    return SparseProjection(width, size, order, signs)


def selection(width: int, kept: Tensor) -> SparseProjection:
    """The sparse projection that keeps some columns and drops all others.

    Args:
        width: number of columns.
        kept: which of them, in order, [size].

    Returns:
        The projection.

    Example:
        >>> selection(4, torch.tensor([0, 2])).apply(torch.tensor([5.0, 6.0, 7.0, 8.0]))
        tensor([5., 7.])
    """
    if len(kept) == width:
        return SparseProjection(width, width)
    return SparseProjection(width, len(kept), kept, torch.ones(len(kept)))


@dataclass(frozen=True)
class Directions:
    """Directions that a layer's two sides are projected onto, and the products that are kept.

    Args:
        outputs: orthonormal rows of P_out, [group, k_out, out].
        inputs: orthonormal rows of P_in, [group, k_in, inner].
        kept: which of the group x k_out x k_in products are features, in order, [feature].
    """

    outputs: Tensor
    inputs: Tensor
    kept: Tensor

    def check(self, layer: str, groups: int, out: int, inner: int) -> None:
        """Refuses a layer with other sides.

        Args:
            layer: its name.
            groups: number of its groups.
            out: width of the side of its output gradients, in one group.
            inner: width of the side of its inputs, in one group.

        Raises:
            ValueError: the directions were found for another layer.
        """
        found = len(self.outputs), self.outputs.shape[2], self.inputs.shape[2]
        if found != (groups, out, inner) or len(self.inputs) != groups:
            raise ValueError(
                f"the directions of {layer!r} are of {found[0]} groups with sides of {found[1]} and"
                f" {found[2]}, the layer has {groups} with {out} and {inner}: they were found for"
                " another model"
            )

    @property
    def sparse(self) -> SparseProjection:
        """S, which keeps these products."""
        return selection(self.outputs.shape[:2].numel() * self.inputs.shape[1], self.kept)
