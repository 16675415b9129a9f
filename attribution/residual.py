"""What group Newton lacks: outputs of retrained models less what it predicts of them.

A linear datamodel fitted to them has group Newton's prediction as its prior mean, and fewer
models are enough: the prior has told the larger part of the change already.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from attribution.cases import KINDS
from attribution.ensemble import Ensemble
from attribution.forget import ForgetSet, Mask
from attribution.gradients import compute_curvatures
from attribution.newton import GroupNewton
from attribution.outputs import Array
from attribution.seeds import generator
from attribution.task import Rows
from attribution.training import threads
from stores import (
    ArraySpec,
    Place,
    Provenance,
    Store,
    StoreSpec,
    Where,
    digest,
    gather,
    in_turns,
    place,
    run_blocks,
    versions,
)

LARGEST = 0.25  # of the training rows: what a model may lack to be like a deletion request
CHECKPOINTS, STEPS = 2, 1  # of the prior: a thousand large sets are predicted, roughly
MODELS_TOGETHER = 5


def models_like_requests(ensemble: Ensemble, models: int, seed: int = 0) -> Rows:
    """Some models that lack no more rows than a deletion request may ask for.

    Half-size subsets are left out: what a prediction for small sets says of them is useless.

    Args:
        ensemble: models trained on subsets.
        models: how many at most.
        seed: of the choice.

    Returns:
        Their numbers, ascending; none where all models lack more than a quarter of the rows.

    Example:
        >>> import tempfile
        >>> from attribution import draw_subsets, train_models
        >>> from examples.digits import task
        >>> mixed = draw_subsets(task, models=8, design="mixed")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     models_like_requests(train_models(task, mixed, folder + "/a", workers=0), 3).shape
        (3,)
    """
    lacking = np.array([(~mask).mean() for mask in ensemble.masks])
    fitting = np.flatnonzero((lacking > 0) & (lacking <= LARGEST))
    return np.sort(generator(seed, "residual models").permutation(fitting)[:models])


def residual_models(
    ensemble: Ensemble,
    newton: GroupNewton,
    to: Where,
    *,
    anchor: Ensemble,
    models: Sequence[int] | Rows,
    workers: int | None = 0,
    scheduler: str | None = None,
) -> Ensemble:
    """Some models of an ensemble, their outputs less what group Newton predicts of them.

    With y_j the outputs of model j, S_j the rows it lacks and p the plain first Newton step of
    two checkpoints, the outputs kept are y_j - s p(S_j), where the factors s, one for each kind of
    row, are least squares of y_j - mean(full models) on p(S_j). `fit_datamodels` of them gives the
    effects that group Newton lacks. Interrupted, the same call resumes.

    Args:
        ensemble: models trained on subsets.
        newton: gives features, damping and temperature.
        to: folder for the predictions and the models.
        anchor: models trained on all rows.
        models: numbers of the models, ascending; see `models_like_requests`.
        workers: processes; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The models, as an ensemble without weights.

    Raises:
        ValueError: models of other rows than group Newton's, one that lacks no row, or a folder
            that holds what was made from something else.
        BlocksFailed: blocks failed repeatedly; what was finished is kept.

    Source: ours; a linear datamodel (arXiv 2202.00622) around a prior mean.
    """
    newton.check_task(ensemble.task)
    numbers = np.asarray(models)
    masks = ensemble.masks[numbers]
    if not len(numbers) or masks.all(1).any():
        raise ValueError(
            "a residual needs models that each lack some rows: choose them with"
            " models_like_requests"
        )
    few = min(CHECKPOINTS, newton.features.trainings)
    plain = replace(_uncalibrated(newton), features=newton.features.first(few), steps=STEPS)
    where: dict[str, Any] = {"workers": None if scheduler else workers, "scheduler": scheduler}
    settings: dict[str, Any] = {
        "ensemble": dict(ensemble.store.provenance.settings),
        "anchor": dict(anchor.store.provenance.settings),
        "models": digest(numbers.astype("<i8")),
        "features": [dict(store.provenance.settings) for store in plain.features.stores],
        "damping": plain.damping,
        "temperature": plain.temperature,
    }
    compute_curvatures(plain.features, [plain.temperature or 1.0], **where)
    prior = _prior(plain, masks, place(to) / "prior", settings, where)
    return _written(ensemble, numbers, _Residual(ensemble, anchor, numbers, prior), to, settings)


def _uncalibrated(newton: GroupNewton) -> GroupNewton:
    told = newton.calibration
    if told is None:
        return newton
    damping, temperature = newton.damping or told.damping, newton.temperature or told.temperature
    return replace(newton, damping=damping, temperature=temperature, calibration=None)


def _prior(
    newton: GroupNewton, masks: Mask, to: Place, settings: dict[str, Any], where: dict[str, Any]
) -> Store:
    targets = len(newton.task.target_ids)
    shape = (len(masks), targets, newton.features.outputs(0, np.array([0])).shape[1])
    arrays = {"change": ArraySpec(("model", "target", "output"), shape, "float32")}
    store = Store.open_or_create(
        to,
        StoreSpec("residual-prior", "model", min(MODELS_TOGETHER, len(masks)), arrays),
        Provenance(settings),
        constants={"mask": masks},
    )
    if store.pending():
        work = _PriorBlock(newton, store.path)
        run_blocks(
            in_turns(work, store),
            store.pending(),
            title="predictions of retrained models",
            **where,
        )
    return store.finalize()


@dataclass(frozen=True)
class _PriorBlock:
    newton: GroupNewton = field(repr=False)
    path: str

    def __call__(self, block: int) -> None:
        store = Store.open(self.path)
        lacking = ~store.map_constant("mask")[store.spec.span(block)]
        sets = [ForgetSet.at(self.newton.task, np.flatnonzero(rows)) for rows in lacking]
        with threads(1):
            found = np.stack([self.newton.change(forget).mean for forget in sets])
        store.write_block(block, {"change": found.astype(np.float32)})


@dataclass(frozen=True)
class _Residual:
    """Outputs less the prior times its factor for each kind of row, a few models at a time."""

    ensemble: Ensemble
    anchor: Ensemble
    numbers: Rows
    prior: Store

    def outputs(self, block: int) -> Array:
        """What is left of the outputs of a block of models, [model, target, output]."""
        return self._outputs(block) - self._factors[self._kinds(block)][..., None] * self._change(
            block
        )

    def _outputs(self, block: int) -> Array:
        return gather(self.ensemble.store, "outputs", self.numbers[self.prior.spec.span(block)])

    def _change(self, block: int) -> Array:
        return self.prior.numpy("change", block)

    def _kinds(self, block: int) -> Rows:
        masks = self.prior.map_constant("mask")[self.prior.spec.span(block)]
        targets = np.arange(self.prior.spec.array("change").shape[1])
        kinds = np.stack([np.where(targets < masks.shape[1], 1, 2)] * len(masks))
        kinds[:, : masks.shape[1]][~masks] = 0
        return kinds

    @cached_property
    def _factors(self) -> Array:
        mean = self.anchor.outputs.mean(0)
        powers, products = np.zeros((2, len(KINDS)))
        for block in range(self.prior.spec.blocks):
            prior, change, kinds = (
                self._change(block),
                self._outputs(block) - mean,
                self._kinds(block),
            )
            for kind in range(len(KINDS)):
                p, t = prior[kinds == kind], change[kinds == kind]
                powers[kind] += np.square(p, dtype=np.float64).sum()
                products[kind] += (p * t).sum(dtype=np.float64)
        found = np.divide(products, powers, out=np.zeros(len(KINDS)), where=powers > 0)
        return np.maximum(found, 0).astype(np.float32)


def _written(
    ensemble: Ensemble, numbers: Rows, left: _Residual, to: Where, settings: dict[str, Any]
) -> Ensemble:
    told, masks = ensemble.store, ensemble.masks[numbers]
    made = left.prior.spec
    dtype = told.spec.array("outputs").dtype
    arrays = {"outputs": replace(made.array("change"), dtype=dtype)}
    store = Store.open_or_create(
        place(to) / "models",
        StoreSpec("ensemble", "model", made.block, arrays),
        # Like every ensemble it bears the digest of its masks, which a purge exchanges.
        Provenance(
            settings | {"masks": digest(masks)},
            {"versions": versions("torch", "numpy", "datamodel-matching")},
        ),
        constants={"mask": masks, "judge": ensemble.judges[numbers]},
        ids={"train": ensemble.task.train_ids, "target": ensemble.task.target_ids},
        attributes={name: told.attributes[name] for name in ("design", "seed", "without")}
        | {"keys": []},
    )
    for number in store.pending():
        store.write_block(number, {"outputs": left.outputs(number).astype(dtype)})
    return Ensemble.open(store.finalize().path, ensemble.task)
