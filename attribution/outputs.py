"""Outputs of models on targets, always in eval mode; margins of outputs."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from attribution.devices import repeatable
from attribution.paths import channels_last, takes_channels_last
from attribution.task import Task

Array = np.ndarray[Any, np.dtype[np.float32]]

ROWS_AT_ONCE = 512


def evaluate(module: nn.Module, state: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Outputs of one model.

    Args:
        module: gives the structure; neither its weights nor its mode change.
        state: state dict of the model, on the device where to compute.
        inputs: [row, ...], on any device.

    Returns:
        Outputs [row, output], on the inputs' device.

    Example:
        >>> evaluate(nn.Linear(2, 1), nn.Linear(2, 1).state_dict(), torch.zeros(3, 2)).shape
        torch.Size([3, 1])
    """
    device = next(iter(state.values())).device if state else inputs.device
    few = inputs[:2].to(device)
    turned = takes_channels_last(module, few, training=False, backward=False)

    def run(rows: Tensor) -> Tensor:
        rows = channels_last(rows) if turned else rows
        # A state holds layers that share a parameter each with a tensor of its own.
        return functional_call(module, dict(state), (rows,), tie_weights=False)  # type: ignore[no-any-return]

    return _in_pieces(module, inputs, run, 0, device)


def evaluate_many(module: nn.Module, states: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Outputs of many models on the same rows.

    Args:
        module: gives the structure; neither its weights nor its mode change.
        states: stacked state dicts, each tensor [model, ...], on the device where to compute.
        inputs: [row, ...], on any device.

    Returns:
        Outputs [model, row, output], on the inputs' device.

    Example:
        >>> from attribution.descent import stack
        >>> states = stack([nn.Linear(2, 1).state_dict() for _ in range(4)])
        >>> evaluate_many(nn.Linear(2, 1), states, torch.zeros(3, 2)).shape
        torch.Size([4, 3, 1])
    """

    def run(rows: Tensor) -> Tensor:
        call = vmap(lambda state: functional_call(module, state, (rows,), tie_weights=False))
        return call(dict(states))  # type: ignore[no-any-return]

    return _in_pieces(module, inputs, run, 1, next(iter(states.values())).device)


def _in_pieces(
    module: nn.Module,
    inputs: Tensor,
    run: Callable[[Tensor], Tensor],
    axis: int,
    device: torch.device,
) -> Tensor:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), repeatable(device):
            pieces = [run(rows.to(device)) for rows in inputs.split(ROWS_AT_ONCE)]
            return torch.cat(pieces, dim=axis).to(inputs.device)
    finally:
        for part, mode in modes.items():
            part.training = mode


def target_margins(task: Task, outputs: np.ndarray[Any, Any]) -> Array:
    """Margins of outputs on all targets of a task.

    Args:
        task: gives the labels and the loss that defines the margin.
        outputs: [..., target, output], all targets.

    Returns:
        Margins [..., target].

    Example:
        >>> from examples.digits import task
        >>> target_margins(task, np.zeros((2, 1797, 10), dtype=np.float32)).shape
        (2, 1797)
    """
    _, labels = task.targets()
    values = torch.from_numpy(np.ascontiguousarray(outputs))
    return task.loss.margin(values, labels.expand(*values.shape[:-2], *labels.shape)).numpy()
