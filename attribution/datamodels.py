"""Linear datamodels: effects of all training rows on all targets, regressed from retrained models.

One more "model" with all rows, the mean of the full models weighted by their number, anchors
the sum of the effects: subsets of one fixed size leave it undetermined.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.ensemble import Ensemble
from attribution.linear_datamodel import LinearDatamodel
from attribution.ridge import Design, Fit, decompose, own_masks, solve
from attribution.seeds import generator
from attribution.task import Rows
from attribution.training import threads
from stores import (
    ArraySpec,
    Provenance,
    Store,
    StoreSpec,
    Where,
    in_turns,
    place,
    run_blocks,
    versions,
)

# Candidates for lambda, in units of the mean eigenvalue of the Gram matrix.
LAMBDAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
HELD_OUT = 0.2
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class _Settings:
    lambdas: tuple[float, ...]
    seed: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', got {self.dtype!r}")
        if not self.lambdas or min(self.lambdas) <= 0:
            raise ValueError(f"lambdas must all be above 0, got {self.lambdas}")

    @property
    def number(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32


@dataclass(frozen=True)
class _Problem:
    """All that fitting a block of targets needs."""

    ensemble: Store
    anchor: Any
    noise: Any
    fitted: Rows
    held: Rows
    trial: Design
    final: Design
    held_masks: Tensor
    judging: Tensor
    lambdas: Tensor
    path: str
    dtype: torch.dtype

    def __call__(self, block: int) -> None:
        with threads(1):
            self._fit(block)

    def _fit(self, block: int) -> None:
        store = Store.open(self.path, "datamodel")
        span = store.spec.span(block)
        outputs = torch.from_numpy(self.ensemble.array("outputs")[:, span]).to(self.dtype)
        anchor = torch.from_numpy(self.anchor[span]).to(self.dtype)
        places = torch.arange(span.start, span.stop)
        chosen, sums = self._choose(outputs, anchor, places)
        everything = torch.cat([outputs, anchor[None]])
        rotated, _ = self.final.centred(everything)
        own, outside = own_masks(self.final, places), self.final.outside(everything, rotated)
        fit = solve(self.final, rotated, self.lambdas[chosen], own, outside)
        effects = torch.tensordot(self.final.masks.T, fit.dual, 1)
        inside = places < effects.shape[0]
        effects[places[inside], torch.nonzero(inside).flatten()] = fit.own[inside]
        arrays = {
            "effects": effects,
            "own": fit.own,
            "chosen": chosen,
            "variance": fit.variance,
            "cross_products": sums,
            "noise": torch.from_numpy(self.noise[span]),
        }
        kinds = {name: np.dtype(store.spec.arrays[name].dtype) for name in arrays}
        store.write_block(block, {n: a.numpy().astype(kinds[n]) for n, a in arrays.items()})

    def _choose(self, outputs: Tensor, anchor: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Best lambda of each target on held-out models, and what the shrink factors need.

        Lambda is judged by deviations from the mean of all held-out models; the factors by the
        change from the full models to those held-out models that are like a deletion request.
        """
        rotated, centre = self.trial.centred(torch.cat([outputs[self.fitted], anchor[None]]))
        own = own_masks(self.trial, places)
        held = outputs[self.held]
        around = self._against(self.held_masks - self.trial.centre, places)
        removed = self._against(self.held_masks[self.judging] - 1, places)
        errors, moments = [], []
        for value in self.lambdas:
            fit = solve(self.trial, rotated, value.expand(len(places)), own)
            mine, other = around(fit)
            errors.append((held - centre - mine - other).square().sum((0, 2)))
            mine, other = removed(fit)
            truth = held[self.judging] - anchor
            pairs = [(mine, mine), (mine, other), (other, other), (mine, truth), (other, truth)]
            moments.append(torch.stack([(a * b).sum((0, 2)) for a, b in pairs], 1))
        chosen = torch.stack(errors).argmin(0)
        return chosen, torch.stack(moments)[chosen, torch.arange(len(places))]

    def _against(self, masks: Tensor, places: Tensor) -> Callable[[Fit], tuple[Tensor, Tensor]]:
        """Effects of the own row and of the other rows, each [model, target, output]."""
        inside = places < masks.shape[1]
        mine = torch.zeros(len(masks), len(places), dtype=self.dtype)
        mine[:, inside] = masks[:, places[inside]]
        across = masks @ self.trial.masks.T
        return lambda fit: (mine[:, :, None] * fit.own, torch.tensordot(across, fit.dual, 1))


def fit_datamodels(
    ensemble: Ensemble,
    *,
    anchor: Ensemble,
    to: Where,
    lambdas: Sequence[float] = LAMBDAS,
    seed: int = 0,
    dtype: str = "float32",
    workers: int | None = 0,
    scheduler: str | None = None,
) -> LinearDatamodel:
    """Fits linear datamodels for all targets and outputs and stores the effects of all rows.

    Lambda is chosen for each target on held-out models; so are the two factors by which a
    prediction shrinks, one for the effect of a target's own row and one for other rows.

    Args:
        ensemble: models trained on subsets.
        anchor: models trained on all rows.
        to: folder of the store.
        lambdas: candidates, in units of the mean eigenvalue of the Gram matrix.
        seed: of the held-out split.
        dtype: float32 or float64, of the arithmetic and of the stored effects.
        workers: processes, one thread each; 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The datamodel.

    Raises:
        ValueError: the ensemble's models all saw the same rows, the anchor's did not see all,
            they belong to different data, or the store was made from something else.

    Example:
        >>> import tempfile
        >>> from attribution import draw_subsets, train_models
        >>> from examples.digits import task
        >>> half = draw_subsets(task, models=20, design="half")
        >>> full = draw_subsets(task, models=4, design="full")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bank = train_models(task, half, to=f"{folder}/half", workers=0)
        ...     anchor = train_models(task, full, to=f"{folder}/full", workers=0)
        ...     datamodel = fit_datamodels(bank, anchor=anchor, to=f"{folder}/datamodel")
        ...     datamodel.store.spec.arrays["effects"].shape
        (1437, 1797, 10)

    Source: datamodels (arXiv 2202.00622) with ridge for the lasso; the anchor, the unpenalised own
        row and the shrink factors are ours.
    """
    _check_ensembles(ensemble, anchor)
    chosen = _Settings(tuple(lambdas), seed, dtype)
    # The decomposition is costly, and an existing store holds what it needs of it.
    final = None if place(to).taken() else _final_design(ensemble, anchor, chosen.number)
    store = _datamodel_store(ensemble, anchor, to, final, chosen)
    if store.pending():
        final = final or _final_design(ensemble, anchor, chosen.number)
        work = in_turns(_problem(ensemble, anchor, store, final, chosen), store)
        title = f"fitting {os.path.basename(store.path)}"
        at = None if scheduler else workers
        run_blocks(work, store.pending(), title=title, workers=at, scheduler=scheduler)
    return LinearDatamodel.open(store.finalize().path)


def _check_ensembles(ensemble: Ensemble, anchor: Ensemble) -> None:
    if (ensemble.masks == ensemble.masks[0]).all():
        raise ValueError(
            f"all models of {ensemble.store.path} saw the same rows: datamodels need models trained"
            " on different subsets (draw_subsets with design half, bernoulli, clusters or mixed)"
        )
    if not anchor.masks.all():
        raise ValueError(f"the anchor {anchor.store.path} must hold models trained on all rows")
    if len(anchor) < 2:
        raise ValueError(
            f"the anchor {anchor.store.path} holds 1 model: the spread of one retraining needs 2"
        )
    for axis in ("train", "target"):
        if ensemble.store.ids(axis) != anchor.store.ids(axis):
            raise ValueError(f"ensemble and anchor were made from different {axis} rows")


def _datamodel_store(
    ensemble: Ensemble,
    anchor: Ensemble,
    to: Where,
    design: Design | None,
    chosen: _Settings,
) -> Store:
    targets, outputs = ensemble.outputs.shape[1:]
    n = ensemble.masks.shape[1]
    per_target = n * outputs * np.dtype(chosen.dtype).itemsize
    block = -(-targets // max(1, -(-targets * per_target // BLOCK_BYTES)))
    each = ("target", "output")
    arrays = {
        "effects": ArraySpec(("train", *each), (n, targets, outputs), chosen.dtype),
        "own": ArraySpec(each, (targets, outputs), chosen.dtype),
        "variance": ArraySpec(each, (targets, outputs), chosen.dtype),
        "noise": ArraySpec(each, (targets, outputs), chosen.dtype),
        "cross_products": ArraySpec(("target", None), (targets, 5), chosen.dtype),
        "chosen": ArraySpec(("target",), (targets,), "int64"),
    }
    settings = {
        "ensemble": dict(ensemble.store.provenance.settings),
        "anchor": dict(anchor.store.provenance.settings),
        "lambdas": list(chosen.lambdas),
        "seed": chosen.seed,
        "dtype": chosen.dtype,
    }
    return Store.open_or_create(
        to,
        StoreSpec("datamodel", "target", block, arrays),
        Provenance(settings, {"versions": versions("torch", "numpy", "datamodel-matching")}),
        constants=_constants(design, chosen) if design else {},
        ids={"train": ensemble.task.train_ids, "target": ensemble.task.target_ids},
    )


def _constants(design: Design, chosen: _Settings) -> dict[str, Any]:
    return {
        "masks": design.masks.numpy(),
        "eigenvalues": design.eigenvalues.numpy(),
        "lambdas": np.array(chosen.lambdas) * float(design.eigenvalues.mean()),
    }


def _final_design(ensemble: Ensemble, anchor: Ensemble, dtype: torch.dtype) -> Design:
    masks = np.concatenate([ensemble.masks, np.ones_like(ensemble.masks[:1])])
    weights = np.append(np.ones(len(ensemble)), len(anchor))
    return _decomposed(torch.from_numpy(masks).to(dtype), torch.from_numpy(weights))


def _decomposed(masks: Tensor, weights: Tensor) -> Design:
    # One thread, so that the same models give the same bits on every machine of a kind.
    with threads(1):
        return decompose(masks, weights)


def _problem(
    ensemble: Ensemble, anchor: Ensemble, store: Store, final: Design, chosen: _Settings
) -> _Problem:
    # The same share of judges and of others, and never no judge.
    order = generator(chosen.seed, "held-out models").permutation(len(ensemble))
    kinds = (order[ensemble.judges[order]], order[~ensemble.judges[order]])
    held = np.sort(np.concatenate([kind[: math.ceil(HELD_OUT * len(kind))] for kind in kinds]))
    fitted = np.setdiff1d(np.arange(len(ensemble)), held)
    number = chosen.number
    masks = torch.from_numpy(ensemble.masks).to(number)
    everything = torch.ones(1, masks.shape[1], dtype=number)
    weights = torch.ones(len(fitted) + 1)
    weights[-1] = len(anchor)
    trial = _decomposed(torch.cat([masks[fitted], everything]), weights)
    return _Problem(
        ensemble=ensemble.store,
        anchor=anchor.outputs.mean(0),
        noise=anchor.outputs.std(0, ddof=1),
        fitted=fitted,
        held=held,
        trial=trial,
        final=final,
        held_masks=masks[held],
        judging=torch.from_numpy(np.flatnonzero(ensemble.judges[held])),
        lambdas=torch.from_numpy(store.constant("lambdas")).to(number),
        path=store.path,
        dtype=number,
    )
