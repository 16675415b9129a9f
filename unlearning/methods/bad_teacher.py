"""Bad teacher: an untrained model teaches the forget rows, the model itself the retain rows."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution.descent import SGD, stack
from attribution.seeds import derive_seed, generator
from attribution.task import State
from unlearning.method import Plan, Request, check_batchnorm, check_positive, epochs_order
from unlearning.runner import UnlearningMethod
from unlearning.two_sides import divergence

MOMENTUM = 0.9


@dataclass(frozen=True)
class BadTeacher(UnlearningMethod):
    """Descends T^2 KL(teacher || model), the mean over the forget rows and a sample of retain rows.

    The teacher of a forget row is a newly initialised model, another for each model and seed; the
    teacher of a retain row is the model as it was before. The steps are those of SGD with momentum
    0.9; the paper's Adam would turn the rounding errors of a step without forget rows, where the
    model is its own teacher, into full steps.

    Args:
        epochs: passes over the forget rows and the sample.
        rate: learning rate.
        batch_size: rows a step.
        retain_share: share of the retain rows that is drawn, in (0, 1].
        temperature: T, by which outputs are divided.
        batchnorm: "frozen" leaves BatchNorm statistics as they are, "update" lets them move.

    Raises:
        ValueError: a number is outside its range.

    Source: "Can Bad Teaching Induce Forgetting?" (arXiv 2205.08096).
    """

    epochs: int = 4
    rate: float = 1e-4
    batch_size: int = 64
    retain_share: float = 0.3
    temperature: float = 1.0
    batchnorm: str = "frozen"

    def __post_init__(self) -> None:
        check_positive(self, ("epochs", "rate", "batch_size", "retain_share", "temperature"))
        if self.retain_share > 1:
            raise ValueError(f"BadTeacher.retain_share must be at most 1, got {self.retain_share}")
        check_batchnorm(self.batchnorm)

    def plan(self, request: Request) -> Plan:
        """Steps toward the two teachers."""
        random = generator(request.seed, "retain rows")
        retained = random.permutation(request.wanted.retained)
        sample = retained[: max(1, round(self.retain_share * len(retained)))]
        inputs, labels = request.rows(np.concatenate([request.forget.rows, sample]))
        order = epochs_order(len(inputs), self.epochs, self.batch_size, request)
        apart = divergence(request.task.loss, self.temperature)
        return Plan(
            inputs=inputs,
            labels=labels,
            order=order,
            rates=np.full(order.shape[1], self.rate),
            cotangent=apart.cotangent,
            value=apart.value,
            optimizer=SGD(momentum=MOMENTUM),
            targets=_taught(request, inputs),
            training=self.batchnorm == "update",
        )


def _taught(request: Request, inputs: Tensor) -> Tensor:
    """Outputs of the bad teachers on the leading forget rows, of the models on the others."""
    forget, retain = inputs[: len(request.forget)], inputs[len(request.forget) :]
    bad = request.outputs(bad_teachers(request), forget)
    return torch.cat([bad, request.outputs(request.states, retain)], dim=1)


def bad_teachers(request: Request) -> State:
    """States of newly initialised models, each tensor [model, ...].

    Args:
        request: gives the models' numbers and the seed.

    Returns:
        The states, on the device.
    """
    seed = derive_seed(request.seed, "bad teacher")
    new = [request.task.new_model(seed, number) for number in request.numbers]
    return stack([module.to(request.device).state_dict() for module in new])
