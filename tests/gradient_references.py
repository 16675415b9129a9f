"""Slow and obvious gradients, projections, patches and moments that layers are compared with."""

import copy

import torch
from torch import nn
from torch.nn import functional


def patches(layer, images):
    """Input patches of a Conv2d, one row for each output pixel, by indexing: [patch, width]."""
    (up, left), (down, right) = layer.padding, layer.stride
    padded = functional.pad(images, (left, left, up, up))
    heights, widths = (
        range(0, padded.shape[2 + axis] - layer.dilation[axis] * (layer.kernel_size[axis] - 1), by)
        for axis, by in enumerate((down, right))
    )
    found = [
        [
            image[channel, row + a * layer.dilation[0], column + b * layer.dilation[1]]
            for channel in range(image.shape[0])
            for a in range(layer.kernel_size[0])
            for b in range(layer.kernel_size[1])
        ]
        for image in padded
        for row in heights
        for column in widths
    ]
    return torch.tensor(found, dtype=images.dtype)


def group_patches(layer, images):
    """Input patches of each group of a Conv2d, which sees its own channels: [group, patch, width].

    For a layer of one group there is no group axis.
    """
    if layer.groups == 1:
        return patches(layer, images)
    return torch.stack([patches(layer, own) for own in images.chunk(layer.groups, dim=1)])


def second_moments(module, inputs, loss):
    """G and A of every Linear and Conv2d layer, and their positions, from every row by itself."""
    own = copy.deepcopy(module).eval()
    layers = {n: m for n, m in own.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    calls, found = [], {name: [0.0, 0.0, 0] for name in layers}
    for name, layer in layers.items():
        # A copy, because the outputs themselves may be written into.
        layer.register_forward_hook(
            lambda layer, given, made, name=name: (
                calls.append((name, layer, given[0].detach(), made)),
                made.clone(),
            )[1]
        )
    for row in inputs:
        calls.clear()
        outputs = own(row[None])
        weight = loss.hessian(outputs.detach())[0]
        for name, layer, given, made in calls:
            deltas = torch.stack(
                [torch.autograd.grad(z, made, retain_graph=True)[0] for z in outputs[0]]
            )
            if isinstance(layer, nn.Linear):
                left, right = given.reshape(1, -1, given.shape[-1]), deltas.flatten(1, -2)[:, None]
            else:
                left = group_patches(layer, given)
                left = left if layer.groups > 1 else left[None]
                right = deltas.reshape(len(deltas), layer.groups, -1, left.shape[1]).mT
            if layer.bias is not None:
                left = functional.pad(left, (0, 1), value=1.0)
            found[name][0] += torch.einsum("ogpa,oq,qgpb->gab", right, weight, right)
            found[name][1] += left.mT @ left
            found[name][2] += left.shape[1]
    return found


def gradients_of_rows(module, state, inputs):
    """Gradient of every output of every row, one backward pass each, by parameter name.

    Each is [row, output, ...]; a parameter with several names stands under the first of them.
    """
    own = copy.deepcopy(module).eval()
    own.load_state_dict(state)
    named = {name: value for name, value in own.named_parameters() if value.requires_grad}
    found = {name: [] for name in named}
    for row in inputs:
        for output in own(row[None])[0]:
            each = torch.autograd.grad(
                output, list(named.values()), retain_graph=True, materialize_grads=True
            )
            for name, gradient in zip(named, each, strict=True):
                found[name].append(gradient)
    rows = len(inputs)
    return {name: torch.stack(each).unflatten(0, (rows, -1)) for name, each in found.items()}


def _sparse_matrix(sparse):
    """A sparse projection as a dense matrix."""
    if sparse.order is None:
        return torch.eye(sparse.width)
    matrix = torch.zeros(sparse.size, sparse.width)
    for turn, (column, sign) in enumerate(zip(sparse.order, sparse.signs, strict=True)):
        matrix[turn % sparse.size, column] = sign
    return matrix


def _kronecker_matrix(sides):
    """P_out kron P_in of every group, as one dense matrix."""
    outputs = torch.eye(sides.out).expand(sides.groups, -1, -1)
    inputs = torch.eye(sides.inner).expand(sides.groups, -1, -1)
    outputs = outputs if sides.outputs is None else sides.outputs
    inputs = inputs if sides.inputs is None else sides.inputs
    pairs = zip(outputs.double(), inputs.double(), strict=True)
    return torch.block_diag(*(torch.kron(out, inner) for out, inner in pairs))


def _block_vectors(block, gradients):
    """Gradients of a block's parameters as vectors, in the order its projection takes them."""
    parts = [gradients[name].flatten(0, 1) for name in block.names]
    if not hasattr(block, "sides"):
        return torch.cat([part.flatten(1) for part in parts], 1)
    if hasattr(block, "padding"):
        return parts[0].mT.flatten(1)
    rows = parts[0].shape[0]
    shape = (rows, block.sides.groups, block.sides.out, -1)
    return torch.cat([part.reshape(shape) for part in parts], 3).flatten(1)


def projected_gradients(projector, gradients):
    """Features from gradients in full times dense projection matrices, [row, output, k]."""
    plan, found = projector.plan, []
    for block in plan.blocks:
        vectors = _block_vectors(block, gradients)
        if hasattr(block, "sides"):
            vectors = vectors @ _kronecker_matrix(block.sides).to(vectors).T
        sparse = block.sides.sparse if hasattr(block, "sides") else block.sparse
        vectors = vectors @ _sparse_matrix(sparse).to(vectors).T
        found.append(vectors)
    for other in plan.others:
        vectors = gradients[other.name].flatten(0, 1).flatten(1)
        found.append(vectors @ _sparse_matrix(other.sparse).to(vectors).T)
    rows, outputs = next(iter(gradients.values())).shape[:2]
    return torch.cat(found, 1).reshape(rows, outputs, -1)
