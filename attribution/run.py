"""A run: one folder with everything that is precomputed for a task."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from attribution.combined import Combined
from attribution.counterfactual import Counterfactual
from attribution.ensemble import Ensemble
from attribution.ensemble_training import train_models
from attribution.folders import store_places
from attribution.forget import ForgetSet
from attribution.gradients import Features, Projection
from attribution.linear_datamodel import LinearDatamodel
from attribution.model import Model
from attribution.moments import Moments
from attribution.newton import Calibration, GroupNewton, damping_per_row
from attribution.oracle import Oracle
from attribution.purging.journal import refuse_unfinished
from attribution.purging.tombstones import read_tombstones, task_left
from attribution.purging.turns import writers_turn
from attribution.run_calibration import RunCalibration
from attribution.subsets import draw_subsets
from attribution.task import Task
from attribution.task_file import load_task
from attribution.trak import fit_trak, resume_trak
from stores import ROOT, Place, Provenance, Store, Where, check_provenance, digest, place, taken_out

SCHEMA = 1
SETTINGS, CALIBRATION = "run.json", "calibration.json"
PREDICTORS = ("datamodel", "newton", "combined", "residual", "linear", "trak")


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
        datamodel: name of the regression, ridge or lasso.
        segments: of training, whose mean weights group Newton takes; 0: it takes trained models.
        principal: features of each layer in the mean along principal directions; 0: along random
            ones.
    """

    task: str
    full_models: int = 100
    subset_models: int = 4000
    design: str = "mixed"
    seed: int = 0
    checkpoints: int = 8
    files: tuple[str, ...] = ()
    damping: float | None = None
    datamodel: str = "ridge"
    segments: int = 0
    principal: int = 0

    @property
    def subsets(self) -> str:
        """Name of the subset models in folders."""
        return f"{self.design}-{self.subset_models}"

    @property
    def projection(self) -> Projection:
        """How gradients of checkpoints are projected."""
        return Projection(seed=self.seed, principal=self.principal)


@dataclass(frozen=True)
class Run:
    """A run's folder, or prefix in a bucket, and its task.

    Args:
        path: where it lies.
        settings: what it was asked for.
        task: the task.
        device: where what its stores lack is computed.
    """

    path: Place
    settings: RunSettings
    task: Task = field(repr=False)
    device: str = "cpu"

    @classmethod
    def open(cls, path: Where, device: str = "cpu") -> "Run":
        """Opens a run that was precomputed.

        Args:
            path: its folder.
            device: where what its stores lack is computed.

        Returns:
            The run.

        Raises:
            ValueError: no run there, one of a later schema, its task cannot be loaded, or is not
                what the run's models were trained on.
        """
        settings = read_settings(path)
        task = task_left(load_task(settings.task, outside=path), path)
        run = cls(place(path), settings, task, device)
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
        """Projected gradients of some full models, or of means along their training."""
        return Features.open(self.path / "features", self.task, self.device)

    @cached_property
    def calibration(self) -> RunCalibration | None:
        """What the calibration bank told, if there is one."""
        there = self.path.exists(CALIBRATION)
        return RunCalibration.load(self.path / CALIBRATION) if there else None

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
        return self.fit_trak(self.trak_damping)

    def fit_trak(self, damping: float | None, **at: Any) -> LinearDatamodel:
        """TRAK scores as a linear datamodel; those that are there already are opened.

        Args:
            damping: lambda; see `trak_damping`.
            at: where to compute, as `attribution.trak.fit_trak` takes it.

        Returns:
            The datamodel.
        """
        with writers_turn(self.path):
            if taken_out(self.trak_path / "scores"):  # they were made before rows were purged
                scores = resume_trak(self.features.ends(), self.trak_path)
            else:
                scores = fit_trak(self.features.ends(), self.trak_path, damping=damping, **at)
        return LinearDatamodel.from_scores(scores)

    @property
    def trak_path(self) -> Place:
        """Folder of the TRAK scores from as many trainings as there are."""
        return self.path / f"trak-{self.features.trainings}"

    @property
    def trak_damping(self) -> float | None:
        """Lambda of TRAK: what was given, rows x weight decay (None), or another known one.

        Without weight decay it is that of the last segment's time, or group Newton's.
        """
        return self.damping_by(self.calibration.newton if self.calibration else None)

    def damping_by(self, newton: Calibration | None) -> float | None:
        """The same with a calibration that the run does not have yet."""
        if self.settings.damping is not None or self._decays:
            return self.settings.damping
        if times := self.features.times:
            return len(self.task.train_ids) * damping_per_row(self.task, times[-1:])
        return newton.damping if newton else None

    @property
    def _decays(self) -> bool:
        return self.task.recipe is not None and self.task.recipe.weight_decay > 0

    @cached_property
    def combined(self) -> Combined:
        """Weighed sum of the residual predictor, or else of group Newton, and of the datamodel."""
        if self.calibration is None or not self.calibration.weights:
            raise ValueError(f"{self.path} has no calibration bank: use another predictor")
        first = self.residual if self.calibration.residual else self.newton
        return Combined(first, self.datamodel, self.calibration.weights)

    @cached_property
    def residual(self) -> Combined:
        """Group Newton and what it lacks: a datamodel with its prediction as the prior mean."""
        if self.calibration is None or not self.calibration.residual:
            raise ValueError(f"{self.path} has no calibration bank: use another predictor")
        lacking = LinearDatamodel.open(self.residual_path)
        return Combined(self.newton, lacking, self.calibration.residual)

    @cached_property
    def linear(self) -> Combined:
        """Weighed sum of the datamodel and of TRAK scores: a query sums stored effects."""
        if self.calibration is None or not self.calibration.linear:
            raise ValueError(f"{self.path} has no calibration bank: use another predictor")
        return Combined(self.datamodel, self.trak, self.calibration.linear)

    @property
    def residual_path(self) -> Place:
        """Folder of the effects that group Newton lacks."""
        return self.path / f"residual-{self.settings.subsets}"

    @property
    def predictors(self) -> tuple[str, ...]:
        """Names of the predictors that the run has, or can make from what it has."""
        gradients = (self.path / "features/checkpoint-0").taken() and (
            self._decays
            or self.settings.damping is not None
            or self.settings.segments > 0
            or self.calibration is not None
        )
        has = {
            "datamodel": (self.path / f"datamodel-{self.settings.subsets}").taken(),
            "newton": gradients,
            "combined": self.calibration is not None and bool(self.calibration.weights),
            "residual": self.calibration is not None and bool(self.calibration.residual),
            "linear": self.calibration is not None and bool(self.calibration.linear),
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
            "linear": lambda: self.linear,
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
        weights: bool = False,
        device: str = "cpu",
        workers: int | None = None,
        scheduler: str | None = None,
    ) -> Ensemble:
        """One of two disjoint banks of models retrained without a forget set; trained if missing.

        Args:
            forget: rows that no model sees.
            which: 0 for the audit, 1 for targets and the null.
            models: how many.
            weights: keep the weights too; the bank then lies in a folder of its own.
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
        name = ("audit" if which == 0 else "targets") + ("-weights" if weights else "")
        with writers_turn(self.path):
            return train_models(
                self.task,
                subsets,
                self.path / "oracles" / f"{folder}-{models}" / name,
                keep="weights" if weights else "outputs",
                device=device,
                workers=workers,
                scheduler=scheduler,
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

    @property
    def purged(self) -> int:
        """Rows that were purged from the run; models trained before have seen them."""
        return len(read_tombstones(self.path))

    def stores(self) -> list[Store]:
        """All stores of the run that exist, finished or not."""
        return [Store.open(self.path / name) for name in store_places(self.path)]


def read_settings(path: Where, *, finishing: bool = False) -> RunSettings:
    """Settings of a run, without loading its task.

    Args:
        path: the run's folder.
        finishing: whether the caller finishes an interrupted purge, which is refused otherwise.

    Returns:
        The settings.

    Raises:
        ValueError: no run there, one whose settings cannot be read or have a later schema, or one
            that is purged in part.
    """
    if not finishing:
        refuse_unfinished(path)
    where = place(path)
    try:
        told = json.loads(where.read(SETTINGS))
        schema = told.pop("schema")
        files = tuple(told.pop("files", ()))
        # Runs made before there was group Newton have no gradients.
        told.setdefault("checkpoints", 0)
        settings = RunSettings(**told, files=files) if schema == SCHEMA else None
    except ConnectionError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"there is no run in {str(path)!r}: make one with dmm precompute TASK --run {path}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"cannot read {str(where / SETTINGS)!r}, the settings of a run ({error}): restore it"
            " from a copy, or remove it and give dmm precompute with the settings of before, which"
            " keeps what is computed"
        ) from error
    if settings is None:
        raise ValueError(
            f"the run in {str(path)!r} has schema {schema}, this version reads {SCHEMA}"
        )
    return settings


def _refuse_changed_task(run: Run) -> None:
    made = run.path / ("features/checkpoint-0" if run.settings.files else "full")
    if not made.exists(ROOT):
        return
    store, wanted = Store.open(made), run.task.settings()
    stored = {name: store.provenance.settings.get(name) for name in wanted}
    check_provenance(Provenance(stored), Provenance(wanted), store.path)
