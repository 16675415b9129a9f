"""Requests and plans: an unlearning method turns a request into a plan of gradient steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attribution.descent import SGD, Cotangent, Optimizer, Project, unstack
from attribution.forget import ForgetSet
from attribution.outputs import evaluate, evaluate_many
from attribution.seeds import generator
from attribution.task import Rates, Rows, State, Task
from attribution.training import epoch_order

PLAIN = (bool, int, float, str)
Value = Callable[[Tensor, Tensor, Tensor], Tensor]
Measure = Callable[[Tensor, Tensor], Tensor]
Choose = Callable[[Tensor], int]


@dataclass(frozen=True)
class Request:
    """Models that are to forget the same rows.

    Args:
        task: what they were trained for.
        forget: rows to forget now.
        already: rows they have forgotten before, or None.
        states: stacked state dicts, each tensor [model, ...], on the device.
        numbers: number of each model, which selects its random stream.
        digests: digest of the weights that each model's stored moments belong to.
        moments: what each model carries from a projected request before this one; None for all
            where there was none.
        seed: of every draw.
        device: where to compute.
        many: whether the models are computed at once.
        since: rows they have forgotten since then, which these moments still count, or None.
    """

    task: Task
    forget: ForgetSet
    already: ForgetSet | None
    states: State = field(repr=False)
    numbers: tuple[int, ...]
    digests: tuple[str, ...]
    moments: tuple[Mapping[str, Tensor] | None, ...]
    seed: int
    device: torch.device
    many: bool
    since: ForgetSet | None = None

    @property
    def wanted(self) -> ForgetSet:
        """All rows that are to be gone in the end."""
        return self.forget.union(self.task, self.already)

    @property
    def counted(self) -> ForgetSet | None:
        """Rows forgotten before that the models' moments, carried or stored, still count."""
        return self.already if self.moments[0] is None else self.since

    @cached_property
    def module(self) -> nn.Module:
        """A model of the task's structure, on the device."""
        return self.task.new_model(0).to(self.device)

    def rows(self, positions: Rows) -> tuple[Tensor, Tensor]:
        """Inputs and labels of training rows, on the device."""
        inputs, labels = self.task.rows("train", positions)
        return inputs.to(self.device), labels.to(self.device)

    def outputs(self, states: State, inputs: Tensor) -> Tensor:
        """Outputs of all models in eval mode, [model, row, output]."""
        if self.many:
            return evaluate_many(self.module, states, inputs)
        module, count = self.module, len(self.numbers)
        return torch.stack([evaluate(module, unstack(states, i), inputs) for i in range(count)])


@dataclass(frozen=True)
class Stopping:
    """Stops a model at the first check where its measure is below its reference.

    Of that state and the one at the check before, the one whose measure is nearer is kept.

    Args:
        every: steps between checks.
        rows: number of leading plan rows that are measured.
        words: what the measure is.
        measure: maps outputs [model, row, output] and the plan's targets of these rows to a number
            of each model, [model].
        reference: of each model, [model].
    """

    every: int
    rows: int
    words: str
    measure: Measure
    reference: Tensor


@dataclass(frozen=True)
class Rewinding:
    """Goes back, after the last step, to one of the states that a model has been in.

    Args:
        steps: numbers of steps after which a state is kept, ascending; the last one ends the plan.
        inputs: rows whose outputs decide, [row, ...].
        choose: maps outputs [state, row, output] of one model to the number of its state.
    """

    steps: tuple[int, ...]
    inputs: Tensor
    choose: Choose


@dataclass(frozen=True)
class Plan:
    """Gradient steps, the same for one model and for many.

    Args:
        inputs: rows that are visited, [row, ...].
        labels: [row].
        order: positions among these rows of every step, [model, step, row], padded with -1.
        rates: learning rate of every step, [step].
        cotangent: derivative of a row's objective with respect to its outputs.
        value: a row's objective, for the history.
        optimizer: SGD or Adam.
        targets: what a row's objective needs beside its label, [model, row, number], such as
            outputs to match, or None.
        project: maps updates by parameter name to the updates that are made, or None.
        stopping: when to stop early, or which state to go back to; None: neither.
        training: steps in train mode, so that BatchNorm statistics move.
        pull: adds pull/2 |parameters - their start|^2 to the objective.
        moments: of the retain rows' inputs, each [model, *moment_shape], which the new models carry
            to their next request; None: the plan needs none.
        start: states before the first step, each tensor [model, ...]; None: the request's.
        spent: rows that a gradient was computed for before the first step.
        before: outputs of the request's states on these rows, where they are known already, [model,
            row, output].
    """

    inputs: Tensor
    labels: Tensor
    order: Rows
    rates: Rates
    cotangent: Cotangent
    value: Value
    optimizer: Optimizer = field(default_factory=SGD)
    targets: Tensor | None = None
    project: Callable[[int | None], Project] | None = None
    stopping: Stopping | Rewinding | None = None
    training: bool = False
    pull: float = 0.0
    moments: State | None = None
    start: State | None = None
    spent: int = 0
    before: Tensor | None = None


def stream_order(
    rows: int,
    steps: int,
    batch_size: int,
    request: Request,
    purpose: str = "unlearning order",
) -> Rows:
    """Rows of every step of every model: random passes in one stream, no batch cut short.

    Args:
        rows: number of rows to draw from.
        steps: number of steps.
        batch_size: rows a step.
        request: gives the models' numbers and the seed.
        purpose: names the draw; another name gives an independent one.

    Returns:
        Positions [model, step, row].
    """
    passes = -(-steps * batch_size // rows)
    orders = []
    for number in request.numbers:
        random = generator(request.seed, purpose, number)
        stream = np.concatenate([random.permutation(rows) for _ in range(passes)])
        orders.append(stream[: steps * batch_size].reshape(steps, batch_size))
    return np.stack(orders)


def epochs_order(
    rows: int,
    epochs: int,
    batch_size: int,
    request: Request,
    purpose: str = "unlearning order",
) -> Rows:
    """Rows of every step of every model: whole passes in even batches, padded with -1.

    Args:
        rows: number of rows.
        epochs: passes over them.
        batch_size: rows a step at most.
        request: gives the models' numbers and the seed.
        purpose: names the draw; another name gives an independent one.

    Returns:
        Positions [model, step, row].
    """
    orders = []
    for number in request.numbers:
        random = generator(request.seed, purpose, number)
        passes = [epoch_order(np.arange(rows), batch_size, random) for _ in range(epochs)]
        orders.append(np.concatenate(passes))
    return np.stack(orders)


def loss_plan(
    request: Request,
    rows: Rows,
    *,
    sign: int,
    epochs: int,
    rate: float,
    batch_size: int,
    training: bool,
) -> Plan:
    """Plain passes over some rows, down the task's loss (sign 1) or up (sign -1).

    Args:
        request: the models.
        rows: positions of the training rows to visit.
        sign: 1 to descend, -1 to ascend.
        epochs: passes over the rows.
        rate: learning rate.
        batch_size: rows a step.
        training: steps in train mode.

    Returns:
        The plan.
    """
    inputs, labels = request.rows(rows)
    order = epochs_order(len(rows), epochs, batch_size, request)
    loss = request.task.loss
    return Plan(
        inputs=inputs,
        labels=labels,
        order=order,
        rates=np.full(order.shape[1], rate),
        cotangent=lambda outputs, y, _: sign * loss.gradient(outputs, y),
        value=lambda outputs, y, _: loss.value(outputs, y),
        training=training,
    )


def check_positive(method: object, names: Sequence[str]) -> None:
    """Refuses settings of a method that are not above 0, or infinite.

    Args:
        method: a dataclass.
        names: fields to check.

    Raises:
        ValueError: names the field and its value.
    """
    for name in names:
        if not 0 < getattr(method, name) < np.inf:
            kind = type(method).__name__
            raise ValueError(
                f"{kind}.{name} must be above 0 and finite, got {getattr(method, name)}"
            )


def check_share(method: object, name: str) -> None:
    """Refuses a setting of a method that is no share strictly between 0 and 1.

    Args:
        method: a dataclass.
        name: field to check.

    Raises:
        ValueError: names the field and its value.
    """
    if not 0 < getattr(method, name) < 1:
        kind = type(method).__name__
        raise ValueError(f"{kind}.{name} must lie between 0 and 1, got {getattr(method, name)}")


def check_batchnorm(batchnorm: str) -> None:
    """Refuses anything but the two policies.

    Args:
        batchnorm: the policy.

    Raises:
        ValueError: neither "frozen" nor "update".
    """
    if batchnorm not in ("frozen", "update"):
        raise ValueError(f"batchnorm must be 'frozen' or 'update', got {batchnorm!r}")


def told_settings(method: object) -> dict[str, Any]:
    """Settings of a method for the provenance of a model.

    Args:
        method: a dataclass.

    Returns:
        Plain values by field name; of a counterfactual or a backend its kind and its own plain
        values, because what lies deeper holds ids of rows.
    """
    return {f.name: _told(getattr(method, f.name)) for f in fields(method)}  # type: ignore[arg-type]


def _told(value: Any) -> Any:
    if _is_plain(value):
        return dict(value) if isinstance(value, Mapping) else value
    if not is_dataclass(value):
        return type(value).__name__
    own = {f.name: getattr(value, f.name) for f in fields(value)}
    own = {n: _told(held) for n, held in own.items() if held is not None and _is_plain(held)}
    return {"kind": type(value).__name__} | own if own else type(value).__name__


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):  # numbers by layer, never by row
        return all(isinstance(item, float) for item in value.values())
    return value is None or isinstance(value, PLAIN)
