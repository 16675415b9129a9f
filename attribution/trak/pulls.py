"""Where each training row pulls the parameters: the right-hand side of a TRAK score."""

import torch
from torch import Tensor

from attribution.gradients import Features, output_cotangents
from attribution.task import Rows
from attribution.trak.curvature import row_pieces


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

    Source: TRAK (arXiv 2303.14186), section 3.2, which averages Q and the rest of a score apart.
    """
    loss, labels = features.task.loss, features.task.targets(rows)[1]
    outputs = torch.from_numpy(features.outputs(checkpoint, rows)).double()
    strength = _mean_margin_derivative(features, rows, labels)
    if strength is None:
        return loss.gradient(outputs, labels)
    return strength[:, None] * output_cotangents(loss, outputs, labels, "margin")[:, 0]


def pulls(features: Features, checkpoint: int, rows: Rows) -> Tensor:
    """J_i^T g_i of some training rows.

    Args:
        features: of all checkpoints.
        checkpoint: number of the checkpoint.
        rows: positions of training rows.

    Returns:
        Pulls, float64, [row, k].
    """
    j = torch.from_numpy(features.gather(checkpoint, rows)).double()
    return torch.einsum("ro,rok->rk", output_pulls(features, checkpoint, rows), j)


def common_pull(features: Features, checkpoint: int) -> Tensor:
    """What is taken off each pull: their mean where training minimises a mean, otherwise nothing.

    Args:
        features: of all checkpoints.
        checkpoint: number of the checkpoint.

    Returns:
        float64, [k].
    """
    total, train = torch.zeros(features.width, dtype=torch.float64), len(features.task.train_ids)
    if features.task.objective == "mean":
        for rows in row_pieces(features, train):
            total += pulls(features, checkpoint, rows).sum(0)
    return total / train


def _mean_margin_derivative(features: Features, rows: Rows, labels: Tensor) -> Tensor | None:
    total = torch.zeros(len(rows), dtype=torch.float64)
    for checkpoint in range(len(features)):
        outputs = torch.from_numpy(features.outputs(checkpoint, rows)).double()
        part = features.task.loss.margin_derivative(outputs, labels)
        if part is None:
            return None
        total += part
    return total / len(features)
