"""Projected per-example gradients: phi = P grad, and the transposed map."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import final

import torch
from torch import Tensor, nn

from attribution.gradients.capture import Capture, capture
from attribution.gradients.jacobian import Factors
from attribution.gradients.layers import LinearBlock
from attribution.gradients.others import other_features
from attribution.gradients.plan import Plan, make_plan
from attribution.gradients.projection import Directions, Projection
from attribution.task import State

CACHE_BYTES = 2**20  # of what is captured of a call at once; fits a core's cache

Cotangents = Tensor | Callable[[Tensor], Tensor]
Kept = dict[tuple[int, int], Tensor]


@final
@dataclass(frozen=True)
class GradientProjector:
    """Projects per-example gradients of a model with respect to all trainable parameters.

    For each layer with weight W, inputs a_t and output gradients delta_t over positions t, the
    features are P_out (sum_t delta_t a_t^T) P_in^T, in eval mode; no per-example gradient is
    formed. Linear, Conv1d, Conv2d, Embedding and normalisation layers work that way, biases
    included; any other parameter goes through torch.func and a sparse projection. Make one with
    `gradient_projector`.

    Args:
        module: gives the structure; neither its weights nor its mode nor its buffers change.
        projection: settings.
        checkpoint: number of the checkpoint, which the matrices depend on.
        plan: blocks of the features.
    """

    module: nn.Module = field(repr=False)
    projection: Projection
    checkpoint: int
    plan: Plan = field(repr=False)

    @cached_property
    def size(self) -> int:
        """Number of features, k."""
        return sum(self.plan.sizes)

    @cached_property
    def spans(self) -> list[slice]:
        """Features of each block, then of each other parameter."""
        return [slice(*ends) for ends in pairwise(accumulate(self.plan.sizes, initial=0))]

    def linearise(self, state: Mapping[str, Tensor], inputs: Tensor) -> "Linearisation":
        """Runs the model once and keeps what any number of features of these rows need.

        Args:
            state: state dict of the model.
            inputs: [row, ...].

        Returns:
            Outputs, and features on demand.

        Raises:
            ValueError: the state or the outputs do not fit, a layer does not have the rows as
                its first axis, or a parameter of a layer is used outside it.
        """
        return Linearisation(self, state, inputs, capture(self.module, self.plan, state, inputs))

    def features(
        self, state: Mapping[str, Tensor], inputs: Tensor, cotangents: Cotangents
    ) -> Tensor:
        """Projected gradients of sum_o cotangents[row, direction, o] f_o(x_row).

        Args:
            state: state dict of the model; its dtype is that of the features.
            inputs: [row, ...].
            cotangents: [row, direction, output], or a function that gives them from the outputs
                [row, output].

        Returns:
            Features [row, direction, k].

        Raises:
            ValueError: as for `linearise`; cotangents of another shape; or torch.func cannot
                differentiate a parameter, which is named.

        Example:
            >>> model = nn.Linear(3, 2)
            >>> projector = gradient_projector(model, Projection())
            >>> one = torch.ones(1, 1, 2)
            >>> projector.features(model.state_dict(), torch.tensor([[1.0, 2.0, 3.0]]), one)
            tensor([[[1., 2., 3., 1., 1., 2., 3., 1.]]])
        """
        run = self.linearise(state, inputs)
        return run.features(cotangents(run.outputs) if callable(cotangents) else cotangents)

    def adjoint(self, features: Tensor) -> State:
        """Direction P^T v in the space of the parameters: <adjoint(v), grad> = <v, phi>.

        Args:
            features: v, [k].

        Returns:
            Tensors by parameter name, of the parameters' shapes and the features' dtype. A
            parameter with several names stands under each of them, and counts once in the
            product.

        Raises:
            ValueError: another number of features.

        Example:
            >>> projector = gradient_projector(nn.Linear(2, 1), Projection())
            >>> projector.adjoint(torch.tensor([1.0, 2.0, 3.0]))
            {'weight': tensor([[1., 2.]]), 'bias': tensor([3.])}
        """
        if features.shape != (self.size,):
            raise ValueError(f"expected {self.size} features, got shape {tuple(features.shape)}")
        found: State = {}
        parts = [features[span] for span in self.spans]
        for block, part in zip(self.plan.blocks, parts, strict=False):
            found |= block.adjoint(part)
        for other, part in zip(self.plan.others, parts[len(self.plan.blocks) :], strict=True):
            found[other.name] = other.sparse.adjoint(part).reshape(other.shape)
        named = self.plan.aliases.items()
        return {name: found[first] for first, names in named for name in names}


@final
@dataclass(frozen=True)
class Linearisation:
    """A model on some rows, ready to give features of any directions.

    Args:
        projector: whose features.
        state: state dict of the model.
        inputs: [row, ...].
        captured: its forward pass.
    """

    projector: GradientProjector
    state: Mapping[str, Tensor] = field(repr=False)
    inputs: Tensor = field(repr=False)
    captured: Capture = field(repr=False)

    @property
    def outputs(self) -> Tensor:
        """Outputs [row, output], without a graph."""
        return self.captured.outputs.detach()

    def features(self, cotangents: Tensor) -> Tensor:
        """Features [row, direction, k] of cotangents [row, direction, output]."""
        outputs, size = self.captured.outputs, self.projector.size
        cotangents = self._checked(cotangents)
        found = outputs.new_zeros(*cotangents.shape[:2], size, requires_grad=False)
        # With one direction nothing is needed twice.
        kept: Kept | None = {} if cotangents.shape[1] > 1 else None
        with torch.no_grad():
            for direction in range(cotangents.shape[1]):
                receiver = partial(self._add_call, found[:, direction], kept)
                self.captured.pull(cotangents[:, direction], receiver)
            self._add_others(found, cotangents)
        return found

    @cached_property
    def factors(self) -> Factors | None:
        """How features are made of factors; None for models that are not made of such layers.

        Each layer must be Linear, be called once and see one position a row, and no trainable
        parameter may lie outside them, as in a multilayer perceptron, or in a head on inputs that
        are computed beforehand.
        """
        plan, calls, blocks = self.projector.plan, self.captured.calls, self._linear
        flat = all(call.inputs.ndim == 2 for _, call in calls)
        once = sorted(number for number, _ in calls) == list(range(len(plan.blocks)))
        if plan.others or not flat or not once or len(blocks) < len(plan.blocks):
            return None
        _, outputs, inputs = zip(*(block.sides.shape for block in blocks), strict=True)
        return Factors(inputs, outputs, tuple(block.sides.sparse for block in blocks))

    def factor_rows(self, cotangents: Tensor) -> Tensor:
        """Factors of the features of cotangents [row, direction, output], each row in one piece.

        Raises:
            ValueError: the features of these rows are not made of factors.

        Example:
            >>> projector = gradient_projector(nn.Linear(2, 1, bias=False), Projection())
            >>> state, inputs = projector.module.state_dict(), torch.tensor([[3.0, 4.0]])
            >>> projector.linearise(state, inputs).factor_rows(10 * torch.ones(1, 1, 1))
            tensor([[ 3.,  4., 10.]])
        """
        if self.factors is None:
            raise ValueError(
                "the model calls its layers otherwise for some rows than for others: its features"
                " cannot be kept as factors; remove the folder of the features, and make them with"
                " factors=False, or dmm precompute --no-factors"
            )
        cotangents, blocks = self._checked(cotangents), self._linear
        spans = [slice(*ends) for ends in pairwise(accumulate(self.factors.outputs, initial=0))]
        right = cotangents.new_zeros(*cotangents.shape[:2], sum(self.factors.outputs))

        def keep(direction: int, place: int, deltas: Tensor) -> None:
            number, _ = self.captured.calls[place]
            right[:, direction, spans[number]] = blocks[number].sides.projected(deltas)

        with torch.no_grad():
            calls = sorted(self.captured.calls, key=lambda numbered: numbered[0])
            left = [blocks[number].capture(call)[:, 0] for number, call in calls]
            for direction in range(cotangents.shape[1]):
                self.captured.pull(cotangents[:, direction], partial(keep, direction))
        return torch.cat([*left, right.flatten(1)], 1)

    @property
    def _linear(self) -> list[LinearBlock]:
        return [b for b in self.projector.plan.blocks if isinstance(b, LinearBlock)]

    def _checked(self, cotangents: Tensor) -> Tensor:
        outputs = self.captured.outputs
        if cotangents.ndim != 3 or cotangents[:, 0].shape != outputs.shape:
            raise ValueError(
                f"expected cotangents [row, direction, output] for outputs of shape"
                f" {tuple(outputs.shape)}, got shape {tuple(cotangents.shape)}"
            )
        return cotangents.detach().to(outputs)

    def _add_call(self, found: Tensor, kept: Kept | None, place: int, deltas: Tensor) -> None:
        number, call = self.captured.calls[place]
        block, span = self.projector.plan.blocks[number], self.projector.spans[number]
        for rows in _row_slices(deltas, block.captured_size(deltas)):
            captured = None if kept is None else kept.get((place, rows.start))
            if captured is None:
                captured = block.capture(call.of(rows))
            if kept is not None:
                kept[place, rows.start] = captured
            found[rows, span] += block.features(captured, deltas[rows])

    def _add_others(self, found: Tensor, cotangents: Tensor) -> None:
        projector = self.projector
        plan, first = projector.plan, sum(block.size for block in projector.plan.blocks)
        if plan.others and len(self.inputs):
            found[..., first:] = other_features(
                projector.module, plan, self.state, self.inputs, cotangents
            )


def _row_slices(deltas: Tensor, numbers: int) -> list[slice]:
    """Rows that are worked on at once, in pieces of about equal size."""
    rows = len(deltas)
    fitting = max(1, CACHE_BYTES // max(1, numbers * deltas.element_size()))
    pieces = -(-rows // fitting) if deltas.device.type == "cpu" else 1
    height = max(1, -(-rows // max(1, pieces)))
    return [slice(start, start + height) for start in range(0, rows, height)]


def gradient_projector(
    module: nn.Module,
    projection: Projection,
    checkpoint: int = 0,
    directions: Mapping[str, Directions] | None = None,
) -> GradientProjector:
    """Makes the projector of a model's gradients.

    Its random matrices depend on (seed, checkpoint, layer) alone: they are drawn by Philox, a
    counter-based generator, on the CPU, and so are bit-identical wherever they are used.

    Args:
        module: the model; parameters that require no gradient are left out.
        projection: settings.
        checkpoint: number of the checkpoint.
        directions: of the layers whose sides are not projected at random, by the first name of
            each; see `principal_directions`.

    Returns:
        The projector.

    Raises:
        ValueError: nothing is trainable, or a layer mixes rows or changes its weights in eval
            mode; names it. Or directions are asked for and not given, or do not fit the model.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
        >>> gradient_projector(model, Projection(inputs=16, outputs=16)).size
        288
    """
    plan = make_plan(module, projection, checkpoint, directions)
    return GradientProjector(module, projection, checkpoint, plan)
