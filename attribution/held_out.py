"""Ridge predictions of held-out models from one decomposition of all of them.

The residuals of a fit are a linear map of the outputs. With R the map of the fit on all models, h
the held-out ones and k the others, those of the fit on k alone are

    held-out residuals          e_h = R_hh^-1 (R y)_h,
    residuals of the others     e_k = (R y)_k - R_kh e_h,

so that nothing is decomposed or fitted again. With x the centred, weighted and scaled mask of the
own row and E the map of the fit on k, its effect in that fit, over its scale, is x^T E y / lambda.
Where it is free it is regressed on afterwards: then its effect is (x^T E y) / (x^T E x).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.dense import product
from attribution.ridge import Design, owners

PIECE = 2**22  # numbers of the basis that are scaled at once


@dataclass(frozen=True)
class HeldOut:
    """What predicts held-out models, and the last model, for each lambda; made once.

    Args:
        basis: eigenbasis of all models, [model, rank].
        asked: positions of the held-out models and of the last model, [asked].
        roots: square roots of their weights, [asked].
        lambdas: candidates, [lambda].
        damped: lambda / (eigenvalue + lambda), [lambda, rank].
        maps: from residuals of the fit on all models to those of the fit on the others,
            [lambda, asked, asked].
        spanned: whether effects can reach all outputs, as there are no more models than rows.
    """

    basis: Tensor
    asked: Tensor
    roots: Tensor
    lambdas: Tensor
    damped: Tensor
    maps: Tensor
    spanned: bool

    def rotated_back(self, scaled: Tensor, values: Tensor) -> Tensor:
        """Asked rows of the basis, times a factor for each of the rank, times values [rank, ...].

        Args:
            scaled: the factors, [rank].
            values: matrix, [rank, column].

        Returns:
            The product, [asked, column].
        """
        few = self.asked.split(max(1, PIECE // self.basis.shape[1]))
        parts = [product(self.basis[rows] * scaled, values) for rows in few]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Outcome:
    """Of a fit without the held-out models, for some targets.

    Args:
        residuals: outputs minus predictions of the held-out models and of the last model,
            [asked, target, output].
        own: effect of each target's own row over its scale, [target, output].
    """

    residuals: Tensor
    own: Tensor


def hold_out(design: Design, held: Tensor, lambdas: Tensor, maps: Tensor | None = None) -> HeldOut:
    """Prepares predictions of some models by fits without them.

    Args:
        design: of all models.
        held: positions of the held-out models, [held]; the last model is never one.
        lambdas: candidates, [lambda].
        maps: those of the same call before; None finds them, which is costly.

    Returns:
        What predicts them.

    Example:
        >>> from attribution.ridge import decompose
        >>> design = decompose(torch.eye(4), torch.ones(4), torch.ones(4))
        >>> hold_out(design, torch.tensor([0, 2]), torch.tensor([0.1, 1.0])).maps.shape
        torch.Size([2, 3, 3])
    """
    models, number = len(design.weights), design.basis.dtype
    asked = torch.cat([held, torch.tensor([models - 1])])
    eigenvalues = design.eigenvalues.double()
    damped = lambdas.double()[:, None] / (eigenvalues + lambdas.double()[:, None])
    spanned = len(eigenvalues) == models - 1
    if maps is None:
        maps = _maps(design, asked, damped, spanned=spanned)
    roots, narrow = design.weights[asked], (lambdas.to(number), damped.to(number))
    return HeldOut(design.basis, asked, roots, *narrow, maps, spanned)


def _maps(design: Design, asked: Tensor, damped: Tensor, *, spanned: bool) -> Tensor:
    basis, roots = design.basis[asked].double(), design.weights[asked].double()
    outside = torch.zeros(len(asked), len(asked), dtype=torch.float64)
    if not spanned:
        unit = roots / design.weights.double().norm()
        outside = torch.eye(len(asked)).double() - basis @ basis.T - torch.outer(unit, unit)
    maps = [_map((basis * part) @ basis.T + outside) for part in damped]
    return torch.stack(maps).to(design.basis.dtype)


def _map(residuals: Tensor) -> Tensor:
    """From the residual map's rows and columns of [held, last] to the map without the held."""
    found = torch.eye(len(residuals), dtype=residuals.dtype)
    found[:-1, :-1] = torch.cholesky_inverse(torch.linalg.cholesky(residuals[:-1, :-1]))
    found[-1, :-1] = -residuals[-1, :-1] @ found[:-1, :-1]
    return found


def outcomes(
    held_out: HeldOut,
    rotated: Tensor,
    own: Tensor,
    outside: Tensor | None = None,
    *,
    free: bool = False,
) -> Iterator[Outcome]:
    """Predicts held-out models by fits without them, for one lambda after the other.

    Args:
        held_out: of the models.
        rotated: rotated outputs of all models, [rank, target, output].
        own: rotated mask of each target's own row, [rank, target]; 0 for test targets.
        outside: part of the asked models' centred outputs that effects cannot reach, weighted,
            [asked, target, output]; None where they reach all.
        free: whether the own row is not penalised.

    Yields:
        The outcome of each lambda.

    Example:
        >>> from attribution.ridge import decompose
        >>> design = decompose(torch.eye(4), torch.ones(4), torch.ones(4))
        >>> held_out = hold_out(design, torch.tensor([0]), torch.tensor([0.1, 1.0]))
        >>> rotated, _ = design.centred(torch.ones(4, 1, 1))
        >>> [found.residuals.shape for found in outcomes(held_out, rotated, torch.zeros(3, 1))]
        [torch.Size([2, 1, 1]), torch.Size([2, 1, 1])]
    """
    columns, shape = rotated[0].numel(), rotated.shape[1:]
    some = owners(own)  # test targets have no own row
    masks = own[:, some]
    both = torch.cat([rotated.flatten(1), masks], 1)
    across = product(held_out.damped, (masks[:, :, None] * rotated[:, some]).flatten(1))
    within = product(held_out.damped, masks.square())
    each = zip(held_out.lambdas, held_out.damped, held_out.maps, across, within, strict=True)
    for penalty, damped, known, xy, xx in each:
        left = held_out.rotated_back(damped, both)
        scaled, mine = left[:, :columns], left[:, columns:]
        if outside is not None:
            scaled = scaled + outside.flatten(1)
        residuals = product(known, scaled).unflatten(1, shape)
        moved = xy.unflatten(0, (-1, shape[1]))
        moved = moved - (mine[:-1, :, None] * residuals[:-1, some]).sum(0)
        effect = rotated.new_zeros(shape)
        if free:
            theirs = product(known, mine)
            effect[some] = _over(moved, xx - (mine[:-1] * theirs[:-1]).sum(0), xx)
            residuals[:, some] -= theirs[:, :, None] * effect[some]
        else:
            effect[some] = moved / penalty
        yield Outcome(residuals.div_(held_out.roots[:, None, None]), effect)


def _over(moved: Tensor, leverage: Tensor, whole: Tensor) -> Tensor:
    # Where the others agree on the row, rounding is all that is left of its leverage.
    told = leverage > whole * torch.finfo(whole.dtype).eps ** 0.5
    return torch.where(told, 1 / leverage, 0)[:, None] * moved


def best_outcome(
    held_out: HeldOut,
    rotated: Tensor,
    own: Tensor,
    outside: Tensor | None = None,
    *,
    free: bool = False,
) -> tuple[Tensor, Outcome]:
    """The lambda of each target that predicts its held-out models best, and what it predicts.

    Args:
        held_out: of the models.
        rotated: as for `outcomes`.
        own: as for `outcomes`.
        outside: as for `outcomes`.
        free: as for `outcomes`.

    Returns:
        Its number for each target, [target], the first of equal ones; and the outcome.

    Example:
        >>> from attribution.ridge import decompose
        >>> masks = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0], [1, 0]])
        >>> design = decompose(masks, torch.ones(5), torch.ones(2))
        >>> held_out = hold_out(design, torch.tensor([0]), torch.tensor([1.0, 0.1]))
        >>> rotated, _ = design.centred(masks[:, :1, None])
        >>> best_outcome(held_out, rotated, torch.zeros(2, 1))[0]
        tensor([1])
    """
    chosen = torch.zeros(rotated.shape[1], dtype=torch.long)
    residuals = effect = least = torch.empty(0)
    for number, found in enumerate(outcomes(held_out, rotated, own, outside, free=free)):
        error = found.residuals[:-1].square().sum((0, 2))
        if number == 0:
            residuals, effect, least = found.residuals, found.own, error
            continue
        better = (error < least).nonzero().flatten()
        residuals[:, better], effect[better] = found.residuals[:, better], found.own[better]
        chosen[better], least[better] = number, error[better]
    return chosen, Outcome(residuals, effect)
