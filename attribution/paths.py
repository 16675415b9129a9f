"""Which way of computing is the quicker one for a model on a device."""

from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from attribution.task import State

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def why_one_by_one(module: nn.Module, inputs: Tensor, *, training: bool) -> str | None:
    """Why models of this kind cannot be computed many at once, or None where they can.

    Args:
        module: a model.
        inputs: a few rows, [row, ...].
        training: whether steps are taken in train mode.

    Returns:
        The reason in words, or None.

    Example:
        >>> why_one_by_one(nn.Linear(3, 2), torch.zeros(2, 3), training=True)
        >>> why_one_by_one(nn.BatchNorm1d(3), torch.zeros(2, 3), training=True)
        'its buffers (running_mean, ...) change during training'
    """
    buffers = [name for name, _ in module.named_buffers()]
    if training and buffers:
        return f"its buffers ({buffers[0]}, ...) change during training"
    if len(dict(module.named_parameters(remove_duplicate=False))) > len(list(module.parameters())):
        return "some of its layers share parameters"
    probe = deepcopy(module).train(training)
    trainable = {name for name, tensor in probe.named_parameters() if tensor.requires_grad}
    two = {name: torch.stack([tensor, tensor]) for name, tensor in probe.state_dict().items()}
    parameters = {name: tensor for name, tensor in two.items() if name in trainable}
    rest = {name: tensor for name, tensor in two.items() if name not in trainable}

    def pull(p: State, b: State, rows: Tensor) -> State:
        outputs, pullback = vjp(partial(call, probe, b, rows), p)[:2]
        gradients: State = pullback(outputs)[0]
        return gradients

    try:
        vmap(pull)(parameters, rest, torch.stack([inputs, inputs]))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return str(error).strip().splitlines()[0]
    return None


def call(module: nn.Module, rest: State, inputs: Tensor, parameters: State) -> Tensor:
    """Outputs of a module with these parameters and the rest of its state."""
    outputs: Tensor = functional_call(module, parameters | rest, (inputs,))
    return outputs


def pays_at_once(module: nn.Module, device: str | torch.device) -> bool:
    """Whether many models at once take less time than one by one, where both can be done.

    Convolutions of many models become one in groups, for which the library of the CPU has no quick
    kernel: at 100,000 parameters and 32 rows of 32 x 32 pixels, a step of each model takes 1.2
    times as long as alone, and its outputs 2.8 times.

    Args:
        module: a model.
        device: where to compute.

    Returns:
        False for a module with convolutions on the CPU.

    Example:
        >>> pays_at_once(nn.Linear(3, 2), "cpu"), pays_at_once(nn.Conv2d(3, 2, 1), "cpu")
        (True, False)
    """
    grouped = any(isinstance(part, CONVOLUTIONS) for part in module.modules())
    return torch.device(device).type != "cpu" or not grouped


def at_once(
    module: nn.Module, inputs: Tensor, device: str | torch.device, *, training: bool
) -> bool:
    """Whether many models of this kind are computed at once: they can be, and it pays.

    Args:
        module: a model.
        inputs: a few rows, [row, ...].
        device: where to compute.
        training: whether steps are taken in train mode.

    Returns:
        True or False.

    Example:
        >>> at_once(nn.Linear(3, 2), torch.zeros(2, 3), "cpu", training=True)
        True
    """
    paying = pays_at_once(module, device)
    return paying and why_one_by_one(module, inputs, training=training) is None


def takes_channels_last(module: nn.Module, inputs: Tensor) -> bool:
    """Whether one model takes its inputs with the channels last in memory, and gains by it.

    The CPU's convolutions are 1.4 times as quick then. A model that views its activations in
    another shape may refuse them, so one row goes forth and back before.

    Args:
        module: a model; neither its weights nor its mode nor its buffers change.
        inputs: rows, [row, ...].

    Returns:
        True for images on the CPU and a model with 2-D convolutions that can.

    Example:
        >>> rows = torch.zeros(2, 3, 4, 4)
        >>> takes_channels_last(nn.Conv2d(3, 2, 1), rows), takes_channels_last(nn.Flatten(), rows)
        (True, False)
    """
    if inputs.ndim != 4 or not inputs.is_floating_point() or inputs.device.type != "cpu":
        return False
    if not any(isinstance(part, nn.Conv2d) for part in module.modules()):
        return False
    probe = _without_hooks(deepcopy(module).eval())
    try:
        with torch.enable_grad():
            outputs = probe(channels_last(inputs[:2]))
            outputs.sum().backward()
    except RuntimeError:
        return False
    return True


def _without_hooks(module: nn.Module) -> nn.Module:
    # Hooks are copied with a module, and those that look on would see rows that are not theirs.
    for part in module.modules():
        for hooks in (part._forward_pre_hooks, part._forward_hooks, part._backward_hooks):
            hooks.clear()
    return module


def channels_last(inputs: Tensor) -> Tensor:
    """The same rows with their channels last in memory."""
    return inputs.contiguous(memory_format=torch.channels_last)
