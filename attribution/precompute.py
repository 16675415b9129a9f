"""Precompute: everything that queries of a task need, made once, in one folder."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from attribution.calibration_bank import calibration_bank, cases_of, common_share
from attribution.combined import Weights, weigh, weighed_sum
from attribution.counterfactual import Change
from attribution.datamodels import REGRESSIONS, fit_datamodels
from attribution.deviations import held_out_error
from attribution.ensemble import Ensemble, subsets_left, train_models
from attribution.folders import store_places
from attribution.gradients import Projection, featurize, gradient_projector
from attribution.linear_datamodel import LinearDatamodel
from attribution.model import Model, load_model
from attribution.moments import compute_moments
from attribution.newton import GroupNewton, calibrate, predicted_changes
from attribution.purging.tombstones import purged_rows, read_tombstones, task_left
from attribution.purging.turns import writers_turn
from attribution.residual import models_like_requests, residual_models
from attribution.run import CALIBRATION, SCHEMA, SETTINGS, Run, RunSettings, read_settings
from attribution.run_calibration import RunCalibration
from attribution.subsets import Subsets, draw_subsets
from attribution.task import Task
from attribution.task_file import load_task, task_place
from stores import Place, Store, Where, name_blocks, place, taken_out

FEWEST_MODELS = 10  # that a datamodel is fitted to
RESIDUAL_MODELS = 150  # at most; group Newton takes about a second of one core for each on digits


def precompute(
    task_spec: str,
    path: Where,
    *,
    full_models: int = 100,
    subset_models: int = 4000,
    design: str = "mixed",
    checkpoints: int | None = None,
    datamodel: str = "ridge",
    seed: int = 0,
    device: str = "cpu",
    workers: int | None = None,
    scheduler: str | None = None,
) -> Run:
    """Trains models, fits datamodels, stores gradients and calibrates; resumes by itself.

    Args:
        task_spec: `file.py:name` or `module:name`.
        path: folder of the run.
        full_models: models trained on all rows.
        subset_models: models trained on subsets.
        design: half, bernoulli, clusters or mixed.
        checkpoints: full models whose gradients group Newton averages over; 0 for none, None for
            8, or for all where there are fewer.
        datamodel: name of the regression, ridge or lasso.
        seed: of everything.
        device: where to compute.
        workers: processes; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The run.

    Raises:
        ValueError: bad input, or a folder that holds a run with other settings or data.
    """
    # A folder that is not there yet can be locked once it is made.
    with writers_turn(path):
        task = task_left(load_task(task_spec, outside=path), path)
        settings = RunSettings(
            task_place(task_spec),
            full_models,
            subset_models,
            design,
            seed,
            min(8, full_models) if checkpoints is None else checkpoints,
            datamodel=datamodel,
        )
        _check_numbers(settings)
        # Drawing the subsets first refuses bad settings before anything is written.
        full_subsets = draw_subsets(task, models=full_models, design="full", seed=seed + 1)
        # Those of a run from which rows were purged are no longer what would be drawn.
        subsets = subsets_left(place(path) / f"ensemble-{settings.subsets}") or draw_subsets(
            task, models=subset_models, design=design, seed=seed
        )
        task.check()
        if settings.checkpoints:
            cure = "; --newton-checkpoints 0 makes a run without it"
            _check_gradients(task, Projection(seed=seed), cure)
        _record(path, settings)
        run = Run(place(path), settings, task, device)
        at: dict[str, Any] = {"workers": workers, "scheduler": scheduler}
        with writers_turn(path):
            _refuse_purged(run)
            _fill(run, full_subsets, subsets, at, at | {"device": device})
    return run


def _fill(
    run: Run, full_subsets: Subsets, subsets: Subsets, at: dict[str, Any], where: dict[str, Any]
) -> None:
    settings, seed = run.settings, run.settings.seed
    full = train_models(run.task, full_subsets, run.path / "full", keep="weights", **where)
    ensemble = train_models(run.task, subsets, run.path / f"ensemble-{settings.subsets}", **where)
    to = run.path / f"datamodel-{settings.subsets}"
    if not _made_before(to, remove=[to]):
        method = REGRESSIONS[settings.datamodel]()
        fit_datamodels(ensemble, anchor=full, to=to, method=method, seed=seed, **at)
    compute_moments(full, run.path / "moments", **where)
    if settings.checkpoints:
        models, projection = full.checkpoints(settings.checkpoints), Projection(seed=seed)
        featurize(run.task, models, run.path / "features", projection=projection, **where)
    if settings.checkpoints > 1 and _calibrated_before(run):
        run.fit_trak(run.trak_damping, **at)  # what was discarded of it
    elif settings.checkpoints > 1:
        calibrate_run(run, **where)
    # The stores took this task for theirs, so it may be found where it lies now.
    _write_settings(run.path, settings)


def _refuse_purged(run: Run) -> None:
    if purged_rows(run.task, read_tombstones(run.path)):
        raise ValueError(f"rows were purged from {run.path} meanwhile: call this again")


def precompute_checkpoints(
    task_spec: str,
    path: Where,
    files: Sequence[str | os.PathLike[str]],
    *,
    damping: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    workers: int | None = None,
    scheduler: str | None = None,
) -> Run:
    """Stores the gradients of checkpoints that are there already; nothing is trained.

    Args:
        task_spec: `file.py:name` or `module:name`.
        path: folder of the run.
        files: checkpoints trained on all rows: .safetensors, .pt, .pth or .ckpt.
        damping: lambda of group Newton, in units of the sum of the rows' losses; None: the number
            of rows x the recipe's weight decay.
        seed: of the projections.
        device: where to compute.
        workers: processes; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The run; group Newton is its only predictor.

    Raises:
        ValueError: bad input, a task that tells no weight decay, a file that does not fit the
            task's model or has forgotten rows, the same weights twice, or a folder that holds a
            run with other settings or data.
    """
    if not files:
        raise ValueError("expected at least one checkpoint, got none")
    with writers_turn(path):
        task = task_left(load_task(task_spec, outside=path), path)
        names = tuple(os.path.basename(os.fspath(file)) for file in files)
        settings = RunSettings(
            task_place(task_spec), 0, 0, "none", seed, len(files), names, damping
        )
        models = [load_model(task, file) for file in files]
        _check_damping(task, damping)
        _check_checkpoints(models, names)
        task.check()
        projection = Projection(seed=seed)
        _check_gradients(task, projection, "")
        _record(path, settings)
        run = Run(place(path), settings, task, device)
        where: dict[str, Any] = {"device": device, "workers": workers, "scheduler": scheduler}
        with writers_turn(path):
            _refuse_purged(run)
            featurize(task, models, run.path / "features", projection=projection, **where)
            _write_settings(path, settings)
    return run


def calibrate_run(
    run: Run,
    *,
    device: str = "cpu",
    workers: int | None = None,
    scheduler: str | None = None,
) -> RunCalibration:
    """Trains a run's calibration bank and holds all its predictors against it.

    Args:
        run: with full models, features and perhaps datamodels.
        device: where to compute.
        workers: processes; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The calibration, which is written to the run's folder as well.

    Raises:
        ValueError: the stores of the run do not belong together.
    """
    at: dict[str, Any] = {"workers": workers, "scheduler": scheduler}
    seed, to = run.settings.seed + 4, run.path / "calibration"
    bank = calibration_bank(run.task, to / "bank", seed=seed, device=device, **at)
    plain = GroupNewton(run.task, run.features, damping=1.0)
    folder = to / f"newton-{len(run.features)}"
    newton = calibrate(plain, bank, folder, full=run.full, **at)
    before = run.full.outputs.mean(0)
    cases = cases_of(bank, before)
    chosen = replace(
        plain, damping=newton.damping, temperature=newton.temperature, steps=newton.steps
    )
    raw = predicted_changes(chosen, cases, bank, folder / "changes", **at)
    first = [
        newton.applied(
            change, case.forget, case.targets, common_share(change.mean[case.forget.rows])
        )
        for case, change in zip(cases, raw, strict=True)
    ]
    linear = [run.datamodel.change(case.forget) for case in cases]
    trak = run.fit_trak(run.damping_by(newton), **at)
    scored = [trak.change(case.forget) for case in cases]
    sources: dict[str, list[Sequence[Change]]] = {"newton": [raw], "linear": [linear, scored]}
    residual: dict[str, Weights] = {}
    missed = _fit_residual(run, chosen, **at)
    if missed is not None:
        lacking = [missed.change(case.forget) for case in cases]
        sources["residual"] = [raw, lacking]
        # Few models leave the posterior of a row's effect on itself wide open; the prior does not.
        residual = weigh(cases, list(zip(first, lacking, strict=True)), trusted=False)
        first = [
            weighed_sum(residual, one, two, case.kind_numbers)
            for case, one, two in zip(cases, first, lacking, strict=True)
        ]
    weights = weigh(cases, list(zip(first, linear, strict=True)))
    own = [case.error(change.mean) for case, change in zip(cases, linear, strict=True)]
    # A predictor with more factors must not look nearer for them alone.
    means = {
        name: [[change.mean for change in each] for each in changes]
        for name, changes in sources.items()
    }
    errors = {"datamodel": float(np.mean(own))}
    errors |= {name: held_out_error(cases, *parts) for name, parts in means.items()}
    parts, added = means.get("residual", means["newton"]), [change.mean for change in linear]
    errors["combined"] = held_out_error(cases, *parts, added=added)
    fitted = weigh(cases, list(zip(linear, scored, strict=True)), trusted=False)
    sums = {kind: one.as_sure_as_the_first() for kind, one in fitted.items()}
    found = RunCalibration(newton, weights, errors, residual, sums)
    found.save(run.path / CALIBRATION)
    return found


def _calibrated_before(run: Run) -> bool:
    """Whether the calibration was fitted on these checkpoints before rows were purged."""
    folder = run.path / "calibration" / f"newton-{len(run.features)}"
    # The weights were fitted to all of it together.
    residual = run.path / "calibration" / "residual"
    whole = [run.path / CALIBRATION, folder, residual, run.residual_path]
    choices = [folder / name for name in store_places(folder) if name.startswith("choice")]
    for part in (*choices, run.residual_path):
        _made_before(part, remove=whole)
    return _made_before(folder / "changes", remove=whole) and run.path.exists(CALIBRATION)


def _made_before(where: Place, *, remove: Sequence[Place]) -> bool:
    """Whether a store was made before rows were purged; then no block of it can be made alone."""
    if taken_out(where) is None:
        return False
    if pending := Store.open(where).pending():
        raise ValueError(
            f"{name_blocks(pending)} of {where} cannot be computed alone, as rows were purged since"
            f" the others were: remove {', '.join(map(str, remove))}, and the same command makes"
            " all of it anew from what is left"
        )
    return True


def _fit_residual(run: Run, newton: GroupNewton, **at: Any) -> LinearDatamodel | None:
    """The datamodel of what group Newton lacks, if some models are like deletion requests."""
    to = run.residual_path
    if to.taken() and not Store.open(to).pending():
        # Once fitted it stays, also where the calibration changes: its weights are fitted anew.
        _refuse_other_projections(run, to)
        return LinearDatamodel.open(to)
    ensemble = Ensemble.open(run.path / f"ensemble-{run.settings.subsets}", run.task)
    seed = run.settings.seed
    chosen = models_like_requests(ensemble, RESIDUAL_MODELS, seed)
    if len(chosen) < FEWEST_MODELS:
        return None
    folder = run.path / "calibration" / "residual"
    left = residual_models(ensemble, newton, folder, anchor=run.full, models=chosen, **at)
    return fit_datamodels(left, anchor=run.full, to=to, seed=seed, **at)


def _refuse_other_projections(run: Run, residual: Place) -> None:
    told = Store.open(residual).provenance.settings["ensemble"]["features"][0]["projection"]
    wanted = run.features.stores[0].provenance.settings["projection"]
    if told != wanted:
        raise ValueError(
            f"{residual} was fitted to what group Newton lacked with projections {told}, the run's"
            f" are {wanted}: remove it and {run.path}/calibration/residual, and call this again"
        )


def _check_numbers(settings: RunSettings) -> None:
    if settings.datamodel not in REGRESSIONS:
        known = ", ".join(REGRESSIONS)
        raise ValueError(f"unknown regression {settings.datamodel!r}: choose from {known}")
    if settings.full_models < 2:
        raise ValueError(f"a run needs at least 2 full models, got {settings.full_models}")
    if settings.subset_models < FEWEST_MODELS:
        raise ValueError(
            f"datamodels need at least {FEWEST_MODELS} models, got {settings.subset_models}"
        )
    if settings.design == "full":
        raise ValueError("datamodels need models on different subsets: choose another design")
    if settings.checkpoints < 0 or settings.checkpoints > settings.full_models:
        raise ValueError(
            f"group Newton takes 0 to {settings.full_models} of the full models as checkpoints,"
            f" got {settings.checkpoints}"
        )
    if settings.seed < 0:
        raise ValueError(f"a seed must not be negative, got {settings.seed}")


def _check_damping(task: Task, damping: float | None) -> None:
    if damping is None and (task.recipe is None or not task.recipe.weight_decay):
        raise ValueError(
            f"task {task.name!r} tells no weight decay, which group Newton takes its damping from:"
            " give it a recipe with the weight decay of the checkpoints, or a damping (rows x"
            " weight decay)"
        )
    if damping is not None and not 0 < damping < float("inf"):
        raise ValueError(f"a damping must be above 0 and finite, got {damping}")


def _check_checkpoints(models: Sequence[Model], names: Sequence[str]) -> None:
    digests = [model.digest() for model in models]
    for number, (model, name) in enumerate(zip(models, names, strict=True)):
        if model.forgotten:
            raise ValueError(
                f"{name!r} has forgotten {len(model.forgotten)} rows: precompute from models"
                " trained on all rows, and give this one to predict or unlearn"
            )
        twin = digests.index(digests[number])
        if twin != number:
            raise ValueError(
                f"checkpoints {twin} ({names[twin]!r}) and {number} ({name!r}) hold the same"
                " weights: give each model once"
            )


def _check_gradients(task: Task, projection: Projection, cure: str) -> None:
    """Refuses a model without per-example gradients before anything costly starts."""
    module, (inputs, _) = task.new_model(0), task.targets([0])
    rows = inputs.expand(2, *inputs.shape[1:])
    try:
        run = gradient_projector(module, projection).linearise(module.state_dict(), rows)
        run.features(torch.eye(run.outputs.shape[1]).to(run.outputs).expand(2, -1, -1))
    except ValueError as error:
        raise ValueError(
            f"group Newton cannot take the model of task {task.name!r}: {error}{cure}"
        ) from error


def _record(path: Where, settings: RunSettings) -> None:
    if place(path).exists(SETTINGS):
        _refuse_other(path, read_settings(path), settings)
    else:
        _write_settings(path, settings)


def _write_settings(path: Where, settings: RunSettings) -> None:
    text = json.dumps({"schema": SCHEMA} | asdict(settings), indent=2) + "\n"
    try:
        place(path).write(SETTINGS, text.encode())
    except OSError as error:
        raise ValueError(f"cannot write the run folder {str(path)!r}: {error}") from error


def _refuse_other(path: Where, found: RunSettings, wanted: RunSettings) -> None:
    # Where the task's file lies may change; what it trains on is checked by the stores. Gradients
    # of more checkpoints are added to those that are there.
    more = wanted.checkpoints >= found.checkpoints and not wanted.files
    free = {"task", "checkpoints"} if more else {"task"}
    pairs: Sequence[tuple[str, Any]] = [p for p in asdict(wanted).items() if p[0] not in free]
    for name, value in pairs:
        if getattr(found, name) != value:
            raise ValueError(
                f"the run in {str(path)!r} was made with {name} = {getattr(found, name)}, this call"
                f" asks for {value}: use another --run folder, or the same settings"
            )
