"""TRAK scores of one target straight from the features, where no scores are stored."""

import numpy as np
import torch

from attribution.gradients import Features
from attribution.newton.inverse import Damped
from attribution.outputs import Array
from attribution.training import threads
from attribution.trak.curvature import (
    condition_number,
    gram_matrix,
    natural_damping,
    warn_if_ill_conditioned,
)
from attribution.trak.pulls import output_pulls
from attribution.trak.score_blocks import margin_slopes


def margin_effects(features: Features, target: int, *, damping: float | None = None) -> Array:
    """Effects of including each training row on one target's margin, as `fit_trak` computes them.

    With s the margin's derivative with respect to the outputs, one vector v = (H + lambda I)^-1
    J(x)^T s is solved for and the score of row i is -g_i^T J_i v, mean over the checkpoints, with
    g_i as `fit_trak` has it.

    Args:
        features: projected gradients of the checkpoints.
        target: position of the target.
        damping: lambda, as for `fit_trak`.

    Returns:
        Effects, [train].

    Raises:
        ValueError: no damping is known, or it is too small.

    Example:
        >>> import tempfile
        >>> from attribution import Model
        >>> from attribution.gradients import Projection, featurize
        >>> from examples.digits import mlp, task
        >>> models, small = [Model(task, mlp().state_dict())], Projection(inputs=4, outputs=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     features = featurize(task, models, f"{folder}/features", projection=small)
        ...     margin_effects(features, 1500).shape
        (1437,)
    """
    known = natural_damping(features.task) if damping is None else damping
    each = [_of_checkpoint(features, c, target, known) for c in range(len(features))]
    return np.asarray(np.mean(each, axis=0, dtype=np.float64), dtype=np.float32)


def _of_checkpoint(features: Features, checkpoint: int, target: int, damping: float) -> Array:
    rows, place = np.arange(len(features.task.train_ids)), np.array([target])
    slope = margin_slopes(features, checkpoint, place)[0]
    j = torch.from_numpy(features.gather(checkpoint, place))[0]
    with threads(1):
        curvature = gram_matrix(features, checkpoint, weighting=True, dtype="float32")
        lower = Damped(torch.from_numpy(curvature), damping).lower
        warn_if_ill_conditioned(condition_number(lower), damping, "float32", checkpoint)
        v = torch.cholesky_solve((slope @ j).double()[:, None], lower)[:, 0].numpy()
    pushed = torch.from_numpy(features.product(checkpoint, v, rows))
    return np.asarray(-(output_pulls(features, checkpoint, rows) * pushed).sum(1).numpy())
