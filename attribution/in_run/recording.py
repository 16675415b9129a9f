"""Train one model by the recipe and add up what each row's gradients did to the targets' loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from attribution.descent import Batch, Descent
from attribution.in_run.derivatives import Point, Targets, generator_of, row_products
from attribution.outputs import Array
from attribution.seeds import derive_seed
from attribution.task import Rows, State, Task
from attribution.training import Step, require_recipe, seeded, start_training
from stores import advance

# Share of a gradient that is left in the velocity when it is followed no longer.
LEAST_SHARE = 1e-4

_Products = Callable[[Point, Batch, State], Tensor]


@dataclass(frozen=True)
class RunValues:
    """Values of one training run, and the model it ended with.

    Args:
        scores: value of each row for each direction, [train, direction], in units of the loss.
        change: what the whole run did to the loss, [direction].
        state: final state dict, on the CPU.
    """

    scores: Array
    change: Array
    state: State = field(repr=False)


@dataclass(frozen=True)
class _Held:
    """A step whose gradients still move the weights.

    Args:
        step: its rows and learning rate.
        point: the model before the step.
        effects: change of the loss at this step for a unit of velocity, [direction, ...].
    """

    step: Step
    point: Point
    effects: State


def held_steps(momentum: float) -> tuple[int, int]:
    """Steps through which a gradient is followed, and the most that are held at once.

    Args:
        momentum: of the recipe; m^k of a gradient is left in the velocity after k steps.

    Returns:
        The smallest k with m^k <= 1e-4, and a quarter more, at least 1.

    Example:
        >>> held_steps(0.9), held_steps(0.0)
        ((88, 110), (0, 1))
    """
    ahead = math.ceil(math.log(LEAST_SHARE) / math.log(momentum)) if momentum else 0
    return ahead, ahead + max(1, ahead // 4)


def run_values(
    task: Task,
    rows: Rows,
    targets: Rows,
    *,
    seed: int,
    index: int,
    device: torch.device,
    order: int = 1,
    per_target: bool = False,
) -> RunValues:
    """Trains one model as `train_one` does and values its rows by In-Run Data Shapley.

    Step t moves the weights by d_t = -rate_t v_t, where the velocity
    v_t = momentum v_(t-1) + sum over z in B_t of g_z / |B_t| + weight_decay w_t is a sum over its
    sources. Row z owns v_t^z = momentum v_(t-1)^z + [z in B_t] g_z / |B_t| of it. The sources play
    a game at each step in which a set S is worth U_t(S) = l(w_t - rate_t sum of v_t^z over S) -
    l(w_t), with l the loss of the target; weight decay is a player whose value is not kept. The
    Shapley values of a row, expanded at w_t and added over the steps, are

        order 1: phi_z = sum_t -rate_t v_t^z . g_t                error O(rate^2) a step,
        order 2: phi_z = sum_t -rate_t v_t^z . (g_t + H_t d_t / 2)  error O(rate^3) a step,

    with g_t and H_t the gradient and Hessian of l at w_t in eval mode. Without momentum these are
    the values of the paper. What a gradient does later through momentum is followed until 1e-4 of
    it is left in the velocity, so that memory does not grow with the number of steps: for at most
    `held_steps` of them the parameters are held, and a derivative for each direction.

    No row's gradient is formed. Row losses are differentiated in train mode, as the step took
    them: with the step's dropout, and with its batch statistics where there is BatchNorm. The
    drift of BatchNorm's running statistics is no row's value.

    Args:
        task: a task with a recipe.
        rows: positions of the training rows; all others get 0.
        targets: positions among the task's targets, [target].
        seed: seed of the ensemble.
        index: number of the model in the ensemble.
        device: where to compute.
        order: 1 or 2.
        per_target: one direction for each target; else one for their mean loss.

    Returns:
        The values; negative where a row lowered the loss.

    Raises:
        ValueError: the task has no recipe.

    Example:
        >>> from attribution import Recipe
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        >>> recipe = Recipe(epochs=2, batch_size=2, peak_rate=0.1)
        >>> task = Task("toy", data, data, lambda: nn.Linear(4, 2), recipe)
        >>> rows, targets, cpu = np.arange(3), np.arange(4), torch.device("cpu")
        >>> values = run_values(task, rows, targets, seed=0, index=0, device=cpu)
        >>> values.scores.shape, values.scores[3]
        ((4, 1), array([0.]))

    Source: In-Run Data Shapley (arXiv 2406.11011), first and second order; the shares of momentum
        and weight decay are ours.
    """
    recipe, data = require_recipe(task), _on(device, task.rows("train", _all_rows(task)))
    judged = _judged(task, targets, device, per_target)
    ahead, most = held_steps(recipe.momentum)
    values = torch.zeros(len(task.train_ids), judged.directions, dtype=torch.float64)
    held: list[_Held] = []
    with seeded(derive_seed(seed, "forward passes", index)):
        descent, steps = start_training(task, data, [(rows, index)], seed, many=False)
        products = partial(row_products, task.loss, descent.module)
        first = judged.losses(descent.state)
        for step in steps:
            held.append(_taken(descent, step, judged, order))
            advance()
            if len(held) == most:
                _credit(values, held, most - ahead, recipe.momentum, products)
                del held[: most - ahead]
        _credit(values, held, len(held), recipe.momentum, products)
    state = {name: tensor.cpu() for name, tensor in descent.state.items()}
    return RunValues(values.numpy(), (judged.losses(descent.state) - first).cpu().numpy(), state)


def _all_rows(task: Task) -> Rows:
    return np.arange(len(task.train_ids))


def _on(device: torch.device, tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return tensors[0].to(device), tensors[1].to(device)


def _judged(task: Task, targets: Rows, device: torch.device, per_target: bool) -> Targets:
    module = task.new_model(0).to(device).eval()
    return Targets(task.loss, module, *_on(device, task.targets(targets)), per_target)


def _taken(descent: Descent, step: Step, judged: Targets, order: int) -> _Held:
    """Takes a step and gives what must be known of it later."""
    point = _point(descent, step.batch)
    descent.step(step.batch, step.rate)
    moved = {
        name: descent.parameters[name].detach() - old for name, old in point.parameters.items()
    }
    slopes = judged.slopes(point, moved if order == 2 else None)
    return _Held(step, point, {name: -step.rate * slope for name, slope in slopes.items()})


def _point(descent: Descent, batch: Batch) -> Point:
    # A parameter that layers share has several names in a state and one here.
    own = dict(descent.module.named_parameters()) | dict(descent.module.named_buffers())
    parameters, rest = (
        {name: tensor.detach().clone() for name, tensor in part.items() if name in own}
        for part in (descent.parameters, descent.rest)
    )
    return Point(parameters, rest, generator_of(batch.inputs.device).get_state())


def _credit(
    values: Tensor, held: list[_Held], count: int, momentum: float, products: _Products
) -> None:
    """Adds the values of the first `count` steps; the others tell what momentum did later."""
    later: State = {}
    for place in reversed(range(len(held))):
        step, point, now = held[place].step, held[place].point, held[place].effects
        later = {n: t + momentum * later[n] for n, t in now.items()} if later else now
        if place < count:
            found = products(point, step.batch, later)
            values.index_add_(0, step.rows.cpu(), found.cpu().double())


def why_not_recorded(task: Task, *, order: int, per_target: bool) -> str | None:
    """Why values of a task's model cannot be computed, or None where they can.

    Args:
        task: a task with a recipe.
        order: 1 or 2.
        per_target: one direction for each target; else one for their mean loss.

    Returns:
        The reason in words, or None.

    Example:
        >>> from examples.digits import task
        >>> why_not_recorded(task, order=2, per_target=True)
    """
    few = [0, 1] if len(task.train_ids) > 1 else [0]
    judged = _judged(task, np.array(few), torch.device("cpu"), per_target)
    with seeded(0):
        descent, steps = start_training(
            task, task.rows("train", _all_rows(task)), [(np.array(few), 0)], 0, many=False
        )
        step = next(steps)
        try:
            held = [_taken(descent, step, judged, order)]
            values = torch.zeros(len(task.train_ids), judged.directions, dtype=torch.float64)
            _credit(values, held, 1, 0.0, partial(row_products, task.loss, descent.module))
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            return str(error).strip().splitlines()[0]
    return None
