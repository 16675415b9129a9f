"""Derivatives of what one may want the gradient of, with respect to the outputs."""

from typing import Literal

import torch
from torch import Tensor

from attribution.losses import Loss

Of = Literal["outputs", "loss", "margin"]


def output_cotangents(loss: Loss, outputs: Tensor, labels: Tensor, of: Of) -> Tensor:
    """Cotangents that make `features` give gradients of every output, the loss or the margin.

    Args:
        loss: defines loss and margin.
        outputs: [row, output].
        labels: [row], or as the loss takes them.
        of: "outputs" for all of them, one direction each; "loss" or "margin" for one direction.

    Returns:
        [row, direction, output].

    Raises:
        ValueError: `of` is none of the three.

    Example:
        >>> from attribution import CrossEntropy
        >>> outputs, labels = torch.zeros(1, 2), torch.tensor([1])
        >>> output_cotangents(CrossEntropy(), outputs, labels, "loss")
        tensor([[[ 0.5000, -0.5000]]])
        >>> output_cotangents(CrossEntropy(), outputs, labels, "margin")
        tensor([[[-1.,  1.]]])
    """
    if of == "outputs":
        return torch.eye(outputs.shape[1]).to(outputs).expand(len(outputs), -1, -1)
    if of == "loss":
        return loss.gradient(outputs, labels).unsqueeze(1)
    if of == "margin":
        return _margin_gradient(loss, outputs, labels).unsqueeze(1)
    raise ValueError(f"of must be 'outputs', 'loss' or 'margin', got {of!r}")


def _margin_gradient(loss: Loss, outputs: Tensor, labels: Tensor) -> Tensor:
    with torch.enable_grad():
        free = outputs.detach().requires_grad_()
        return torch.autograd.grad(loss.margin(free, labels).sum(), free)[0]
