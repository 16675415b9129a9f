"""Ridge datamodels: one decomposition of the masks, lambda for each target by held-out models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attribution.dense import product
from attribution.held_out import HeldOut, best_outcome, hold_out
from attribution.regression import Fitted, Numbers, Problem, Regression, Sizes, Solver
from attribution.ridge import PIECE, Design, decompose, own_masks, solve
from attribution.scratch import Columns
from stores import ArraySpec, Store

# Candidates for lambda, in units of the mean eigenvalue of the Gram matrix.
LAMBDAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
COLUMNS = 2048  # outputs of targets that are fitted at once, where memory allows
COPIES = 8  # of all models' outputs of these targets that are in memory while they are fitted


@dataclass(frozen=True)
class Ridge(Regression):
    """Ridge regression: sum_j a_j (y_j - b - x_j w)^2 + lambda sum_i w_i^2 / s_i^2.

    With |g_i| the length of the loss's derivative with respect to the outputs of row i, mean over
    the models trained on all rows, the squared effect that is expected of a row is

        s_i^2 = alike + (1 - alike) |g_i| / mean_k |g_k|.

    A row that is at rest after training can hardly have moved it, one that pulls still may have.

    Args:
        lambdas: candidates, in units of the mean eigenvalue of the scaled masks' Gram matrix; that
            with the least error on held-out models is taken for each target.
        alike: share of the squared effect that is expected of all rows alike, in (0, 1]; 1 is plain
            ridge.

    Example:
        >>> Ridge(lambdas=(0.1, 1.0)).settings()
        {'name': 'ridge', 'lambdas': [0.1, 1.0], 'alike': 0.4}
    """

    name: ClassVar = "ridge"
    sparse: ClassVar = False

    lambdas: tuple[float, ...] = LAMBDAS
    alike: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.alike <= 1:
            raise ValueError(f"Ridge.alike must be above 0 and at most 1, got {self.alike}")
        if not self.lambdas or min(self.lambdas) <= 0:
            raise ValueError(f"lambdas must all be above 0, got {self.lambdas}")

    def settings(self) -> dict[str, Any]:
        """Its name, the candidates and the share."""
        return {"name": self.name, "lambdas": list(self.lambdas), "alike": self.alike}

    def arrays(self, sizes: Sizes, wide: str) -> dict[str, ArraySpec]:
        """The number of each target's lambda."""
        return {"chosen": ArraySpec(("target",), (sizes.targets,), "int64")}

    def step(self, sizes: Sizes, number: torch.dtype, most: int) -> int:
        """As many as a processor's cache likes, or fewer where there are many models."""
        column = COPIES * (sizes.models + 1) * number.itemsize
        return max(1, min(COLUMNS, most // column) // sizes.outputs)

    def constants(self, models: Problem) -> Mapping[str, Numbers]:
        """Decomposes the masks; this also tells how sure the effects are."""
        design = decompose(
            models.masks(), models.weights(), expected_scales(models.pulls(), self.alike)
        )
        lambdas = self.candidates(design)
        lengths = [part.square().sum(0) for part in design.masks.split(PIECE, 1)]
        found = {
            "basis": design.basis,
            "eigenvalues": design.eigenvalues,
            "lambdas": lambdas.to(models.number),
            "longest": (design.scales * torch.cat(lengths).sqrt()).max(),
            "maps": hold_out(design, models.held, lambdas).maps,
            "masks": design.masks,
            "scales": design.scales,
        }
        return {name: value.numpy() for name, value in found.items()}

    def candidates(self, design: Design) -> Tensor:
        """The lambdas, [lambda], float64."""
        lambdas = torch.tensor(self.lambdas, dtype=torch.float64)
        return lambdas * float(design.eigenvalues.mean())

    def solver(self, models: Problem) -> "RidgeSolver":
        """What fits blocks of a store that has those constants."""
        return RidgeSolver(models, self)


def expected_scales(pulls: Tensor, alike: float) -> Tensor:
    """Scales s of the rows' effects; where no row pulls all are 1.

    Args:
        pulls: |g| of each row, up to a factor of all, [train].
        alike: see `Ridge`.

    Returns:
        s, [train].

    Example:
        >>> expected_scales(torch.tensor([0.0, 2.0]), alike=0.5).square()
        tensor([0.5000, 1.5000])
    """
    shares = pulls / pulls.mean() if pulls.any() else torch.ones_like(pulls)
    return (alike + (1 - alike) * shares).sqrt()


@dataclass(frozen=True)
class RidgeSolver(Solver):
    """Ridge in the eigenbasis of the masks; what is kept of a target are dual coefficients.

    Args:
        problem: the models.
        method: its settings.
    """

    method: Ridge

    def inner(self, store: Store) -> int:
        """Rank of the masks."""
        return len(store.map_constant("eigenvalues"))

    def fit(self, store: Store, outputs: Tensor, noise: Numbers, targets: slice) -> Fitted:
        """Takes the lambda that predicts the held-out models best, and fits all models."""
        design = self._design(store)
        held_out = self._held_out(store, design)
        rotated, centre = design.centred(outputs)
        own = own_masks(design, torch.arange(targets.start, targets.stop))
        left = None if held_out.spanned else self._unreached(held_out, outputs, rotated, centre)
        chosen, outcome = best_outcome(held_out, rotated, own, left)
        outside = None if held_out.spanned else design.outside(outputs, rotated)
        lambdas = self.method.candidates(design).to(outputs.dtype)
        fit = solve(design, rotated, lambdas[chosen], outside)
        judged = self.problem.judged(outcome.residuals, outcome.own, outputs, targets)
        # |m . d| <= |m| |d|
        bound = float(store.map_constant("longest")) * fit.dual.square().sum(0).sqrt()
        own_effects = (own[:, :, None] * fit.dual).sum(0)
        found = {"own": own_effects, "variance": fit.variance, "chosen": chosen}
        return Fitted(fit.dual, bound, found | {"cross_products": judged})

    def effects(self, store: Store, kept: Columns, rows: slice) -> Tensor:
        """Products of the rows' masks with the dual coefficients."""
        masks, scales = (torch.from_numpy(store.map_constant(name)) for name in ("masks", "scales"))
        masks = masks[:, rows] * scales[rows]
        return kept.through(
            lambda dual: product(masks.T, dual.flatten(1)).reshape(-1, *dual.shape[1:])
        )

    def _design(self, store: Store) -> Design:
        basis, eigenvalues, masks, scales = (
            torch.from_numpy(store.map_constant(name))
            for name in ("basis", "eigenvalues", "masks", "scales")
        )
        roots = self.problem.weights().double().sqrt().to(self.problem.number)
        return Design(basis, eigenvalues, masks, roots, scales)

    def _held_out(self, store: Store, design: Design) -> HeldOut:
        maps = torch.from_numpy(store.map_constant("maps"))
        return hold_out(design, self.problem.held, self.method.candidates(design), maps)

    def _unreached(
        self, held_out: HeldOut, outputs: Tensor, rotated: Tensor, centre: Tensor
    ) -> Tensor:
        """Part of the held-out and the last model's centred outputs that no effects can reach."""
        asked = outputs[held_out.asked] - centre
        ones = torch.ones(len(rotated), dtype=rotated.dtype)
        reached = held_out.rotated_back(ones, rotated.flatten(1)).reshape(asked.shape)
        return held_out.roots[:, None, None] * asked - reached
