"""Group Newton: what retraining without a forget set does, from gradients of a few checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.cases import common_share
from attribution.counterfactual import Change, Counterfactual, check_ids
from attribution.forget import ForgetSet
from attribution.gradients import Features
from attribution.losses import SquaredError
from attribution.newton.calibration import STEPS, Calibration
from attribution.newton.inverse import Damped, Removed
from attribution.newton.linearised import Linearised
from attribution.newton.removal import Removal
from attribution.outputs import Array
from attribution.task import Rows, Task


@dataclass(frozen=True)
class GroupNewton(Counterfactual):
    """Retrains each checkpoint's linearised model without the forget set; mean over checkpoints.

    With J_i the projected gradients of row i's outputs, g_i and R_i the derivatives of its loss
    with respect to the outputs, and H = sum_i J_i^T R_i J_i over all training rows, the first
    Newton step takes the forget set's own curvature out of H:

        d = (H - H_F + lambda I)^-1 (sum_{i in F} J_i^T g_i - |F| / n sum_i J_i^T g_i),
        change of the outputs of x = J(x) d.

    The second sum is over all n training rows: training minimises the mean of the losses, of which
    each row that stays is a larger part when some go, against the same weight decay. It is left out
    where the task's objective is the sum of the losses. Further steps take R at the new outputs,
    until the linearised problem is solved. Targets need not be known in advance.

    Of features along the segments of training, whose checkpoints are mean weights, segment l of
    time t_l solves this with lambda_l in proportion to weight decay + 1 / t_l, of which the part of
    1 / t_l pulls back to the step d of the segment before; J(x) is the last one's.

    Args:
        task: whose rows are forgotten.
        features: projected gradients of its checkpoints.
        damping: lambda, in units of the sum of the kept rows' losses, alike for all forget sets;
            None: the calibrated one, or without calibration (number of rows kept) x the recipe's
            weight decay. Along segments that of a single one of all their time, by default (number
            of rows kept) x (weight decay + 1 / time).
        temperature: T that outputs are divided by before the loss; None: the calibrated one, or 1.
        steps: Newton steps at most; 1 is the formula above. None: the calibrated number, or 3.
        calibration: fitted on models really retrained; None: std is the plain spread over the
            checkpoints and nothing is scaled.

    Raises:
        ValueError: a number is outside its range, no damping is known, or the features are of
            other rows than the task's.

    Source: group influence with the group's curvature removed; TRAK's projections (arXiv
    2303.14186) and generalised Gauss-Newton curvature; segments of training as in SOURCE (arXiv
    2405.12186), which linearises the loss and leaves the forget set in the curvature.

    Example:
        >>> import tempfile
        >>> from attribution import ForgetSet, Model, featurize
        >>> from examples.digits import mlp, task
        >>> model = Model(task, mlp().state_dict())
        >>> forget = ForgetSet.of(task, ["train-17", "train-403"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     features = featurize(task, [model], f"{folder}/features")
        ...     GroupNewton(task, features).predict(model, forget, ["test-0"]).mean.shape
        (1, 10)
    """

    task: Task = field(repr=False)
    features: Features = field(repr=False)
    damping: float | None = None
    temperature: float | None = None
    steps: int | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        for name in ("damping", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise ValueError(f"GroupNewton.{name} must be above 0 and finite, got {value}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"GroupNewton.steps must be 1 or more, got {self.steps}")
        if self.temperature not in (None, 1.0) and isinstance(self.task.loss, SquaredError):
            raise ValueError("GroupNewton.temperature must be 1 for the squared error")
        known = self.damping is not None or self.calibration is not None
        if not known and not damping_per_row(self.task, self.features.times):
            raise ValueError(
                f"task {self.task.name!r} tells no weight decay: give it a recipe with the one it"
                " was trained with, or GroupNewton a damping or a calibration"
            )
        self.check_task(self.task)

    def __getstate__(self) -> dict[str, Any]:
        """Its fields alone: factors that it keeps do not travel to workers."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def check_task(self, task: Task) -> None:
        """Refuses a task with other rows than the features'."""
        own = self.features.task
        check_ids(task, own.train_ids, own.target_ids, "the group Newton predictor")

    def change(
        self, forget: ForgetSet, already: ForgetSet | None = None, targets: Rows | None = None
    ) -> Change:
        """Predicted change: retrained without `forget`, less retrained without `already`.

        Args:
            forget: every row that is to be gone in the end.
            already: rows that are gone now.
            targets: positions among the task's targets; None: all.

        Returns:
            The change of these targets; std, over trainings, and noise, the spread of their last
            checkpoints' outputs, are unknown (not a number) with one training.

        Raises:
            ValueError: a forget set of other data, or too little damping.
        """
        places = np.arange(len(self.task.target_ids)) if targets is None else targets
        steps = self._path_steps(forget)
        wanted = self._along(steps, places)
        each = wanted if already is None else wanted - self.changes(already, places)
        plain = Change(
            wanted.mean(0),
            spread_over_checkpoints(each),
            spread_over_checkpoints(self._outputs(places)),
        )
        if self.calibration is None:
            return plain if already is None else replace(plain, mean=each.mean(0))
        common = common_share(self._along(steps, forget.rows).mean(0))
        found = self.calibration.applied(plain, forget, places, common)
        if already is None:
            return found
        # Its rows are of the kind that they were when they were removed.
        gone = replace(plain, mean=(wanted - each).mean(0))
        before = self.calibration.applied(gone, already, places)
        return replace(found, mean=found.mean - before.mean)

    def changes(self, forget: ForgetSet, targets: Rows) -> Array:
        """Change that each training predicts, as it is without calibrated factors.

        Args:
            forget: the rows that are removed.
            targets: positions among the task's targets, [target].

        Returns:
            The changes, [training, target, output].

        Raises:
            ValueError: a forget set of other data, or too little damping.
        """
        return self._along(self._path_steps(forget), targets)

    def _path_steps(self, forget: ForgetSet) -> list[Array]:
        trainings = range(self.features.trainings)
        return [self.path_step(training, forget).numpy() for training in trainings]

    def path_step(self, training: int, forget: ForgetSet) -> Tensor:
        """Step d of the projected parameters at the end of a training, [feature].

        Args:
            training: its number.
            forget: the rows that are removed.

        Returns:
            d, through all its segments.

        Raises:
            ValueError: a forget set of other data, or too little damping.
        """
        first, *later = self.features.path(training)
        step = self.step(first, forget)
        for checkpoint in later:
            step = self.step(checkpoint, forget, start=step)
        return step

    def _along(self, steps: list[Array], targets: Rows) -> Array:
        """First-order changes for a step of each training, [training, target, output]."""
        return np.stack(
            [
                self.features.product(end, step, targets)
                for end, step in zip(self._ends, steps, strict=True)
            ]
        )

    @property
    def _ends(self) -> list[int]:
        return [self.features.path(t)[-1] for t in range(self.features.trainings)]

    def step(
        self,
        checkpoint: int,
        forget: ForgetSet,
        before: float = 1.0,
        after: float = 0.0,
        *,
        start: Tensor | None = None,
    ) -> Tensor:
        """Step d of the projected parameters as the rows' weight falls, [feature].

        Args:
            checkpoint: number of the checkpoint.
            forget: the rows.
            before: their weight that the checkpoint is trained with.
            after: their weight that it is to be trained with.
            start: d at the start of the checkpoint's segment; None: 0.

        Returns:
            d.

        Raises:
            ValueError: a forget set of other data, or too little damping.
        """
        removal = self.removal(checkpoint, forget, before, after)
        damping, hold = self._damping(checkpoint, removal.kept)
        held = None if start is None else hold * start
        return removal.steps(self.damped(checkpoint, damping), [self.most_steps], held)[0]

    def removal(
        self, checkpoint: int, forget: ForgetSet, before: float = 1.0, after: float = 0.0
    ) -> Removal:
        """The problem that a step solves, for any damping and number of steps.

        Args:
            checkpoint: number of the checkpoint.
            forget: the rows.
            before: their weight that the checkpoint is trained with.
            after: their weight that it is to be trained with.

        Returns:
            The problem.

        Raises:
            ValueError: a forget set of other data.
        """
        n = len(self.task.train_ids)
        if forget.total != n:
            raise ValueError(f"the forget set is drawn from {forget.total} rows, the task has {n}")
        rows = torch.from_numpy(forget.rows)
        j, problem = self.features.jacobian(checkpoint, forget.rows), self._problem(checkpoint)
        outputs = problem.outputs[rows]
        # The share of all weight that goes, which the mean of the losses gives to what stays.
        share = (before - after) * len(forget) / (n - (1 - before) * len(forget))
        share = share if self.task.objective == "mean" else 0.0
        own = j.pulled(problem.gradients(outputs, rows))
        pull = (before - after) * own
        if share:
            pull = pull - share * (self._gradient(checkpoint, problem) - (1 - before) * own)
        mask = torch.from_numpy(forget.mask).to(pull)
        return Removal(
            problem,
            weights=((1 - share) * (1 - (1 - before) * mask), 1 - (1 - after) * mask),
            pull=pull,
            removed=Removed(j, (1 - after) * problem.hessians(outputs)),
            kept=n - (1 - after) * len(forget),
        )

    def damped(self, checkpoint: int, damping: float) -> Damped:
        """H + lambda I of all rows; the latest one of each checkpoint is kept.

        Args:
            checkpoint: number of the checkpoint.
            damping: lambda.

        Returns:
            It.
        """
        known = self._kept_factors.get(checkpoint)
        if known is None or known.damping != damping:
            curvature = self.features.curvature(checkpoint, self._temperature)
            known = Damped(torch.from_numpy(curvature), damping)
            self._kept_factors[checkpoint] = known
        return known

    @property
    def _temperature(self) -> float:
        if self.temperature is not None:
            return self.temperature
        return self.calibration.temperature if self.calibration else 1.0

    @property
    def most_steps(self) -> int:
        """Newton steps at most: those given, the calibrated number, or 3."""
        if self.steps is not None:
            return self.steps
        return self.calibration.steps if self.calibration else STEPS

    def _damping(self, checkpoint: int, kept: float) -> tuple[float, float]:
        """Lambda of a checkpoint, and what part of it pulls back to the start of its segment."""
        known = self.calibration.damping if self.calibration else None
        given = known if self.damping is None else self.damping
        decay, per_row = _decay(self.task), damping_per_row(self.task, self.features.times)
        whole = kept * per_row if given is None else given
        if not self.features.times:
            return whole, 0.0
        hold = whole / per_row / self.features.times[checkpoint % len(self.features.times)]
        return whole / per_row * decay + hold, hold

    @cached_property
    def _kept_factors(self) -> dict[int, Damped]:
        return {}

    @cached_property
    def _kept_gradients(self) -> dict[int, Tensor]:
        return {}

    def _gradient(self, checkpoint: int, problem: Linearised) -> Tensor:
        """sum_i J_i^T g_i over all training rows, [feature]."""
        if checkpoint not in self._kept_gradients:
            self._kept_gradients[checkpoint] = problem.gradient()
        return self._kept_gradients[checkpoint]

    def _problem(self, checkpoint: int) -> Linearised:
        rows = np.arange(len(self.task.train_ids))
        outputs = torch.from_numpy(self.features.outputs(checkpoint, rows)).to(self.features.dtype)
        return Linearised(
            lambda: self.features.blocks(checkpoint),
            outputs,
            self._labels,
            self.task.loss,
            self._temperature,
        )

    @cached_property
    def _labels(self) -> Tensor:
        return self.task.rows("train", np.arange(len(self.task.train_ids)))[1]

    def _outputs(self, targets: Rows) -> Array:
        return np.stack([self.features.outputs(end, targets) for end in self._ends])


def damping_per_row(task: Task, times: Sequence[float]) -> float:
    """Lambda of one row that the recipe tells: its weight decay, and 1 / time of the training.

    Gradient flow of that time leaves exp(-c time) of a component with curvature c where it was; one
    implicit step, which a pull of 1 / time back to the start makes, 1 / (1 + c time).

    Args:
        task: gives the recipe.
        times: of the segments of training; (): unknown, the weight decay alone.

    Returns:
        Lambda over the number of rows; 0 where nothing is told.

    Example:
        >>> from examples.digits import task
        >>> damping_per_row(task, (1000.0, 1000.0))
        0.001
    """
    return _decay(task) + (1 / sum(times) if times else 0.0)


def _decay(task: Task) -> float:
    return task.recipe.weight_decay if task.recipe else 0.0


def spread_over_checkpoints(each: Array) -> Array:
    """Standard deviation over checkpoints; unknown, hence NaN, of a single one.

    Args:
        each: values of each checkpoint, [checkpoint, ...].

    Returns:
        The standard deviation, [...].

    Example:
        >>> spread_over_checkpoints(np.array([[1.0], [3.0]], dtype=np.float32)).round(3)
        array([1.414], dtype=float32)
    """
    if len(each) < 2:
        return np.full(each.shape[1:], np.nan, dtype=np.float32)
    return np.asarray(each.std(0, ddof=1, dtype=np.float64), dtype=np.float32)
