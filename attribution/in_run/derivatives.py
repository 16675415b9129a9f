"""Derivatives of one training step: of the targets' loss at its weights, of its rows' losses."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from attribution.descent import Batch
from attribution.losses import Loss
from attribution.outputs import evaluate
from attribution.task import State

ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Point:
    """A model at one moment of training.

    Args:
        parameters: its trainable parameters, by name.
        rest: frozen parameters and buffers.
        drawn: state of the random generator that the next forward pass in train mode draws from.
    """

    parameters: State = field(repr=False)
    rest: State = field(repr=False)
    drawn: Tensor = field(repr=False)


@dataclass(frozen=True)
class Targets:
    """Rows whose loss is explained, and whether each by itself or their mean.

    Args:
        loss: the task's loss.
        module: the model's structure, in eval mode.
        inputs: [target, ...].
        labels: [target].
        per_target: whether each target is a direction of its own; else their mean is the only one.
    """

    loss: Loss
    module: nn.Module = field(repr=False)
    inputs: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    per_target: bool

    @property
    def directions(self) -> int:
        """Number of losses that are explained."""
        return len(self.inputs) if self.per_target else 1

    def losses(self, state: State) -> Tensor:
        """Losses of a model, or their mean, [direction], float64."""
        outputs = evaluate(self.module, state, self.inputs)
        losses = self.loss.value(outputs, self.labels).double()
        return losses if self.per_target else losses.mean(0, keepdim=True)

    def slopes(self, point: Point, moved: State | None) -> State:
        """Change of the loss for a unit of displacement, g + H d / 2, in eval mode.

        With g the gradient and H the Hessian of the loss at this point, a displacement d changes
        the loss by d.(g + H d / 2), up to the third power of d.

        Args:
            point: where the derivatives are taken.
            moved: the displacement d, by parameter name; None for g alone.

        Returns:
            By parameter name, [direction, ...].
        """
        if self.per_target:
            each = self.inputs.unsqueeze(1), self.labels.unsqueeze(1)
            return vmap(lambda x, y: self._sum_slope(point, moved, x, y))(*each)
        total: State = {name: torch.zeros_like(t) for name, t in point.parameters.items()}
        pieces = zip(self.inputs.split(ROWS_AT_ONCE), self.labels.split(ROWS_AT_ONCE), strict=True)
        for inputs, labels in pieces:
            more = self._sum_slope(point, moved, inputs, labels)
            total = {name: tensor + more[name] for name, tensor in total.items()}
        return {name: tensor.unsqueeze(0) / len(self.inputs) for name, tensor in total.items()}

    def _sum_slope(
        self, point: Point, moved: State | None, inputs: Tensor, labels: Tensor
    ) -> State:
        def run(parameters: State) -> Tensor:
            return functional_call(self.module, parameters | point.rest, (inputs,))  # type: ignore[no-any-return]

        def gradient(parameters: State) -> State:
            outputs, pullback = vjp(run, parameters)[:2]
            return pullback(self.loss.gradient(outputs, labels))[0]  # type: ignore[no-any-return]

        if moved is None:
            return gradient(point.parameters)
        first, second = _forward(gradient, point.parameters, moved)
        return {name: first[name] + second[name] / 2 for name in first}


def row_products(
    loss: Loss, module: nn.Module, point: Point, batch: Batch, directions: State
) -> Tensor:
    """Products of each row's share of a batch's gradient with given directions.

    weight_z x grad l_z . direction, by forward-mode differentiation: no row's gradient is formed.
    The forward pass is the training step's own, in train mode and with its dropout; a loss that
    depends on other rows through BatchNorm is differentiated as it stood in that batch.

    Args:
        loss: the task's loss.
        module: the model's structure in train mode, on the device of the batch.
        point: the model before the step.
        batch: rows of the step.
        directions: by parameter name, [direction, ...].

    Returns:
        Products, [row, direction].

    Example:
        >>> from attribution.losses import SquaredError
        >>> module = nn.Linear(2, 1, bias=False)
        >>> point = Point({"weight": torch.zeros(1, 2)}, {}, torch.get_rng_state())
        >>> batch = Batch(torch.eye(2), torch.ones(2), torch.full((2,), 0.5), torch.zeros(2, 0))
        >>> row_products(SquaredError(), module, point, batch, {"weight": torch.ones(1, 1, 2)})
        tensor([[-0.5000],
                [-0.5000]])
    """

    def run(parameters: State) -> Tensor:
        # BatchNorm writes to its buffers, which a derivative may not do to tensors from outside.
        rest = {name: tensor.clone() for name, tensor in point.rest.items()}
        return functional_call(module, parameters | rest, (batch.inputs,))  # type: ignore[no-any-return]

    def along(direction: State) -> Tensor:
        outputs, moved = _forward(run, point.parameters, direction)
        products: Tensor = (loss.gradient(outputs, batch.labels) * moved).sum(-1)
        return products * batch.weight

    with _drawing(generator_of(batch.inputs.device), point.drawn):
        return vmap(along, out_dims=1, randomness="same")(directions)


def _forward(function: Callable[[State], Any], at: State, along: State) -> tuple[Any, Any]:
    _load_forward_mode()
    return jvp(function, (at,), (along,))[:2]


@cache
def _load_forward_mode() -> None:
    # torch warns of a part of its own when it loads its rules of forward mode for the first time.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        jvp(torch.sin, (torch.zeros(1),), (torch.zeros(1),))


def generator_of(device: torch.device) -> torch.Generator:
    """The global generator that forward passes on a device draw from.

    Args:
        device: CPU or CUDA device.

    Returns:
        The generator itself.

    Example:
        >>> generator_of(torch.device("cpu")) is torch.default_generator
        True
    """
    if device.type == "cpu":
        return torch.default_generator
    number = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[number]


@contextmanager
def _drawing(generator: torch.Generator, state: Tensor) -> Iterator[None]:
    now = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(now)
