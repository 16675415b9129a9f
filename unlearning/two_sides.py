"""Plans of two sides: the forget rows have one objective, the retain rows another."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution.descent import Cotangent, Optimizer
from attribution.losses import Loss
from attribution.task import Rows
from unlearning.method import Plan, Request, Value, epochs_order, stream_order


@dataclass(frozen=True)
class Objective:
    """A row's objective as a function of the model's outputs, the label and the targets.

    Args:
        value: maps outputs [..., output], labels and targets to values [...].
        cotangent: derivative of the value with respect to the outputs, [..., output].
    """

    value: Value
    cotangent: Cotangent

    def times(self, factor: float) -> "Objective":
        """The objective times a factor, below 0 to climb it."""
        return Objective(
            lambda outputs, labels, targets: factor * self.value(outputs, labels, targets),
            lambda outputs, labels, targets: factor * self.cotangent(outputs, labels, targets),
        )

    def plus(self, other: "Objective") -> "Objective":
        """The sum of two objectives."""
        return Objective(
            lambda z, labels, t: self.value(z, labels, t) + other.value(z, labels, t),
            lambda z, labels, t: self.cotangent(z, labels, t) + other.cotangent(z, labels, t),
        )


def loss_objective(loss: Loss) -> Objective:
    """The loss of a row's own label.

    Args:
        loss: the task's.

    Returns:
        The objective; it needs no targets.

    Example:
        >>> from attribution import SquaredError
        >>> half = loss_objective(SquaredError()).value
        >>> half(torch.tensor([[3.0]]), torch.tensor([1.0]), torch.zeros(1, 0))
        tensor([2.])
    """
    return Objective(
        lambda outputs, labels, _: loss.value(outputs, labels),
        lambda outputs, labels, _: loss.gradient(outputs, labels),
    )


def divergence(loss: Loss, temperature: float = 1.0) -> Objective:
    """Kullback-Leibler divergence from a teacher's outputs t, the targets, to the model's z.

    T^2 KL(p(t / T) || p(z / T)), where p are the class probabilities; where the loss is a squared
    error, p is a normal density of variance 1 and this is |z - t|^2 / 2. As the loss is minus a
    logarithm of p, KL(p(t) || p(z)) = l(z) - l(t) - l'(t) (z - t), whatever the label.

    Args:
        loss: the task's.
        temperature: T, above 0.

    Returns:
        The objective; its targets are the teacher's outputs, [..., output].

    Example:
        >>> from attribution import CrossEntropy
        >>> teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> divergence(CrossEntropy()).value(student, torch.tensor([0]), teacher)
        tensor([0.1201])

    Source: SCRUB (arXiv 2302.09880); the temperature is that of distillation.
    """

    def value(outputs: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        z, t = outputs / temperature, targets / temperature
        linear = (loss.gradient(t, labels) * (z - t)).sum(-1)
        return temperature**2 * (loss.value(z, labels) - loss.value(t, labels) - linear)

    def cotangent(outputs: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        student = loss.gradient(outputs / temperature, labels)
        return temperature * (student - loss.gradient(targets / temperature, labels))

    return Objective(value, cotangent)


def two_sided_plan(
    request: Request,
    order: Rows,
    *,
    forget: Objective,
    retain: Objective,
    rate: float,
    optimizer: Optimizer,
    targets: Tensor | None = None,
    training: bool = False,
) -> Plan:
    """Steps at one rate on the forget rows and all retain rows, in this order.

    Args:
        request: the models.
        order: positions among the forget rows followed by the retain rows, [model, step, row].
        forget: objective of a forget row.
        retain: objective of a retain row.
        rate: learning rate.
        optimizer: SGD or Adam.
        targets: what the objectives need beside labels, [model, row, number], or None.
        training: steps in train mode.

    Returns:
        The plan.
    """
    inputs, labels = request.rows(both_sides(request))
    side = torch.arange(len(inputs), device=request.device) < len(request.forget)
    side = side.to(inputs.dtype).expand(len(request.numbers), -1).unsqueeze(-1)

    def value(outputs: Tensor, labels: Tensor, told: Tensor) -> Tensor:
        first, second = (o.value(outputs, labels, told[..., 1:]) for o in (forget, retain))
        return torch.where(told[..., 0] > 0, first, second)

    def cotangent(outputs: Tensor, labels: Tensor, told: Tensor) -> Tensor:
        first, second = (o.cotangent(outputs, labels, told[..., 1:]) for o in (forget, retain))
        return torch.where(told[..., :1] > 0, first, second)

    return Plan(
        inputs=inputs,
        labels=labels,
        order=order,
        rates=np.full(order.shape[1], rate),
        cotangent=cotangent,
        value=value,
        optimizer=optimizer,
        targets=side if targets is None else torch.cat([side, targets], dim=-1),
        training=training,
    )


def both_sides(request: Request) -> Rows:
    """Positions of the forget rows among the training rows, then of all retain rows."""
    return np.concatenate([request.forget.rows, request.wanted.retained])


def side_by_side(
    request: Request, *, epochs: int, forget_batch: int, retain_batch: int
) -> tuple[Rows, tuple[float, float]]:
    """Steps of so many forget rows and so many retain rows; the forget rows come round again.

    Args:
        request: the models.
        epochs: passes over the retain rows.
        forget_batch: forget rows a step.
        retain_batch: retain rows a step.

    Returns:
        Positions [model, step, row] for `two_sided_plan`, and the factors of a forget and of a
        retain row that make the mean over a step the sum of the two sides' means.
    """
    first = len(request.forget)
    retained = len(request.wanted.retained)
    steps = -(-epochs * retained // retain_batch)
    forget = stream_order(first, steps, forget_batch, request, "forget order")
    retain = first + stream_order(retained, steps, retain_batch, request, "retain order")
    together = forget_batch + retain_batch
    return np.concatenate([forget, retain], axis=2), (
        together / forget_batch,
        together / retain_batch,
    )


def in_turns(
    request: Request,
    *,
    epochs: int,
    forget_epochs: int,
    forget_batch: int,
    retain_batch: int,
    before: int = 0,
) -> tuple[Rows, tuple[int, ...]]:
    """Epochs of the retain rows; before each of some of them, an epoch of the forget rows.

    Args:
        request: the models.
        epochs: passes over the retain rows.
        forget_epochs: passes over the forget rows.
        forget_batch: forget rows a step.
        retain_batch: retain rows a step.
        before: number of epochs of the retain rows before the first one of the forget rows.

    Returns:
        Positions [model, step, row] for `two_sided_plan`, padded with -1, and the number of steps
        after each epoch of the retain rows.
    """
    first = len(request.forget)
    retained = len(request.wanted.retained)
    forget = epochs_order(first, forget_epochs, forget_batch, request, "forget order")
    retain = epochs_order(retained, epochs, retain_batch, request, "retain order")
    retain[retain >= 0] += first
    width = max(forget_batch, retain_batch)
    turns = np.split(_widened(retain, width), epochs, axis=1)
    for epoch, each in enumerate(np.split(_widened(forget, width), forget_epochs, axis=1), before):
        turns[epoch] = np.concatenate([each, turns[epoch]], axis=1)
    ends = np.cumsum([turn.shape[1] for turn in turns])
    return np.concatenate(turns, axis=1), tuple(int(end) for end in ends)


def _widened(order: Rows, width: int) -> Rows:
    missing = width - order.shape[2]
    return np.pad(order, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
