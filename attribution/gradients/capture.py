"""One forward pass in eval mode that keeps what the features of every layer need."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.func import functional_call

from attribution.gradients.graph import backward_order, farthest, uses
from attribution.gradients.layers import Call
from attribution.gradients.plan import Plan
from attribution.task import State

Receiver = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Capture:
    """A forward pass with its graph, which tells the gradient of each layer's outputs.

    Args:
        outputs: [row, output].
        calls: of the layers, in order, each with the number of the layer's block.
        edges: what to differentiate by so that gradients pass all calls.
        receivers: functions of the number of a call and the gradient of its outputs, called
            while the gradient passes.
    """

    outputs: Tensor
    calls: list[tuple[int, Call]]
    edges: list[GradientEdge]
    receivers: list[Receiver]

    def pull(self, cotangents: Tensor, receiver: Receiver) -> None:
        """Passes the gradients of all calls' outputs to a function, for one direction."""
        if not self.edges:
            return
        self.receivers.append(receiver)
        try:
            # With respect to these alone, so that no gradient of a weight is computed.
            torch.autograd.grad(self.outputs, self.edges, cotangents, retain_graph=True)
        finally:
            self.receivers.clear()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Runs the body with a module in eval mode and restores the mode of each part after it.

    Args:
        module: the module.

    Example:
        >>> dropout = nn.Dropout()
        >>> with evaluating(dropout):
        ...     dropout.training
        False
        >>> dropout.training
        True
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def tied_state(plan: Plan, state: Mapping[str, Tensor]) -> tuple[State, State]:
    """Trainable parameters by their first names, and all else, detached.

    Args:
        plan: of the model.
        state: a state dict.

    Returns:
        Parameters, and the rest of the state.

    Raises:
        ValueError: a name is missing, or parameters that are one in the model differ.
    """
    missing = [name for name in plan.keys if name not in state]
    if missing:
        raise ValueError(f"the state has no {missing[0]!r}: give a state dict of the model")
    for first, *names in plan.aliases.values():
        for name in names:
            if not torch.equal(state[first], state[name]):
                raise ValueError(
                    f"{first!r} and {name!r} are one parameter of the model, but the state has"
                    " different values for them"
                )
    trainable = {name for names in plan.aliases.values() for name in names}
    rest = {name: tensor.detach() for name, tensor in state.items() if name not in trainable}
    return {name: state[name].detach() for name in plan.aliases}, rest


def call(module: nn.Module, plan: Plan, parameters: State, rest: State, inputs: Tensor) -> Tensor:
    """Outputs of a module whose parameters are given by their first names."""
    named = {name: parameters[first] for first, all in plan.aliases.items() for name in all}
    outputs: Tensor = functional_call(module, named | rest, (inputs,), tie_weights=False)
    return outputs


def capture(module: nn.Module, plan: Plan, state: Mapping[str, Tensor], inputs: Tensor) -> Capture:
    """Runs a module in eval mode and keeps what the features of its layers need.

    Args:
        module: gives the structure; neither its weights nor its mode nor its hooks change.
        plan: of the module.
        state: state dict of the model.
        inputs: [row, ...].

    Returns:
        Outputs and calls.

    Raises:
        ValueError: the outputs are not [row, output], a layer does not have the rows as its
            first axis, or a parameter of a layer is used outside it.
    """
    parameters, rest = tied_state(plan, state)
    leaves = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
    record = _Record(len(inputs), [], [], [])
    layers = dict(module.named_modules())
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(evaluating(module))
        for name, number in plan.layers.items():
            # First among the hooks: others may replace the outputs.
            handle = layers[name].register_forward_hook(
                partial(record.keep, name, number), prepend=True, with_kwargs=True
            )
            stack.callback(handle.remove)
        outputs = call(module, plan, leaves, rest, inputs)
    if outputs.ndim != 2 or len(outputs) != len(inputs):
        raise ValueError(
            f"the model must map inputs [row, ...] to outputs [row, output], got shape"
            f" {tuple(outputs.shape)} for {len(inputs)} rows"
        )
    order = backward_order(outputs)
    _refuse_other_uses(plan, uses(order, leaves), record, set(order))
    return Capture(outputs, record.calls, farthest(order, record.edges), record.receivers)


@dataclass(frozen=True)
class _Record:
    rows: int
    calls: list[tuple[int, Call]]
    edges: list[GradientEdge]
    receivers: list[Receiver]

    def keep(  # noqa: PLR0917 - a hook's arguments
        self,
        name: str,
        number: int,
        layer: nn.Module,
        positional: tuple[Any, ...],
        named: Mapping[str, Any],
        outputs: Tensor,
    ) -> Tensor:
        inputs = positional[0] if positional else named["input"]
        if not outputs.requires_grad:  # the model switched gradients off around the layer
            return outputs
        if len(inputs) != self.rows or len(outputs) != self.rows:
            raise ValueError(
                f"layer {name!r} was given inputs of shape {tuple(inputs.shape)} for a batch of"
                f" {self.rows} rows: its first axis must be the rows, else their gradients cannot"
                " be told apart; expand or transpose its inputs in the model's forward"
            )
        if outputs._is_view():
            # Writing into a view leaves its place in the graph behind; this one counts as new.
            outputs = torch.ops.aten._unsafe_view(outputs, outputs.shape)
        place, version, receivers = len(self.calls), inputs._version, self.receivers
        made = Call(layer, inputs.detach(), tuple(layer.buffers(recurse=False)), outputs.dtype)
        self.calls.append((number, made))
        self.edges.append(get_gradient_edge(outputs))

        # A reference to the edges from here would keep the graph alive for ever.
        def receive(delta: Tensor) -> None:
            if made.inputs._version != version:
                raise ValueError(
                    f"the inputs of layer {name!r} are written into after its call: let the model"
                    " make new tensors instead"
                )
            for receiver in receivers:
                receiver(place, delta)

        # On the outputs as they are now, whatever is later written into them.
        outputs.register_hook(receive)
        return outputs


def _refuse_other_uses(plan: Plan, used: Counter[str], record: _Record, reached: set[Node]) -> None:
    pairs = zip(record.calls, record.edges, strict=True)
    known = Counter(number for (number, _), edge in pairs if edge.node in reached)
    for number, block in enumerate(plan.blocks):
        for name in block.names:
            if used[name] != known[number]:
                raise ValueError(
                    f"parameter {name!r} enters the outputs {used[name]} times, but through"
                    f" {known[number]} calls of its layer: use it through its layer only, or"
                    " freeze it with requires_grad_(False)"
                )
