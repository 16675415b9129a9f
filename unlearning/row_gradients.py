"""Gradients of the loss on some rows, by parameter: how much the rows hang on each weight."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from attribution.descent import unstack
from attribution.losses import Loss
from attribution.paths import why_one_by_one
from attribution.task import State
from unlearning.method import Request

ROWS_AT_ONCE = 128
NUMBERS_AT_ONCE = 2**25  # of the gradients of single rows: 128 MiB of float32


def own_module(request: Request, index: int) -> nn.Module:
    """A module of its own with the weights of one model of a request, in eval mode.

    Whether models are computed at once or not, their gradients then come from the same kernels
    and have the same bits, so that a threshold on them picks the same weights.

    Args:
        request: the models.
        index: number of the model within the request.

    Returns:
        The module.
    """
    module = deepcopy(request.module).eval()
    module.load_state_dict(unstack(request.states, index))
    return module


def mean_gradient(module: nn.Module, loss: Loss, inputs: Tensor, labels: Tensor) -> State:
    """Gradient of the mean loss of some rows.

    Args:
        module: the model.
        loss: whose gradient.
        inputs: [row, ...].
        labels: [row].

    Returns:
        By name of the trainable parameters, in their shapes.

    Example:
        >>> from attribution import SquaredError
        >>> model = nn.Linear(1, 1, bias=False)
        >>> model.load_state_dict({"weight": torch.zeros(1, 1)})
        <All keys matched successfully>
        >>> inputs, labels = torch.tensor([[1.0], [3.0]]), torch.tensor([-1.0, -2.0])
        >>> mean_gradient(model, SquaredError(), inputs, labels)["weight"]
        tensor([[3.5000]])
    """
    parameters = _trainable(module)
    sums = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    for rows, y in zip(inputs.split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True):
        outputs = module(rows)
        pulled = loss.gradient(outputs.detach(), y) / len(inputs)
        held = list(parameters.values())
        found = torch.autograd.grad(outputs, held, pulled, materialize_grads=True)
        for name, gradient in zip(parameters, found, strict=True):
            sums[name] += gradient
    return sums


def mean_squared_gradients(module: nn.Module, loss: Loss, inputs: Tensor, labels: Tensor) -> State:
    """Mean over rows of the squared gradient of a row's loss: the diagonal of empirical Fisher.

    Args:
        module: the model.
        loss: whose gradient.
        inputs: [row, ...].
        labels: [row].

    Returns:
        By name of the trainable parameters, in their shapes.

    Example:
        >>> from attribution import SquaredError
        >>> model = nn.Linear(1, 1, bias=False)
        >>> model.load_state_dict({"weight": torch.zeros(1, 1)})
        <All keys matched successfully>
        >>> inputs, labels = torch.tensor([[1.0], [3.0]]), torch.tensor([-1.0, -2.0])
        >>> mean_squared_gradients(model, SquaredError(), inputs, labels)["weight"]
        tensor([[18.5000]])
    """
    sums = {name: torch.zeros_like(tensor) for name, tensor in _trainable(module).items()}
    many = why_one_by_one(module, inputs[:1], training=False) is None
    fitting = NUMBERS_AT_ONCE // sum(total.numel() for total in sums.values())
    size = max(1, min(ROWS_AT_ONCE, fitting)) if many else 1
    each = _each_row(module, loss) if many else _only_row(module, loss)
    for rows, y in zip(inputs.split(size), labels.split(size), strict=True):
        for name, gradient in each(rows, y).items():
            sums[name] += gradient.square().sum(0)
    return {name: total / len(inputs) for name, total in sums.items()}


def _trainable(module: nn.Module) -> State:
    return {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}


def _each_row(module: nn.Module, loss: Loss) -> Callable[[Tensor, Tensor], State]:
    parameters = {name: tensor.detach() for name, tensor in _trainable(module).items()}

    def one(row: Tensor, label: Tensor) -> State:
        outputs, pullback = vjp(lambda p: functional_call(module, p, (row[None],)), parameters)[:2]
        gradients: State = pullback(loss.gradient(outputs, label[None]))[0]
        return gradients

    return vmap(one)


def _only_row(module: nn.Module, loss: Loss) -> Callable[[Tensor, Tensor], State]:
    def one(rows: Tensor, labels: Tensor) -> State:
        found = mean_gradient(module, loss, rows, labels)
        return {name: gradient[None] for name, gradient in found.items()}

    return one
