"""How hard each training row pulls on its own outputs: the middle factor of a TRAK score."""

import torch
from torch import Tensor

from attribution.gradients import Features, output_cotangents
from attribution.task import Rows


def pulls(features: Features, checkpoint: int, rows: Rows) -> Tensor:
    """Derivatives of the rows' losses with respect to the outputs of a checkpoint.

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

    Source: TRAK (arXiv 2303.14186), section 3.2, which averages Q and the rest of a score apart.
    """
    loss, labels = features.task.loss, features.task.targets(rows)[1]
    outputs = torch.from_numpy(features.outputs(checkpoint, rows)).double()
    strength = _mean_margin_derivative(features, rows, labels)
    if strength is None:
        return loss.gradient(outputs, labels)
    return strength[:, None] * output_cotangents(loss, outputs, labels, "margin")[:, 0]


def _mean_margin_derivative(features: Features, rows: Rows, labels: Tensor) -> Tensor | None:
    total = torch.zeros(len(rows), dtype=torch.float64)
    for checkpoint in range(len(features)):
        outputs = torch.from_numpy(features.outputs(checkpoint, rows)).double()
        part = features.task.loss.margin_derivative(outputs, labels)
        if part is None:
            return None
        total += part
    return total / len(features)
