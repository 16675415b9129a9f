"""Takes the steps of a plan, for all models at once or one after the other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.descent import Batch, Descent, stack, unstack
from attribution.outputs import evaluate, evaluate_many
from attribution.task import State
from attribution.training import row_weights, take
from unlearning.method import Plan, Request


@dataclass(frozen=True)
class Ran:
    """What came of a plan: stacked states, and for each model its status and cost.

    Args:
        states: each tensor [model, ...].
        status: how each model ended.
        history: mean objective before and after.
        evaluations: gradient evaluations of each model.
    """

    states: State
    status: tuple[str, ...]
    history: tuple[float, ...]
    evaluations: tuple[float, ...]


def execute(plan: Plan | None, request: Request) -> Ran:
    """Takes the steps of a plan, for all models at once or one after the other.

    Args:
        plan: the steps, or None for none.
        request: the models.

    Returns:
        Their new states, status and cost.

    Raises:
        ValueError: the weights became non-finite.
    """
    count = len(request.numbers)
    if plan is None:
        return Ran(request.states, ("unchanged",) * count, (), (0.0,) * count)
    before = _objective(plan, request, request.states)
    # Train mode moves BatchNorm statistics, which only the path of one model can do.
    if request.many and not plan.training:
        ended = [_descend(plan, request, None)]
        states = ended[0].states
    else:
        ended = [_descend(plan, request, i) for i in range(count)]
        states = stack([e.states for e in ended])
    for name, tensor in states.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"unlearning diverged: non-finite weights in {name!r}; lower the rate")
    status = [s for e in ended for s in e.status]
    evaluations = [n for e in ended for n in e.evaluations]
    history = (before, _objective(plan, request, states))
    return Ran(states, tuple(status), history, tuple(evaluations))


def _objective(plan: Plan, request: Request, states: State) -> float:
    outputs = request.outputs(states, plan.inputs)
    labels = plan.labels.expand(len(outputs), *plan.labels.shape)
    targets = outputs[..., :0] if plan.targets is None else plan.targets
    return float(plan.value(outputs, labels, targets).mean())


@dataclass(frozen=True)
class _Ended:
    states: State
    status: tuple[str, ...]
    evaluations: tuple[float, ...]


def _descend(plan: Plan, request: Request, index: int | None) -> _Ended:
    """Steps of all models at once (index None) or of the one at `index`."""
    states = request.states if index is None else unstack(request.states, index)
    chosen = slice(None) if index is None else index
    order = torch.from_numpy(plan.order[chosen]).to(request.device)
    weights = row_weights(order, plan.inputs.dtype)
    descent = Descent(
        request.module,
        states,
        plan.cotangent,
        plan.optimizer,
        many=index is None,
        training=plan.training,
        project=plan.project(index) if plan.project else None,
    )
    watch = _Watch(plan, request, descent, index)
    for step, rate in enumerate(plan.rates):
        if watch.finished(step):
            break
        now, weight = order[..., step, :], weights[..., step, :]
        if plan.training:  # one model, whose BatchNorm would count padding as rows
            weight, now = weight[now >= 0], now[now >= 0]
        batch = take(plan.inputs, now), take(plan.labels, now), weight, _targets(plan, chosen, now)
        descent.step(Batch(*batch), float(rate))
    else:
        watch.finished(len(plan.rates))
    done = (order >= 0).sum(-1).cumsum(-1)
    return watch.ended(len(plan.rates), done)


def _targets(plan: Plan, chosen: slice | int, now: Tensor) -> Tensor:
    if plan.targets is None:
        return torch.zeros(*now.shape, 0, device=now.device)
    mine = plan.targets[chosen]
    index = (now % mine.shape[-2]).unsqueeze(-1).expand(*now.shape, mine.shape[-1])
    return mine.gather(-2, index)


class _Watch:
    """Follows the gap of each model and keeps the state of each at its best moment."""

    def __init__(self, plan: Plan, request: Request, descent: Descent, index: int | None) -> None:
        self.stopping, self.inputs, self.request = plan.stopping, plan.inputs, request
        self.descent, self.many = descent, index is None
        self.models = slice(None) if index is None else slice(index, index + 1)
        self.count = len(request.numbers[self.models])
        self.kept: list[State | None] = [None] * self.count
        self.status = ["never crossed" if plan.stopping else "finished"] * self.count
        self.stopped = [-1] * self.count
        self.last: tuple[State, Tensor] | None = None

    def finished(self, step: int) -> bool:
        """Checks the gaps where a check is due; True when every model has stopped."""
        if self.stopping is None or step % self.stopping.every:
            return False
        state = self.descent.state
        gaps = self.stopping.gap(self._outputs(state), self.models).cpu()
        for i in [i for i in range(self.count) if self.kept[i] is None and gaps[i] > 0]:
            earlier = self.last is not None and abs(self.last[1][i]) < abs(gaps[i])
            self.kept[i] = self._one(self.last[0] if earlier and self.last else state, i)
            self.status[i] = "crossed" if step else "too fast"
            self.stopped[i] = step
        self.last = (state, gaps)
        return all(kept is not None for kept in self.kept)

    def _outputs(self, state: State) -> Tensor:
        assert self.stopping is not None
        inputs = self.inputs[: self.stopping.rows]
        if self.many:
            return evaluate_many(self.request.module, state, inputs)
        return evaluate(self.request.module, state, inputs)[None]

    def _one(self, state: State, index: int) -> State:
        return unstack(state, index) if self.many else state

    def ended(self, steps: int, done: Tensor) -> _Ended:
        """The kept states; models that never stopped keep their last one."""
        final = self.descent.state
        states = [self._one(final, i) if kept is None else kept for i, kept in enumerate(self.kept)]
        last = [steps if at < 0 else at for at in self.stopped]
        rows = done if self.many else done[None]
        evaluations = [float(rows[i, at - 1]) if at else 0.0 for i, at in enumerate(last)]
        packed = stack(states) if self.many else states[0]
        return _Ended(packed, tuple(self.status), tuple(evaluations))
