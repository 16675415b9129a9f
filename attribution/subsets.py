"""Which training rows each model of an ensemble sees.

Subsets of one fixed size leave a shift undetermined: adding c to every row's effect and taking
c times the size from the intercept predicts the same outputs on all of them. The regression in
`datamodels` therefore anchors on models trained on all rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attribution.forget import ForgetSet, Mask, nearest_rows, row_vectors
from attribution.seeds import generator
from attribution.task import Task

# Of the clusters and mixed designs: what a model leaves out, and in what portions.
SHARE_LEFT_OUT = 0.12
ROWS_IN_CLUSTER = (10, 100)


@dataclass(frozen=True)
class Subsets:
    """The rows of each model; models are numbered in the order of the masks.

    Args:
        masks: True where the model trains on the row, [model, train].
        design: how they were drawn.
        seed: of the draw, and of every model's initialisation and order.
        judges: True where a model may be held out to judge predictions, [model]; of the mixed
            design these are the scattered ones, which are nearest to a deletion request.
        without: ids that no model sees, ascending by position.
    """

    masks: Mask
    design: str
    seed: int
    judges: Mask
    without: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.masks)


def _full(task: Task, models: int, random: np.random.Generator) -> Mask:
    del random
    return np.ones((models, len(task.train_ids)), dtype=bool)


def _half(task: Task, models: int, random: np.random.Generator) -> Mask:
    n = len(task.train_ids)
    ranks = np.argsort(random.random((models, n)), axis=1)
    return ranks < n // 2


def _bernoulli(task: Task, models: int, random: np.random.Generator) -> Mask:
    return random.random((models, len(task.train_ids))) < 1 / 2


def _clusters(task: Task, models: int, random: np.random.Generator) -> Mask:
    vectors, groups = row_vectors(task)
    largest = min(ROWS_IN_CLUSTER[1], max(2, int(SHARE_LEFT_OUT * len(vectors))))
    smallest = min(ROWS_IN_CLUSTER[0], largest - 1)
    masks = np.ones((models, len(vectors)), dtype=bool)
    for mask in masks:
        while mask.mean() > 1 - SHARE_LEFT_OUT:
            near = nearest_rows(vectors, groups, int(random.integers(len(vectors))))
            mask[near[: random.integers(smallest, largest)]] = False
    return masks


def _scattered(task: Task, models: int, random: np.random.Generator) -> Mask:
    return random.random((models, len(task.train_ids))) < 1 - SHARE_LEFT_OUT


def _mixed(task: Task, models: int, random: np.random.Generator) -> Mask:
    scattered = models // 4
    clusters = (models - scattered) // 3
    parts = [(_half, models - clusters - scattered), (_clusters, clusters), (_scattered, scattered)]
    return np.concatenate([draw(task, count, random) for draw, count in parts])


DESIGNS: dict[str, Callable[[Task, int, np.random.Generator], Mask]] = {
    "full": _full,
    "half": _half,
    "bernoulli": _bernoulli,
    "clusters": _clusters,
    "mixed": _mixed,
}


def draw_subsets(
    task: Task, *, models: int, design: str, seed: int = 0, without: ForgetSet | None = None
) -> Subsets:
    """Draws the training rows of each model of an ensemble.

    Designs: `full` all rows; `half` exactly half of them; `bernoulli` each row with probability
    1/2; `clusters` all but 12 %, left out as whole neighbourhoods of one class; `mixed` half for
    every second model, clusters for a quarter and 12 % scattered rows left out for a quarter.
    Models are ordered by size, so that models trained together take the same number of steps.

    Args:
        task: whose training rows.
        models: how many models.
        design: one of the names above.
        seed: of the draw, and of every model's initialisation and order.
        without: rows that no model sees.

    Returns:
        The subsets.

    Raises:
        ValueError: an unknown design, no models, too few rows, or other data's forget set.

    Example:
        >>> from examples.digits import task
        >>> subsets = draw_subsets(task, models=4, design="half", seed=0)
        >>> subsets.masks.sum(1)
        array([718, 718, 718, 718])
    """
    if design not in DESIGNS:
        raise ValueError(f"unknown design {design!r}: choose one of {', '.join(DESIGNS)}")
    if seed < 0:
        raise ValueError(f"a seed must not be negative, got {seed}")
    if models < 1:
        raise ValueError(f"an ensemble needs at least 1 model, got {models}")
    if without is not None and without.total != len(task.train_ids):
        raise ValueError(
            f"the forget set is drawn from {without.total} rows, task {task.name!r} has"
            f" {len(task.train_ids)}: make it with this task"
        )
    masks = DESIGNS[design](task, models, generator(seed, f"subsets {design}"))
    if without is not None:
        masks &= ~without.mask
    if not masks.any(1).all():
        raise ValueError(f"design {design!r} leaves a model without rows: the data are too few")
    judges = np.ones(models, dtype=bool)
    if design == "mixed" and models // 4:
        judges[: -(models // 4)] = False
    order = np.argsort(masks.sum(1), kind="stable")
    return Subsets(masks[order], design, seed, judges[order], without.ids if without else ())
