"""Takes the steps of a plan, for all models at once or one after the other."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.descent import Batch, Descent, stack, unstack
from attribution.outputs import evaluate, evaluate_many
from attribution.task import State
from attribution.training import row_weights, take
from unlearning.method import Plan, Request, Rewinding, Stopping


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
    start = plan.start or request.states
    states = start if index is None else unstack(start, index)
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
    followed = _followed(plan, request, descent, index)
    for step, rate in enumerate(plan.rates):
        if followed.finished(step):
            break
        now, weight = order[..., step, :], weights[..., step, :]
        if plan.training:  # one model, whose BatchNorm would count padding as rows
            weight, now = weight[now >= 0], now[now >= 0]
        batch = take(plan.inputs, now), take(plan.labels, now), weight, _targets(plan, chosen, now)
        descent.step(Batch(*batch), float(rate))
    else:
        followed.finished(len(plan.rates))
    states, status, steps = followed.ended(len(plan.rates))
    done = (order >= 0).sum(-1).cumsum(-1).reshape(followed.count, -1)
    evaluations = [
        plan.spent + (float(done[i, at - 1]) if at else 0.0) for i, at in enumerate(steps)
    ]
    return _Ended(states, status, tuple(evaluations))


def _targets(plan: Plan, chosen: slice | int, now: Tensor) -> Tensor:
    if plan.targets is None:
        return torch.zeros(*now.shape, 0, device=now.device)
    mine = plan.targets[chosen]
    index = (now % mine.shape[-2]).unsqueeze(-1).expand(*now.shape, mine.shape[-1])
    return mine.gather(-2, index)


class _Followed(ABC):
    """The models of a descent on their way: where they are, and which state each ends with."""

    def __init__(self, request: Request, descent: Descent, index: int | None) -> None:
        self.request, self.descent, self.many = request, descent, index is None
        self.models = slice(None) if index is None else slice(index, index + 1)
        self.count = len(request.numbers[self.models])

    @abstractmethod
    def finished(self, step: int) -> bool:
        """Looks at the models after so many steps; True when none goes on."""

    @abstractmethod
    def ended(self, steps: int) -> tuple[State, tuple[str, ...], list[int]]:
        """The states to keep after so many steps; status and number of steps of each model."""

    def outputs(self, state: State, inputs: Tensor) -> Tensor:
        """Outputs of these models, [model, row, output]."""
        if self.many:
            return evaluate_many(self.request.module, state, inputs)
        return evaluate(self.request.module, state, inputs)[None]

    def one(self, state: State, index: int) -> State:
        """State of one of these models."""
        return unstack(state, index) if self.many else state

    def packed(self, states: list[State]) -> State:
        """States of these models as the descent holds them."""
        return stack(states) if self.many else states[0]


def _followed(plan: Plan, request: Request, descent: Descent, index: int | None) -> _Followed:
    if isinstance(plan.stopping, Stopping):
        inputs = plan.inputs[: plan.stopping.rows]
        return _Stopped(plan.stopping, inputs, request, descent, index)
    if isinstance(plan.stopping, Rewinding):
        return _Rewound(plan.stopping, request, descent, index)
    return _ToTheEnd(request, descent, index)


class _ToTheEnd(_Followed):
    def finished(self, step: int) -> bool:
        del step
        return False

    def ended(self, steps: int) -> tuple[State, tuple[str, ...], list[int]]:
        return self.descent.state, ("finished",) * self.count, [steps] * self.count


class _Stopped(_Followed):
    """Follows the gap of each model and keeps the state of each at its best moment."""

    def __init__(
        self,
        stopping: Stopping,
        inputs: Tensor,
        request: Request,
        descent: Descent,
        index: int | None,
    ) -> None:
        super().__init__(request, descent, index)
        self.stopping, self.inputs = stopping, inputs
        self.kept: list[State | None] = [None] * self.count
        self.status = ["never crossed"] * self.count
        self.stopped = [-1] * self.count
        self.last: tuple[State, Tensor] | None = None

    def finished(self, step: int) -> bool:
        """Checks the gaps where a check is due; True when every model has stopped."""
        if step % self.stopping.every:
            return False
        state = self.descent.state
        gaps = self.stopping.gap(self.outputs(state, self.inputs), self.models).cpu()
        for i in [i for i in range(self.count) if self.kept[i] is None and gaps[i] > 0]:
            earlier = self.last is not None and abs(self.last[1][i]) < abs(gaps[i])
            self.kept[i] = self.one(self.last[0] if earlier and self.last else state, i)
            self.status[i] = "crossed" if step else "too fast"
            self.stopped[i] = step
        self.last = (state, gaps)
        return all(kept is not None for kept in self.kept)

    def ended(self, steps: int) -> tuple[State, tuple[str, ...], list[int]]:
        """The kept states; models that never stopped keep their last one."""
        final = self.descent.state
        states = [self.one(final, i) if kept is None else kept for i, kept in enumerate(self.kept)]
        last = [steps if at < 0 else at for at in self.stopped]
        return self.packed(states), tuple(self.status), last


class _Rewound(_Followed):
    """Keeps states and the outputs that decide among them."""

    def __init__(
        self, rewinding: Rewinding, request: Request, descent: Descent, index: int | None
    ) -> None:
        super().__init__(request, descent, index)
        self.rewinding = rewinding
        self.states: list[State] = []
        self.seen: list[Tensor] = []

    def finished(self, step: int) -> bool:
        """Keeps the state where one is due; no model stops early."""
        if step in self.rewinding.steps:
            self.states.append(self.descent.state)
            self.seen.append(self.outputs(self.states[-1], self.rewinding.inputs))
        return False

    def ended(self, steps: int) -> tuple[State, tuple[str, ...], list[int]]:
        """The chosen states; the gradients of all steps were computed."""
        chosen = [self.rewinding.choose(outputs) for outputs in torch.stack(self.seen, dim=1)]
        states = [self.one(self.states[at], i) for i, at in enumerate(chosen)]
        last = len(self.states) - 1
        status = ["finished" if at == last else "rewound" for at in chosen]
        return self.packed(states), tuple(status), [steps] * self.count
