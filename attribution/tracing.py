"""Replay a vectorised computation as plain kernels, without the dispatch of vmap and vjp."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from attribution.products import can_multiply, is_narrow, multiply, multiply_narrow

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.expand.default, aten._unsafe_view.default)
VIEWS = (
    *(aten.view.default, aten.transpose.int, aten.permute.default),
    *(aten.unsqueeze.default, aten.expand.default),
)
CONSTANTS = (aten.arange.default, aten.full.default)
# Kernels whose result is their own, and the ones that write it over their first argument.
FRESH = (
    *(multiply, multiply_narrow, aten.bmm.default, aten._softmax.default),
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.scatter_add.default),
)
OVERWRITING = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.exp.default: aten.exp_.default,
    aten.relu.default: aten.relu_.default,
    aten.scatter_add.default: aten.scatter_add_.default,
}
# The same kernels by another door, which takes half as long to open.
QUICK = {
    aten.add.Tensor: Tensor.add,
    aten.add_.Tensor: Tensor.add_,
    aten.sub.Tensor: Tensor.sub,
    aten.sub_.Tensor: Tensor.sub_,
    aten.mul.Tensor: Tensor.mul,
    aten.mul_.Tensor: Tensor.mul_,
    aten.relu_.default: Tensor.relu_,
    aten.scatter_add_.default: Tensor.scatter_add_,
    aten._softmax.default: torch._softmax,
    aten.sum.dim_IntList: Tensor.sum,
    # A product may lie in memory otherwise than when it was recorded.
    aten.view.default: Tensor.reshape,
    aten._unsafe_view.default: Tensor.reshape,
    aten.transpose.int: Tensor.transpose,
    aten.permute.default: Tensor.permute,
    aten.unsqueeze.default: Tensor.unsqueeze,
}


@dataclass(frozen=True)
class _Made:
    """What is computed once, from a held tensor or from nothing."""

    name: str
    kernel: Callable[..., Tensor]
    source: str | None
    settings: tuple[Any, ...]
    named: Mapping[str, Any]

    def value(self, values: Mapping[str, Any]) -> Tensor:
        sources = () if self.source is None else (values[self.source],)
        return self.kernel(*sources, *self.settings, **self.named)


@dataclass(frozen=True)
class Recording:
    """The kernels that a function ran, to be run again.

    Args:
        traced: the kernels.
        held: names of the held tensors in their order.
        constants: other tensors that the function took from elsewhere, by name.
        made: views of held tensors and constants.
    """

    traced: GraphModule
    held: tuple[str, ...]
    constants: Mapping[str, Any]
    made: tuple[_Made, ...]

    def bind(self, *held: Tensor) -> Callable[..., Any]:
        """The function of the other tensors, for these held ones."""
        values = {**self.constants, **dict(zip(self.held, held, strict=True))}
        for each in self.made:
            values[each.name] = each.value(values)
        # Attributes of a module take a search.
        return MethodType(type(self.traced).forward, SimpleNamespace(**values))


def record(
    function: Callable[..., Any], held: Sequence[Tensor], example: Sequence[Tensor]
) -> Recording:
    """Records the kernels that a function runs, so that just these can be run again.

    On small models this spares much of a step, because no Python of torch.func is left in it.
    Whatever can be computed from the held tensors without reading them, is computed only once.

    Args:
        function: of the held tensors and then the others, gives a tensor or a list of them; must
            not branch on values.
        held: tensors that stay where they are between calls, though their values change.
        example: the others, of the shapes that they will have.

    Returns:
        The recording.

    Example:
        >>> from torch.func import vmap
        >>> double = record(vmap(lambda x: 2 * x), [], [torch.ones(3)]).bind()
        >>> double(torch.tensor([1.0, 2.0, 3.0]))
        tensor([2., 4., 6.])
    """
    # Without a mode of the whole trace there is one for each kernel, with a copy of the call stack.
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        traced = make_fx(function)(*held, *example)
    assert isinstance(traced, GraphModule)
    nodes = list(traced.graph.nodes)
    # A kernel that works in place would reach the arguments through a copy that is left out.
    in_place = any(isinstance(n.target, OpOverload) and n.target._schema.is_mutable for n in nodes)
    for node in nodes:
        same = None if in_place else _same_value(node)
        if same is not None:
            node.replace_all_uses_with(same)
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    names = tuple(
        _hold(traced, node) for node in traced.graph.find_nodes(op="placeholder")[: len(held)]
    )
    made = () if in_place else _make_once(traced)
    _multiply(traced)
    if not in_place:
        _overwrite(traced)
    for node in traced.graph.nodes:
        node.target = QUICK.get(node.target, node.target)
    traced.recompile()
    taken = {str(node.target) for node in traced.graph.find_nodes(op="get_attr")}
    taken |= {each.source for each in made if each.source is not None}
    others = taken.difference(names, (each.name for each in made))
    constants = {name: getattr(traced, name) for name in others}
    return Recording(traced, names, constants, made)


def _same_value(node: Node) -> Node | None:
    """The node that a node only repeats, if any: vmap leaves many such behind."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, Node):
        return None
    if node.target in RESHAPES and node.meta["val"].shape == source.meta["val"].shape:
        return source
    if node.target is aten.mul.Scalar and node.args[1] == 1:
        # Whole numbers times 1.0 are fractions.
        return source if node.meta["val"].dtype == source.meta["val"].dtype else None
    if node.target is aten.transpose.int and source.target is aten.transpose.int:
        return _untransposed(node, source)
    return None


def _untransposed(node: Node, source: Node) -> Node | None:
    rank = node.meta["val"].ndim
    pairs = [[axis for axis in each.args[1:] if isinstance(axis, int)] for each in (node, source)]
    axes = [{axis % rank for axis in pair} for pair in pairs]
    inner = source.args[0]
    return inner if axes[0] == axes[1] and isinstance(inner, Node) else None


def _multiply(traced: GraphModule) -> None:
    for node in traced.graph.nodes:
        if node.target is aten.bmm.default:
            a, b = (argument.meta["val"] for argument in node.args)
            if can_multiply(a, b):
                # What is handed out lies in memory as it would without this.
                handed_out = any(user.op == "output" for user in node.users)
                narrow = is_narrow(a, b) and not handed_out
                node.target = multiply_narrow if narrow else multiply


def _hold(traced: GraphModule, node: Node) -> str:
    """Takes the value of a node from outside, under the name that is returned."""
    name = f"_held_{node.name}"
    setattr(traced, name, node.meta["val"])
    with traced.graph.inserting_before(node):
        held = traced.graph.create_node("get_attr", name)
    held.meta = node.meta
    node.replace_all_uses_with(held)
    traced.graph.erase_node(node)
    return name


def _make_once(traced: GraphModule) -> tuple[_Made, ...]:
    made = []
    for node in list(traced.graph.nodes):
        source = node.args[0] if node.args else None
        if node.target in CONSTANTS and not node.all_input_nodes:
            start, taken = None, 0
        elif node.target in VIEWS and isinstance(source, Node) and source.op == "get_attr":
            start, taken = str(source.target), 1
        else:
            continue
        kernel, settings, named = node.target, node.args[taken:], dict(node.kwargs)
        made.append(_Made(_hold(traced, node), kernel, start, settings, named))
    traced.graph.eliminate_dead_code()
    return tuple(made)


def _overwrite(traced: GraphModule) -> None:
    """Lets kernels write over an argument that nothing else reads, which spares memory traffic."""
    fresh: set[Node] = set()
    for node in traced.graph.nodes:
        source = node.args[0] if node.args else None
        only = isinstance(source, Node) and source in fresh and len(source.users) == 1
        if node.target in FRESH or (only and node.target in VIEWS):
            fresh.add(node)
    for node in traced.graph.nodes:
        if node.target is aten.add.Tensor and not node.kwargs and node.args[1] in fresh:
            node.args = (node.args[1], node.args[0])
        source = node.args[0] if node.args else None
        if not isinstance(source, Node) or source not in fresh:
            continue
        if len(source.users) > 1 or source in node.args[1:]:
            continue
        if node.op != "call_function" or not _alike(node, source):
            continue
        if node.target in OVERWRITING:
            node.target = OVERWRITING[node.target]
        elif node.target is aten.threshold_backward.default:
            node.target = aten.threshold_backward.grad_input
            node.kwargs = {"grad_input": source}


def _alike(node: Node, source: Node) -> bool:
    made, taken = node.meta["val"], source.meta["val"]
    return isinstance(made, torch.Tensor) and (made.shape, made.dtype) == (taken.shape, taken.dtype)
