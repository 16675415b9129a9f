"""Features of one layer's parameters, from its inputs and the gradients of its outputs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from attribution.gradients.projection import SparseProjection
from attribution.task import State


@dataclass(frozen=True)
class Call:
    """One call of a layer in a forward pass.

    Args:
        layer: the layer.
        inputs: its inputs, [row, ...], detached.
        buffers: its buffers, in order, as they were during the call.
        dtype: of its outputs.
    """

    layer: nn.Module
    inputs: Tensor
    buffers: tuple[Tensor, ...]
    dtype: torch.dtype

    def of(self, rows: slice) -> "Call":
        """The call on some of its rows."""
        return replace(self, inputs=self.inputs[rows])


class Block(ABC):
    """Features of the parameters of one layer: a linear map of their per-example gradient.

    Subclasses have the names of the parameters that they cover, `weight` and `bias`; None
    stands for one that is frozen, absent or covered elsewhere.
    """

    weight: str | None
    bias: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters covered."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of features."""

    @property
    @abstractmethod
    def matrices(self) -> Sequence[Tensor]:
        """The numbers of the projection."""

    @abstractmethod
    def captured_size(self, deltas: Tensor) -> int:
        """Numbers that are captured for each row, given the gradients of the outputs."""

    @abstractmethod
    def capture(self, call: Call) -> Tensor:
        """What the features need of the inputs of one call, [row, ...]."""

    @abstractmethod
    def features(self, captured: Tensor, deltas: Tensor) -> Tensor:
        """Features of one call, [row, size], from the gradients of its outputs, [row, ...]."""

    @abstractmethod
    def adjoint(self, features: Tensor) -> State:
        """Transposed projection of features [size], by parameter name."""


@dataclass(frozen=True)
class Sides:
    """A factorised gradient [group, out, in], the projections of its sides and that of the result.

    Args:
        groups: number of groups.
        out: width of the side of the output gradients, in one group.
        inner: width of the side of the inputs, in one group, the bias's constant 1 included.
        outputs: P_out, [group, k_out, out]; None: the identity.
        inputs: P_in, [group, k_in, inner]; None: the identity.
        sparse: S, of the products of all groups, one behind the other.
    """

    groups: int
    out: int
    inner: int
    outputs: Tensor | None
    inputs: Tensor | None
    sparse: SparseProjection

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, k_out and k_in."""
        k_out = self.out if self.outputs is None else self.outputs.shape[1]
        k_in = self.inner if self.inputs is None else self.inputs.shape[1]
        return self.groups, k_out, k_in

    def captured_size(self, deltas: Tensor) -> int:
        """Numbers of P_in a_t over all positions and groups of a row."""
        return deltas.shape[1:].numel() // self.out * self.shape[2]

    @property
    def size(self) -> int:
        """Number of features: group x k_out x k_in, or less where that is more than S keeps."""
        return self.sparse.size

    @property
    def matrices(self) -> list[Tensor]:
        """P_out and P_in where they are not the identity, and S's order and signs."""
        sides = [matrix for matrix in (self.outputs, self.inputs) if matrix is not None]
        return sides + self.sparse.matrices

    def input_matrices(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """P_in written out, the identity too, [group, k_in, inner]."""
        if self.inputs is not None:
            return self.inputs.to(device, dtype)
        return torch.eye(self.inner, dtype=dtype, device=device).expand(self.groups, -1, -1)

    def features(self, deltas: Tensor, captured: Tensor) -> Tensor:
        """S vec(P_out (sum_t delta_t z_t^T)), [row, size], for projected inputs z.

        Args:
            deltas: gradients of the outputs, [row, group, out, position].
            captured: P_in a_t, [row, group, k_in, position].

        Returns:
            Features of each row.
        """
        return self.sparse.apply(self._products(deltas, captured))

    def projected(self, deltas: Tensor) -> Tensor:
        """P_out delta, [row, k_out], of a layer of one group that sees one position a row."""
        return deltas if self.outputs is None else deltas @ self.outputs[0].to(deltas).mT

    def _products(self, deltas: Tensor, captured: Tensor) -> Tensor:
        if self.outputs is None:
            return _products(deltas, captured)
        outputs = self.outputs.to(deltas)
        _, k_out, k_in = self.shape
        # Multiply-adds a position: the sum over positions first, or the projection first.
        if captured.shape[-1] > 1 and self.out * k_in <= (self.out + k_in) * k_out:
            half = _products(deltas, captured).reshape(-1, self.groups, self.out, k_in)
            return (outputs @ half).flatten(1)
        return _products(outputs @ deltas, captured)

    def adjoint(self, features: Tensor) -> Tensor:
        """P_out^T S^T v P_in, [group, out, inner], of features [size]."""
        found = self.sparse.adjoint(features).reshape(self.shape)
        if self.outputs is not None:
            found = self.outputs.to(found).mT @ found
        return found if self.inputs is None else found @ self.inputs.to(found)


class TwoSided(Block):
    """Features of a weight whose gradient is sum_t delta_t a_t^T, by projections of both sides.

    Subclasses have the projections, `sides`.
    """

    sides: Sides

    @property
    def size(self) -> int:
        """That of the sides' projections: group x k_out x k_in, or less."""
        return self.sides.size

    @property
    def matrices(self) -> Sequence[Tensor]:
        """Those of the sides."""
        return self.sides.matrices

    def captured_size(self, deltas: Tensor) -> int:
        """Numbers of P_in a_t over all positions and groups of a row."""
        return self.sides.captured_size(deltas)

    @abstractmethod
    def in_groups(self, captured: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """The two sides of a call, each with its positions last.

        Args:
            captured: what was captured of it.
            deltas: gradients of its outputs.

        Returns:
            delta_t, [row, group, out, position], and P_in a_t, [row, group, k_in, position].
        """

    def features(self, captured: Tensor, deltas: Tensor) -> Tensor:
        """S vec(P_out (sum_t delta_t a_t^T) P_in^T) of each row, all groups together."""
        return self.sides.features(*self.in_groups(captured, deltas))


@final
@dataclass(frozen=True)
class LinearBlock(TwoSided):
    """A Linear layer: inputs a [row, ..., in] with a constant 1 appended for the bias.

    Args:
        weight: name of the weight, if covered.
        bias: name of the bias, if covered.
        sides: the projections.
    """

    weight: str | None
    bias: str | None
    sides: Sides

    def capture(self, call: Call) -> Tensor:
        """Projected inputs, [row, position, k_in]."""
        rows = call.inputs.reshape(len(call.inputs), -1, call.inputs.shape[-1])
        if self.weight is None:
            return rows.new_ones(*rows.shape[:2], 1)
        if self.sides.inputs is None:
            return functional.pad(rows, (0, 1), value=1.0) if self.bias else rows
        matrix = self.sides.inputs[0].to(rows)
        return _affine(rows, matrix, self.bias is not None)

    def in_groups(self, captured: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """One group."""
        return _one_group(captured, deltas)

    def adjoint(self, features: Tensor) -> State:
        """Weight [out, in] and bias [out]."""
        found = self.sides.adjoint(features)[0]
        width = self.sides.inner - (self.bias is not None)
        return _named((self.weight, found[:, :width]), (self.bias, found[:, width:].flatten()))


@final
@dataclass(frozen=True)
class EmbeddingBlock(TwoSided):
    """An Embedding: its inputs are rows of the identity.

    Args:
        weight: name of the weight [entry, width].
        bias: None; an embedding has none.
        sides: the projections; P_in has a column for each entry.
        padding: entry whose gradient is zero by definition, if any.
    """

    weight: str
    bias: None
    sides: Sides
    padding: int | None

    def capture(self, call: Call) -> Tensor:
        """Columns of P_in at the inputs, [row, position, k_in]."""
        entries = call.inputs.reshape(len(call.inputs), -1)
        matrix = self.sides.input_matrices(entries.device, call.dtype)[0]
        return self._without_padding(matrix.mT)[entries]

    def in_groups(self, captured: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """One group."""
        return _one_group(captured, deltas)

    def adjoint(self, features: Tensor) -> State:
        """Weight [entry, width]."""
        return {self.weight: self._without_padding(self.sides.adjoint(features)[0].mT)}

    def _without_padding(self, entries: Tensor) -> Tensor:
        if self.padding is None:
            return entries
        kept = torch.arange(len(entries), device=entries.device) != self.padding
        return entries * kept.to(entries.dtype).unsqueeze(1)


def _layer_norm(layer: Any, inputs: Tensor) -> Tensor:
    return functional.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)


def _rms_norm(layer: Any, inputs: Tensor) -> Tensor:
    return functional.rms_norm(inputs, layer.normalized_shape, eps=layer.eps)


def _group_norm(layer: Any, inputs: Tensor) -> Tensor:
    return functional.group_norm(inputs, layer.num_groups, eps=layer.eps)


def _batch_norm(layer: Any, inputs: Tensor, mean: Tensor, variance: Tensor, _: Tensor) -> Tensor:
    return functional.batch_norm(inputs, mean, variance, eps=layer.eps)


NORMALISATIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
}
"""Normalised inputs of each kind, before weight and bias, from layer, inputs and buffers."""


@final
@dataclass(frozen=True)
class NormalisationBlock(Block):
    """Weight and bias of a normalisation layer in eval mode, y = weight x + bias elementwise.

    Args:
        weight: name of the weight, if covered.
        bias: name of the bias, if covered.
        shape: of each of them.
        trailing: whether they belong to the last axes of the inputs, not to axis 1.
        sparse: projection of the gradients of weight and bias, one behind the other.
    """

    weight: str | None
    bias: str | None
    shape: tuple[int, ...]
    trailing: bool
    sparse: SparseProjection

    @property
    def size(self) -> int:
        """Size of the sparse projection."""
        return self.sparse.size

    @property
    def matrices(self) -> Sequence[Tensor]:
        """Its order and signs."""
        return self.sparse.matrices

    def captured_size(self, deltas: Tensor) -> int:
        """As many as the inputs have."""
        return deltas.shape[1:].numel()

    def capture(self, call: Call) -> Tensor:
        """Normalised inputs, of the shape of the inputs."""
        return NORMALISATIONS[type(call.layer)](call.layer, call.inputs, *call.buffers)

    def features(self, captured: Tensor, deltas: Tensor) -> Tensor:
        """S [sum_t delta_t x_t, sum_t delta_t] of each row."""
        weight = [self._summed(deltas * captured)] if self.weight else []
        bias = [self._summed(deltas)] if self.bias else []
        return self.sparse.apply(torch.cat([*weight, *bias], 1))

    def adjoint(self, features: Tensor) -> State:
        """Weight and bias, each of the parameters' shape."""
        found = self.sparse.adjoint(features).reshape(-1, *self.shape)
        return _named((self.weight, found[0]), (self.bias, found[-1]))

    def _summed(self, values: Tensor) -> Tensor:
        if self.trailing:
            return values.reshape(len(values), -1, _product(self.shape)).sum(1)
        return values.reshape(len(values), self.shape[0], -1).sum(2)


def _affine(rows: Tensor, matrix: Tensor, bias: bool) -> Tensor:
    if bias:
        return functional.linear(rows, matrix[:, :-1], matrix[:, -1])
    return functional.linear(rows, matrix)


def _one_group(captured: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    found = deltas.reshape(*captured.shape[:2], -1)
    return found.mT.unsqueeze(1), captured.mT.unsqueeze(1)


def _products(deltas: Tensor, captured: Tensor) -> Tensor:
    if captured.shape[-1] == 1:
        return (deltas * captured.mT).flatten(1)
    return (deltas @ captured.mT).flatten(1)


def _named(*parts: tuple[str | None, Tensor]) -> State:
    return {name: tensor for name, tensor in parts if name is not None}


def _product(lengths: Sequence[int]) -> int:
    return int(torch.Size(lengths).numel())
