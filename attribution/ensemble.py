"""Ensembles: models trained on given subsets, their outputs and weights in a resumable store."""

import operator
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from attribution.descent import Recordings, stack, unstack
from attribution.devices import repeatable, visible_gpus
from attribution.ensemble_store import ensemble_store, segment_keys, state_keys
from attribution.forget import ForgetSet
from attribution.model import Model, check_state
from attribution.outputs import Array, evaluate, evaluate_many, target_margins
from attribution.paths import pays_at_once, why_one_by_one
from attribution.segments import SegmentMeans
from attribution.subsets import Subsets
from attribution.task import State, Task
from attribution.training import threads, train_many, train_one
from stores import (
    BlockFailed,
    Store,
    Where,
    advance,
    gather,
    in_turns,
    name_blocks,
    run_blocks,
    taken_out,
)


@dataclass(frozen=True)
class Ensemble:
    """Trained models of a task: which rows each saw, its outputs, perhaps its weights.

    Args:
        task: what they were trained for.
        store: where they lie.

    Example:
        >>> import tempfile
        >>> from attribution import draw_subsets
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
        return int(str(self.store.attributes.get("segments", 0)))

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


@dataclass(frozen=True)
class _TrainBlock:
    task: Task
    path: str
    seed: int
    many: bool
    device: str
    # A worker keeps this object for all its blocks.
    recordings: Recordings = field(default_factory=dict, repr=False)

    def __call__(self, block: int) -> None:
        store = Store.open(self.path, "ensemble")
        span = store.spec.span(block)
        subsets = [np.flatnonzero(mask) for mask in store.constant("mask")[span]]
        segments = int(str(store.attributes.get("segments", 0)))
        means = SegmentMeans(segments) if segments else None
        with threads(1), repeatable(self.device, tf32=True):
            states = self._trained(subsets, range(span.start, span.stop), means)
            self._refuse_diverged(span, [list(state.values()) for state in states])
            for index, state in enumerate(states if not self.many else [], span.start):
                check_state(self.task, state, f"model {index}, as trained,")
            arrays = {"outputs": self._outputs(states)}
        self._refuse_diverged(span, [[torch.from_numpy(each)] for each in arrays["outputs"]])
        both = stack(states)
        arrays |= {name: both[key].numpy() for name, key in state_keys(store).items()}
        if means is not None:
            arrays |= _means(store, [means.states(place) for place in range(len(states))])
        store.write_block(block, arrays)

    def _trained(
        self, subsets: list[Any], indices: range, means: SegmentMeans | None
    ) -> list[State]:
        device = torch.device(self.device)
        if self.many:
            return train_many(
                self.task,
                subsets,
                self.seed,
                indices,
                device,
                recordings=self.recordings,
                means=means,
            )
        if self.task.train is None:
            return train_many(
                self.task, subsets, self.seed, indices, device, many=False, means=means
            )
        return self._trained_by_user(subsets, indices, device)

    def _refuse_diverged(self, span: slice, values: list[list[torch.Tensor]]) -> None:
        whole = [all(bool(torch.isfinite(v).all()) for v in each) for each in values]
        wrong = [str(span.start + i) for i, finite in enumerate(whole) if not finite]
        if wrong:
            raise BlockFailed(
                f"training diverged: weights or outputs of model {', '.join(wrong)} are not finite;"
                f" change how task {self.task.name!r} trains, say its learning rate"
            )

    def _trained_by_user(
        self, subsets: list[Any], indices: range, device: torch.device
    ) -> list[State]:
        states = []
        for rows, index in zip(subsets, indices, strict=True):
            states.append(train_one(self.task, rows, self.seed, index, device))
            advance(1 / len(subsets))
        return states

    def _outputs(self, states: list[State]) -> np.ndarray[Any, Any]:
        inputs, _ = self.task.targets()
        module, device = self.task.new_model(0), torch.device(self.device)
        module, inputs = module.to(device), inputs.to(device)
        if self.many:
            moved = {name: tensor.to(device) for name, tensor in stack(states).items()}
            return evaluate_many(module, moved, inputs).cpu().numpy()
        each = [{name: tensor.to(device) for name, tensor in state.items()} for state in states]
        return torch.stack([evaluate(module, state, inputs) for state in each]).cpu().numpy()


def _means(store: Store, means: list[list[State]]) -> dict[str, np.ndarray[Any, Any]]:
    found: dict[str, np.ndarray[Any, Any]] = {}
    for segment, states in enumerate(zip(*means, strict=True)):
        both = stack(states)
        found |= {name: both[key].numpy() for name, key in segment_keys(store, segment).items()}
    return found


def train_models(
    task: Task,
    subsets: Subsets,
    to: Where,
    *,
    keep: Literal["outputs", "weights"] = "outputs",
    segments: int = 0,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    scheduler: str | None = None,
    models_at_once: int | None = None,
) -> Ensemble:
    """Trains one model for each subset and stores its outputs on all targets.

    Models are trained in blocks of fixed groups, many at once where the model can be vectorised
    and one by one where it cannot (a warning then says why) or where that is quicker, as with
    larger convolutions on the CPU. Interrupted at any moment, the same call computes the unfinished
    blocks only and ends with the same bits.

    Args:
        task: what to train.
        subsets: rows of each model.
        to: folder of the store.
        keep: "weights" to store the state dicts beside the outputs.
        segments: equal parts of training by the recipe whose mean weights are stored beside the
            last ones; see `Ensemble.along`.
        device: where to compute; cuda gives each local worker a GPU of its own, and asks a
            scheduler's workers for the resource GPU if some declare it.
        workers: processes; None for one per core or GPU, 0 for this process.
        scheduler: address of an existing dask scheduler instead; one thread a worker.
        models_at_once: models of a block; changes the numbers in their last digits, so a store
            made with another number is refused. None: 50, on a processor fewer where they have more
            than 10,000 parameters, and 1 where trained one by one.

    Returns:
        The ensemble.

    Raises:
        ValueError: the task cannot train, the store was made from other data or another recipe,
            a trained model does not fit; segments of outputs alone, without a recipe, or more than
            there are steps.
        BlocksFailed: blocks failed repeatedly, or the training of a model in them diverged; what
            was finished is kept.

    Example:
        >>> import tempfile
        >>> from attribution import draw_subsets
        >>> from examples.digits import task
        >>> subsets = draw_subsets(task, models=2, design="full", seed=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     full = train_models(task, subsets, to=f"{folder}/full", keep="weights", workers=0)
        ...     full.model(1).outputs([0]).shape
        (1, 10)
    """
    task.check()
    reason = why_not_many(task)
    many = reason is None and pays_at_once(task.new_model(0), task.rows("train", [0])[0], device)
    store = ensemble_store(
        task,
        subsets,
        to,
        keep=keep,
        device=str(device),
        many=many,
        models_at_once=models_at_once,
        segments=segments,
    )
    if store.pending():
        if reason is not None and task.train is None:
            warnings.warn(
                f"models of task {task.name!r} are trained one by one: {reason}", stacklevel=2
            )
        work = _TrainBlock(task, store.path, subsets.seed, many, str(device))
        title = f"training {os.path.basename(store.path)}"
        run_blocks(
            in_turns(work, store),
            store.pending(),
            title=title,
            workers=workers,
            scheduler=scheduler,
            gpus=visible_gpus(device, workers, scheduler),
        )
    return Ensemble.open(store.finalize().path, task)


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


def why_not_many(task: Task) -> str | None:
    """Why models of a task must be trained one by one, or None where many can be trained at once.

    Args:
        task: the task.

    Returns:
        The reason in words, or None.

    Raises:
        ValueError: the task has neither a recipe nor a train function.

    Example:
        >>> from examples.digits import task
        >>> why_not_many(task)
    """
    if task.train is not None:
        return "the task has its own train function"
    if task.recipe is None:
        raise ValueError(
            f"task {task.name!r} has neither a recipe nor a train function: give Task(recipe=...)"
            " or Task(train=...) to train models"
        )
    inputs, _ = task.rows("train", [0, 1] if len(task.train_ids) > 1 else [0])
    return why_one_by_one(task.new_model(0), inputs, training=True)
