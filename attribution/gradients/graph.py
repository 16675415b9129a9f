"""The autograd graph of a forward pass: who uses a parameter, and how far back to go."""

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


def backward_order(outputs: Tensor) -> list[Node]:
    """Nodes of the graph of a tensor, each behind those that its gradient is passed on to.

    Args:
        outputs: a tensor.

    Returns:
        The nodes; none if it has no graph.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> [type(node).__name__ for node in backward_order(2 * x.sum())]
        ['AccumulateGrad', 'SumBackward0', 'MulBackward0']
    """
    order: list[Node] = []
    seen: set[Node] = set()
    waiting = [(outputs.grad_fn, False)]
    while waiting:
        node, left = waiting.pop()
        if node is None or (node in seen and not left):
            continue
        if left:
            order.append(node)
            continue
        seen.add(node)
        waiting.append((node, True))
        waiting += [(after, False) for after, _ in node.next_functions]
    return order


def uses(order: Sequence[Node], leaves: Mapping[str, Tensor]) -> Counter[str]:
    """How often each leaf enters a graph.

    Args:
        order: nodes of the graph.
        leaves: tensors that require gradients, by name.

    Returns:
        Counts by name.
    """
    names = {get_gradient_edge(leaf).node: name for name, leaf in leaves.items()}
    entered = (after for node in order for after, _ in node.next_functions)
    return Counter(names[after] for after in entered if after in names)


def farthest(order: Sequence[Node], edges: Sequence[GradientEdge]) -> list[GradientEdge]:
    """Edges behind which no other edge lies: gradients on the way to them pass all the others.

    Args:
        order: nodes of the graph, as `backward_order` gives them.
        edges: edges of the graph.

    Returns:
        Some of the edges.
    """
    wanted = {edge.node for edge in edges}
    reaching: set[Node] = set()
    for node in order:
        after = [next_node for next_node, _ in node.next_functions]
        if any(other in wanted or other in reaching for other in after):
            reaching.add(node)
    last = {edge.node: edge for edge in edges if edge.node in set(order) - reaching}
    return list(last.values())
