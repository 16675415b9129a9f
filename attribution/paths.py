"""Which way of computing is the quicker one for a model on a device."""

from copy import deepcopy
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from attribution.task import State

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LARGE = 100_000  # products of a row, from which on models with convolutions are computed alone
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_FOUND: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()


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


def pays_at_once(module: nn.Module, inputs: Tensor, device: str | torch.device) -> bool:
    """Whether many models at once take less time than one by one, where both can be done.

    Convolutions of many models become one in groups. The library of the CPU has no quick kernel for
    it, which counts where the products of a row take longer than the calls
    (examples/benchmarks/convolutions.py).

    Args:
        module: a model; neither its weights nor its mode nor its buffers change.
        inputs: a few rows, [row, ...].
        device: where to compute.

    Returns:
        False on the CPU for a module whose convolutions take 100,000 products a row or more.

    Example:
        >>> few, many = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 64, 64)
        >>> convolution = nn.Conv2d(3, 9, 3)
        >>> pays_at_once(convolution, few, "cpu"), pays_at_once(convolution, many, "cpu")
        (True, False)
    """
    if torch.device(device).type != "cpu" or not _convolutions(module):
        return True
    return multiplications(module, inputs) < LARGE


def multiplications(module: nn.Module, inputs: Tensor) -> int:
    """Products that the convolutions of a module take for one row.

    Args:
        module: a model; neither its weights nor its mode nor its buffers change.
        inputs: a few rows, [row, ...].

    Returns:
        Their number.

    Example:
        >>> multiplications(nn.Conv2d(3, 9, 3), torch.zeros(2, 3, 8, 8))
        8748
    """
    counts: list[int] = []

    def count(layer: nn.Module, given: tuple[Tensor, ...], outputs: Tensor) -> None:
        del given
        counts.append(outputs[0].numel() * layer.weight[0].numel())  # type: ignore[index]

    probe = _without_hooks(deepcopy(module).eval())
    for part in _convolutions(probe):
        part.register_forward_hook(count)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        probe(inputs[:1].clone())
    return sum(counts)


def _convolutions(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, CONVOLUTIONS)]


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
    possible = why_one_by_one(module, inputs, training=training) is None
    return possible and pays_at_once(module, inputs, device)


def takes_channels_last(
    module: nn.Module, inputs: Tensor, *, training: bool, backward: bool
) -> bool:
    """Whether one model takes its inputs with the channels last in memory, and gains by it.

    The CPU's convolutions are quicker then (examples/benchmarks/convolutions.py). A model that
    views its activations in another shape refuses them, so a few rows go forth and back before;
    what was found of a module is kept.

    Args:
        module: a model; neither its weights nor its mode nor its buffers change.
        inputs: rows, [row, ...].
        training: whether the model is to compute in train mode.
        backward: whether it is to compute gradients.

    Returns:
        True for images on the CPU and a model with 2-D convolutions that can.

    Example:
        >>> rows, how = torch.zeros(2, 3, 4, 4), {"training": True, "backward": True}
        >>> [takes_channels_last(m, rows, **how) for m in (nn.Conv2d(3, 2, 1), nn.Flatten())]
        [True, False]
    """
    if inputs.ndim != 4 or not inputs.is_floating_point() or inputs.device.type != "cpu":
        return False
    if not any(isinstance(part, nn.Conv2d) for part in module.modules()):
        return False
    known = _FOUND.setdefault(module, {})
    case = (inputs.shape[1:], inputs.dtype, training, backward)
    if case not in known:
        known[case] = _can_take(module, inputs[:2], training, backward)
    return known[case]


def _can_take(module: nn.Module, inputs: Tensor, training: bool, backward: bool) -> bool:
    # A copy: the model may write into what it is given.
    rows = inputs.clone(memory_format=torch.channels_last)
    try:
        probe = _without_hooks(deepcopy(module).train(training))
        with torch.set_grad_enabled(backward), torch.random.fork_rng(devices=[]):
            outputs = probe(rows)
            if backward:
                outputs.sum().backward()
    except Exception:  # whatever it is, the way without it stays
        return False
    return True


def _without_hooks(module: nn.Module) -> nn.Module:
    # Hooks are copied with a module, and those that look on would see rows that are not theirs.
    for part in module.modules():
        for kind in HOOKS:
            getattr(part, kind).clear()
    return module


def channels_last(inputs: Tensor) -> Tensor:
    """The same rows with their channels last in memory."""
    return inputs.contiguous(memory_format=torch.channels_last)
