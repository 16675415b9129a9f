"""Ensembles: models trained on given subsets, with their outputs and perhaps their weights."""

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from attribution.descent import unstack
from attribution.ensemble_store import kept_segments, segment_keys, state_keys
from attribution.forget import ForgetSet
from attribution.model import Model
from attribution.outputs import Array, target_margins
from attribution.subsets import Subsets
from attribution.task import State, Task
from stores import Store, Where, gather, name_blocks, taken_out


@dataclass(frozen=True)
class Ensemble:
    """Trained models of a task: which rows each saw, its outputs, perhaps its weights.

    Args:
        task: what they were trained for.
        store: where they lie.

    Example:
        >>> import tempfile
        >>> from attribution import draw_subsets, train_models
        >>> from examples.digits import task
        >>> subsets = draw_subsets(task, models=2, design="half", seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bank = train_models(task, subsets, to=f"{folder}/bank", workers=0)
        ...     bank.outputs.shape
        (2, 1797, 10)
    """

    task: Task = field(repr=False)
    store: Store = field(repr=False)

    @classmethod
    def open(cls, path: Where, task: Task) -> "Ensemble":
        """Opens an ensemble made from this task.

        Args:
            path: its folder.
            task: what it was trained for.

        Returns:
            The ensemble.

        Raises:
            ValueError: no such store, blocks are missing, or other rows than the task's.
        """
        store = Store.open(path, "ensemble")
        if store.ids("train") != list(task.train_ids) or store.ids("target") != list(
            task.target_ids
        ):
            raise ValueError(
                f"{store.path} was made from other rows than those of task {task.name!r}"
            )
        if store.pending():
            raise ValueError(
                f"{store.path} is not finished: {name_blocks(store.pending())} of"
                f" {store.spec.block} models each pending; run the command that makes it again, it"
                " resumes"
            )
        return cls(task, store)

    def __len__(self) -> int:
        return self.store.spec.length

    @cached_property
    def masks(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """True where a model trained on a row, [model, train]."""
        return self.store.map_constant("mask")

    @cached_property
    def judges(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """True where a model may be held out to judge predictions, [model]."""
        return self.store.constant("judge")

    @cached_property
    def outputs(self) -> Array:
        """Outputs of every model on all targets, [model, target, output]."""
        return self.store.numpy("outputs")

    @cached_property
    def margins(self) -> Array:
        """Margins of every model on all targets, [model, target]."""
        return target_margins(self.task, self.outputs)

    @property
    def seed(self) -> int:
        """Seed of the subsets and of every model."""
        return int(str(self.store.attributes["seed"]))

    @cached_property
    def without(self) -> ForgetSet | None:
        """Rows that no model of the design was allowed to see."""
        ids = [str(row) for row in self.store.attributes["without"]]
        return ForgetSet.of(self.task, ids) if ids else None

    @property
    def keeps_weights(self) -> bool:
        """Whether the models' weights were kept."""
        return bool(self.store.attributes["keys"])

    @property
    def segments(self) -> int:
        """Parts of each training whose mean weights were kept."""
        return kept_segments(self.store)

    def states(self, models: Sequence[int] | None = None) -> State:
        """Stacked state dicts of some models, each tensor [model, ...]; None: of all."""
        if not self.keeps_weights:
            raise ValueError(
                f"{self.store.path} kept no weights: train it with"
                " train_models(..., keep='weights')"
            )
        numbers = range(len(self)) if models is None else map(operator.index, models)
        chosen = np.fromiter(numbers, np.int64)
        return self._gathered(state_keys(self.store), chosen)

    def _gathered(self, keys: dict[str, str], models: Any) -> State:
        return {
            key: torch.from_numpy(gather(self.store, name, models)) for name, key in keys.items()
        }

    def model(self, index: int) -> Model:
        """One of its models; the rows it never saw count as forgotten."""
        self._check(index)
        return self._model(index, self.states([index]), {})

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise ValueError(f"{self.store.path} has models 0 to {len(self) - 1}, not {index}")

    def _model(self, index: int, stacked: State, more: dict[str, int]) -> Model:
        told = {"ensemble": os.path.basename(self.store.path), "index": index, "seed": self.seed}
        unseen = np.flatnonzero(~self.masks[index])
        forgotten = ForgetSet.at(self.task, unseen) if len(unseen) else None
        return Model(self.task, unstack(stacked, 0), forgotten, told | more)

    def checkpoints(self, count: int) -> list[Model]:
        """Its first models."""
        return [self.model(index) for index in range(count)]

    def along(self, count: int) -> list[Model]:
        """Mean weights over the segments of its first trainings, all of one after the other."""
        return [self._mean(i, s) for i in range(count) for s in range(self.segments)]

    def _mean(self, index: int, segment: int) -> Model:
        self._check(index)
        keys = segment_keys(self.store, segment)
        return self._model(index, self._gathered(keys, np.array([index])), {"segment": segment})

    def times(self, index: int) -> tuple[float, ...]:
        """Times of the segments of a training, as they were; see `segment_times`."""
        self._check(index)
        return tuple(self.store.constant("times")[index].tolist()) if self.segments else ()


def subsets_left(path: Where) -> Subsets | None:
    """The subsets of an ensemble from which rows were purged, without these rows.

    They were drawn from more rows, and the same draw from those that are left would be another.

    Args:
        path: folder of the ensemble.

    Returns:
        The subsets; None where there is no ensemble, or no row was purged from it.

    Example:
        >>> subsets_left("nowhere")
    """
    if not taken_out(path):
        return None
    store = Store.open(path, "ensemble")
    told = store.attributes
    without = tuple(str(row) for row in told["without"])
    masks, judges = store.constant("mask"), store.constant("judge")
    return Subsets(masks, str(told["design"]), int(told["seed"]), judges, without)
