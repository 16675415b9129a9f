"""In-run values in a store: recorded once, opened like other scores."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from attribution.counterfactual import target_positions
from attribution.devices import repeatable, where_to_run
from attribution.in_run.recording import held_steps, run_values, why_not_recorded
from attribution.model import Model
from attribution.outputs import Array
from attribution.task import Rows, Task
from attribution.training import require_recipe, threads
from stores import (
    ArraySpec,
    Provenance,
    Store,
    StoreSpec,
    Where,
    digest,
    in_turns,
    run_blocks,
    versions,
)

MEANING = "value for this run, not a retrained output"
MEAN = "mean of the targets"

# Derivatives of targets that a block may hold at once.
HELD_BYTES = 2**28


@dataclass(frozen=True)
class InRunScores:
    """What each row did to the targets' loss during one training run.

    A value for this run, not a retrained output: it tells what happened on the way that these
    weights took; a model trained without the row would have taken another one.

    Args:
        store: where they lie.
    """

    store: Store = field(repr=False)

    @classmethod
    def open(cls, path: Where) -> "InRunScores":
        """Opens recorded values.

        Args:
            path: folder of the store.

        Returns:
            The values.

        Raises:
            ValueError: no such store, or blocks are missing.
        """
        store = Store.open(path, "in-run-scores")
        if store.pending():
            raise ValueError(f"{store.path} is not finished: run the command that makes it again")
        return cls(store)

    @cached_property
    def scores(self) -> Array:
        """Effect of including a row on the loss, [train, target]; negative where it helped."""
        return self.store.numpy("scores")

    @cached_property
    def change(self) -> Array:
        """What the whole run did to the loss, [target]: its end less its beginning."""
        return self.store.numpy("change")

    @property
    def targets(self) -> tuple[str, ...]:
        """Ids of the targets, or of those whose mean is the only one."""
        return tuple(str(row) for row in self.store.attributes["targets"])

    @property
    def order(self) -> int:
        """1 or 2: up to which power of a step's length its values are exact."""
        return int(self.store.provenance.settings["order"])

    def belongs_to(self, model: Model) -> bool:
        """Whether a model is the very one that this run ended with."""
        return bool((self.store.numpy("digest") == _bytes(model)).all())


def _bytes(model: Model) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(bytes.fromhex(model.digest()), dtype=np.uint8)


@dataclass(frozen=True)
class _RunBlock:
    task: Task
    path: str
    seed: int
    index: int
    order: int
    per_target: bool
    device: str

    def __call__(self, block: int) -> None:
        store = Store.open(self.path, "in-run-scores")
        span = store.spec.span(block)
        targets, rows = store.constant("positions"), np.arange(len(self.task.train_ids))
        with threads(1), repeatable(self.device, tf32=True):
            values = run_values(
                self.task,
                rows,
                targets[span] if self.per_target else targets,
                seed=self.seed,
                index=self.index,
                device=torch.device(self.device),
                order=self.order,
                per_target=self.per_target,
            )
        made_by = _bytes(Model(self.task, values.state))
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "scores": values.scores.astype(np.float32),
            "change": values.change.astype(np.float32),
            "digest": np.tile(made_by, (len(values.change), 1)),
        }
        store.write_block(block, arrays)


def record_run(
    task: Task,
    to: Where,
    *,
    seed: int = 0,
    index: int = 0,
    order: int = 1,
    targets: Sequence[str] | Rows | None = None,
    per_target: bool = False,
    device: str | torch.device = "cpu",
    workers: int | None = 0,
    scheduler: str | None = None,
    targets_at_once: int | None = None,
) -> InRunScores:
    """Trains one model on all rows and stores what each row did to the targets' loss on the way.

    A score is the effect of including a row on the loss of a target, in the loss's unit (nats for
    cross-entropy): negative where the row lowered the loss. This is the sign of the paper's phi,
    which values the change of the validation loss. Scores add over rows, and removing rows
    subtracts theirs. The sum over all rows misses `change`, what the run really did to the loss,
    by the part of weight decay and by what the expansion leaves out, which tells how well it
    holds; with long steps the first order alone may be far off. The formulas stand at
    `run_values`. The model is the one that `train_one` makes of the same seed and index.

    For the mean loss of the targets a step costs one more backward pass over them, with order 2 a
    Hessian-vector product instead, and a forward-mode pass over the batch. With `per_target` the
    targets are cut into blocks, and each block trains the same model again. A block is recorded
    whole or not at all: an interrupted one starts anew, and the same call computes the unfinished
    ones only.

    Args:
        task: a task with a recipe.
        to: folder of the store.
        seed: seed of the ensemble.
        index: number of the model in the ensemble.
        order: 1, or 2 to add how the rows of a step act on each other.
        targets: ids or positions of targets; None: the test rows.
        per_target: a score for each target; False: one score, for their mean loss.
        device: where to compute.
        workers: processes; 0 for this process.
        scheduler: address of an existing dask scheduler instead.
        targets_at_once: targets of a block; None: as many as take 256 MiB.

    Returns:
        The scores.

    Raises:
        ValueError: the task has its own train function or no recipe, order is not 1 or 2, an
            unknown target, a model that cannot be differentiated so, or the store was made with
            other settings.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> from attribution import Recipe
        >>> data = TensorDataset(torch.eye(6), torch.arange(6) % 2)
        >>> recipe = Recipe(epochs=4, batch_size=4, peak_rate=0.1)
        >>> task = Task("toy", data, data, lambda: nn.Linear(6, 2), recipe)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = record_run(task, f"{folder}/in-run", order=2)
        ...     run.scores.shape, bool((run.scores < 0).all())
        ((6, 1), True)

    Source: In-Run Data Shapley (arXiv 2406.11011).
    """
    _check(task, order, targets_at_once)
    task.check()
    places = _places(task, targets)
    reason = why_not_recorded(task, order=order, per_target=per_target)
    if reason is not None:
        raise ValueError(f"the model of task {task.name!r} cannot be valued in its run: {reason}")
    settings = task.settings() | {
        "meaning": MEANING,
        "device": torch.device(device).type,
        "seed": seed,
        "index": index,
        "order": order,
        "targets": digest(places),
        "per_target": per_target,
    }
    store = _store(task, to, places, settings, targets_at_once)
    if store.pending():
        work = _RunBlock(task, store.path, seed, index, order, per_target, str(device))
        title = f"recording {os.path.basename(store.path)}"
        where = where_to_run(device, workers, scheduler)
        run_blocks(in_turns(work, store), store.pending(), title=title, **where)
    return InRunScores.open(store.finalize().path)


def _check(task: Task, order: int, targets_at_once: int | None) -> None:
    if task.train is not None:
        raise ValueError(
            f"task {task.name!r} has its own train function, whose steps cannot be followed:"
            " in-run values need Task(recipe=...)"
        )
    require_recipe(task)
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    if targets_at_once is not None and targets_at_once < 1:
        raise ValueError(f"targets_at_once must be above 0, got {targets_at_once}")


def _places(task: Task, targets: Sequence[str] | Rows | None) -> Rows:
    if targets is not None:
        return target_positions(task, targets)
    if not task.test_ids:
        raise ValueError(f"task {task.name!r} has no test rows: name targets=")
    return np.arange(len(task.train_ids), len(task.target_ids))


def _store(
    task: Task,
    to: Where,
    places: Rows,
    settings: dict[str, object],
    targets_at_once: int | None,
) -> Store:
    ids = [task.target_ids[i] for i in places]
    names = ids if settings["per_target"] else [MEAN]
    count, n = len(names), len(task.train_ids)
    arrays = {
        "scores": ArraySpec(("train", "target"), (n, count), "float32"),
        "change": ArraySpec(("target",), (count,), "float32"),
        "digest": ArraySpec(("target", None), (count, 32), "uint8"),
    }
    block = min(count, targets_at_once or _fitting_targets(task))
    recorded = {
        "versions": versions("torch", "numpy", "datamodel-matching"),
        "sources": task.sources(),
    }
    return Store.open_or_create(
        to,
        StoreSpec("in-run-scores", "target", block, arrays),
        Provenance(settings, recorded),
        constants={"positions": places},
        ids={"train": task.train_ids, "target": names},
        attributes={"meaning": MEANING, "targets": ids},
    )


def _fitting_targets(task: Task) -> int:
    parameters = list(task.new_model(0).parameters())
    size = sum(tensor.numel() * tensor.element_size() for tensor in parameters)
    _, most = held_steps(require_recipe(task).momentum)
    return max(1, HELD_BYTES // (size * most))
