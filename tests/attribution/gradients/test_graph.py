import torch
from torch.autograd.graph import get_gradient_edge

from attribution.gradients.graph import backward_order, farthest, uses


def test_a_node_comes_after_all_that_its_gradient_is_passed_on_to():
    x = torch.randn(3, requires_grad=True)
    y = torch.exp(x)
    outputs = (y * torch.sin(y) + x).sum()
    order = backward_order(outputs)
    assert len(set(order)) == len(order)
    assert order[-1] is outputs.grad_fn
    places = {node: place for place, node in enumerate(order)}
    for node in order:
        assert all(places[after] < places[node] for after, _ in node.next_functions if after)


def test_a_tensor_without_a_graph_has_no_nodes():
    assert backward_order(torch.ones(2)) == []


def test_uses_are_counted():
    leaves = {name: torch.randn(3, requires_grad=True) for name in "abc"}
    outputs = (leaves["a"] * leaves["a"] + leaves["b"]).sum()
    assert uses(backward_order(outputs), leaves) == {"a": 2, "b": 1}


def test_of_a_chain_the_last_edge_is_the_farthest():
    x = torch.randn(3, requires_grad=True)
    chain = [torch.exp(x)]
    for _ in range(4):
        chain.append(torch.sin(chain[-1]))
    edges = [get_gradient_edge(part) for part in chain]
    assert farthest(backward_order(chain[-1]), edges) == edges[:1]


def test_of_branches_each_has_its_farthest_edge():
    x = torch.randn(3, requires_grad=True)
    stem = torch.exp(x)
    left, right, unused = torch.sin(x), torch.cos(stem), torch.tan(x)
    edges = [get_gradient_edge(part) for part in (stem, left, right, unused)]
    found = farthest(backward_order(left + right), edges)
    assert {edge.node for edge in found} == {edges[0].node, edges[1].node}
