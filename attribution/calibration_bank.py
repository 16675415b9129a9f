"""A few forget sets, and models retrained without each, to hold predictions against."""

import numpy as np

from attribution.ensemble import Ensemble, subsets_left
from attribution.ensemble_training import train_models
from attribution.forget import cluster_rows, random_rows
from attribution.seeds import derive_seed, generator
from attribution.subsets import Subsets
from attribution.task import Rows, Task
from stores import Where

SHARES = (0.01, 0.1)  # of the training rows: the smallest and the largest forget set
FEWEST = 10  # rows of a forget set, where there are rows enough
FORGET_SETS, FEWEST_EACH = 20, 4


def calibration_bank(
    task: Task,
    to: Where,
    *,
    forget_sets: int = FORGET_SETS,
    models_each: int = FEWEST_EACH,
    seed: int = 0,
    device: str = "cpu",
    workers: int | None = None,
    scheduler: str | None = None,
) -> Ensemble:
    """Trains a few models without each of some forget sets, random and coherent in turns.

    The noise of one retraining is as large as most changes, and hides which of two good predictors
    is the better one; the mean of several models tells.

    Args:
        task: what to train.
        to: folder of the store.
        forget_sets: how many.
        models_each: models trained without each of them.
        seed: of the sets and the models.
        device: where to compute.
        workers: processes; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The models, those of one set side by side; the rows that each of them never saw are its
        forget set.

    Raises:
        ValueError: fewer than 4 sets or 1 model of each, or a task that cannot be trained.
    """
    if forget_sets < 4:
        raise ValueError(f"a calibration needs 4 forget sets or more, got {forget_sets}")
    if models_each < 1:
        raise ValueError(f"a calibration needs 1 model of each set or more, got {models_each}")
    masks = np.ones((forget_sets, len(task.train_ids)), dtype=bool)
    for index, mask in enumerate(masks):
        mask[_drawn(task, derive_seed(seed, "calibration set", index), index)] = False
    masks = masks.repeat(models_each, axis=0)
    everything = np.ones(len(masks), dtype=bool)
    drawn = Subsets(masks, "calibration", derive_seed(seed, "calibration models"), everything)
    subsets = subsets_left(to) or drawn
    return train_models(task, subsets, to, device=device, workers=workers, scheduler=scheduler)


def _drawn(task: Task, seed: int, index: int) -> Rows:
    """Sizes are uniform in their logarithm; a class that is too small gives all it can spare."""
    n = len(task.train_ids)
    # A set of a few rows may happen to change next to nothing, and tells next to nothing.
    fewest = min(FEWEST, max(1, n // 4))
    low, high = (max(float(fewest), share * n) for share in SHARES)
    size = round(float(np.exp(generator(seed, "size").uniform(np.log(low), np.log(high)))))
    if index % 2 == 0:
        return random_rows(task, size, seed)
    for smaller in range(size, 0, -1):
        try:
            return cluster_rows(task, smaller, seed)
        except ValueError:
            continue
    raise AssertionError("a cluster of one row always exists")
