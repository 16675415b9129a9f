"""The task without some of its training rows, as if they had never been in its data."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from attribution.forget import ForgetSet
from attribution.task import AugmentFunction, Recipe, Rows, Task, TrainFunction


def retained_task(task: Task, forget: ForgetSet) -> Task:
    """Gives the task of the rows that are left; their ids stay, their positions close up.

    The user's own functions go on being called with the positions of the data as they were given.

    Args:
        task: whose training rows.
        forget: the rows to leave out.

    Returns:
        A task of fewer training rows.

    Raises:
        ValueError: a forget set of other data.

    Example:
        >>> from examples.digits import task
        >>> left = retained_task(task, ForgetSet.of(task, ["train-0", "train-2"]))
        >>> len(left.train_ids), left.train_ids[:2], len(left.test_ids)
        (1435, ('train-1', 'train-3'), 360)
    """
    if forget.total != len(task.train_ids):
        raise ValueError(
            f"the forget set is drawn from {forget.total} rows, task {task.name!r} has"
            f" {len(task.train_ids)}: make it with this task"
        )
    kept = forget.retained
    return replace(
        task,
        train_data=_chosen(task.train_data, kept),
        train_ids=tuple(task.train_ids[i] for i in kept),
        train=None if task.train is None else _Training(task.train, kept),
        recipe=None if task.recipe is None else _recipe(task.recipe, kept),
    )


def _chosen(data: Any, kept: Rows) -> Any:
    # Tensors stay tensors, which are read at once and not row by row.
    if type(data) is TensorDataset:
        return TensorDataset(*(tensor[kept] for tensor in data.tensors))
    return Subset(data, kept.tolist())


def _recipe(recipe: Recipe, kept: Rows) -> Recipe:
    if recipe.augment is None:
        return recipe
    return replace(recipe, augment=_Augmentation(recipe.augment, kept))


@dataclass(frozen=True)
class _Training:
    """A user's training function on the positions that are left."""

    __wrapped__: TrainFunction  # where `inspect` finds the source
    kept: Rows

    def __call__(self, indices: Rows, seed: int, device: torch.device) -> Any:
        return self.__wrapped__(self.kept[indices], seed, device)


@dataclass(frozen=True)
class _Augmentation:
    """A user's augmentation on the positions that are left; padding stays -1."""

    __wrapped__: AugmentFunction
    kept: Rows

    def __call__(self, inputs: Tensor, seed: int, epoch: int, rows: Tensor) -> Tensor:
        places = torch.from_numpy(np.append(self.kept, -1)).to(rows.device)
        return self.__wrapped__(inputs, seed, epoch, places[rows])
