"""Precompute: everything that queries of a task need, made once, in one folder."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from attribution.calibrating import (
    calibrate_run,
    calibrated_before,
    made_before,
    refuse_older,
)
from attribution.datamodels import FEWEST_MODELS, REGRESSIONS, fit_datamodels
from attribution.ensemble import Ensemble, subsets_left
from attribution.ensemble_training import train_models
from attribution.gradients import Projection, featurize, gradient_projector
from attribution.model import Model, load_model
from attribution.moments import compute_moments
from attribution.purging.tombstones import purged_rows, read_tombstones, task_left
from attribution.purging.turns import writers_turn
from attribution.run import SCHEMA, SETTINGS, Run, RunSettings, read_settings
from attribution.segments import task_times
from attribution.subsets import Subsets, draw_subsets
from attribution.task import Task
from attribution.task_file import load_task, task_place
from stores import Where, place

PRINCIPAL = 256  # features along principal directions, of each layer in the mean, of a new run


def precompute(
    task_spec: str,
    path: Where,
    *,
    full_models: int = 100,
    subset_models: int = 4000,
    design: str = "mixed",
    checkpoints: int | None = None,
    segments: int | None = None,
    principal: int | None = None,
    datamodel: str = "ridge",
    factors: bool = True,
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
        segments: equal parts of training; group Newton and TRAK take the mean weights over each of
            them. 0: they take trained models, as they must where the task trains by itself. None:
            those of the run that is there, or 0.
        principal: features of their gradients along principal directions, for each layer in the
            mean, see `Projection`; 0: along random ones. None: as in the run that is there, or 256.
            It may change as long as no gradients are stored.
        datamodel: name of the regression, ridge or lasso.
        factors: whether features are kept as factors too, where they can be; see `featurize`.
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
        task, known = task_left(load_task(task_spec, outside=path), path), _settings_there(path)
        settings = RunSettings(
            task_place(task_spec),
            full_models,
            subset_models,
            design,
            seed,
            min(8, full_models) if checkpoints is None else checkpoints,
            datamodel=datamodel,
            segments=(known.segments if known else 0) if segments is None else segments,
            principal=_principal(known) if principal is None else principal,
        )
        _check_numbers(settings)
        # Drawing the subsets first refuses bad settings before anything is written.
        full_subsets = draw_subsets(task, models=full_models, design="full", seed=seed + 1)
        # Those of a run from which rows were purged are no longer what would be drawn.
        subsets = subsets_left(place(path) / f"ensemble-{settings.subsets}") or draw_subsets(
            task, models=subset_models, design=design, seed=seed
        )
        if settings.segments:
            task_times(task, len(task.train_ids), settings.segments)
        task.check()
        projection = settings.projection
        if settings.checkpoints:
            cure = "; --newton-checkpoints 0 makes a run without it"
            _check_gradients(task, projection, cure)
        _record(path, settings)
        run = Run(place(path), settings, task, device)
        at: dict[str, Any] = {"workers": workers, "scheduler": scheduler}
        with writers_turn(path):
            _refuse_purged(run)
            refuse_older(run)
            _fill(run, full_subsets, subsets, at, at | {"device": device}, factors=factors)
    return run


def _fill(
    run: Run,
    full_subsets: Subsets,
    subsets: Subsets,
    at: dict[str, Any],
    where: dict[str, Any],
    *,
    factors: bool,
) -> None:
    settings, seed = run.settings, run.settings.seed
    full = train_models(
        run.task,
        full_subsets,
        run.path / "full",
        keep="weights",
        segments=settings.segments,
        **where,
    )
    ensemble = train_models(run.task, subsets, run.path / f"ensemble-{settings.subsets}", **where)
    to = run.path / f"datamodel-{settings.subsets}"
    if not made_before(to, remove=[to]):
        method = REGRESSIONS[settings.datamodel]()
        fit_datamodels(ensemble, anchor=full, to=to, method=method, seed=seed, **at)
    compute_moments(full, run.path / "moments", **where)
    if settings.checkpoints:
        _featurize(run, full, factors=factors, **where)
    if settings.checkpoints > 1 and calibrated_before(run):
        run.fit_trak(run.trak_damping, **at)  # what was discarded of it
    elif settings.checkpoints > 1:
        calibrate_run(run, **where)
    # The stores took this task for theirs, so it may be found where it lies now.
    _write_settings(run.path, settings)


def _featurize(run: Run, full: Ensemble, **how: Any) -> None:
    count, projection = run.settings.checkpoints, run.settings.projection
    models = full.along(count) if full.segments else full.checkpoints(count)
    to, times = run.path / "features", full.times(0)
    featurize(run.task, models, to, projection=projection, times=times, **how)


def _settings_there(path: Where) -> RunSettings | None:
    return read_settings(path) if place(path).exists(SETTINGS) else None


def _principal(known: RunSettings | None) -> int:
    return known.principal if known else PRINCIPAL


def _refuse_purged(run: Run) -> None:
    if purged_rows(run.task, read_tombstones(run.path)):
        raise ValueError(f"rows were purged from {run.path} meanwhile: call this again")


def precompute_checkpoints(
    task_spec: str,
    path: Where,
    files: Sequence[str | os.PathLike[str]],
    *,
    damping: float | None = None,
    principal: int | None = None,
    factors: bool = True,
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
        principal: features along principal directions, for each layer in the mean, see
            `Projection`; 0: along random ones. None: as in the run that is there, or 256. It may
            change as long as no gradients are stored.
        factors: whether features are kept as factors too, where they can be; see `featurize`.
        seed: of the random projections.
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
            task_place(task_spec),
            0,
            0,
            "none",
            seed,
            len(files),
            names,
            damping,
            principal=_principal(_settings_there(path)) if principal is None else principal,
        )
        models = [load_model(task, file) for file in files]
        _check_damping(task, damping)
        _check_checkpoints(models, names)
        task.check()
        projection = settings.projection
        _check_gradients(task, projection, "")
        _record(path, settings)
        run = Run(place(path), settings, task, device)
        where: dict[str, Any] = {"device": device, "workers": workers, "scheduler": scheduler}
        with writers_turn(path):
            _refuse_purged(run)
            features = run.path / "features"
            featurize(task, models, features, projection=projection, factors=factors, **where)
            _write_settings(path, settings)
    return run


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
    if settings.segments < 0:
        raise ValueError(f"segments must be 0 or more, got {settings.segments}")
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
        # Which directions are kept does not change whether there are gradients.
        at_random = replace(projection, principal=0)
        run = gradient_projector(module, at_random).linearise(module.state_dict(), rows)
        run.features(torch.eye(run.outputs.shape[1]).to(run.outputs).expand(2, -1, -1))
    except ValueError as error:
        raise ValueError(
            f"group Newton cannot take the model of task {task.name!r}: {error}{cure}"
        ) from error


def _record(path: Where, settings: RunSettings) -> None:
    known = _settings_there(path)
    if known is None:
        _write_settings(path, settings)
        return
    _refuse_other(path, known, settings)
    if known.principal != settings.principal:
        # Told as soon as there may be gradients; all else when they are there.
        _write_settings(path, replace(known, principal=settings.principal))


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
    numbers = range(wanted.checkpoints * max(1, wanted.segments))
    if not any((place(path) / f"features/checkpoint-{n}").taken() for n in numbers):
        free |= {"principal"}
    pairs: Sequence[tuple[str, Any]] = [p for p in asdict(wanted).items() if p[0] not in free]
    for name, value in pairs:
        if getattr(found, name) != value:
            raise ValueError(
                f"the run in {str(path)!r} was made with {name} = {getattr(found, name)}, this call"
                f" asks for {value}: use another --run folder, or the same settings"
            )
