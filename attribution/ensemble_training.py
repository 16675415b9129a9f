"""Trains an ensemble, block by block, into its store; resumes by itself."""

import os
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from attribution.descent import Recordings, stack
from attribution.devices import repeatable, visible_gpus
from attribution.ensemble import Ensemble
from attribution.ensemble_store import ensemble_store, kept_segments, segment_keys, state_keys
from attribution.model import check_state
from attribution.outputs import evaluate, evaluate_many
from attribution.paths import pays_at_once, why_one_by_one
from attribution.segments import SegmentMeans
from attribution.subsets import Subsets
from attribution.task import State, Task
from attribution.training import threads, train_many, train_one
from stores import BlockFailed, Store, Where, advance, in_turns, run_blocks


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
        segments = kept_segments(store)
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
