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
# Predictions by which it is judged whether own rows are penalised, of held-out models on training
# rows, a few rows at a time.
JUDGED, FEWEST_ROWS, MOST_ROWS, ROWS = 2**15, 256, 4096, 32
COPIES = 8  # of all models' outputs of these targets that are in memory while they are fitted


@dataclass(frozen=True)
class Ridge(Regression):
    """Ridge regression: sum_j a_j (y_j - b - x_j w)^2 + lambda sum_i w_i^2 / s_i^2.

    With |g_i| the length of the loss's derivative with respect to the outputs of row i, mean over
    the models trained on all rows, the squared effect that is expected of a row is

        s_i^2 = alike + (1 - alike) |g_i| / mean_k |g_k|.

    A row whose loss no longer pulls can hardly have changed the model, one that pulls still may
    have. The effect of a target's own row is often far larger than expected of others: where few
    models tell it, it is better left free of the penalty.

    Args:
        lambdas: candidates, in units of the mean eigenvalue of the scaled masks' Gram matrix; that
            with the least error on held-out models is taken for each target.
        alike: share of the squared effect that is expected of all rows alike, in (0, 1]; 1 is plain
            ridge.
        free: whether the effect of a target's own row is not penalised; None: whichever predicts
            the held-out models that are like a deletion request better, for all targets alike.

    Example:
        >>> Ridge(lambdas=(0.1, 1.0)).settings()
        {'name': 'ridge', 'lambdas': [0.1, 1.0], 'alike': 0.4, 'free': None}
    """

    name: ClassVar = "ridge"
    sparse: ClassVar = False

    lambdas: tuple[float, ...] = LAMBDAS
    alike: float = 0.4
    free: bool | None = None

    def __post_init__(self) -> None:
        if not 0 < self.alike <= 1:
            raise ValueError(f"Ridge.alike must be above 0 and at most 1, got {self.alike}")
        if self.free not in (None, False, True):
            raise ValueError(f"Ridge.free must be None, False or True, got {self.free!r}")
        if not self.lambdas or min(self.lambdas) <= 0:
            raise ValueError(f"lambdas must all be above 0, got {self.lambdas}")

    def settings(self) -> dict[str, Any]:
        """Its name and its fields."""
        told = {"lambdas": list(self.lambdas), "alike": self.alike, "free": self.free}
        return {"name": self.name} | told

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
        held_out = hold_out(design, models.held, lambdas)
        free = _free_is_nearer(models, design, held_out) if self.free is None else self.free
        found = {
            "basis": design.basis,
            "eigenvalues": design.eigenvalues,
            "lambdas": lambdas.to(models.number),
            "longest": (design.scales * torch.cat(lengths).sqrt()).max(),
            "maps": held_out.maps,
            "masks": design.masks,
            "scales": design.scales,
            "free": torch.tensor(free),
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
        held_out, free = self._held_out(store, design), bool(store.map_constant("free"))
        rotated, centre = design.centred(outputs)
        places = torch.arange(targets.start, targets.stop)
        own, scales = own_masks(design, places), _own_scales(design, places)
        left = _unreached(held_out, outputs, rotated, centre)
        chosen, outcome = best_outcome(held_out, rotated, own, left, free=free)
        outside = None if held_out.spanned else design.outside(outputs, rotated)
        lambdas = self.method.candidates(design).to(outputs.dtype)
        fit = solve(design, rotated, lambdas[chosen], own, outside, free=free)
        judged = self.problem.judged(outcome.residuals, scales * outcome.own, outputs, targets)
        own_effects = scales * fit.own
        # |m . d| <= |m| |d|; the effect of an own row that is free is no such product.
        longest = float(store.map_constant("longest"))
        bound = torch.maximum(longest * fit.dual.square().sum(0).sqrt(), own_effects.abs())
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


def _free_is_nearer(models: Problem, design: Design, held_out: HeldOut) -> bool:
    """Whether held-out judges are predicted better where own rows are not penalised."""
    count = design.masks.shape[1]
    some = min(MOST_ROWS, max(FEWEST_ROWS, JUDGED // len(models.judging)))
    errors = torch.zeros(2, dtype=torch.float64)
    for rows in torch.arange(0, count, -(-count // some)).split(ROWS):
        outputs = torch.cat([models.outputs(slice(int(r), int(r) + 1)) for r in rows], 1)
        rotated, centre = design.centred(outputs)
        own = own_masks(design, rows)
        left = _unreached(held_out, outputs, rotated, centre)
        for number, free in enumerate((False, True)):
            _, outcome = best_outcome(held_out, rotated, own, left, free=free)
            errors[number] += outcome.residuals[models.judging].square().sum()
    return bool(errors[1] < errors[0])


def _own_scales(design: Design, places: Tensor) -> Tensor:
    """Scale of each target's own row, [target, 1]; 1 for test targets."""
    found = torch.ones(len(places), 1, dtype=design.scales.dtype)
    inside = places < len(design.scales)
    found[inside, 0] = design.scales[places[inside]]
    return found


def _unreached(
    held_out: HeldOut, outputs: Tensor, rotated: Tensor, centre: Tensor
) -> Tensor | None:
    """Part of the asked models' centred outputs that effects cannot reach, weighted, if any."""
    if held_out.spanned:
        return None
    asked = outputs[held_out.asked] - centre
    ones = torch.ones(len(rotated), dtype=rotated.dtype)
    reached = held_out.rotated_back(ones, rotated.flatten(1)).reshape(asked.shape)
    return held_out.roots[:, None, None] * asked - reached
