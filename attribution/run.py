"""A run: one folder with everything that is precomputed for a task."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from attribution.counterfactual import Counterfactual
from attribution.datamodels import fit_datamodels
from attribution.ensemble import Ensemble, train_models
from attribution.forget import ForgetSet
from attribution.linear_datamodel import LinearDatamodel
from attribution.moments import Moments, compute_moments
from attribution.oracle import Oracle
from attribution.subsets import draw_subsets
from attribution.task import Task
from attribution.task_file import load_task, task_place
from stores import Provenance, Store, check_provenance, digest

SCHEMA = 1
PREDICTORS = ("datamodel",)


@dataclass(frozen=True)
class RunSettings:
    """What a run was asked for.

    Args:
        task: where the task is loaded from.
        full_models: models trained on all rows.
        subset_models: models trained on subsets.
        design: how the subsets are drawn.
        seed: of everything; full models use seed + 1, oracle banks seed + 2 and seed + 3.
    """

    task: str
    full_models: int = 100
    subset_models: int = 4000
    design: str = "mixed"
    seed: int = 0

    @property
    def subsets(self) -> str:
        """Name of the subset models in folders."""
        return f"{self.design}-{self.subset_models}"


@dataclass(frozen=True)
class Run:
    """A run's folder and its task.

    Args:
        path: the folder.
        settings: what it was asked for.
        task: the task.
    """

    path: Path
    settings: RunSettings
    task: Task = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Run":
        """Opens a run that was precomputed.

        Args:
            path: its folder.

        Returns:
            The run.

        Raises:
            ValueError: no run there, one of a later schema, its task cannot be loaded, or is not
                what the run's models were trained on.
        """
        settings = read_settings(Path(path))
        run = cls(Path(path), settings, load_task(settings.task, outside=Path(path)))
        _refuse_changed_task(run)
        return run

    @cached_property
    def full(self) -> Ensemble:
        """Models trained on all rows, with weights."""
        return Ensemble.open(self.path / "full", self.task)

    @cached_property
    def datamodel(self) -> LinearDatamodel:
        """Effects of every row on every target."""
        return LinearDatamodel.open(self.path / f"datamodel-{self.settings.subsets}")

    @cached_property
    def moments(self) -> Moments:
        """Input moments of the full models."""
        return Moments.open(self.path / "moments")

    def predictor(self, name: str) -> Counterfactual:
        """A predictor by its name on the command line."""
        if name not in PREDICTORS:
            raise ValueError(f"unknown predictor {name!r}: choose from {', '.join(PREDICTORS)}")
        return self.datamodel

    def bank(
        self,
        forget: ForgetSet,
        which: int,
        models: int,
        *,
        device: str = "cpu",
        workers: int | None = None,
        scheduler: str | None = None,
    ) -> Ensemble:
        """One of two disjoint banks of models retrained without a forget set; trained if missing.

        Args:
            forget: rows that no model sees.
            which: 0 for the audit, 1 for targets and the null.
            models: how many.
            device: where to compute.
            workers: processes; None for one per core, 0 for this process.
            scheduler: address of an existing dask scheduler instead.

        Returns:
            The bank.
        """
        folder = digest(*forget.ids)[:16]
        subsets = draw_subsets(
            self.task,
            models=models,
            design="full",
            seed=self.settings.seed + 2 + which,
            without=forget,
        )
        to = self.path / "oracles" / f"{folder}-{models}" / ("audit" if which == 0 else "targets")
        return train_models(
            self.task, subsets, to, device=device, workers=workers, scheduler=scheduler
        )

    def oracle(self, forget: ForgetSet, models: int, **where: Any) -> Oracle:
        """The oracle of a forget set; its bank is not the audit's."""
        return Oracle(self.full, self.bank(forget, 1, models, **where))

    def stores(self) -> list[Store]:
        """All stores of the run that exist, finished or not."""
        found = sorted(path.parent for path in self.path.rglob("zarr.json"))
        roots = [p for p in found if not any(q in p.parents for q in found)]
        return [Store.open(p) for p in roots if not p.name.endswith(".tmp")]


def read_settings(path: Path) -> RunSettings:
    """Settings of a run, without loading its task.

    Args:
        path: the run's folder.

    Returns:
        The settings.

    Raises:
        ValueError: no run there, or one of a later schema.
    """
    try:
        told = json.loads((path / "run.json").read_text())
        schema = told.pop("schema")
        settings = RunSettings(**told) if schema == SCHEMA else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"there is no run in {str(path)!r}: make one with dmm precompute TASK --run {path}"
        ) from error
    if settings is None:
        raise ValueError(
            f"the run in {str(path)!r} has schema {schema}, this version reads {SCHEMA}"
        )
    return settings


def precompute(
    task_spec: str,
    path: str | os.PathLike[str],
    *,
    full_models: int = 100,
    subset_models: int = 4000,
    design: str = "mixed",
    seed: int = 0,
    device: str = "cpu",
    workers: int | None = None,
    scheduler: str | None = None,
) -> Run:
    """Trains full and subset models, fits datamodels and stores input moments; resumes by itself.

    Args:
        task_spec: `file.py:name` or `module:name`.
        path: folder of the run.
        full_models: models trained on all rows.
        subset_models: models trained on subsets.
        design: half, bernoulli, clusters or mixed.
        seed: of everything.
        device: where to compute.
        workers: processes; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The run.

    Raises:
        ValueError: bad input, or a folder that holds a run with other settings or data.
    """
    task = load_task(task_spec, outside=Path(path))
    settings = RunSettings(task_place(task_spec), full_models, subset_models, design, seed)
    _check_numbers(settings)
    # Drawing the subsets first refuses bad settings before anything is written.
    full_subsets = draw_subsets(task, models=full_models, design="full", seed=seed + 1)
    subsets = draw_subsets(task, models=subset_models, design=design, seed=seed)
    task.check()
    _record(Path(path), settings)
    run = Run(Path(path), settings, task)
    where: dict[str, Any] = {"device": device, "workers": workers, "scheduler": scheduler}
    full = train_models(task, full_subsets, run.path / "full", keep="weights", **where)
    ensemble = train_models(task, subsets, run.path / f"ensemble-{settings.subsets}", **where)
    fit_datamodels(
        ensemble,
        anchor=full,
        to=run.path / f"datamodel-{settings.subsets}",
        seed=seed,
        workers=workers,
        scheduler=scheduler,
    )
    compute_moments(full, run.path / "moments", workers=workers, scheduler=scheduler)
    # The stores took this task for theirs, so it may be found where it lies now.
    _write_settings(Path(path), settings)
    return run


def _check_numbers(settings: RunSettings) -> None:
    if settings.full_models < 2:
        raise ValueError(f"a run needs at least 2 full models, got {settings.full_models}")
    if settings.subset_models < 10:
        raise ValueError(f"datamodels need at least 10 models, got {settings.subset_models}")
    if settings.design == "full":
        raise ValueError("datamodels need models on different subsets: choose another design")
    if settings.seed < 0:
        raise ValueError(f"a seed must not be negative, got {settings.seed}")


def _record(path: Path, settings: RunSettings) -> None:
    if (path / "run.json").exists():
        _refuse_other(path, read_settings(path), settings)
    else:
        _write_settings(path, settings)


def _write_settings(path: Path, settings: RunSettings) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        partial = path / "run.json.partial"
        partial.write_text(json.dumps({"schema": SCHEMA} | asdict(settings), indent=2) + "\n")
        partial.replace(path / "run.json")
    except OSError as error:
        raise ValueError(f"cannot write the run folder {str(path)!r}: {error}") from error


def _refuse_changed_task(run: Run) -> None:
    if not (run.path / "full" / "zarr.json").exists():
        return
    store, wanted = Store.open(run.path / "full", "ensemble"), run.task.settings()
    stored = {name: store.provenance.settings.get(name) for name in wanted}
    check_provenance(Provenance(stored), Provenance(wanted), store.path)


def _refuse_other(path: Path, found: RunSettings, wanted: RunSettings) -> None:
    # Where the task's file lies may change; what it trains on is checked by the stores.
    pairs: Sequence[tuple[str, Any]] = [p for p in asdict(wanted).items() if p[0] != "task"]
    for name, value in pairs:
        if getattr(found, name) != value:
            raise ValueError(
                f"the run in {str(path)!r} was made with {name} = {getattr(found, name)}, this call"
                f" asks for {value}: use another --run folder, or the same settings"
            )
