"""Ridge datamodels: lambda for each target by held-out models, effects streamed to the store."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attribution.dense import product
from attribution.effects import append, row_pieces, write_effects
from attribution.held_out import HeldOut, best_outcome, hold_out
from attribution.regression import Fitter, Numbers, Problem, Regression, Sizes
from attribution.ridge import Design, decompose, own_masks, solve
from attribution.training import threads
from stores import ArraySpec, Store

# Candidates for lambda, in units of the mean eigenvalue of the Gram matrix.
LAMBDAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
COLUMNS = 2048  # outputs of targets that are fitted at once


@dataclass(frozen=True)
class Ridge(Regression):
    """Ridge regression: sum_j a_j (y_j - b - x_j w)^2 + lambda sum_{i != own} w_i^2.

    Args:
        lambdas: candidates, in units of the mean eigenvalue of the masks' Gram matrix; that with
            the least error on held-out models is taken for each target.

    Example:
        >>> Ridge(lambdas=(0.1, 1.0)).settings()
        {'name': 'ridge', 'lambdas': [0.1, 1.0]}
    """

    name: ClassVar = "ridge"
    sparse: ClassVar = False

    lambdas: tuple[float, ...] = LAMBDAS

    def __post_init__(self) -> None:
        if not self.lambdas or min(self.lambdas) <= 0:
            raise ValueError(f"lambdas must all be above 0, got {self.lambdas}")

    def settings(self) -> dict[str, Any]:
        """Its name and the candidates."""
        return {"name": self.name, "lambdas": list(self.lambdas)}

    def arrays(self, sizes: Sizes, wide: str) -> dict[str, ArraySpec]:
        """The number of each target's lambda."""
        return {"chosen": ArraySpec(("target",), (sizes.targets,), "int64")}

    def column_bytes(self, sizes: Sizes, number: torch.dtype) -> int:
        """Outputs of all models, and the effects in dual form."""
        return 2 * (sizes.models + 1) * sizes.outputs * number.itemsize

    def prepared(self, models: Problem) -> "RidgeFitter":
        """Decomposes the masks."""
        # One thread: the eigenvectors' last bits depend on how many there are.
        with threads(1):
            design = decompose(models.masks(), models.weights())
            lambdas = torch.tensor(self.lambdas, dtype=torch.float64)
            lambdas *= float(design.eigenvalues.mean())
            held_out = hold_out(design, models.held, lambdas)
        return RidgeFitter(models, design, held_out, lambdas.to(models.number))


@dataclass(frozen=True)
class RidgeFitter(Fitter):
    """Decomposed masks.

    Args:
        problem: the models.
        design: of all models.
        held_out: predicts the held-out ones.
        lambdas: candidates, [lambda].
    """

    design: Design
    held_out: HeldOut
    lambdas: Tensor

    @property
    def constants(self) -> Mapping[str, Numbers]:
        """What tells how sure the effects are."""
        return {
            "masks": self.design.masks.numpy(),
            "eigenvalues": self.design.eigenvalues.numpy(),
            "lambdas": self.lambdas.numpy(),
        }

    def work(self, path: str, top: int) -> "RidgeBlock":
        """Fits and writes one block."""
        return RidgeBlock(self, path, top)


@dataclass(frozen=True)
class RidgeBlock:
    """Fits and writes one block of targets.

    Args:
        fitter: the models.
        path: of the store.
        top: rows of either sign that are kept for each target.
    """

    fitter: RidgeFitter
    path: str
    top: int

    def __call__(self, block: int) -> None:
        """Computes on one thread, so that the bits do not depend on the machine's cores."""
        store = Store.open(self.path, "datamodel")
        with threads(1):
            self._write(store, block)

    def _write(self, store: Store, block: int) -> None:
        models, span = self.fitter.problem, store.spec.span(block)
        outputs = models.outputs(span)
        fitted = self._fitted(outputs, span)
        dual, own = fitted.pop("dual"), fitted["own"]
        slopes = models.slopes(span, outputs)
        del outputs
        longest = self.fitter.design.masks.square().sum(0).max().sqrt()
        # |m . d| <= |m| |d|; the own row's effect is no such product.
        bound = torch.maximum(longest * dual.norm(dim=0), own.abs())
        with store.writing(block) as writer:
            pieces = self._pieces(row_pieces(writer), dual, own, slopes, span)
            write_effects(writer, pieces, bound, self.top)
            append(writer, {name: part.numpy() for name, part in fitted.items()})
            append(writer, {"noise": models.noise(span), "slopes": slopes.numpy()})

    def _fitted(self, outputs: Tensor, span: slice) -> dict[str, Tensor]:
        step = max(1, COLUMNS // outputs.shape[2])
        dual = torch.empty(len(self.fitter.design.eigenvalues), *outputs.shape[1:]).to(outputs)
        found: list[dict[str, Tensor]] = []
        for start in range(0, outputs.shape[1], step):
            part = slice(start, min(start + step, outputs.shape[1]))
            places = slice(span.start + part.start, span.start + part.stop)
            small = self._fit(outputs[:, part].contiguous(), places)
            dual[:, part] = small.pop("dual")
            found.append(small)
        return {"dual": dual} | {
            name: torch.cat([small[name] for small in found]) for name in found[0]
        }

    def _fit(self, outputs: Tensor, span: slice) -> dict[str, Tensor]:
        design, held_out = self.fitter.design, self.fitter.held_out
        rotated, centre = design.centred(outputs)
        own = own_masks(design, torch.arange(span.start, span.stop))
        left = None if held_out.spanned else self._unreached(outputs, rotated, centre)
        chosen, outcome = best_outcome(held_out, rotated, own, left)
        outside = None if held_out.spanned else design.outside(outputs, rotated)
        fit = solve(design, rotated, self.fitter.lambdas[chosen], own, outside)
        judged = self.fitter.problem.judged(outcome.residuals, outcome.own, outputs, span)
        found = {"dual": fit.dual, "own": fit.own, "variance": fit.variance}
        return found | {"chosen": chosen, "cross_products": judged}

    def _unreached(self, outputs: Tensor, rotated: Tensor, centre: Tensor) -> Tensor:
        """Part of the held-out and the last model's centred outputs that no effects can reach."""
        held_out, held = self.fitter.held_out, self.fitter.problem.held
        asked = torch.cat([outputs[held], outputs[-1:]]) - centre
        reached = product(held_out.basis, rotated.flatten(1)).reshape(asked.shape)
        return held_out.roots[:, None, None] * asked - reached

    def _pieces(
        self, rows: Iterable[slice], dual: Tensor, own: Tensor, slopes: Tensor, span: slice
    ) -> Iterator[tuple[Tensor, Tensor]]:
        masks, places = self.fitter.design.masks, np.arange(span.start, span.stop)
        flat = dual.flatten(1)
        for part in rows:
            effects = product(masks[:, part].T, flat).reshape(-1, *own.shape)
            inside = np.flatnonzero((places >= part.start) & (places < part.stop))
            effects[places[inside] - part.start, inside] = own[inside]
            yield effects, (effects * slopes).sum(2)
