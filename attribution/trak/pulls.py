"""How hard each training row pulls on its own outputs: the middle factor of a TRAK score."""

import torch
from torch import Tensor

from attribution.gradients import Features, output_cotangents
from attribution.losses import Loss
from attribution.task import Rows

ALIKE = 1e-6  # two gradients are along one direction up to this share


def output_pulls(features: Features, checkpoint: int, rows: Rows) -> Tensor:
    """Derivatives g_i of the rows' losses with respect to the outputs of a checkpoint.

    Where the loss l is a function of the margin m, they are dl/dm, averaged over all checkpoints,
    times the checkpoint's own dm/dz: one model may be sure of a row that another gets wrong, and
    what a model trained on other rows makes of it is told better by their mean than by each one's
    own. For other losses they are the checkpoint's own dl/dz.

    Args:
        features: of all checkpoints.
        checkpoint: number of the checkpoint.
        rows: positions of training rows.

    Returns:
        Derivatives, float64, [row, output].

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from attribution import Model
        >>> from attribution.gradients import Projection, featurize
        >>> from examples.digits import mlp, task
        >>> models, small = [Model(task, mlp().state_dict())], Projection(inputs=4, outputs=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     features = featurize(task, models, f"{folder}/features", projection=small)
        ...     output_pulls(features, 0, np.array([3, 17])).shape
        torch.Size([2, 10])

    Source: TRAK (arXiv 2303.14186), section 3.2, which averages Q and the rest of a score apart.
    """
    loss, labels = features.task.loss, features.task.targets(rows)[1]
    each = [
        torch.from_numpy(features.outputs(number, rows)).double() for number in range(len(features))
    ]
    strengths = [_margin_derivative(loss, outputs, labels) for outputs in each]
    known = [strength for strength in strengths if strength is not None]
    if len(known) < len(strengths):
        return loss.gradient(each[checkpoint], labels)
    along = output_cotangents(loss, each[checkpoint], labels, "margin")[:, 0]
    return torch.stack(known).mean(0)[:, None] * along


def _margin_derivative(loss: Loss, outputs: Tensor, labels: Tensor) -> Tensor | None:
    """The factor s in dl/dz = s dm/dz, [row]; None where there is none."""
    gradient = loss.gradient(outputs, labels)
    along = output_cotangents(loss, outputs, labels, "margin")[:, 0]
    found = (gradient * along).sum(1) / along.square().sum(1)
    left = (gradient - found[:, None] * along).abs().max()
    return found if left <= ALIKE * gradient.abs().max() else None
