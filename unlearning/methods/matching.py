"""Matching: fine-tune a model until it outputs what a retrained model is predicted to output."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution import Counterfactual, ForgetSet
from attribution.descent import Adam
from attribution.losses import Loss
from attribution.seeds import generator
from attribution.task import Rows
from unlearning.method import (
    Plan,
    Request,
    Stopping,
    check_batchnorm,
    check_positive,
    stream_order,
)
from unlearning.projection import GradientProjection
from unlearning.runner import UnlearningMethod
from unlearning.two_sides import Objective, divergence


@dataclass(frozen=True)
class Matching(UnlearningMethod):
    """Matches predicted counterfactual outputs on the forget rows and a sample of retain rows.

    Minimises the mean over rows of a distance from the model's outputs to their targets, plus
    pull/2 |parameters - their start|^2, with Adam, its rate falling linearly to 0; target =
    f(x) before + predicted change. The distance "mse" is the mean over outputs of
    (f(x) - target)^2; "kl" is T^2 KL(p(target / T) || p(f(x) / T)), p the probabilities that the
    loss is minus a logarithm of. With a datamodel as counterfactual this is Datamodel Matching
    (DMM), with an oracle it is oracle matching (OM), with an untrained teacher bad teaching.

    Args:
        counterfactual: predicts the targets.
        backend: projects every update out of the retain rows' core gradient space; None: free.
        passes: gradient evaluations, in units of the number of training rows.
        rate: first learning rate.
        batch_size: rows a step.
        forget_multiplier: visits of a forget row, per visit of a retain row.
        retain_multiplier: retain rows visited, per forget row.
        retain_extra: retain rows visited on top.
        batchnorm: "frozen" leaves BatchNorm statistics as they are, "update" lets them move.
        distance: "mse" or "kl".
        temperature: T of "kl", by which outputs are divided.
        pull: toward the start, for targets that are less certain than the model itself.
        tolerance: stops a model when the distance of all matched rows has fallen below this share
            of what it was before; looked at once a pass over them. 0: takes all steps.

    Raises:
        ValueError: a number is outside its range, or an unknown distance.

    Source: Attribute-to-Delete (arXiv 2410.23232), algorithms C.1 and C.3.
    """

    counterfactual: Counterfactual
    backend: GradientProjection | None = None
    passes: float = 2.5
    rate: float = 5e-3
    batch_size: int = 32
    forget_multiplier: int = 3
    retain_multiplier: float = 1.0
    retain_extra: int = 300
    batchnorm: str = "frozen"
    distance: str = "mse"
    temperature: float = 1.0
    pull: float = 0.0
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, ("passes", "rate", "batch_size", "forget_multiplier", "temperature"))
        if self.distance not in DISTANCES:
            raise ValueError(f"distance must be 'mse' or 'kl', got {self.distance!r}")
        if not 0 <= self.pull < np.inf or not 0 <= self.tolerance < 1:
            raise ValueError(
                "Matching.pull must be finite and not negative and Matching.tolerance lie in"
                f" [0, 1), got {self.pull} and {self.tolerance}"
            )
        if not 0 <= self.retain_multiplier < np.inf or self.retain_extra < 0:
            raise ValueError(
                "Matching.retain_multiplier and retain_extra must be finite and not negative"
            )
        check_batchnorm(self.batchnorm)

    def plan(self, request: Request) -> Plan:
        """Steps toward the predicted outputs."""
        self.counterfactual.check_task(request.task)
        rows = np.concatenate([request.forget.rows, self.retain_rows(request.wanted, request.seed)])
        inputs, labels = request.rows(rows)
        change = self.counterfactual.change(request.wanted, request.already, rows)
        before = request.outputs(request.states, inputs)
        wanted = change.applied(before.cpu().numpy())
        targets = torch.from_numpy(wanted).to(before)
        forget, retain = np.split(np.arange(len(rows)), [len(request.forget)])
        visits = np.concatenate([np.tile(forget, self.forget_multiplier), retain])
        bound = self.backend.bind(request) if self.backend else None
        steps = -(-max(1, int(self.passes * request.forget.total)) // self.batch_size)
        apart = DISTANCES[self.distance](request.task.loss, self.temperature)
        return Plan(
            inputs=inputs,
            labels=labels,
            order=visits[stream_order(len(visits), steps, self.batch_size, request)],
            rates=self.rate * (1 - np.arange(steps) / steps),
            cotangent=apart.cotangent,
            value=apart.value,
            optimizer=Adam(),
            targets=targets,
            project=bound,
            moments=bound.moments if bound else None,
            training=self.batchnorm == "update",
            pull=self.pull,
            stopping=self._stopping(apart, labels, before, targets),
            before=before,
        )

    def _stopping(
        self, apart: Objective, labels: Tensor, before: Tensor, targets: Tensor
    ) -> Stopping | None:
        if not self.tolerance:
            return None

        def measure(outputs: Tensor, wanted: Tensor) -> Tensor:
            return apart.value(outputs, labels.expand(len(outputs), *labels.shape), wanted).mean(-1)

        rows = targets.shape[1]
        wanted = self.tolerance * measure(before, targets)
        return Stopping(-(-rows // self.batch_size), rows, WATCHED, measure, wanted)

    def retain_rows(self, forget: ForgetSet, seed: int) -> Rows:
        """The sample of retain rows that is matched beside the forget rows.

        Args:
            forget: all rows that are to be gone.
            seed: of the draw.

        Returns:
            Positions among the training rows, [row].
        """
        wanted = round(self.retain_multiplier * len(forget)) + self.retain_extra
        return generator(seed, "retain rows").permutation(forget.retained)[:wanted]


def _squared(loss: Loss, temperature: float) -> Objective:
    del loss, temperature

    def value(outputs: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        del labels
        return (outputs - targets).square().mean(-1)

    def cotangent(outputs: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        del labels
        return 2 * (outputs - targets) / outputs.shape[-1]

    return Objective(value, cotangent)


DISTANCES = {"mse": _squared, "kl": divergence}
WATCHED = "distance of the matched rows to their targets"
