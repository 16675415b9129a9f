"""A run: one folder with everything that is precomputed for a task."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from attribution.combined import Combined
from attribution.counterfactual import Counterfactual
from attribution.ensemble import Ensemble, train_models
from attribution.forget import ForgetSet
from attribution.gradients import Features
from attribution.linear_datamodel import LinearDatamodel
from attribution.model import Model
from attribution.moments import Moments
from attribution.newton import GroupNewton
from attribution.oracle import Oracle
from attribution.run_calibration import RunCalibration
from attribution.subsets import draw_subsets
from attribution.task import Task
from attribution.task_file import load_task
from attribution.trak import fit_trak
from stores import Provenance, Store, check_provenance, digest

SCHEMA = 1
PREDICTORS = ("datamodel", "newton", "combined", "residual", "trak")


@dataclass(frozen=True)
class RunSettings:
    """What a run was asked for.

    Args:
        task: where the task is loaded from.
        full_models: models trained on all rows.
        subset_models: models trained on subsets.
        design: how the subsets are drawn.
        seed: of everything; full models use seed + 1, oracle banks seed + 2 and seed + 3, the
            calibration bank seed + 4.
        checkpoints: full models that group Newton averages over; 0 for none.
        files: checkpoints of the user's own that stand in for trained models, by file name.
        damping: lambda of group Newton and TRAK for these; None: rows x the recipe's weight decay.
    """

    task: str
    full_models: int = 100
    subset_models: int = 4000
    design: str = "mixed"
    seed: int = 0
    checkpoints: int = 8
    files: tuple[str, ...] = ()
    damping: float | None = None

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
        self._need_training("models trained on all rows")
        return Ensemble.open(self.path / "full", self.task)

    @cached_property
    def datamodel(self) -> LinearDatamodel:
        """Effects of every row on every target."""
        self._need_training("a datamodel")
        return LinearDatamodel.open(self.path / f"datamodel-{self.settings.subsets}")

    @cached_property
    def moments(self) -> Moments:
        """Input moments of the full models."""
        self._need_training("input moments")
        return Moments.open(self.path / "moments")

    @cached_property
    def features(self) -> Features:
        """Projected gradients of some full models."""
        return Features.open(self.path / "features", self.task)

    @cached_property
    def calibration(self) -> RunCalibration | None:
        """What the calibration bank told, if there is one."""
        path = self.path / "calibration.json"
        return RunCalibration.load(path) if path.exists() else None

    @cached_property
    def newton(self) -> GroupNewton:
        """Group Newton from the features, calibrated where there is a bank."""
        told = self.calibration
        return GroupNewton(
            self.task,
            self.features,
            damping=self.settings.damping,
            calibration=told.newton if told else None,
        )

    @cached_property
    def trak(self) -> LinearDatamodel:
        """TRAK scores as a linear datamodel; computed from the features the first time."""
        scores = fit_trak(self.features, self.trak_path, damping=self.trak_damping)
        return LinearDatamodel.from_scores(scores)

    @property
    def trak_path(self) -> Path:
        """Folder of the TRAK scores."""
        return self.path / "trak"

    @property
    def trak_damping(self) -> float | None:
        """Lambda of TRAK: what was given, rows x weight decay (None), or group Newton's."""
        if self.settings.damping is not None or self._decays:
            return self.settings.damping
        return self.calibration.newton.damping if self.calibration else None

    @property
    def _decays(self) -> bool:
        return self.task.recipe is not None and self.task.recipe.weight_decay > 0

    @cached_property
    def combined(self) -> Combined:
        """Group Newton and the datamodel, weighed against each other."""
        if self.calibration is None or not self.calibration.weights:
            raise ValueError(f"{self.path} has no calibration bank: use another predictor")
        return Combined(self.newton, self.datamodel, self.calibration.weights)

    @cached_property
    def residual(self) -> Combined:
        """Group Newton and what it lacks: a datamodel with its prediction as the prior mean."""
        if self.calibration is None or not self.calibration.residual:
            raise ValueError(f"{self.path} has no calibration bank: use another predictor")
        lacking = LinearDatamodel.open(self.residual_path)
        return Combined(self.newton, lacking, self.calibration.residual)

    @property
    def residual_path(self) -> Path:
        """Folder of the effects that group Newton lacks."""
        return self.path / f"residual-{self.settings.subsets}"

    @property
    def predictors(self) -> tuple[str, ...]:
        """Names of the predictors that the run has, or can make from what it has."""
        gradients = (self.path / "features").exists() and (
            self._decays or self.settings.damping is not None or self.calibration is not None
        )
        has = {
            "datamodel": (self.path / f"datamodel-{self.settings.subsets}").exists(),
            "newton": gradients,
            "combined": self.calibration is not None and bool(self.calibration.weights),
            "residual": self.calibration is not None and bool(self.calibration.residual),
            "trak": gradients,
        }
        return tuple(name for name in PREDICTORS if has.get(name))

    @property
    def best(self) -> str:
        """The predictor with the smallest error on the calibration bank, or the first there is."""
        if self.calibration is not None:
            return min(self.calibration.errors, key=self.calibration.errors.__getitem__)
        if not self.predictors:
            raise ValueError(f"{self.path} has no predictions yet: run dmm precompute again")
        return self.predictors[0]

    def predictor(self, name: str | None = None) -> Counterfactual:
        """A predictor by its name on the command line; None: the best."""
        known: dict[str, Callable[[], Counterfactual]] = {
            "datamodel": lambda: self.datamodel,
            "newton": lambda: self.newton,
            "combined": lambda: self.combined,
            "residual": lambda: self.residual,
            "trak": lambda: self.trak,
        }
        chosen = self.best if name is None else name
        if chosen not in known:
            raise ValueError(f"unknown predictor {chosen!r}: choose from {', '.join(known)}")
        if chosen not in self.predictors:
            raise ValueError(
                f"{self.path} has no predictor {chosen!r}, it has {', '.join(self.predictors)}"
            )
        return known[chosen]()

    def model(self, index: int = 0) -> Model:
        """One of the models trained on all rows, or of the user's own checkpoints."""
        return self.features.model(index) if self.settings.files else self.full.model(index)

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

    def _need_training(self, what: str) -> None:
        if self.settings.files:
            raise ValueError(
                f"{self.path} was made from checkpoints and holds no {what}: precompute another run"
                " without --checkpoint"
            )

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
        files = tuple(told.pop("files", ()))
        # Runs made before there was group Newton have no gradients.
        told.setdefault("checkpoints", 0)
        settings = RunSettings(**told, files=files) if schema == SCHEMA else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"there is no run in {str(path)!r}: make one with dmm precompute TASK --run {path}"
        ) from error
    if settings is None:
        raise ValueError(
            f"the run in {str(path)!r} has schema {schema}, this version reads {SCHEMA}"
        )
    return settings


def _refuse_changed_task(run: Run) -> None:
    made = run.path / ("features/checkpoint-0" if run.settings.files else "full")
    if not (made / "zarr.json").exists():
        return
    store, wanted = Store.open(made), run.task.settings()
    stored = {name: store.provenance.settings.get(name) for name in wanted}
    check_provenance(Provenance(stored), Provenance(wanted), store.path)
