"""Fits TRAK scores: one solve for each training row, then products with every target's features."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from attribution.effects import (
    check_dtype,
    effect_arrays,
    object_rows,
    stored_wide,
)
from attribution.gradients import Features, compute_curvatures
from attribution.newton.inverse import Damped
from attribution.products import products_by
from attribution.task import Rows, Task
from attribution.training import threads
from attribution.trak.curvature import (
    condition_number,
    gram_matrix,
    is_stored,
    natural_damping,
    warn_if_ill_conditioned,
)
from attribution.trak.pulls import output_pulls
from attribution.trak.score_blocks import ScoreBlock, margin_arrays, margins_differ
from attribution.trak.scores import KIND, TrakScores
from attribution.trak.tally import Tally
from stores import (
    ArraySpec,
    Place,
    Provenance,
    Store,
    StoreSpec,
    Where,
    in_turns,
    name_blocks,
    place,
    run_blocks,
    score_block,
    versions,
)

ROWS_KIND = "trak-rows"
BLOCK_BYTES = 2**27  # of the targets' features in memory
ROWS_BYTES = 2**24  # of the features of one block of rows

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Settings:
    damping: float
    weighting: bool
    dtype: str
    top: int

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if not (math.isfinite(self.damping) and self.damping > 0):
            raise ValueError(f"damping must be above 0 and finite, got {self.damping}")
        if self.top < 1:
            raise ValueError(f"top must be 1 or more, got {self.top}")


def fit_trak(
    features: Features,
    to: Where,
    *,
    damping: float | None = None,
    weighting: bool = True,
    dtype: str = "float32",
    top: int = 20,
    workers: int | None = 0,
    scheduler: str | None = None,
) -> TrakScores:
    """Computes and stores the effect of including each training row on every output and margin.

    With J_i [output, k] the features of row i, g_i and R_i the first and second derivatives of
    its loss with respect to the outputs, and H = sum_i J_i^T R_i J_i over the n training rows, the
    effect on the outputs of target x is, mean over the checkpoints,

        score(i, x) = -J(x) (H + lambda I)^-1 J_i^T g_i,

    and on its margin the margin's derivative at the checkpoint's outputs times that. Where the loss
    l is a function of the margin m, as cross-entropy is, g_i is dl/dm times dm/dz, and dl/dm is
    averaged over the checkpoints apart, before the rest is. Scores are in the unit of the outputs.

    Interrupted at any moment, the same call computes the unfinished blocks only and ends with the
    same bits, whatever the workers. How many targets make a block follows from the layout
    (`score_block`), not from memory: a process holds 128 MiB of their features at most, the rest in
    a temporary file, and scores of as many rows as a storage object holds.

    Args:
        features: projected gradients of the checkpoints.
        to: folder for the scores and for what they are made from.
        damping: lambda, in the unit of a sum of losses; None: n x the recipe's weight decay.
        weighting: False leaves R out, H = sum_i phi_i phi_i^T of the margins' gradients, as the
            `trak` package does; lambda then has another unit and must be given.
        dtype: float16 (with a scale for each target and output), float32 or float64, of the stored
            scores; products are in float32 or wider, and the system is solved in float64.
        top: rows of either sign that are kept for each target beside its scores.
        workers: processes, one thread each; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The scores.

    Raises:
        ValueError: a bad setting, no damping is known, it is too small for the curvature to be
            inverted, or the folder's scores were made from something else.

    Example:
        >>> import tempfile
        >>> from attribution import Model
        >>> from attribution.gradients import Projection, featurize
        >>> from examples.digits import mlp, task
        >>> models, small = [Model(task, mlp().state_dict())], Projection(inputs=4, outputs=2)
        >>> folder = tempfile.mkdtemp()
        >>> features = featurize(task, models, f"{folder}/features", projection=small)
        >>> scores = fit_trak(features, f"{folder}/trak")
        >>> scores.effects(0).shape, scores.margins(0).shape
        ((1437, 10), (1437,))

    Source: TRAK (arXiv 2303.14186), section 3.2 and equation 14; for several outputs at once, with
        the curvature's weights and the damping that make it a Newton step.
    """
    train = len(features.task.train_ids)
    chosen = _Settings(
        _damping(features.task, weighting) if damping is None else float(damping),
        weighting,
        dtype,
        min(top, train),
    )
    store = _score_store(features, place(to) / "scores", chosen)
    if store.pending():
        at = None if scheduler else workers
        run = partial(run_blocks, workers=at, scheduler=scheduler)
        paths = [place(to) / f"rows-{checkpoint}" for checkpoint in range(len(features))]
        new = [checkpoint for checkpoint, path in enumerate(paths) if not path.taken()]
        if is_stored(weighting=weighting, dtype=stored_wide(dtype)):
            compute_curvatures(features, [1.0], new, workers=at, scheduler=scheduler)
        rows = tuple(
            _solved_rows(features, checkpoint, path, chosen, run)
            for checkpoint, path in enumerate(paths)
        )
        work = ScoreBlock(features, rows, store.path, BLOCK_BYTES, chosen.top)
        run(in_turns(work, store), store.pending(), title=f"TRAK scores of {features.task.name}")
    return TrakScores(store.finalize())


def resume_trak(features: Features, to: Where) -> TrakScores:
    """Opens scores from which rows were purged, and computes what is pending from what is left.

    The rows that were solved before are still there, and with them each block gets the scores that
    it had; the curvature with the purged rows is not.

    Args:
        features: projected gradients of the checkpoints, at least those of the scores.
        to: folder of the scores and of what they are made from.

    Returns:
        The scores.

    Raises:
        ValueError: solved rows are pending, too: the scores have to be made anew.

    Example:
        >>> import tempfile
        >>> from attribution import Model
        >>> from attribution.gradients import Projection, featurize
        >>> from examples.digits import mlp, task
        >>> models, small = [Model(task, mlp().state_dict())], Projection(inputs=4, outputs=2)
        >>> folder = tempfile.mkdtemp()
        >>> features = featurize(task, models, f"{folder}/features", projection=small)
        >>> scores = fit_trak(features, f"{folder}/trak")
        >>> resume_trak(features, f"{folder}/trak").store.pending()
        []
    """
    store = Store.open(place(to) / "scores", KIND)
    if store.pending():
        few = features.first(TrakScores(store).checkpoints)
        rows = tuple(Store.open(place(to) / f"rows-{c}", ROWS_KIND) for c in range(len(few)))
        if any(solved.pending() for solved in rows):
            raise ValueError(
                f"{name_blocks(store.pending())} of {store.path} cannot be computed again, as rows"
                f" were purged: remove {to}, and the scores are made anew from the features"
            )
        top = store.spec.array("top_rows").shape[2]
        work = ScoreBlock(few, rows, store.path, BLOCK_BYTES, top)
        title = f"TRAK scores of {features.task.name}"
        run_blocks(in_turns(work, store), store.pending(), title=title, workers=0)
    return TrakScores(store.finalize())


def _damping(task: Task, weighting: bool) -> float:
    if not weighting:
        raise ValueError("without weighting lambda has no natural size: give fit_trak a damping")
    return natural_damping(task)


def _provenance(features: Features, chosen: _Settings, checkpoint: int | None = None) -> Provenance:
    settings: dict[str, Any] = {} if checkpoint is None else {"checkpoint": checkpoint}
    settings |= {
        "features": [dict(store.provenance.settings) for store in features.stores],
        "damping": chosen.damping,
        "weighting": chosen.weighting,
        "averaged": "apart",
        "objective": features.task.objective,
        "dtype": chosen.dtype,
    }
    recorded = {
        "versions": versions("torch", "numpy", "datamodel-matching"),
        "products": products_by(),
    }
    return Provenance(settings, recorded)


# -- training rows: (H + lambda I)^-1 J_i^T g_i ------------------------------------------------


def _solved_rows(
    features: Features, checkpoint: int, path: Place, chosen: _Settings, run: Callable[..., None]
) -> Store:
    train, width = len(features.task.train_ids), features.width
    outputs = features.stores[checkpoint].spec.array("features").shape[1]
    block = min(train, max(1, ROWS_BYTES // (outputs * width * 4)))
    array = ArraySpec(("train", "feature"), (train, width), stored_wide(chosen.dtype), width)
    store = Store.open_or_create(
        path,
        StoreSpec(ROWS_KIND, "train", block, {"rows": array}),
        _provenance(features, chosen, checkpoint),
        # It is costly, and an existing store holds it.
        constants={} if path.taken() else {"factor": _factor(features, checkpoint, chosen)},
    )
    work = _RowsBlock(features, checkpoint, store.path)
    run(in_turns(work, store), store.pending(), title=f"rows of checkpoint {checkpoint}")
    return store.finalize()


def _factor(features: Features, checkpoint: int, chosen: _Settings) -> Numbers:
    wide = stored_wide(chosen.dtype)
    # One thread, so that the same features give the same bits on every machine of a kind.
    with threads(1):
        gram = gram_matrix(features, checkpoint, weighting=chosen.weighting, dtype=wide)
        lower = Damped(torch.from_numpy(gram), chosen.damping).lower
        condition = condition_number(lower)
    warn_if_ill_conditioned(condition, chosen.damping, wide, checkpoint)
    return lower.numpy()


@dataclass(frozen=True)
class _RowsBlock:
    features: Features
    checkpoint: int
    path: str

    def __call__(self, block: int) -> None:
        store = Store.open(self.path, ROWS_KIND)
        span = store.spec.span(block)
        with threads(1):
            rows = self._solved(np.arange(span.start, span.stop), store.constant("factor"))
        store.write_block(block, {"rows": rows.astype(store.spec.array("rows").dtype)})

    def _solved(self, rows: Rows, factor: Numbers) -> Numbers:
        j = torch.from_numpy(self.features.gather(self.checkpoint, rows)).double()
        pull = torch.einsum("ro,rok->kr", output_pulls(self.features, self.checkpoint, rows), j)
        return torch.cholesky_solve(pull, torch.from_numpy(factor)).T.numpy()


# -- targets: products with their features -----------------------------------------------------


def _score_store(features: Features, path: Place, chosen: _Settings) -> Store:
    train = len(features.task.train_ids)
    targets, outputs = features.stores[0].spec.array("outputs").shape
    wide = stored_wide(chosen.dtype)
    # A store that an older version cut otherwise stays as it is.
    known = Store.open(path, KIND).spec.block if path.taken() else None
    block = known or score_block(targets, outputs, chosen.dtype)
    each = ArraySpec(("target", "output"), (targets, outputs), wide)
    rows = object_rows(train, block * outputs, chosen.dtype)
    sizes = train, targets, outputs
    arrays = effect_arrays(*sizes, chosen.dtype, top=chosen.top, rows=rows)
    arrays |= dict.fromkeys(("own", *Tally.VARIANCES, "outputs", "noise"), each)
    if margins_differ(features):
        arrays |= margin_arrays(train, targets, chosen.dtype, rows)
    else:
        arrays["slopes"] = each
    return Store.open_or_create(
        path,
        StoreSpec(KIND, "target", block, arrays),
        _provenance(features, chosen),
        ids={"train": features.task.train_ids, "target": features.task.target_ids},
    )
