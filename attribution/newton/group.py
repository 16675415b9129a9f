"""Group Newton: what retraining without a forget set does, from gradients of a few checkpoints."""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.calibration_bank import common_share
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

    Args:
        task: whose rows are forgotten.
        features: projected gradients of its checkpoints.
        damping: lambda, in units of the sum of the kept rows' losses, alike for all forget sets;
            None: the calibrated one, or without calibration (number of rows kept) x the recipe's
            weight decay.
        temperature: T that outputs are divided by before the loss; None: the calibrated one, or 1.
        steps: Newton steps at most; 1 is the formula above. None: the calibrated number, or 3.
        calibration: fitted on models really retrained; None: std is the plain spread over the
            checkpoints and nothing is scaled.

    Raises:
        ValueError: a number is outside its range, no damping is known, or the features are of
            other rows than the task's.

    Source: group influence with the group's curvature removed; TRAK's projections (arXiv
    2303.14186) and generalised Gauss-Newton curvature.

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
        recipe = self.task.recipe
        known = self.damping is not None or self.calibration is not None
        if not known and (recipe is None or not recipe.weight_decay):
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
            The change of these targets; std and noise are unknown (not a number) with one
            checkpoint.

        Raises:
            ValueError: a forget set of other data, or too little damping.
        """
        places = np.arange(len(self.task.target_ids)) if targets is None else targets
        steps = self._steps(forget)
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
        """Change that each checkpoint predicts, as it is without calibrated factors.

        Args:
            forget: the rows that are removed.
            targets: positions among the task's targets, [target].

        Returns:
            The changes, [checkpoint, target, output].

        Raises:
            ValueError: a forget set of other data, or too little damping.
        """
        return self._along(self._steps(forget), targets)

    def _steps(self, forget: ForgetSet) -> list[Array]:
        return [self.step(checkpoint, forget).numpy() for checkpoint in range(len(self.features))]

    def _along(self, steps: list[Array], targets: Rows) -> Array:
        """First-order changes for a step of each checkpoint, [checkpoint, target, output]."""
        return np.stack(
            [self.features.product(number, step, targets) for number, step in enumerate(steps)]
        )

    def step(
        self, checkpoint: int, forget: ForgetSet, before: float = 1.0, after: float = 0.0
    ) -> Tensor:
        """Step d of the projected parameters as the rows' weight falls, [feature].

        Args:
            checkpoint: number of the checkpoint.
            forget: the rows.
            before: their weight that the checkpoint is trained with.
            after: their weight that it is to be trained with.

        Returns:
            d.

        Raises:
            ValueError: a forget set of other data, or too little damping.
        """
        removal = self.removal(checkpoint, forget, before, after)
        damped = self.damped(checkpoint, self._damping(removal.kept))
        return removal.steps(damped, [self.most_steps])[0]

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

    def _damping(self, kept: float) -> float:
        if self.damping is not None:
            return self.damping
        if self.calibration is not None:
            return self.calibration.damping
        assert self.task.recipe is not None
        return kept * self.task.recipe.weight_decay

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
        checkpoints = range(len(self.features))
        return np.stack([self.features.outputs(checkpoint, targets) for checkpoint in checkpoints])


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
