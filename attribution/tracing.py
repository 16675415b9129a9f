"""Replay a vectorised computation as plain kernels, without the dispatch of vmap and vjp."""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from attribution.products import can_multiply, multiply

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.expand.default, aten._unsafe_view.default)
VIEWS = (aten.view.default, aten.transpose.int, aten.unsqueeze.default)
# Kernels whose result is their own, and the ones that write it over their first argument.
FRESH = (multiply, aten.bmm.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)
OVERWRITING = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.exp.default: aten.exp_.default,
    aten.relu.default: aten.relu_.default,
}


def trace(function: Callable[..., Any], *example: Any) -> Callable[..., Any]:
    """Records the kernels that a function runs and returns a function that runs just these.

    On small models this spares much of a step, because no Python of torch.func is left in it.

    Args:
        function: of tensors, in dicts or tuples; must not branch on values.
        example: arguments of the shapes that it will be called with.

    Returns:
        The replaying function.

    Example:
        >>> from torch.func import vmap
        >>> double = trace(vmap(lambda x: 2 * x), torch.ones(3))
        >>> double(torch.tensor([1.0, 2.0, 3.0]))
        tensor([2., 4., 6.])
    """
    traced = make_fx(function)(*example)
    nodes = list(traced.graph.nodes)
    # A kernel that works in place would reach the arguments through a copy that is left out.
    in_place = any(isinstance(n.target, OpOverload) and n.target._schema.is_mutable for n in nodes)
    for node in nodes:
        same = None if in_place else _same_value(node)
        if same is not None:
            node.replace_all_uses_with(same)
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    if not in_place:
        _hold(traced)
    _multiply(traced)
    if not in_place:
        _overwrite(traced)
    traced.recompile()
    assert isinstance(traced, GraphModule)
    return traced


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
            node.target = multiply if can_multiply(a, b) else node.target


def _hold(traced: GraphModule) -> None:
    """Makes once what is the same at every call: views of tensors that the function holds."""
    for number, node in enumerate(list(traced.graph.nodes)):
        source = node.args[0] if node.args else None
        if node.target is aten.arange.default:
            value = node.target(*node.args, **node.kwargs)
        elif node.target in VIEWS and isinstance(source, Node) and source.op == "get_attr":
            value = node.target(getattr(traced, str(source.target)), *node.args[1:])
        else:
            continue
        traced.register_buffer(f"_held_{number}", value)
        with traced.graph.inserting_before(node):
            held = traced.graph.get_attr(f"_held_{number}")
        held.meta = node.meta
        node.replace_all_uses_with(held)
        traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()


def _overwrite(traced: GraphModule) -> None:
    """Lets kernels write over an argument that nothing else reads, which spares memory traffic."""
    fresh = {node for node in traced.graph.nodes if node.target in FRESH}
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
