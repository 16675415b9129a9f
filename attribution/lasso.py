"""Lasso of outputs on masks by coordinate descent on the masks' Gram matrix.

For one target t and output, over models j with masks x_j, outputs y_j and weights a_j,

    minimise  1/2 sum_j a_j (y_j - b - x_j w)^2 + lambda sum_{i != t} |w_i|.

Neither the intercept b nor the target's own row is penalised: both are regressed out of the other
rows and of the outputs first, which leaves a plain lasso.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Centred:
    """Weighted, centred masks of some models and their Gram matrix; made once.

    Args:
        masks: roots of the weights times (mask - centre), [model, train].
        gram: of the masks, [train, train].
        centre: weighted mean mask, [train].
        weights: of the models, [model].
    """

    masks: Numbers
    gram: Numbers
    centre: Numbers
    weights: Numbers

    def outputs(self, outputs: Numbers) -> tuple[Numbers, Numbers]:
        """Roots of the weights times centred outputs [model, ...], and their mean [...]."""
        shares = (self.weights / self.weights.sum()).astype(outputs.dtype)
        mean = np.tensordot(shares, outputs, 1)
        roots = np.sqrt(self.weights).astype(outputs.dtype)
        return roots.reshape(-1, *[1] * (outputs.ndim - 1)) * (outputs - mean), mean


def centred(masks: Numbers, weights: Numbers) -> Centred:
    """Centres masks and multiplies them out.

    Args:
        masks: [model, train], zeros and ones of a type of real numbers.
        weights: of the models, [model].

    Returns:
        The masks as a lasso needs them.

    Example:
        >>> centred(np.eye(3), np.ones(3)).gram.shape
        (3, 3)
    """
    centre = np.average(masks, 0, weights).astype(masks.dtype)
    scaled = np.sqrt(weights).astype(masks.dtype)[:, None] * (masks - centre)
    return Centred(scaled, scaled.T @ scaled, centre, weights)


def without_row(models: Centred, row: int | None) -> Numbers:
    """Gram matrix after one row is regressed out of all others; its own entries become 0.

    Args:
        models: all rows.
        row: its position; None regresses nothing out.

    Returns:
        The matrix, [train, train].

    Example:
        >>> float(abs(without_row(centred(np.eye(4), np.ones(4)), 1)[1]).max()) < 1e-12
        True
    """
    if not _told(models, row):
        return models.gram
    shares = models.gram[row] / models.gram[row, row]
    return np.asarray(models.gram - np.outer(models.gram[row], shares))


def regress_out(models: Centred, row: int | None, outputs: Numbers) -> Numbers:
    """Outputs after one row is regressed out of them.

    Args:
        models: all rows.
        row: its position; None regresses nothing out.
        outputs: centred ones, [model].

    Returns:
        What is left, [model].

    Example:
        >>> models = centred(np.eye(2), np.ones(2))
        >>> regress_out(models, 0, np.array([1.0, -1.0])).tolist()
        [0.0, 0.0]
    """
    if not _told(models, row):
        return outputs
    mask = models.masks[:, row]
    return outputs - mask * (mask @ outputs / models.gram[row, row])


def _told(models: Centred, row: int | None) -> bool:
    """Whether some models saw the row and others did not."""
    return row is not None and bool(models.gram[row, row] > 0)


def own_effect(models: Centred, row: int | None, outputs: Numbers, effects: Numbers) -> Numbers:
    """Effect of the row that was regressed out, given the other rows' effects.

    Args:
        models: all rows.
        row: its position; None gives 0, as does a row that all models or none saw.
        outputs: centred ones, [model].
        effects: of the other rows, [..., train].

    Returns:
        The effect, [...].

    Example:
        >>> models = centred(np.array([[1.0, 0], [0, 1], [1, 1], [0, 0]]), np.ones(4))
        >>> float(own_effect(models, 0, models.masks[:, 0] * 2, np.zeros(2)))
        2.0
    """
    if not _told(models, row):
        return np.zeros(effects.shape[:-1], effects.dtype)
    reached = models.masks[:, row] @ outputs - effects @ models.gram[row]
    return np.asarray(reached / models.gram[row, row])


def lasso_effects(
    models: Centred,
    gram: Numbers,
    left: Numbers,
    lambdas: Numbers,
    *,
    tolerance: float,
    iterations: int,
) -> Numbers:
    """Effects of all rows for falling lambdas, each started from the one before.

    Args:
        models: all rows.
        gram: their Gram matrix after the own row was regressed out.
        left: outputs after it was, [model].
        lambdas: falling, [lambda].
        tolerance: largest gap between the objective and its dual, as a part of the outputs' sum of
            squares.
        iterations: passes over the rows at most.

    Returns:
        Effects, [lambda, train]; 0 for the own row.

    Raises:
        ImportError: scikit-learn is not installed.

    Example:
        >>> models = centred(np.eye(4), np.ones(4))
        >>> outputs, _ = models.outputs(np.array([3.0, 0, 0, 0]))
        >>> settings = {"tolerance": 1e-8, "iterations": 1000}
        >>> found = lasso_effects(models, models.gram, outputs, np.array([5.0, 0.1]), **settings)
        >>> found.round(2).tolist()
        [[0.0, 0.0, 0.0, 0.0], [2.87, 0.0, 0.0, 0.0]]
    """
    path = _solver()
    # Scikit-learn divides the squares by twice the number of models. Of the masks it only reads
    # the shape, as the Gram matrix is given and nothing is checked.
    _, found, _ = path(
        models.masks,
        left,
        alphas=lambdas / len(left),
        precompute=gram,
        Xy=models.masks.T @ left,
        check_input=False,
        tol=tolerance,
        max_iter=iterations,
    )
    return np.asarray(found.T) + 0.0  # no negative zeros


def _solver() -> Callable[..., Any]:
    try:
        from sklearn.linear_model import lasso_path
    except ImportError as error:
        raise ImportError(
            "expected scikit-learn for lasso datamodels; install it with "
            "pip install 'datamodel-matching[lasso]'"
        ) from error
    return lasso_path  # type: ignore[no-any-return]
