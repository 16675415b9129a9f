"""Train one model by a task's recipe, or many small ones at once; same rows, order and steps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from attribution.descent import SGD, Batch, Descent, Recordings, stack, unstack
from attribution.seeds import derive_seed, generator
from attribution.segments import SegmentMeans
from attribution.task import Recipe, Rows, State, Task
from stores import advance

PADDING = -1


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs the body with so many torch threads and restores the number after it.

    Args:
        count: threads within one operation.

    Example:
        >>> with threads(1):
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs the body with torch's global generators at a seed (dropout draws from them).

    Args:
        seed: the seed.

    Example:
        >>> with seeded(3):
        ...     first = torch.rand(2)
        >>> with seeded(3):
        ...     torch.equal(first, torch.rand(2))
        True
    """
    used = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=used):
        torch.manual_seed(seed)
        yield


def epoch_order(rows: Rows, batch_size: int, random: np.random.Generator) -> Rows:
    """A random order of rows cut into as few batches as can be, alike in size up to one row.

    A step follows the mean over its batch. Were the last batch of an epoch what is left, a single
    row of it could count as much as `batch_size` others, and the outputs of a retrained model would
    depend on the number of rows modulo `batch_size`, see examples/benchmarks/last_batch.py.

    Args:
        rows: positions to visit once each.
        batch_size: rows a step at most.
        random: generator of the order.

    Returns:
        Positions [step, row], padded with -1 at the end of a step.

    Example:
        >>> (epoch_order(np.arange(7), 3, np.random.default_rng(0)) >= 0).sum(1)
        array([3, 2, 2])
    """
    steps = -(-len(rows) // batch_size)
    order = np.full((steps, batch_size), PADDING, dtype=np.int64)
    for batch, chosen in zip(order, np.array_split(random.permutation(rows), steps), strict=True):
        batch[: len(chosen)] = chosen
    return order


def training_order(rows: Rows, epochs: int, batch_size: int, seed: int, index: int) -> Rows:
    """Rows of every training step of one model; depends on (rows, seed, index) alone.

    Args:
        rows: positions to train on.
        epochs: passes over them.
        batch_size: rows a step at most.
        seed: seed of the ensemble.
        index: number of the model in the ensemble.

    Returns:
        Positions [step, row], padded with -1.

    Example:
        >>> training_order(np.arange(5), 2, 3, seed=0, index=0).shape
        (4, 3)
    """
    random = generator(seed, "order", index)
    return np.concatenate([epoch_order(rows, batch_size, random) for _ in range(epochs)])


def take(inputs: Tensor, order: Tensor) -> Tensor:
    """Rows of a tensor in the shape of an order; padding (-1) takes the last row.

    Args:
        inputs: [row, ...].
        order: positions, any shape.

    Returns:
        Values, [*order.shape, ...].

    Example:
        >>> take(torch.arange(4.0), torch.tensor([[2, -1]]))
        tensor([[2., 3.]])
    """
    flat = order.reshape(-1) % len(inputs)
    return inputs.index_select(0, flat).reshape(*order.shape, *inputs.shape[1:])


def row_weights(order: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights that average over the real rows of each step and leave padding out.

    Args:
        order: positions [..., row], padded with -1.
        dtype: of the weights.

    Returns:
        Weights [..., row].

    Example:
        >>> row_weights(torch.tensor([[4, 7, -1]]), torch.float32)
        tensor([[0.5000, 0.5000, 0.0000]])
    """
    real = (order != PADDING).to(dtype)
    return real / real.sum(-1, keepdim=True)


def train_one(task: Task, rows: Rows, seed: int, index: int, device: torch.device) -> State:
    """Trains one model on some of the rows, by the recipe or by the task's own function.

    Args:
        task: what to train.
        rows: positions of the training rows.
        seed: seed of the ensemble.
        index: number of the model in the ensemble.
        device: where to compute.

    Returns:
        Its state dict, on the CPU.

    Raises:
        ValueError: the task has neither a recipe nor a train function.

    Example:
        >>> from examples.digits import task
        >>> sorted(train_one(task, np.arange(20), 0, 0, torch.device("cpu")))[:2]
        ['0.bias', '0.weight']
    """
    if task.train is not None:
        own_seed = derive_seed(seed, "train", index)
        with seeded(own_seed):
            state = task.train(rows, own_seed, device)
        return {name: tensor.detach().cpu() for name, tensor in state.items()}
    return train_many(task, [rows], seed, [index], device, many=False)[0]


def train_many(
    task: Task,
    subsets: Sequence[Rows],
    seed: int,
    indices: Sequence[int],
    device: torch.device,
    *,
    many: bool = True,
    recordings: Recordings | None = None,
    means: SegmentMeans | None = None,
) -> list[State]:
    """Trains models by the recipe, those with equally many steps all at once.

    Args:
        task: a task with a recipe.
        subsets: for each model the positions of its training rows.
        seed: seed of the ensemble.
        indices: number of each model in the ensemble.
        device: where to compute.
        many: vectorise over the models; False trains one after the other.
        recordings: of earlier calls with this very task, see `Descent`.
        means: takes the mean weights of each model's segments, by its place among these.

    Returns:
        Their state dicts, on the CPU.

    Raises:
        ValueError: the task has no recipe.

    Example:
        >>> from examples.digits import task
        >>> subsets = [np.arange(20), np.arange(40)]
        >>> len(train_many(task, subsets, 0, [0, 1], torch.device("cpu")))
        2
    """
    recipe = require_recipe(task)
    states: dict[int, State] = {}
    places = sorted(range(len(subsets)), key=lambda i: recipe.steps(len(subsets[i])))
    inputs, labels = task.rows("train", np.arange(len(task.train_ids)))
    data = (inputs.to(device), labels.to(device))
    for _, group in groupby(places, key=lambda i: recipe.steps(len(subsets[i]))):
        for part in [list(group)] if many else [[i] for i in group]:
            chosen = [(subsets[i], indices[i]) for i in part]
            with seeded(derive_seed(seed, "forward passes", indices[part[0]])):
                group_states = _train_group(
                    task,
                    data,
                    chosen,
                    seed,
                    many=many,
                    share=len(part) / len(subsets),
                    recordings=recordings,
                    watch=partial(means, part) if means else None,
                )
            states |= zip(part, group_states, strict=True)
    return [states[i] for i in range(len(subsets))]


def require_recipe(task: Task) -> Recipe:
    """The task's recipe, or a refusal that names the task."""
    if task.recipe is None:
        raise ValueError(
            f"task {task.name!r} has no recipe: training needs one, or Task(train=...)"
        )
    return task.recipe


def _train_group(
    task: Task,
    data: tuple[Tensor, Tensor],
    chosen: Sequence[tuple[Rows, int]],
    seed: int,
    *,
    many: bool,
    share: float,
    recordings: Recordings | None,
    watch: Callable[[int, int, State], None] | None,
) -> list[State]:
    descent, steps = start_training(task, data, chosen, seed, many=many, recordings=recordings)
    count = require_recipe(task).steps(len(chosen[0][0]))
    held = descent.parameters | descent.rest
    stacked = held if many else {name: tensor[None] for name, tensor in held.items()}
    for number, step in enumerate(steps):
        if watch:
            watch(number, count, stacked)
        descent.step(step.batch, step.rate)
        advance(share / count)
    final = {name: tensor.cpu() for name, tensor in descent.state.items()}
    return [unstack(final, i) for i in range(len(chosen))] if many else [final]


@dataclass(frozen=True)
class Step:
    """One step of the recipe; with many models at once, tensors have a leading model axis.

    Args:
        rows: positions of the batch's rows, [row]; of many models padded with -1.
        batch: what they hold, augmented.
        rate: learning rate.
    """

    rows: Tensor
    batch: Batch
    rate: float


def start_training(
    task: Task,
    data: tuple[Tensor, Tensor],
    chosen: Sequence[tuple[Rows, int]],
    seed: int,
    *,
    many: bool,
    recordings: Recordings | None = None,
) -> tuple[Descent, Iterator[Step]]:
    """New models before their first step, and the steps that training takes, made one by one.

    Args:
        task: a task with a recipe.
        data: inputs and labels of all training rows, where the models are to be.
        chosen: rows and number of each model; all take equally many steps.
        seed: seed of the ensemble.
        many: whether the models are stacked; else there is one.
        recordings: of earlier calls with this very task, see `Descent`.

    Returns:
        The descent and the steps to give to it. Dropout draws from torch's global generator:
        train under `seeded(derive_seed(seed, "forward passes", index))`.

    Raises:
        ValueError: the task has no recipe.

    Example:
        >>> from examples.digits import task
        >>> data = task.rows("train", np.arange(1437))
        >>> descent, steps = start_training(task, data, [(np.arange(40), 0)], 0, many=False)
        >>> [len(step.rows) for step in steps][:3]
        [20, 20, 20]
    """
    recipe, (inputs, _) = require_recipe(task), data
    orders = np.stack(
        [
            training_order(rows, recipe.epochs, recipe.batch_size, seed, index)
            for rows, index in chosen
        ]
    )
    modules = [task.new_model(seed, index).to(device=inputs.device) for _, index in chosen]
    states = [module.state_dict() for module in modules]
    descent = Descent(
        modules[0],
        stack(states) if many else states[0],
        lambda outputs, y, _: task.loss.gradient(outputs, y),
        SGD(recipe.momentum, recipe.weight_decay),
        many=many,
        training=True,
        recordings=recordings,
    )
    order = torch.from_numpy(np.moveaxis(orders, 1, 0).copy() if many else orders[0])
    seeds = [derive_seed(seed, "augment", index) for _, index in chosen]
    return descent, _steps(recipe, data, order.to(inputs.device), seeds)


def _steps(
    recipe: Recipe, data: tuple[Tensor, Tensor], order: Tensor, seeds: Sequence[int]
) -> Iterator[Step]:
    inputs, labels = data
    weights = row_weights(order, inputs.dtype)
    # Padding takes the last row, as it does in `take`.
    places = torch.where(order < 0, len(inputs) - 1, order)
    nothing = torch.zeros(*order.shape[1:], 0, device=inputs.device)
    per_epoch = len(order) // recipe.epochs
    for step, (width, rate) in enumerate(
        zip(_widths(order), recipe.rates(len(order)), strict=True)
    ):
        # Padding too, so that a model gets the same of `augment` alone as among many.
        x = _augmented(recipe, _rows(inputs, places[step]), order[step], seeds, step // per_epoch)
        if order.ndim == 2:
            x = x[:width]
        now, place, weight = (part[step, ..., :width] for part in (order, places, weights))
        batch = Batch(x, _rows(labels, place), weight, nothing[..., :width, :])
        yield Step(now, batch, float(rate))


def _widths(order: Tensor) -> list[int]:
    """Rows that each step takes of the order."""
    # Of one model the real rows alone: BatchNorm would count padding, which may be of no subset.
    if order.ndim == 2:
        return [int(count) for count in (order != PADDING).sum(-1).tolist()]
    return [order.shape[-1]] * len(order)


def _rows(values: Tensor, places: Tensor) -> Tensor:
    return values.index_select(0, places.view(-1)).view(*places.shape, *values.shape[1:])


def _augmented(
    recipe: Recipe, inputs: Tensor, rows: Tensor, seeds: Sequence[int], epoch: int
) -> Tensor:
    if recipe.augment is None:
        return inputs
    if len(seeds) == 1 and rows.ndim == 1:
        return recipe.augment(inputs, seeds[0], epoch, rows)
    each = zip(inputs, seeds, rows, strict=True)
    return torch.stack([recipe.augment(x, seed, epoch, row) for x, seed, row in each])
