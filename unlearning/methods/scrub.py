"""SCRUB: disobey the model as it was on the forget rows, obey it on the retain rows; rewind."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from attribution.descent import SGD
from unlearning.method import (
    Choose,
    Plan,
    Request,
    Rewinding,
    check_batchnorm,
    check_positive,
)
from unlearning.runner import UnlearningMethod
from unlearning.two_sides import (
    both_sides,
    divergence,
    in_turns,
    loss_objective,
    two_sided_plan,
)

MOMENTUM = 0.9


@dataclass(frozen=True)
class Scrub(UnlearningMethod):
    """SCRUB, and with rewinding SCRUB+R.

    The teacher is the model before. Epochs on the forget rows climb T^2 KL(teacher || model);
    epochs on the retain rows descend alpha T^2 KL(teacher || model) + gamma loss; all with one
    SGD of momentum 0.9, for the reason that `BadTeacher` gives. Epochs take turns and begin with
    the retain rows: on the forget rows the derivative is 0 as long as the model is its teacher, so
    that the paper's first epoch there would do nothing.

    Rewinding goes back to the epoch whose error on the forget rows is nearest to a reference, the
    last one of several: the error of the last epoch on test rows, each class weighted as in the
    forget set. The paper takes validation rows; a task has none, so its test rows stand for them.
    Their labels so choose one of a few epochs.

    Args:
        epochs: passes over the retain rows; a state is kept after each.
        forget_epochs: passes over the forget rows, one after each of the first epochs.
        rate: learning rate.
        batch_size: retain rows a step.
        forget_batch_size: forget rows a step.
        alpha: weight of the divergence on the retain rows.
        gamma: weight of the loss on the retain rows.
        temperature: T, by which outputs are divided in the divergence.
        rewind: whether to rewind; else the last epoch is kept.
        batchnorm: "frozen" leaves BatchNorm statistics as they are, "update" lets them move.

    Raises:
        ValueError: a number is outside its range.

    Source: SCRUB (arXiv 2302.09880), and SCRUB+R there.
    """

    epochs: int = 3
    forget_epochs: int = 2
    rate: float = 0.01
    batch_size: int = 64
    forget_batch_size: int = 4
    alpha: float = 0.5
    gamma: float = 1.0
    temperature: float = 1.0
    rewind: bool = True
    batchnorm: str = "frozen"

    def __post_init__(self) -> None:
        check_positive(self, ("epochs", "forget_epochs", "rate", "batch_size"))
        check_positive(self, ("forget_batch_size", "alpha", "gamma", "temperature"))
        if self.forget_epochs >= self.epochs:
            raise ValueError(
                f"Scrub.forget_epochs must be below epochs = {self.epochs}, got"
                f" {self.forget_epochs}: the last epoch repairs the retain rows"
            )
        check_batchnorm(self.batchnorm)

    def plan(self, request: Request) -> Plan:
        """Steps away from the teacher and back to it, in turns."""
        order, ends = in_turns(
            request,
            epochs=self.epochs,
            forget_epochs=self.forget_epochs,
            forget_batch=self.forget_batch_size,
            retain_batch=self.batch_size,
            before=1,
        )
        apart = divergence(request.task.loss, self.temperature)
        inputs, _ = request.rows(both_sides(request))
        plan = two_sided_plan(
            request,
            order,
            forget=apart.times(-1),
            retain=apart.times(self.alpha).plus(
                loss_objective(request.task.loss).times(self.gamma)
            ),
            rate=self.rate,
            optimizer=SGD(momentum=MOMENTUM),
            targets=request.outputs(request.states, inputs),
            training=self.batchnorm == "update",
        )
        return replace(plan, stopping=_rewinding(request, ends)) if self.rewind else plan


def _rewinding(request: Request, ends: tuple[int, ...]) -> Rewinding:
    inputs, labels = request.rows(request.forget.rows)
    test, test_labels, weights = _reference_rows(request, labels)
    return Rewinding(
        steps=ends,
        inputs=torch.cat([inputs, test]),
        choose=_nearest(request, torch.cat([labels, test_labels]), weights),
    )


def _reference_rows(request: Request, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Test rows of the classes of these labels, and weights that make up the same mixture."""
    task = request.task
    inputs, test_labels = task.rows("test", np.arange(len(task.test_ids)))
    wanted = task.loss.classes(labels.cpu())
    classes = task.loss.classes(test_labels)
    size = int(torch.cat([wanted, classes]).max()) + 1
    share = wanted.bincount(minlength=size) / classes.bincount(minlength=size).clamp_min(1)
    chosen = share[classes] > 0
    if not chosen.any():
        raise ValueError(
            "SCRUB rewinds by the error on test rows of the forget rows' classes, and task"
            f" {task.name!r} has none: set rewind to false"
        )
    weights = share[classes][chosen].double()
    device = request.device
    return (
        inputs[chosen].to(device),
        test_labels[chosen].to(device),
        (weights / weights.sum()).to(device),
    )


def _nearest(request: Request, labels: Tensor, weights: Tensor) -> Choose:
    """Chooses the state whose error on the leading forget rows is nearest to the reference."""

    def choose(outputs: Tensor) -> int:
        each = labels.expand(len(outputs), *labels.shape)
        quality = request.task.loss.quality(outputs, each).double()
        forget = quality[:, : len(request.forget)].mean(1)
        reference = (quality[-1, len(request.forget) :] * weights).sum()
        latest_first = (forget - reference).abs().flip(0).cpu().numpy()
        return len(outputs) - 1 - int(np.argmin(latest_first))

    return choose
