"""Linear datamodels: effects of all rows on all targets, regressed from retrained models."""

import os
from typing import Any

from attribution.effects import (
    arithmetic,
    block_targets,
    check_dtype,
    effect_arrays,
    object_rows,
    stored_wide,
)
from attribution.ensemble import Ensemble
from attribution.lasso_datamodels import Lasso
from attribution.linear_datamodel import LinearDatamodel
from attribution.products import products_by
from attribution.regression import Fitter, Regression, Sizes, problem
from attribution.ridge_datamodels import Ridge
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

BLOCK_BYTES = 2**28  # of the outputs and effects that are in memory for the targets of one block

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
    same bits, whatever the workers. A process holds the masks of all models, and no more than
    256 MiB of outputs and effects.

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

    Source: datamodels (arXiv 2202.00622), which takes the lasso; ridge, the anchor, the unpenalised
        own row and the shrink factors are ours.
    """
    _check_ensembles(ensemble, anchor)
    check_dtype(dtype)
    if top < 1:
        raise ValueError(f"top must be 1 or more, got {top}")
    models = problem(ensemble, anchor, seed, arithmetic(dtype))
    sizes = Sizes(len(ensemble), *_lengths(ensemble))
    # One more than asked for, as the own row may lose its rank when the factors are applied.
    kept = min(top + 1, sizes.train)
    spec = _layout(sizes, method, dtype, kept)
    # What is done once is costly, and an existing store holds what it needs of it.
    fitter = None if place(to).taken() else method.prepared(models)
    store = _datamodel_store(ensemble, anchor, to, spec, fitter, _settings(method, seed, dtype))
    if store.pending():
        work = in_turns((fitter or method.prepared(models)).work(store.path, kept), store)
        title = f"fitting {os.path.basename(store.path)}"
        at = None if scheduler else workers
        run_blocks(work, store.pending(), title=title, workers=at, scheduler=scheduler)
    return LinearDatamodel.open(store.finalize().path)


def _lengths(ensemble: Ensemble) -> tuple[int, int, int]:
    targets, outputs = ensemble.store.spec.array("outputs").shape[1:]
    return len(ensemble.task.train_ids), targets, outputs


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


def _layout(sizes: Sizes, method: Regression, dtype: str, top: int) -> StoreSpec:
    column = method.column_bytes(sizes, arithmetic(dtype))
    block = block_targets(sizes.targets, sizes.outputs, dtype, column, BLOCK_BYTES)
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
    fitter: Fitter | None,
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
        constants=fitter.constants if fitter else {},
        ids={"train": ensemble.task.train_ids, "target": ensemble.task.target_ids},
    )
