"""The path of training in segments: their times, and the mean weights over each."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attribution.task import Recipe, State, Task


def segment_times(recipe: Recipe, rows: int, segments: int) -> tuple[float, ...]:
    """How long training stays in each of its segments, equal parts of its steps.

    The time is that of gradient flow on the mean loss: rate / (1 - momentum), summed over the
    steps. What is left of a component of the parameters with curvature c is exp(-c time).

    Args:
        recipe: of the training.
        rows: number of training rows.
        segments: how many.

    Returns:
        Times, [segment].

    Raises:
        ValueError: fewer than 1 segment, or more than there are steps.

    Example:
        >>> recipe = Recipe(epochs=30, batch_size=32, peak_rate=0.1, momentum=0.9)
        >>> [round(time, 1) for time in segment_times(recipe, rows=1437, segments=2)]
        [433.9, 241.1]
    """
    steps = recipe.steps(rows)
    if not 1 <= segments <= steps:
        raise ValueError(f"training of {steps} steps has 1 to {steps} segments, not {segments}")
    times = [0.0] * segments
    for step, rate in enumerate(recipe.rates(steps)):
        times[segment_of(step, steps, segments)] += float(rate) / (1 - recipe.momentum)
    return tuple(times)


def task_times(task: Task, rows: int, segments: int) -> tuple[float, ...]:
    """The times of a task's training on so many rows; see `segment_times`.

    Args:
        task: the task.
        rows: number of training rows.
        segments: how many.

    Returns:
        Times, [segment].

    Raises:
        ValueError: as for `segment_times`, or the task does not train by a recipe.

    Example:
        >>> from examples.digits import task
        >>> len(task_times(task, rows=1437, segments=3))
        3
    """
    if task.train is not None or task.recipe is None:
        raise ValueError(
            f"segments of training are those of a recipe, and task {task.name!r} trains without"
            " one: give segments=0"
        )
    return segment_times(task.recipe, rows, segments)


def segment_of(step: int, steps: int, segments: int) -> int:
    """The segment that a step belongs to.

    Args:
        step: its number.
        steps: how many there are.
        segments: equal parts of them.

    Returns:
        Number of the segment.

    Example:
        >>> [segment_of(step, 5, 2) for step in range(5)]
        [0, 0, 0, 1, 1]
    """
    return step * segments // steps


class SegmentMeans:
    """Mean weights over each segment of training, of models that `train_many` trains.

    Statistics of BatchNorm are averaged too, and are not quite those of the network with the mean
    weights; numbers that are no floats are the segment's last.

    Args:
        segments: how many.

    Example:
        >>> means = SegmentMeans(1)
        >>> for step in range(3):
        ...     means([0], step, 3, {"w": torch.tensor([[float(step)]])})
        >>> means.states(0)
        [{'w': tensor([1.])}]
    """

    def __init__(self, segments: int) -> None:
        self.segments = segments
        # Of each model its number among those trained with it, and their means with their counts.
        self.found: dict[int, tuple[int, list[tuple[int, State]]]] = {}

    @torch.no_grad()
    def __call__(
        self, places: Sequence[int], step: int, steps: int, state: Mapping[str, Tensor]
    ) -> None:
        """Takes the weights that a step starts from, of the models at these places, stacked."""
        assert self.segments <= steps, "train_models refuses segments without a step"
        if step == 0:
            means: list[tuple[int, State]] = []
            self.found |= {place: (i, means) for i, place in enumerate(places)}
        means = self.found[places[0]][1]
        if segment_of(step, steps, self.segments) == len(means):
            means.append((1, {name: tensor.detach().clone() for name, tensor in state.items()}))
            return
        count, latest = means[-1]
        means[-1] = count + 1, latest
        for name, mean in latest.items():
            if mean.is_floating_point():
                mean.lerp_(state[name], 1 / (count + 1))
            else:
                mean.copy_(state[name])

    def states(self, place: int) -> list[State]:
        """The mean state dicts of one model, on the CPU, one a segment."""
        index, means = self.found[place]
        return [{name: each[index].cpu() for name, each in mean.items()} for _, mean in means]
