"""Fits a calibration on a bank of models, each retrained without one of some forget sets."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from attribution.cases import KINDS, Case, cases_of, common_share
from attribution.counterfactual import Change
from attribution.deviations import deviation_factors
from attribution.ensemble import Ensemble
from attribution.forget import ForgetSet
from attribution.gradients import Features, compute_curvatures
from attribution.newton.calibration import STEPS, Calibration
from attribution.newton.choosing import choose
from attribution.newton.group import GroupNewton, damping_per_row
from attribution.outputs import Array
from attribution.training import threads
from attribution.weighing import mean_squares, nonnegative_squares, weights_without
from stores import (
    ArraySpec,
    Provenance,
    Store,
    StoreSpec,
    Where,
    in_turns,
    place,
    run_blocks,
)

# Candidates for T, and for lambda in units of T^2 x (number of rows) x weight decay.
TEMPERATURES = (1.0, 1.4, 2.0)
DAMPINGS = (0.7, 1.4)


def calibrate(
    newton: GroupNewton,
    bank: Ensemble,
    to: Where,
    *,
    full: Ensemble | None = None,
    temperatures: Sequence[float] | None = None,
    dampings: Sequence[float] | None = None,
    workers: int | None = 0,
    scheduler: str | None = None,
) -> Calibration:
    """Fits damping, temperature, steps, and a scale and two variances for each kind of row.

    The first three minimise the squared error, on outputs and margins alike, of the mean that
    predictions of single checkpoints scatter around; two of them, a and b, tell it without bias:
    (change - a)(change - b). While the best damping is the smallest or the largest tried, one
    beyond it is tried too, at most five times. Then scale s and the variances are least squares,

        change = s x predicted,
        (change - s x predicted)^2 = x spread^2 + z common noise^2 + variance of the change,

    where common is the share of their change that the forget rows have in common, because rows that
    go together change what the linear model takes as fixed. The variance of the change, and that of
    one retraining, are known: `cases_of` pools them over the bank and the models trained on all
    rows, or the checkpoints, which tell them badly where the bank has one model of each set. For
    the scale a forget set weighs as `Case.weight` says, for the variances all weigh the same, and
    s is then the scale that fits the other sets.

    Along the segments of trainings only the factors are fitted: the recipe tells lambda, the
    probabilities are those of the path, so that T = 1, and steps are those of `newton`, or 3.

    Args:
        newton: gives features, and the number of steps where it has one; how it is calibrated now
            is not used.
        bank: models that each never saw a forget set of their own.
        to: folder for the predictions that are compared; an interrupted call resumes there.
        full: models trained on all rows, from whose mean the changes are taken; None: the
            checkpoints of the features, which mean weights cannot stand in for.
        temperatures: candidates for T; None: 1, 1.4 and 2. Along segments there are none.
        dampings: candidates for lambda, in units of T^2 x (number of rows) x weight decay, or,
            where none is known, of T^2 x the mean curvature; None: .7 and 1.4. A single pair is
            taken as it is. Along segments there are none.
        workers: processes; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The calibration.

    Raises:
        ValueError: the bank is of another task, some model of it saw all rows, the features are
            of one training only, or candidates are given or `full` is not for features along
            segments.
    """
    newton.check_task(bank.task)
    if newton.features.trainings < 2:
        raise ValueError("a calibration needs the features of 2 trainings or more, got 1")
    if newton.features.times:
        _check_along(full, temperatures, dampings)
    where: dict[str, Any] = {"workers": None if scheduler else workers, "scheduler": scheduler}
    cases = cases_of(bank, outputs_before(newton.features, full))
    if newton.features.times:
        chosen = _told_by_the_recipe(newton)
        compute_curvatures(chosen.features, [1.0], **where)
    else:
        chosen = choose(
            newton,
            cases,
            place(to),
            temperatures=TEMPERATURES if temperatures is None else temperatures,
            dampings=DAMPINGS if dampings is None else dampings,
            settings=_settings(newton, bank),
            where=where,
        )
    changes = predicted_changes(chosen, cases, bank, place(to) / "changes", **where)
    return _fitted(chosen, cases, changes)


def _check_along(full: Ensemble | None, *candidates: Sequence[float] | None) -> None:
    if full is None:
        raise ValueError(
            "along segments the checkpoints are mean weights, whose outputs are not those of"
            " trained models: give the models trained on all rows as full"
        )
    if any(given is not None for given in candidates):
        raise ValueError(
            "along the segments of a training nothing is chosen from temperatures and dampings:"
            " leave them out"
        )


def _told_by_the_recipe(newton: GroupNewton) -> GroupNewton:
    rows, times = len(newton.task.train_ids), newton.features.times
    damping, steps = rows * damping_per_row(newton.task, times), newton.steps or STEPS
    return replace(newton, calibration=None, damping=damping, temperature=1.0, steps=steps)


def outputs_before(features: Features, full: Ensemble | None) -> Array:
    """Outputs of models trained on all rows, [model, target, output].

    Args:
        features: their checkpoints stand in where there are no more models.
        full: models trained on all rows.

    Returns:
        The outputs.
    """
    if full is not None:
        return full.outputs
    return np.stack([features.outputs(checkpoint) for checkpoint in range(len(features))])


def predicted_changes(
    newton: GroupNewton,
    cases: Sequence[Case],
    bank: Ensemble,
    to: Where,
    *,
    workers: int | None = 0,
    scheduler: str | None = None,
) -> list[Change]:
    """What a predictor says of every forget set of a bank, kept in a store.

    Args:
        newton: the predictor.
        cases: the forget sets.
        bank: where they come from, for the provenance.
        to: folder of the store.
        workers: processes; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The changes of all targets.

    Raises:
        ValueError: the folder holds what another predictor said, or of another bank.
    """
    shape = (len(cases), *cases[0].change.shape)
    arrays = {
        name: ArraySpec(("model", "target", "output"), shape, "float32")
        for name in ("mean", "std", "noise")
    }
    settings = _settings(newton, bank) | {"steps": newton.most_steps}
    settings |= {"calibration": _told(newton.calibration)}
    store = _store(to, "calibration-changes", arrays, settings)
    work = _Changes(newton, tuple(case.forget for case in cases), store.path)
    _run(work, store, "predictions", workers, scheduler)
    found = [{name: store.numpy(name, i)[0] for name in arrays} for i in range(len(cases))]
    return [Change(**values) for values in found]


def _settings(newton: GroupNewton, bank: Ensemble) -> dict[str, Any]:
    return {
        "features": [dict(store.provenance.settings) for store in newton.features.stores],
        "bank": dict(bank.store.provenance.settings),
        "steps": newton.steps,
        "damping": newton.damping,
        "temperature": newton.temperature,
    }


def _told(calibration: Calibration | None) -> dict[str, Any] | None:
    return None if calibration is None else asdict(calibration)


def _store(to: Where, kind: str, arrays: dict[str, ArraySpec], settings: dict[str, Any]) -> Store:
    return Store.open_or_create(to, StoreSpec(kind, "model", 1, arrays), Provenance(settings))


def _run(
    work: Callable[[int], None],
    store: Store,
    title: str,
    workers: int | None,
    scheduler: str | None,
) -> None:
    if store.pending():
        work = in_turns(work, store)
        run_blocks(work, store.pending(), title=title, workers=workers, scheduler=scheduler)
    store.finalize()


@dataclass(frozen=True)
class _Changes:
    newton: GroupNewton
    forgets: tuple[ForgetSet, ...] = field(repr=False)
    path: str

    def __call__(self, block: int) -> None:
        with threads(1):
            change = self.newton.change(self.forgets[block])
        arrays = {"mean": change.mean, "std": change.std, "noise": change.noise}
        wanted = {name: values.astype(np.float32)[None] for name, values in arrays.items()}
        Store.open(self.path).write_block(block, wanted)


def _fitted(newton: GroupNewton, cases: Sequence[Case], changes: Sequence[Change]) -> Calibration:
    factors = [_fitted_kind(number, cases, changes) for number in range(len(KINDS))]
    scale, spread, shared, noise = (
        dict(zip(KINDS, column, strict=True)) for column in zip(*factors, strict=True)
    )
    assert newton.damping is not None
    assert newton.temperature is not None
    assert newton.steps is not None
    chosen = newton.damping, newton.temperature
    return Calibration(*chosen, scale, spread, noise, len(cases), shared, newton.steps)


def _fitted_kind(
    kind: int, cases: Sequence[Case], changes: Sequence[Change]
) -> tuple[float, float, float, float]:
    """Scale, spread, shared and noise of one kind of row."""
    pairs = [(case, c, case.kinds[kind]) for case, c in zip(cases, changes, strict=True)]
    pairs = [pair for pair in pairs if pair[2].any()]
    if not pairs:
        return 1.0, 1.0, 0.0, 1.0
    known, means = [case for case, _, _ in pairs], [change.mean for _, change, _ in pairs]
    gram, right = mean_squares(known, kind, means)
    # Where nothing is predicted, no scale fits better than another.
    scale = float(nonnegative_squares(gram.sum(0), right.sum(0))[0]) if gram.any() else 1.0
    others = weights_without(gram, right)[:, 0]
    predicted = [
        (case, rows, told * change.mean[rows])
        for told, (case, change, rows) in zip(others, pairs, strict=True)
    ]
    own = [np.square(change.std[rows]) for _, change, rows in pairs]
    shared = [
        common_share(change.mean[case.forget.rows]) * np.square(change.noise[rows])
        for case, change, rows in pairs
    ]
    noise = [change.noise[rows] for _, change, rows in pairs]
    spread, common, one = deviation_factors(predicted, own, shared, noise=noise)
    return scale, spread, common, one
