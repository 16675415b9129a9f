"""What unlearning did to outputs, accuracy and single rows, against models really retrained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attribution.task import Rows
from unlearning.klom import FEWEST_MODELS, Array, check_margins, klom, shift

SHOWN_ROWS = 10


def tug_of_war(accuracy: Mapping[str, float], oracles: Mapping[str, float]) -> float:
    """ToW: the product over splits of 1 - |accuracy - accuracy of the oracles|.

    Direction: higher is better, up to 1. Reference: the oracles' accuracy, mean over models, so
    that the chance of single trainings does not count as a difference. Null: between two banks of
    oracles, a little below 1.

    Args:
        accuracy: mean accuracy of unlearned models by split (forget, retain, test), 0 to 1.
        oracles: of models retrained without the forget set, by the same splits.

    Returns:
        The product.

    Raises:
        ValueError: other splits on either side, or an accuracy outside 0 to 1.

    Example:
        >>> round(tug_of_war({"forget": 1.0, "test": 0.9}, {"forget": 0.5, "test": 0.8}), 3)
        0.45

    Source: Zhao et al. 2024 (arXiv 2406.01257).
    """
    if set(accuracy) != set(oracles):
        raise ValueError(
            f"expected accuracies of the same splits, got {sorted(accuracy)} and {sorted(oracles)}"
        )
    outside = [a for a in [*accuracy.values(), *oracles.values()] if not 0 <= a <= 1]
    if outside:
        raise ValueError(f"an accuracy must lie between 0 and 1, got {outside[0]}")
    return float(np.prod([1 - abs(accuracy[split] - oracles[split]) for split in oracles]))


def logit_distance(unlearned: Array, oracles: Array) -> Array:
    """Squared distance of the mean outputs of a row in units of the oracles' variance.

    [sum over outputs of (mean difference)^2 - var_u / N - var_o / M] / sum of var_o; the terms
    subtracted are what the finite number of models adds. Its root, where it is above 0, is in
    standard deviations of the oracles.

    Direction: lower is better. Reference: the oracles. Null: 0, single rows to either side.

    Args:
        unlearned: outputs [model, target, output].
        oracles: outputs [model, target, output].

    Returns:
        The distance of each target, [target]; not a number where oracles agree exactly.

    Raises:
        ValueError: the shapes do not fit, or a side has one model.

    Example:
        >>> rows = np.array([-1.0, 0.0, 1.0])[:, None, None]
        >>> logit_distance(rows + 2, rows).round(3)
        array([3.333])

    Source: the objective of oracle matching, Attribute-to-Delete (arXiv 2410.23232).
    """
    u, o = np.asarray(unlearned, dtype=np.float64), np.asarray(oracles, dtype=np.float64)
    if u.ndim != 3 or o.ndim != 3 or u.shape[1:] != o.shape[1:] or min(len(u), len(o)) < 2:
        raise ValueError(
            "expected outputs [model, target, output] of the same targets, of 2 models or more,"
            f" got {u.shape} and {o.shape}"
        )
    ours, theirs = u.var(0, ddof=1), o.var(0, ddof=1)
    squares = (u.mean(0) - o.mean(0)) ** 2 - ours / len(u) - theirs / len(o)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(squares.sum(-1) / theirs.sum(-1))


@dataclass(frozen=True)
class HarmedRow:
    """A row that was to stay as it is, and how far unlearning moved it.

    Args:
        id: of the row.
        shift: mean margin less that of the oracles, in their standard deviations.
        klom: KLOM of the row; None below 80 models.
    """

    id: str
    shift: float
    klom: float | None


def most_harmed(
    unlearned: Array, oracles: Array, ids: Sequence[str], rows: Rows, count: int = SHOWN_ROWS
) -> list[HarmedRow]:
    """The rows whose margins unlearning moved farthest from those of the oracles.

    Ranked by |mean difference| / sd of the oracles, which, unlike KLOM, does not saturate.

    Direction: nearer to 0 is better; below 0 the model is less sure of the label than a retrained
    one. Reference: the oracles. Null: not 0, because the largest of many rows is told: between two
    banks of 100 oracles the largest of 1,400 rows is about .5.

    Args:
        unlearned: margins [model, target].
        oracles: margins [model, target].
        ids: of all targets.
        rows: positions of those to choose from, usually the retain rows.
        count: how many.

    Returns:
        The rows, the farthest first; those that have no finite shift come last.

    Raises:
        ValueError: the shapes do not fit, a margin is not a number, or other numbers of ids.

    Example:
        >>> sample = np.array([[-1.0], [0.0], [1.0]])
        >>> oracles = np.concatenate([sample, sample], 1)
        >>> most_harmed(oracles - [0.0, 3.0], oracles, ["a", "b"], np.arange(2), count=1)
        [HarmedRow(id='b', shift=-3.0, klom=None)]
    """
    u, o = check_margins(unlearned, oracles)
    if len(ids) != u.shape[1]:
        raise ValueError(f"expected an id for each of {u.shape[1]} targets, got {len(ids)}")
    apart = shift(u[:, rows], o[:, rows])
    farthest = np.argsort(-apart, kind="stable")[:count]
    signs = np.sign(u.mean(0) - o.mean(0))[rows]
    enough = min(len(u), len(o)) >= FEWEST_MODELS
    chosen = rows[farthest]
    found = klom(u[:, chosen], o[:, chosen]).tolist() if enough else [None] * len(chosen)
    return [
        HarmedRow(ids[rows[i]], float(signs[i] * apart[i]), distance)
        for i, distance in zip(farthest, found, strict=True)
    ]
