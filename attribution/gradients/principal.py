"""Principal directions: where a model's inputs and output gradients vary most, layer by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from attribution.devices import repeatable
from attribution.gradients.capture import Capture, capture
from attribution.gradients.convolution import ConvolutionBlock
from attribution.gradients.layers import Block, LinearBlock, TwoSided
from attribution.gradients.plan import make_plan
from attribution.gradients.projection import Directions, Projection
from attribution.losses import Loss
from attribution.model import Model
from attribution.task import State, Task
from attribution.training import threads
from stores import advance

ROWS = 2048  # training rows, at most, that moments are taken over
VECTORS = 16  # of a row's outputs, at most, whose gradients are taken
WIDEST = 8192  # side of a layer that is decomposed
ROWS_AT_ONCE = 32  # of one forward pass: patches of convolutions are written out
WHOLE = Projection(inputs=2**62, outputs=2**62, features=2**62)


@dataclass(frozen=True)
class SideMoments:
    """Uncentred second moments of the two sides of one layer's gradients, summed over rows.

    Args:
        outputs: G = sum_t delta_t delta_t^T, [group, out, out], float64.
        inputs: A = sum_t a_t a_t^T, [group, inner, inner], float64.
        positions: number of positions t, of all rows, [].
    """

    outputs: Tensor
    inputs: Tensor
    positions: Tensor


def principal_directions(
    task: Task,
    checkpoints: Sequence[Model],
    projection: Projection,
    training: int = 0,
    device: str = "cpu",
) -> dict[str, Directions]:
    """Finds the directions in which each layer's inputs and output gradients vary most.

    With inputs a_t (and a constant 1 for the bias), outputs s_t and their gradients delta_t =
    R^(1/2) d f / d s_t, weighted by the loss's second derivative R: the eigenvectors of
    A = sum_t a_t a_t^T and G = sum_t delta_t delta_t^T, summed over rows and checkpoints. The
    product of two of them, with eigenvalues a and g, has the Kronecker-factored curvature
    g a / (number of positions t). Of the first `projection.outputs` times the first
    `projection.inputs` directions of each layer, the `projection.principal` x layers products with
    the largest curvature are kept, whatever layer they are of, and at least one of each.

    Linear and convolution layers have them, if no side is wider than 8192. Moments are taken over
    2048 training rows at most, evenly spaced; where there are more than 16 outputs, over 16 random
    mixtures of the rows of R^(1/2).

    Args:
        task: gives training rows, model and loss.
        checkpoints: models of one training, which share the directions.
        projection: settings.
        training: its number, which the mixtures depend on.
        device: where to compute; on another one directions with almost the same eigenvalue may mix.

    Returns:
        Directions by the first name of each layer; none where the model has no such layer.

    Raises:
        ValueError: the model has no per-example gradients, or outputs that are not finite.

    Example:
        >>> from examples.digits import mlp, task
        >>> models = [Model(task, mlp().state_dict())]
        >>> found = principal_directions(task, models, Projection(principal=10))
        >>> list(found), sum(len(layer.kept) for layer in found.values())
        (['0', '2', '4'], 30)

    Source: eigenvectors of Kronecker-factored curvature (arXiv 1503.05671; of convolutions, arXiv
    1602.01407), as LoGra takes them to start from (arXiv 2405.13954).
    """
    count = len(task.train_ids)
    few = min(count, ROWS)
    inputs = task.rows("train", np.arange(few) * count // few)[0]
    random = projection.random(training, "principal.mixtures")
    module, states = task.new_model(0).to(device), [model.state for model in checkpoints]
    with threads(1), repeatable(device):
        found = layer_moments(module, states, inputs, task.loss, random)
        return kept_directions(found, projection)


def layer_moments(
    module: nn.Module,
    states: Sequence[State],
    inputs: Tensor,
    loss: Loss,
    random: np.random.Generator,
) -> dict[str, SideMoments]:
    """Second moments of the two sides of every layer that has principal directions.

    Args:
        module: the model, on the device that is to compute.
        states: its state dicts, whose moments are summed.
        inputs: of the rows, [row, ...].
        loss: whose second derivative weights the outputs.
        random: draws mixtures of the outputs where there are many.

    Returns:
        Moments by the first name of each layer.

    Raises:
        ValueError: the model has no per-example gradients, or outputs that are not finite.

    Example:
        >>> from attribution.losses import SquaredError
        >>> model, random = nn.Linear(1, 1), np.random.default_rng(0)
        >>> rows = torch.tensor([[2.0], [4.0]])
        >>> found = layer_moments(model, [model.state_dict()], rows, SquaredError(), random)
        >>> found[""].inputs
        tensor([[[20.,  6.],
                 [ 6.,  2.]]], dtype=torch.float64)
    """
    plan, device = make_plan(module, WHOLE, 0), next(module.parameters()).device
    blocks = {number: block for number, block in enumerate(plan.blocks) if _decomposed(block)}
    sums = {number: _zeros(block, device) for number, block in blocks.items()}
    for state in states:
        moved = {name: value.to(device) for name, value in state.items()}
        for rows in inputs.split(ROWS_AT_ONCE):
            advance()
            run = capture(module, plan, moved, rows.to(device))
            _refuse_infinite(run.outputs)
            _add(sums, blocks, run, root_vectors(loss, run.outputs.detach(), random))
    return {plan.firsts[number]: moments for number, moments in sums.items()}


def root_vectors(loss: Loss, outputs: Tensor, random: np.random.Generator) -> Tensor:
    """Vectors v of each row's outputs with sum of v v^T = R, the loss's second derivative.

    They are the rows of the symmetric R^(1/2), or 16 random mixtures of them where there are more:
    then the sum is R in the mean.

    Args:
        loss: the loss.
        outputs: [row, output].
        random: draws the mixtures.

    Returns:
        [row, vector, output].

    Example:
        >>> from attribution.losses import SquaredError
        >>> root_vectors(SquaredError(), torch.zeros(1, 2), np.random.default_rng(0))
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    values, vectors = torch.linalg.eigh(loss.hessian(outputs.double()))
    # Of all roots this one does not depend on the signs that eigenvectors happen to have.
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(1) @ vectors.mT
    count = root.shape[1]
    if count > VECTORS:
        signs = 2 * random.integers(0, 2, (len(outputs), VECTORS, count)) - 1
        root = torch.from_numpy(signs).to(root) @ root / VECTORS**0.5
    found: Tensor = root.to(outputs)
    return found


def kept_directions(
    found: Mapping[str, SideMoments], projection: Projection
) -> dict[str, Directions]:
    """Eigenvectors of moments, and the products of theirs with the largest curvature.

    Args:
        found: moments of each layer.
        projection: how many directions and products to keep.

    Returns:
        Directions of each layer, those with the largest eigenvalue first.

    Example:
        >>> one, two = torch.tensor([[[4.0]]]), torch.diag(torch.tensor([1.0, 3.0])).unsqueeze(0)
        >>> moments = SideMoments(one.double(), two.double(), torch.tensor(2))
        >>> few = kept_directions({"head": moments}, Projection(principal=1))
        >>> few["head"].inputs.abs(), few["head"].kept
        (tensor([[[0., 1.]]]), tensor([0]))
    """
    if not found:
        return {}
    outputs, inputs = projection.outputs, projection.inputs
    sides = {
        name: (_principal(part.outputs, outputs), _principal(part.inputs, inputs))
        for name, part in found.items()
    }
    curvatures = [
        g.unsqueeze(2) * a.unsqueeze(1) / found[name].positions.clamp_min(1).cpu()
        for name, ((g, _), (a, _)) in sides.items()
    ]
    kept = _largest(curvatures, projection.principal * len(found))
    return {
        name: _trimmed(left, right, mask)
        for (name, ((_, left), (_, right))), mask in zip(sides.items(), kept, strict=True)
    }


def _decomposed(block: Block) -> TypeGuard[TwoSided]:
    if not isinstance(block, LinearBlock | ConvolutionBlock):
        return False
    return max(block.sides.out, block.sides.inner) <= WIDEST


def _zeros(block: TwoSided, device: torch.device) -> SideMoments:
    outputs, inputs = (
        torch.zeros(block.sides.groups, width, width, dtype=torch.float64, device=device)
        for width in (block.sides.out, block.sides.inner)
    )
    return SideMoments(outputs, inputs, torch.zeros((), dtype=torch.int64, device=device))


@torch.no_grad()
def _add(
    sums: Mapping[int, SideMoments],
    blocks: Mapping[int, TwoSided],
    run: Capture,
    vectors: Tensor,
) -> None:
    """Adds the moments of the rows of one forward pass in place; those of wide layers are large."""
    captured = {
        place: blocks[number].capture(call)
        for place, (number, call) in enumerate(run.calls)
        if number in blocks
    }

    def add(place: int, deltas: Tensor, *, first: bool) -> None:
        if place not in captured:
            return
        number = run.calls[place][0]
        outputs, inputs = blocks[number].in_groups(captured[place], deltas)
        sums[number].outputs.add_(_second_moment(outputs))
        if first:
            sums[number].inputs.add_(_second_moment(inputs))
            sums[number].positions.add_(len(inputs) * inputs.shape[-1])

    for number, vector in enumerate(vectors.unbind(1)):
        run.pull(vector, partial(add, first=number == 0))


def _second_moment(values: Tensor) -> Tensor:
    """Sum of v v^T over rows and positions of [row, group, width, position]."""
    flat = values.movedim(0, 2).flatten(2)
    return flat @ flat.mT


def _refuse_infinite(outputs: Tensor) -> None:
    if not outputs.isfinite().all():
        raise ValueError(
            "outputs are not finite on some training row: leave out a model whose training diverged"
        )


def _principal(moments: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues [group, count], in order, and their eigenvectors as rows."""
    values, vectors = (part.cpu() for part in torch.linalg.eigh(moments))
    return values.flip(-1)[:, :most].clamp_min(0), vectors.mT.flip(-2)[:, :most]


def _largest(curvatures: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of so many largest numbers of all together, and of the largest one of each."""
    flat = torch.cat([each.flatten() for each in curvatures])
    sizes = [each.numel() for each in curvatures]
    for part in flat.split(sizes):
        part[part.argmax()] = torch.inf
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.topk(min(count, len(flat))).indices] = True
    pairs = zip(mask.split(sizes), curvatures, strict=True)
    return [part.reshape(each.shape) for part, each in pairs]


def _trimmed(outputs: Tensor, inputs: Tensor, kept: Tensor) -> Directions:
    """Those of a layer as far as any product with them is kept."""
    _, last_output, last_input = (part.max() + 1 for part in kept.nonzero(as_tuple=True))
    few = kept[:, :last_output, :last_input]
    return Directions(
        outputs[:, :last_output].float().contiguous(),
        inputs[:, :last_input].float().contiguous(),
        few.flatten().nonzero()[:, 0],
    )
