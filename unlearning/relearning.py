"""Relearning: how many steps of training bring back what was to be forgotten."""

from typing import Any

import numpy as np
import torch

from attribution import ForgetSet, Task
from attribution.paths import at_once
from attribution.task import State
from unlearning.audit import Audit
from unlearning.execution import execute
from unlearning.klom import Array
from unlearning.method import Plan, Request, Stopping

RATE = 0.1
MOST_STEPS = 300
# Their median is known to about a tenth; weights of more oracles cost more retraining.
MODELS = 20


def relearning_steps(
    task: Task,
    states: State,
    forget: ForgetSet,
    goal: float,
    *,
    rate: float = RATE,
    most: int = MOST_STEPS,
    device: str | torch.device = "cpu",
) -> Array:
    """Steps of plain training on the forget set until its mean loss is below that of the original.

    Gradient descent w = w - rate x mean gradient over all rows of the forget set, which draws
    nothing by chance. A model whose weights still hold the rows is back after fewer steps than one
    that never saw them, even where their outputs agree.

    Direction: nearer to the oracles' number is better; fewer says that something was kept.
    Reference and null: the steps of oracles.

    Args:
        task: what the models were trained for.
        states: stacked state dicts, each tensor [model, ...]; not changed.
        forget: the rows that come back.
        goal: mean loss of the models before unlearning on these rows, one number for all models.
        rate: learning rate.
        most: steps after which a model is given up.
        device: where to compute.

    Returns:
        Steps of each model, 0 where it is below the goal from the start, infinite where `most`
        steps did not bring it there, [model].

    Raises:
        ValueError: a rate or number of steps that is not above 0, or weights that became
            non-finite.

    Example:
        >>> from attribution.descent import stack
        >>> from examples.digits import mlp, task
        >>> forget = ForgetSet.of(task, ["train-17"])
        >>> torch.manual_seed(0)
        <torch...>
        >>> relearning_steps(task, stack([mlp().state_dict()]), forget, 2.0, rate=0.01)
        array([9.])

    Source: relearn time, Tarun et al. 2023 (arXiv 2111.08947); weights that hold what outputs do
        not show, arXiv 2505.22310.
    """
    if not 0 < rate < np.inf or most < 1:
        raise ValueError(f"expected a rate above 0 and 1 step or more, got {rate} and {most}")
    count, probe = len(next(iter(states.values()))), task.rows("train", forget.rows[:1])[0]
    request = Request(
        task=task,
        forget=forget,
        already=None,
        states={name: tensor.to(device) for name, tensor in states.items()},
        numbers=tuple(range(count)),
        digests=("",) * count,
        moments=(None,) * count,
        seed=0,
        device=torch.device(device),
        many=at_once(task.new_model(0), probe, device, training=False),
    )
    ran = execute(_plan(request, goal, rate, most), request)
    steps = np.array(ran.evaluations) / len(forget)
    return np.where(np.array(ran.status) == "never crossed", np.inf, steps)


def _plan(request: Request, goal: float, rate: float, most: int) -> Plan:
    inputs, labels = request.rows(request.forget.rows)
    loss, goals = request.task.loss, torch.full((len(request.numbers),), goal)

    def mean_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        del targets
        return loss.value(outputs, labels.expand(len(outputs), *labels.shape)).mean(-1)

    return Plan(
        inputs=inputs,
        labels=labels,
        order=np.tile(np.arange(len(inputs)), (len(request.numbers), most, 1)),
        rates=np.full(most, rate),
        cotangent=lambda outputs, y, _: loss.gradient(outputs, y),
        value=lambda outputs, y, _: loss.value(outputs, y),
        stopping=Stopping(1, len(inputs), "mean loss", mean_loss, goals),
    )


def audited_steps(audit: Audit, states: State, device: str = "cpu") -> Array:
    """Relearning steps of the first 20 models, until the forget set is as well known as before.

    Args:
        audit: gives the forget set, and its loss in the compared models before unlearning.
        states: stacked state dicts, each tensor [model, ...].
        device: where to compute.

    Returns:
        Steps of each model, infinite where it was given up, [model].
    """
    _, labels = audit.task.targets(audit.forget.rows)
    before = torch.from_numpy(np.ascontiguousarray(audit.before[:, audit.forget.rows]))
    losses = audit.task.loss.value(before, labels.expand(len(before), *labels.shape))
    first = {name: tensor[:MODELS] for name, tensor in states.items()}
    goal = float(losses.mean())
    return relearning_steps(audit.task, first, audit.forget, goal, device=device)


def told_relearning(steps: Array, oracles: Array) -> dict[str, Any]:
    """Relearning steps against those of oracles, as plain values.

    Args:
        steps: of each unlearned model, infinite where it was given up, [model].
        oracles: of each oracle, [oracle].

    Returns:
        `steps`, the median; `sooner`, the chance that an unlearned model is back before an oracle,
        equals counted half (.5 is right, 1 says that it had kept the rows); `models`, how many.

    Example:
        >>> told_relearning(np.array([0.0, 3.0, np.inf]), np.array([3.0, 40.0]))["sooner"]
        0.583...
    """
    earlier, equal = steps[:, None] < oracles, steps[:, None] == oracles
    sooner = float(earlier.mean() + equal.mean() / 2)
    return {"steps": float(np.median(steps)), "sooner": sooner, "models": len(steps)}
