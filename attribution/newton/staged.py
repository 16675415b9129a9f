"""Staged group Newton: the forget set goes in parts, with new gradients after each."""

import tempfile
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from attribution.cases import KINDS, common_share
from attribution.counterfactual import Change, Counterfactual
from attribution.forget import ForgetSet
from attribution.gradients import Features, featurize
from attribution.gradients.stored_directions import stored_directions
from attribution.model import Model
from attribution.newton.group import GroupNewton, spread_over_checkpoints
from attribution.outputs import Array
from attribution.task import Rows, State, Task


@dataclass(frozen=True)
class StagedNewton(Counterfactual):
    """Lowers the forget set's weight in equal parts and linearises each checkpoint anew after each.

    Stage s of S takes the weight of the forget rows from 1 - s / S to 1 - (s + 1) / S by a step of
    group Newton, moves the parameters by P^T d and computes all gradients of the training rows
    again, along the same principal directions where they have some. The change is that of the
    outputs of the moved model, f(theta_S) - f(theta_0), without a linearisation; mean over
    checkpoints. Calibrated variances are taken over, scales are not.

    Args:
        newton: one stage; gives checkpoints, damping, temperature and steps.
        stages: S.

    Raises:
        ValueError: fewer than 1 stage.
    """

    newton: GroupNewton
    stages: int = 3

    def __post_init__(self) -> None:
        if self.stages < 1:
            raise ValueError(f"StagedNewton.stages must be 1 or more, got {self.stages}")
        if self.newton.features.times:
            raise ValueError(
                "StagedNewton moves trained models on and needs the features of these: featurize"
                " Ensemble.checkpoints, or precompute with segments=0"
            )

    @property
    def gradient_evaluations(self) -> int:
        """Gradients of single outputs on single rows that one forget set costs."""
        task, features = self.newton.task, self.newton.features
        outputs = features.outputs(0, np.array([0])).shape[1]
        return int(len(features) * (self.stages - 1) * len(task.train_ids) * outputs)

    def check_task(self, task: Task) -> None:
        """Refuses a task with other rows than the features'."""
        self.newton.check_task(task)

    def change(
        self, forget: ForgetSet, already: ForgetSet | None = None, targets: Rows | None = None
    ) -> Change:
        """Predicted change: retrained without `forget`, less retrained without `already`.

        Raises:
            ValueError: a forget set of other data, or too little damping.
        """
        task, features = self.newton.task, self.newton.features
        places = np.arange(len(task.target_ids)) if targets is None else targets
        every = self.changes(forget, np.concatenate([places, forget.rows]))
        each, common = every[:, : len(places)], common_share(every[:, len(places) :].mean(0))
        if already is not None:
            each = each - self.changes(already, places)
        outputs = np.stack([features.outputs(c, places) for c in range(len(features))])
        plain = Change(
            each.mean(0), spread_over_checkpoints(each), spread_over_checkpoints(outputs)
        )
        if self.newton.calibration is None:
            return plain
        told = replace(self.newton.calibration, scale=dict.fromkeys(KINDS, 1.0))
        return told.applied(plain, forget, places, common)

    def changes(self, forget: ForgetSet, targets: Rows) -> Array:
        """Change that each checkpoint predicts, [checkpoint, target, output]."""
        features = self.newton.features
        return np.stack([self._moved(c, forget, targets) for c in range(len(features))])

    def _moved(self, checkpoint: int, forget: ForgetSet, targets: Rows) -> Array:
        task, features = self.newton.task, self.newton.features
        state, number = features.model(checkpoint).state, checkpoint
        shares = np.linspace(1, 0, self.stages + 1)
        for stage in range(self.stages):
            with tempfile.TemporaryDirectory() as folder:
                if stage:
                    features, number = self._anew(checkpoint, state, folder), 0
                newton = replace(self.newton, features=features)
                step = newton.step(number, forget, float(shares[stage]), float(shares[stage + 1]))
                state = _added(state, features.projector(number).adjoint(step))
        after = Model(task, state).outputs(targets, device=self.newton.features.device)
        return after - self.newton.features.outputs(checkpoint, targets)

    def _anew(self, checkpoint: int, state: State, folder: str) -> Features:
        task, features = self.newton.task, self.newton.features
        projection = features.projector(0).projection
        known = [stored_directions(features.stores[checkpoint])] if projection.principal else None
        return featurize(
            task,
            [Model(task, state)],
            f"{folder}/features",
            projection=projection,
            directions=known,
            factors="factors" in features.stores[0].spec.arrays,
            device=features.device,
            targets="train",
        )


def _added(state: State, direction: dict[str, Tensor]) -> State:
    moved = {name: state[name] + step.to(state[name]) for name, step in direction.items()}
    return dict(state) | moved
