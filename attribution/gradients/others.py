"""Per-example gradients of parameters without a factorised form, through torch.func."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from attribution.gradients.capture import call, evaluating, tied_state
from attribution.gradients.plan import Plan
from attribution.task import State

GRADIENT_BYTES = 64 * 2**20  # of the gradients that are held at once


def other_features(
    module: nn.Module,
    plan: Plan,
    state: Mapping[str, Tensor],
    inputs: Tensor,
    cotangents: Tensor,
) -> Tensor:
    """Sparse projections of the per-example gradients of a plan's other parameters.

    Each row is differentiated by itself, in as many rows at once as 64 MiB of gradients allow.

    Args:
        module: gives the structure; it is not changed.
        plan: of the module.
        state: state dict of the model.
        inputs: [row, ...].
        cotangents: [row, direction, output].

    Returns:
        Features [row, direction, feature] of all other parameters, one behind the other.

    Raises:
        ValueError: torch.func cannot differentiate them; names them.
    """
    parameters, rest = tied_state(plan, state)
    wanted = {other.name: parameters.pop(other.name) for other in plan.others}

    def outputs(row: Tensor, changed: State) -> Tensor:
        return call(module, plan, parameters | changed, rest, row.unsqueeze(0))[0]

    def gradients(row: Tensor, directions: Tensor) -> State:
        found: State = vmap(vjp(partial(outputs, row), wanted)[1])(directions)[0]
        return found

    numbers = cotangents.shape[1] * sum(tensor.numel() for tensor in wanted.values())
    rows = max(1, GRADIENT_BYTES // (numbers * cotangents.element_size()))
    pieces = zip(inputs.split(rows), cotangents.split(rows), strict=True)
    with evaluating(module):
        return torch.cat([_projected(plan, _tried(wanted, gradients, *piece)) for piece in pieces])


def _tried(
    wanted: State, gradients: Callable[[Tensor, Tensor], State], inputs: Tensor, cotangents: Tensor
) -> State:
    try:
        with warnings.catch_warnings():
            # Kernels without a rule for vmap run row by row; nothing else is to be had.
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            return vmap(gradients)(inputs, cotangents)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no per-example gradient of {', '.join(map(repr, wanted))}: no layer of a known kind"
            f" has it to itself, and torch.func cannot differentiate the model ({reason}); freeze"
            " it with requires_grad_(False), or write the model with known layers"
        ) from error


def _projected(plan: Plan, gradients: State) -> Tensor:
    each = [other.sparse.apply(gradients[other.name].flatten(2)) for other in plan.others]
    return torch.cat(each, 2)
