"""Gradient steps on one model, or on many at once: the one engine of training and unlearning.

The derivative of the loss with respect to the outputs is given in closed form (the cotangent),
so one forward pass and one pullback make a step, whatever the loss.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from attribution.paths import call, channels_last, takes_channels_last
from attribution.task import State
from attribution.tracing import Recording, record

Cotangent = Callable[[Tensor, Tensor, Tensor], Tensor]
Gradients = Callable[["Batch"], Sequence[Tensor]]
Project = Callable[[State], State]
Recordings = dict[tuple[Any, ...], Recording]
Update = Callable[[Sequence[Tensor], float], None]


@dataclass(frozen=True)
class Batch:
    """Rows of one step; with many models at once, every tensor has a leading model axis.

    Args:
        inputs: [row, ...].
        labels: [row].
        weight: [row]; they sum to 1 over the real rows and are 0 on padding.
        targets: outputs to match, [row, output]; [row, 0] where the objective has none.
    """

    inputs: Tensor
    labels: Tensor
    weight: Tensor
    targets: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The four tensors in order."""
        return self.inputs, self.labels, self.weight, self.targets


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent: v = momentum v + g + weight_decay w; w = w - rate v."""

    momentum: float = 0.0
    weight_decay: float = 0.0

    def bind(self, parameters: Sequence[Tensor]) -> Update:
        """The update of these tensors, which keeps their momentum."""
        held = list(parameters)
        velocity: list[Tensor | None] = []
        if self.momentum:
            velocity += [torch.zeros_like(tensor) for tensor in held]
        settings: dict[str, Any] = {
            "weight_decay": self.weight_decay,
            "momentum": self.momentum,
            "dampening": 0.0,
            "nesterov": False,
            "maximize": False,
            "fused": _fusible(held),
        }

        def update(gradients: Sequence[Tensor], rate: float) -> None:
            # The function inside torch.optim.SGD: the class takes longer than the kernel.
            sgd(held, _laid_out(gradients, held), velocity, lr=rate, **settings)

        return update


@dataclass(frozen=True)
class Adam:
    """Adam with its usual constants (.9, .999, 1e-8) and no weight decay."""

    def bind(self, parameters: Sequence[Tensor]) -> Update:
        """The update of these tensors, which keeps their moments."""
        held = list(parameters)
        first, second = ([torch.zeros_like(tensor) for tensor in held] for _ in range(2))
        steps = [torch.zeros((), dtype=torch.float32, device=tensor.device) for tensor in held]
        settings: dict[str, Any] = {
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "amsgrad": False,
            "maximize": False,
            "fused": _fusible(held),
        }

        def update(gradients: Sequence[Tensor], rate: float) -> None:
            # As with SGD, the function inside the class.
            adam(held, _laid_out(gradients, held), first, second, [], steps, lr=rate, **settings)

        return update


Optimizer = SGD | Adam


def _fusible(parameters: Sequence[Tensor]) -> bool:
    return parameters[0].device.type in ("cpu", "cuda")


def _laid_out(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    # Fused kernels walk through memory and would take a transposed gradient as it lies.
    return [
        gradient
        if gradient.stride() == tensor.stride()
        else torch.empty_like(tensor).copy_(gradient)
        for gradient, tensor in zip(gradients, parameters, strict=True)
    ]


def stack(states: Sequence[Mapping[str, Tensor]]) -> State:
    """States of several models as one state with a leading model axis.

    Args:
        states: state dicts with equal keys and shapes.

    Returns:
        The stacked state, each tensor [model, ...].

    Example:
        >>> stack([{"w": torch.zeros(3)}, {"w": torch.ones(3)}])["w"].shape
        torch.Size([2, 3])
    """
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def unstack(state: Mapping[str, Tensor], index: int) -> State:
    """State of one model out of a stacked one.

    Args:
        state: each tensor [model, ...].
        index: number of the model.

    Returns:
        Its state dict.

    Example:
        >>> unstack({"w": torch.eye(2)}, 1)["w"]
        tensor([0., 1.])
    """
    return {name: tensor[index] for name, tensor in state.items()}


def split_state(module: nn.Module, state: Mapping[str, Tensor]) -> tuple[State, State]:
    """Trainable parameters and everything else (frozen parameters and buffers) of a state.

    Args:
        module: a model with the same names.
        state: a state dict, stacked or not.

    Returns:
        Parameters and the rest, both by name.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> [list(part) for part in split_state(model, model.state_dict())]
        [['weight', 'bias'], ['running_mean', 'running_var', 'num_batches_tracked']]
    """
    trainable = {name for name, tensor in module.named_parameters() if tensor.requires_grad}
    parameters = {name: tensor for name, tensor in state.items() if name in trainable}
    return parameters, {name: tensor for name, tensor in state.items() if name not in trainable}


def _many_gradients(
    module: nn.Module,
    parameters: State,
    rest: State,
    cotangent: Cotangent,
    first: Batch,
    *,
    recordings: Recordings,
) -> Gradients:
    def one(p: State, b: State, rows: tuple[Tensor, ...]) -> State:
        inputs, labels, weight, targets = rows
        run = partial(call, module, b, inputs)
        outputs, pullback = vjp(run, p)[:2]
        (gradients,) = pullback(cotangent(outputs, labels, targets) * weight.unsqueeze(-1))
        return gradients  # type: ignore[no-any-return]

    def many(*tensors: Tensor) -> list[Tensor]:
        each = iter(tensors)
        p, b = ({name: next(each) for name in state} for state in (parameters, rest))
        return list(vmap(one)(p, b, tuple(each)).values())

    held = [tensor.detach() for tensor in (*parameters.values(), *rest.values())]
    taken = (*held, *first.tensors)
    key = tuple((x.shape, x.stride(), x.dtype, x.device) for x in taken)
    if key not in recordings:
        recordings[key] = record(many, held, first.tensors)
    replay = recordings[key].bind(*held)

    def gradients(batch: Batch) -> Sequence[Tensor]:
        pulled: list[Tensor] = replay(*batch.tensors)
        return pulled

    return gradients


def _one_gradients(
    module: nn.Module, parameters: State, cotangent: Cotangent, first: Batch
) -> Gradients:
    held = list(parameters.values())
    turned = takes_channels_last(module, first.inputs, training=module.training, backward=True)

    def gradients(batch: Batch) -> Sequence[Tensor]:
        with torch.enable_grad():
            outputs = module(channels_last(batch.inputs) if turned else batch.inputs)
            pulled = cotangent(outputs.detach(), batch.labels, batch.targets)
            weighted = pulled * batch.weight.unsqueeze(-1)
            return torch.autograd.grad(outputs, held, weighted, materialize_grads=True)

    return gradients


class Descent:
    """Parameters of one model, or of many at once, moved in place by gradient steps.

    Args:
        module: gives the structure; it is copied, never changed.
        state: state dict of one model; with `many`, stacked: each tensor [model, ...].
        cotangent: derivative of a row's objective with respect to its outputs, called for one
            model as cotangent(outputs [row, output], labels [row], targets [row, output]).
        optimizer: SGD or Adam.
        many: whether the state is stacked.
        training: whether the forward pass runs in train mode (BatchNorm statistics then move).
        project: maps each update, by parameter name, to the update that is made instead.
        pull: adds pull x (parameters - their start) to the gradients.
        recordings: of earlier descents with the same structure, cotangent and mode, by the shapes
            of what they took; a new one is added. Recording takes as long as many steps.

    Raises:
        ValueError: the model has no trainable parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        state: State,
        cotangent: Cotangent,
        optimizer: Optimizer,
        *,
        many: bool,
        training: bool = False,
        project: Project | None = None,
        pull: float = 0.0,
        recordings: Recordings | None = None,
    ) -> None:
        self.module = deepcopy(module).train(training)
        self.parameters, self.rest = split_state(self.module, self._held(state, many))
        if not self.parameters:
            raise ValueError(
                f"the model, {type(module).__name__}, has no trainable parameters: give the task"
                " one of which some require a gradient"
            )
        self.cotangent, self.project, self.many = cotangent, project, many
        self.optimizer = optimizer
        self.pull = pull
        self.start = [p.detach().clone() for p in self.parameters.values()] if pull else []
        self.update = optimizer.bind(list(self.parameters.values()))
        self.recordings = {} if recordings is None else recordings
        self.gradients: Gradients | None = None

    def _held(self, state: State, many: bool) -> State:
        if many:
            return {name: tensor.detach().clone() for name, tensor in state.items()}
        # The module of one model computes on the very tensors that the optimiser moves.
        self.module.load_state_dict(state)
        own: State = dict(self.module.named_parameters(remove_duplicate=False))
        own |= dict(self.module.named_buffers(remove_duplicate=False))
        return {name: own[name] for name in state if name in own}

    def _bind(self, first: Batch) -> Gradients:
        if not self.many:
            return _one_gradients(self.module, self.parameters, self.cotangent, first)
        return _many_gradients(
            self.module,
            self.parameters,
            self.rest,
            self.cotangent,
            first,
            recordings=self.recordings,
        )

    @torch.no_grad()
    def step(self, batch: Batch, rate: float) -> None:
        """One step at this learning rate."""
        if self.gradients is None:
            self.gradients = self._bind(batch)
        before = [each.clone() for each in self.parameters.values()] if self.project else []
        self.update(self._allowed(self._pulled(self.gradients(batch))), rate)
        if self.project:
            self._apply_projected(before, self.project)

    def _pulled(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self.pull:
            return gradients
        moved = zip(gradients, self.parameters.values(), self.start, strict=True)
        return [gradient + self.pull * (now - start) for gradient, now, start in moved]

    def _allowed(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        # Adam rescales each number, so that the projection of its step may lead uphill unless
        # its gradient was projected too.
        if self.project is None or not isinstance(self.optimizer, Adam):
            return gradients
        named = dict(zip(self.parameters, gradients, strict=True))
        return list(self.project(named).values())

    def _apply_projected(self, before: Sequence[Tensor], project: Project) -> None:
        moved = zip(self.parameters.items(), before, strict=True)
        updates = project({name: tensor - old for (name, tensor), old in moved})
        for (name, tensor), old in zip(self.parameters.items(), before, strict=True):
            tensor.copy_(old + updates[name])

    @property
    def state(self) -> State:
        """The present state dict, a copy."""
        both = self.parameters | self.rest
        return {name: tensor.detach().clone() for name, tensor in both.items()}
