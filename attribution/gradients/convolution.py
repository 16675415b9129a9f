"""Features of a convolution: its input patches are projected by a convolution."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from attribution.gradients.layers import Call, Sides, TwoSided
from attribution.task import State

CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
}


@final
@dataclass(frozen=True)
class ConvolutionBlock(TwoSided):
    """A convolution: a_t is the patch under output pixel t, with a constant 1 for the bias.

    P_in a_t for all t is a convolution with the rows of P_in as filters, so that no patch is
    copied out, unless all of it is wanted.

    Args:
        weight: name of the weight, if covered.
        bias: name of the bias, if covered.
        shape: of the weight, [out, in / groups, ...].
        sides: the projections, one pair a group.
    """

    weight: str | None
    bias: str | None
    shape: tuple[int, ...]
    sides: Sides

    def capture(self, call: Call) -> Tensor:
        """Projected patches, [row, group, k_in, position]."""
        inputs, (groups, _, k_in) = call.inputs, self.sides.shape
        if self.weight is None:
            positions = _filtered(call.layer, inputs, inputs.new_zeros(groups, *self.shape[1:]))
            return torch.ones_like(positions).reshape(len(inputs), groups, 1, -1)
        if self.sides.inputs is None:
            whole = patches(call.layer, inputs).unflatten(1, (groups, -1))
            return functional.pad(whole, (0, 0, 0, int(self.bias is not None)), value=1.0)
        matrix = self.sides.inputs.to(inputs).reshape(groups * k_in, self.sides.inner)
        width = self.sides.inner - (self.bias is not None)
        filters = matrix[:, :width].reshape(-1, *self.shape[1:])
        constants = matrix[:, -1] if self.bias else None
        projected = _filtered(call.layer, inputs, filters, constants)
        return projected.reshape(len(inputs), groups, k_in, -1)

    def in_groups(self, captured: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the convolution."""
        return deltas.reshape(len(deltas), self.sides.groups, self.sides.out, -1), captured

    def adjoint(self, features: Tensor) -> State:
        """Weight [out, in / groups, ...] and bias [out]."""
        found = self.sides.adjoint(features).flatten(0, 1)
        width = self.sides.inner - (self.bias is not None)
        named: State = {}
        if self.weight is not None:
            named[self.weight] = found[:, :width].reshape(self.shape)
        if self.bias is not None:
            named[self.bias] = found[:, width]
        return named


def patches(layer: Any, inputs: Tensor) -> Tensor:
    """Input patches under all output pixels of a convolution, unfolded channel by channel.

    Args:
        layer: Conv1d or Conv2d; its own stride, padding and dilation are used.
        inputs: its inputs, [row, in, width] or [row, in, height, width].

    Returns:
        [row, in x kernel size, position].

    Example:
        >>> patches(nn.Conv1d(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]]))
        tensor([[[1., 2.],
                 [2., 3.]]])
    """
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    if inputs.ndim == 3:
        padded = padded.unsqueeze(2)
    sizes = layer.kernel_size, layer.dilation, layer.stride
    kernel, dilation, stride = ((1, *size)[-2:] for size in sizes)
    return functional.unfold(padded, kernel, dilation, 0, stride)


def _filtered(
    layer: Any, inputs: Tensor, filters: Tensor, constants: Tensor | None = None
) -> Tensor:
    convolve = CONVOLUTIONS[type(layer)]
    padding = layer.padding
    if layer.padding_mode != "zeros":
        # Only the layer knows how much "same" pads on either side.
        amounts = layer._reversed_padding_repeated_twice
        inputs, padding = functional.pad(inputs, amounts, mode=layer.padding_mode), 0
    return convolve(inputs, filters, constants, layer.stride, padding, layer.dilation, layer.groups)
