"""Ridge regression of outputs on masks in the eigenbasis of the masks' Gram matrix.

For every target t and output c, over models j with masks x_j, outputs y_j and weights a_j,

    minimise  sum_j a_j (y_j - b - x_j w)^2 + lambda_t sum_i w_i^2 / s_i^2

The intercept b is not penalised, nor the effect of the target's own row t where it is free. The
scales s tell how large effects are expected to be: this is plain ridge of w_i / s_i on masks whose
columns are times s_i. One decomposition of these serves all targets, outputs and lambdas.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.dense import eigenvectors, product

PIECE = 1024  # models or rows whose masks are widened to float64 at once


@dataclass(frozen=True)
class Design:
    """Centred, weighted and scaled masks of some models in their eigenbasis; costly, made once.

    Args:
        basis: eigenvectors of the Gram matrix, [model, rank].
        eigenvalues: [rank].
        masks: rotated masks, times the rows' scales, [rank, train].
        weights: square roots of the models' weights, [model].
        scales: s of each row, [train].
    """

    basis: Tensor
    eigenvalues: Tensor
    masks: Tensor
    weights: Tensor
    scales: Tensor

    def centred(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated centred outputs [rank, ...] of outputs [model, ...], and their centre [...]."""
        squares = self.weights.square()
        centre = torch.tensordot(squares / squares.sum(), outputs, 1)
        scaled = self.weights.reshape(-1, *[1] * (outputs.ndim - 1)) * (outputs - centre)
        rotated = product(self.basis.T, scaled.flatten(1))
        return rotated.reshape(-1, *outputs.shape[1:]), centre

    def outside(self, outputs: Tensor, rotated: Tensor) -> Tensor:
        """Weighted squares of outputs [model, ...] that no effects can reach, [...].

        Not zero where there are more models than rows.
        """
        squares = self.weights.square()
        mean = torch.tensordot(squares / squares.sum(), outputs, 1)
        around = torch.tensordot(squares, (outputs - mean).square(), 1)
        left: Tensor = (around - rotated.square().sum(0)).clamp_min(0)
        return left


def decompose(masks: Tensor, weights: Tensor, scales: Tensor) -> Design:
    """Eigenbasis of the centred masks times the rows' scales.

    It comes from the smaller Gram matrix, over models or over rows, in float64; that over rows,
    before it is scaled, is a sum of whole numbers and hence exact below 2^24, whatever computes it.
    Eigenvectors are LAPACK's.

    Args:
        masks: [model, train], zeros and ones.
        weights: weight of each model, a whole number, [model].
        scales: s of each row, above 0, [train].

    Returns:
        The design, in the dtype of the masks.

    Example:
        >>> design = decompose(torch.eye(3), torch.ones(3), torch.ones(3))
        >>> design.eigenvalues.round(decimals=3)
        tensor([1., 1.])
    """
    models, rows = masks.shape
    counts = product(weights.float()[None], masks.float())[0].double()
    centre = counts / weights.double().sum()
    solved = _over_models if models <= rows else _over_rows
    scales = scales.to(masks.dtype)
    basis, values, rotated = solved(masks, weights.double(), centre, scales)
    # Rounding is no mask: nothing tells the effect of a row that all models saw, or none.
    rotated[:, (counts == 0) | (counts == weights.double().sum())] = 0
    parts = (basis, values, rotated, weights.double().sqrt(), scales)
    return Design(*(part.to(masks.dtype) for part in parts))


def fewer_rows(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and rotated masks of a design that never held the other rows.

    The masks in the basis of all rows' Gram matrix are turned into that of their own; what depends
    on their products alone, such as the posterior of these rows' effects, is that of the rows left.

    Args:
        masks: some columns of a design's rotated masks, [rank, train].

    Returns:
        Eigenvalues, [rank], and rotated masks, [rank, train], of the rank that is left.

    Example:
        >>> design = decompose(torch.eye(3), torch.ones(3), torch.ones(3))
        >>> eigenvalues, masks = fewer_rows(design.masks[:, :1])
        >>> eigenvalues.round(decimals=3), masks.shape
        (tensor([0.6670]), torch.Size([1, 1]))
    """
    rank, rows = masks.shape
    if rank > rows:
        values, vectors = _eigenvectors(_gram(masks.T))
        rotated = values.sqrt()[:, None] * vectors.T
        rotated[:, ~masks.any(0)] = 0
        return values.to(masks.dtype), rotated.to(masks.dtype)
    values, basis = _eigenvectors(_gram(masks))
    turned = [product(basis.T, part.double()).to(masks.dtype) for part in masks.split(PIECE, 1)]
    return values.to(masks.dtype), torch.cat(turned, 1)


def _gram(matrix: Tensor) -> Tensor:
    """M M^T in float64, of which a piece at a time is as wide."""
    total = matrix.new_zeros(len(matrix), len(matrix), dtype=torch.float64)
    for part in matrix.split(PIECE, 1):
        wide = part.double()
        total.addmm_(wide, wide.T)
    return total


def _over_models(
    masks: Tensor, weights: Tensor, centre: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    roots, scaled = weights.sqrt(), masks * scales
    gram = torch.zeros(len(masks), len(masks), dtype=torch.float64)
    for part, middle in zip(
        scaled.split(PIECE, 1), (centre * scales.double()).split(PIECE), strict=True
    ):
        around = roots[:, None] * (part.double() - middle)
        gram.addmm_(around, around.T)
    values, basis = _eigenvectors(gram)
    # The basis is orthogonal to the roots: the centre need not be taken off the masks.
    rotated = product((roots[:, None] * basis).to(masks.dtype).T, scaled)
    return basis, values, rotated


def _over_rows(
    masks: Tensor, weights: Tensor, centre: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    single, scales = masks.float(), scales.double()
    gram = product((weights.float()[:, None] * single).T, single).double()
    gram -= weights.sum() * torch.outer(centre, centre)
    values, vectors = _eigenvectors(scales[:, None] * gram * scales)
    lengths, vectors_of_masks = values.sqrt(), scales[:, None] * vectors
    pieces = [(piece.double() - centre) @ vectors_of_masks for piece in masks.split(PIECE)]
    basis = weights.sqrt()[:, None] * torch.cat(pieces) / lengths
    return basis, values, lengths[:, None] * vectors.T


def _eigenvectors(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = eigenvectors(gram)
    kept = values > values[-1] * 1e-12
    return values[kept], vectors[:, kept]


@dataclass(frozen=True)
class Fit:
    """Effects in dual form for some targets.

    Args:
        dual: coefficients of the rotated models, [rank, target, output].
        own: effect of each target's own row over its scale, [target, output]; 0 for test targets.
        variance: of one model's output around the fit, [target, output].
    """

    dual: Tensor
    own: Tensor
    variance: Tensor


def solve(
    design: Design,
    rotated: Tensor,
    penalty: Tensor,
    own: Tensor,
    outside: Tensor | None = None,
    *,
    free: bool = False,
) -> Fit:
    """Ridge in closed form.

    With D = 1 / (S + lambda), a the own row's rotated mask and b the rotated outputs, dual = D b
    and own = a dual; where the own row is free, own = (a D b) / (a D a) and dual = D (b - a own).
    The effect of another row is its scale times the product of its rotated mask and the dual.

    Args:
        design: of the models.
        rotated: rotated outputs, [rank, target, output].
        penalty: lambda of each target, [target].
        own: rotated mask of each target's own row, [rank, target]; 0 for test targets.
        outside: squares that no effects can reach, [target, output]; the variance counts them.
        free: whether the own row is not penalised.

    Returns:
        The fit; its variance is the smallest value of the objective over (models - 1).

    Example:
        >>> design = decompose(torch.eye(3), torch.ones(3), torch.ones(3))
        >>> fit = solve(design, torch.ones(2, 1, 1), torch.ones(1), torch.zeros(2, 1))
        >>> fit.dual.flatten()
        tensor([0.5000, 0.5000])
    """
    damped = 1 / (design.eigenvalues[:, None] + penalty)
    dual = rotated * damped[:, :, None]
    effect = (own[:, :, None] * dual).sum(0)
    if free:
        leverage = (own.square() * damped).sum(0).clamp_min(torch.finfo(own.dtype).tiny)
        effect, some = effect / leverage[:, None], owners(own)
        dual[:, some] -= (own * damped)[:, some, None] * effect[some]
    objective = penalty[:, None] * (rotated * dual).sum(0)
    if outside is not None:
        objective = objective + outside
    return Fit(dual, effect, objective / (len(design.weights) - 1))


def owners(own: Tensor) -> slice:
    """Targets up to the last one that has an own row; training rows stand before test rows.

    Args:
        own: rotated mask of each target's own row, [rank, target]; 0 where there is none.

    Returns:
        Their positions.

    Example:
        >>> owners(torch.tensor([[1.0, 0, 2, 0]]))
        slice(0, 3, None)
    """
    found = own.any(0).nonzero()
    return slice(0, int(found[-1]) + 1 if len(found) else 0)


def own_masks(design: Design, places: Tensor) -> Tensor:
    """Rotated mask of each target's own row.

    Args:
        design: of the models.
        places: positions among the targets, training rows first, [target].

    Returns:
        [rank, target]; 0 for test targets.

    Example:
        >>> one = torch.ones(3)
        >>> own_masks(decompose(torch.eye(3), one, one), torch.tensor([0, 3])).shape
        torch.Size([2, 2])
    """
    rank, n = design.masks.shape
    own = torch.zeros(rank, len(places), dtype=design.masks.dtype)
    own[:, places < n] = design.masks[:, places[places < n]]
    return own
