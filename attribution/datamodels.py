"""Linear datamodels: effects of all rows on all targets, regressed from retrained models."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attribution.datamodel_blocks import DatamodelBlock
from attribution.effects import (
    arithmetic,
    check_dtype,
    effect_arrays,
    object_rows,
    stored_wide,
)
from attribution.ensemble import Ensemble
from attribution.lasso_datamodels import Lasso
from attribution.linear_datamodel import LinearDatamodel
from attribution.products import products_by
from attribution.regression import Numbers, Problem, Regression, Sizes, problem
from attribution.ridge_datamodels import Ridge
from attribution.training import threads
from stores import (
    ArraySpec,
    Provenance,
    Store,
    StoreSpec,
    Where,
    in_turns,
    name_blocks,
    place,
    run_blocks,
    score_block,
    taken_out,
    versions,
)

STEP_BYTES = 2**27  # of outputs and what is computed of them, for the targets fitted at once
KEPT_BYTES = 2**27  # of what their effects are made of; more lies in a temporary file
FEWEST_MODELS = 10  # that the datamodels of a run are fitted to

REGRESSIONS: dict[str, type[Regression]] = {method.name: method for method in (Ridge, Lasso)}


def fit_datamodels(
    ensemble: Ensemble,
    *,
    anchor: Ensemble,
    to: Where,
    method: Regression = Ridge(),  # noqa: B008 - frozen
    seed: int = 0,
    dtype: str = "float32",
    top: int = 20,
    workers: int | None = 0,
    scheduler: str | None = None,
) -> LinearDatamodel:
    """Fits linear datamodels for all targets and outputs and stores the effects of all rows.

    How much is penalised is chosen for each target on held-out models; so are the two factors by
    which a prediction shrinks, one for the effect of a target's own row and one for other rows.
    Interrupted at any moment, the same call computes the unfinished blocks only and ends with the
    same bits, whatever the workers. How many targets make a block follows from the layout
    (`score_block`), not from memory: a block is fitted in steps, and what does not fit into memory
    lies in a temporary file meanwhile. The masks are decomposed once, in this process, which then
    holds them three times and four of their Gram matrices; whoever computes a block maps the
    decomposition from the store, and takes no more than 256 MiB for outputs and effects, and the
    effects of as many rows as a storage object holds.

    Args:
        ensemble: models trained on subsets.
        anchor: models trained on all rows.
        to: folder of the store.
        method: `Ridge`, or `Lasso` for sparse effects.
        seed: of the held-out split.
        dtype: float16 (with a scale for each target and output), float32 or float64, of the stored
            effects; the arithmetic is in float32 or wider.
        top: rows of either sign that are kept for each target beside its effects.
        workers: processes, one thread each; 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The datamodel.

    Raises:
        ValueError: the ensemble's models all saw the same rows, the anchor's did not see all,
            they belong to different data, or the store was made from something else, or lost rows
            before it was whole.

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

    Source: datamodels (arXiv 2202.00622), which takes the lasso; ridge, the anchor, how large the
        effect of each row is expected to be and the shrink factors are ours.
    """
    _check_ensembles(ensemble, anchor)
    check_dtype(dtype)
    if top < 1:
        raise ValueError(f"top must be 1 or more, got {top}")
    models = problem(ensemble, anchor, seed, arithmetic(dtype))
    sizes = Sizes(len(ensemble), *_lengths(ensemble))
    # One more than asked for, as the own row may lose its rank when the factors are applied.
    kept = min(top + 1, sizes.train)
    store = _datamodel_store(
        ensemble,
        anchor,
        to,
        _layout(sizes, method, dtype, kept, _cut(sizes, dtype, to)),
        # What is done once is costly, and an existing store has it.
        {} if place(to).taken() else _constants(method, models),
        _settings(method, seed, dtype),
    )
    if pending := store.pending():
        _refuse_purged(store, pending)
        step = method.step(sizes, models.number, STEP_BYTES)
        fit = DatamodelBlock(method.solver(models), store.path, step, KEPT_BYTES, kept)
        title = f"fitting {os.path.basename(store.path)}"
        at = None if scheduler else workers
        work = in_turns(fit, store)
        run_blocks(work, pending, title=title, workers=at, scheduler=scheduler)
    return LinearDatamodel.open(store.finalize().path)


def _refuse_purged(store: Store, pending: Sequence[int]) -> None:
    # All blocks are fitted on the same rows, and what the fit needs of the purged ones is gone.
    if taken_out(store.path) is not None:
        raise ValueError(
            f"{name_blocks(pending)} of {store.path} cannot be fitted alone, as rows were purged"
            " since the others were: remove the store, and fit all of it anew from what is left"
        )


def _constants(method: Regression, models: Problem) -> Mapping[str, Numbers]:
    # One thread: the eigenvectors' last bits depend on how many there are.
    with threads(1):
        return method.constants(models)


def _lengths(ensemble: Ensemble) -> tuple[int, int, int]:
    targets, outputs = ensemble.store.spec.array("outputs").shape[1:]
    return len(ensemble.task.train_ids), targets, outputs


def _check_ensembles(ensemble: Ensemble, anchor: Ensemble) -> None:
    if all(np.array_equal(mask, ensemble.masks[0]) for mask in ensemble.masks):
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


def _cut(sizes: Sizes, dtype: str, to: Where) -> int:
    """Targets of a block; a store that an older version cut otherwise stays as it is."""
    if place(to).taken():
        return Store.open(to, "datamodel").spec.block
    return score_block(sizes.targets, sizes.outputs, dtype)


def _layout(sizes: Sizes, method: Regression, dtype: str, top: int, block: int) -> StoreSpec:
    each = ArraySpec(("target", "output"), (sizes.targets, sizes.outputs), stored_wide(dtype))
    shape = sizes.train, sizes.targets, sizes.outputs
    rows = object_rows(sizes.train, block * sizes.outputs, dtype)
    arrays = effect_arrays(*shape, dtype, top=top, rows=rows, sparse=method.sparse)
    arrays |= dict.fromkeys(("own", "variance", "noise", "slopes"), each)
    pairs = ArraySpec(("target", None), (sizes.targets, 5), each.dtype)
    arrays |= {"cross_products": pairs} | method.arrays(sizes, each.dtype)
    return StoreSpec("datamodel", "target", block, arrays)


def _settings(method: Regression, seed: int, dtype: str) -> dict[str, Any]:
    return {"method": method.settings(), "seed": seed, "dtype": dtype}


def _datamodel_store(  # noqa: PLR0917 - what a store is made of
    ensemble: Ensemble,
    anchor: Ensemble,
    to: Where,
    spec: StoreSpec,
    constants: Mapping[str, Numbers],
    settings: dict[str, Any],
) -> Store:
    models = {
        "ensemble": dict(ensemble.store.provenance.settings),
        "anchor": dict(anchor.store.provenance.settings),
    }
    recorded = {
        "versions": versions("torch", "numpy", "datamodel-matching"),
        "products": products_by(),
    }
    return Store.open_or_create(
        to,
        spec,
        Provenance(models | settings, recorded),
        constants=constants,
        ids={"train": ensemble.task.train_ids, "target": ensemble.task.target_ids},
    )
