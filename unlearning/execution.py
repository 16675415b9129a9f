"""Takes the steps of a plan, for all models at once or one after the other."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.descent import Batch, Descent, stack, unstack
from attribution.devices import repeatable
from attribution.outputs import evaluate, evaluate_many
from attribution.task import State
from attribution.training import row_weights, take
from unlearning.ending import Ending
from unlearning.method import Plan, Request, Rewinding, Stopping

GATHERED = 1 << 20  # numbers of inputs that wait for their steps


class Diverged(ValueError):
    """Weights or outputs became non-finite: the settings are too fast."""


@dataclass(frozen=True)
class Ran:
    """What came of a plan: stacked states, and for each model its ending and cost.

    Args:
        states: each tensor [model, ...].
        endings: how each model ended.
        history: mean objective before and after.
        evaluations: gradient evaluations of each model.
    """

    states: State
    endings: tuple[Ending, ...]
    history: tuple[float, ...]
    evaluations: tuple[float, ...]

    @property
    def status(self) -> tuple[str, ...]:
        """How each model ended, in a word."""
        return tuple(ending.status for ending in self.endings)


def execute(plan: Plan | None, request: Request) -> Ran:
    """Takes the steps of a plan, for all models at once or one after the other.

    Args:
        plan: the steps, or None for none.
        request: the models.

    Returns:
        Their new states, endings and cost.

    Raises:
        Diverged: the weights became non-finite.
    """
    count = len(request.numbers)
    if plan is None:
        return Ran(request.states, (Ending("unchanged"),) * count, (), (0.0,) * count)
    before = _objective(plan, request, request.states, plan.before)
    # Train mode moves BatchNorm statistics, which only the path of one model can do.
    together = request.many and not plan.training
    with repeatable(request.device, tf32=True):
        ended = [_descend(plan, request, i) for i in ([None] if together else range(count))]
    states = ended[0].states if together else stack([e.states for e in ended])
    for name, tensor in states.items():
        if not torch.isfinite(tensor).all():
            raise Diverged(f"unlearning diverged: non-finite weights in {name!r}; lower the rate")
    endings = [ending for e in ended for ending in e.endings]
    evaluations = [n for e in ended for n in e.evaluations]
    history = (before, _objective(plan, request, states))
    return Ran(states, tuple(endings), history, tuple(evaluations))


def _objective(plan: Plan, request: Request, states: State, known: Tensor | None = None) -> float:
    outputs = request.outputs(states, plan.inputs) if known is None else known
    labels = plan.labels.expand(len(outputs), *plan.labels.shape)
    targets = outputs[..., :0] if plan.targets is None else plan.targets
    return float(plan.value(outputs, labels, targets).mean())


@dataclass(frozen=True)
class _Ended:
    states: State
    endings: tuple[Ending, ...]
    evaluations: tuple[float, ...]


def _descend(plan: Plan, request: Request, index: int | None) -> _Ended:
    """Steps of all models at once (index None) or of the one at `index`."""
    start = plan.start or request.states
    states = start if index is None else unstack(start, index)
    order = torch.from_numpy(plan.order[slice(None) if index is None else index])
    order = order.to(request.device)
    descent = Descent(
        request.module,
        states,
        plan.cotangent,
        plan.optimizer,
        many=index is None,
        training=plan.training,
        project=plan.project(index) if plan.project else None,
        pull=plan.pull,
    )
    followed = _followed(plan, request, descent, index)
    steps = _batches(plan, order) if index is None else _batches_of_one(plan, order, index)
    for step, (batch, rate) in enumerate(zip(steps, plan.rates, strict=True)):
        if followed.finished(step):
            break
        _step(descent, batch, float(rate), alone=plan.training and len(batch.inputs) == 1)
    else:
        followed.finished(len(plan.rates))
    states, endings = followed.ended(len(plan.rates))
    done = (order >= 0).sum(-1).cumsum(-1).reshape(followed.count, -1)
    evaluations = [
        plan.spent + (float(done[i, ending.steps - 1]) if ending.steps else 0.0)
        for i, ending in enumerate(endings)
    ]
    return _Ended(states, endings, tuple(evaluations))


def _batches(plan: Plan, order: Tensor) -> Iterator[Batch]:
    """The batches of all models in turn."""
    weights = row_weights(order, plan.inputs.dtype)
    for step in range(order.shape[-2]):
        now = order[:, step]
        targets = _targets(plan, now)
        yield Batch(take(plan.inputs, now), take(plan.labels, now), weights[:, step], targets)


def _batches_of_one(plan: Plan, order: Tensor, index: int) -> Iterator[Batch]:
    """The batches of one model in turn, gathered several at once, which takes less time."""
    targets = None if plan.targets is None else plan.targets[index]
    width = max(1, plan.inputs[0].numel()) * order.shape[-1]
    for now in order.split(max(1, GATHERED // width)):
        weights = row_weights(now, plan.inputs.dtype)
        wanted = plan.inputs.new_zeros(*now.shape, 0) if targets is None else take(targets, now)
        columns = take(plan.inputs, now), take(plan.labels, now), weights, wanted
        for rows, *parts in zip(now, *columns, strict=True):
            if plan.training:  # BatchNorm would count padding as rows
                yield Batch(*(part[rows >= 0] for part in parts))
            else:
                yield Batch(*parts)


def _step(descent: Descent, batch: Batch, rate: float, *, alone: bool) -> None:
    try:
        descent.step(batch, rate)
    except ValueError as error:
        if not alone:
            raise
        raise ValueError(
            "a step has one row only, from which BatchNorm can take no statistics: choose a batch"
            " size of 3 or more, or batchnorm 'frozen', which alone helps where there is one row"
        ) from error


def _targets(plan: Plan, now: Tensor) -> Tensor:
    if plan.targets is None:
        return torch.zeros(*now.shape, 0, device=now.device)
    rows = (now % plan.targets.shape[-2]).unsqueeze(-1)
    return plan.targets.gather(-2, rows.expand(*now.shape, plan.targets.shape[-1]))


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
    def ended(self, steps: int) -> tuple[State, tuple[Ending, ...]]:
        """The states to keep after so many steps, and how each model ended."""

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
        return _Stopped(plan, plan.stopping, request, descent, index)
    if isinstance(plan.stopping, Rewinding):
        return _Rewound(plan.stopping, request, descent, index)
    return _ToTheEnd(request, descent, index)


class _ToTheEnd(_Followed):
    def finished(self, step: int) -> bool:
        del step
        return False

    def ended(self, steps: int) -> tuple[State, tuple[Ending, ...]]:
        return self.descent.state, (Ending("finished", steps, steps),) * self.count


class _Stopped(_Followed):
    """Measures each model and keeps the state of each at its best moment."""

    def __init__(
        self,
        plan: Plan,
        stopping: Stopping,
        request: Request,
        descent: Descent,
        index: int | None,
    ) -> None:
        super().__init__(request, descent, index)
        self.stopping, self.inputs = stopping, plan.inputs[: stopping.rows]
        every = self.inputs.new_zeros(len(request.numbers), stopping.rows, 0)
        self.targets = (every if plan.targets is None else plan.targets)[self.models]
        self.reference = stopping.reference[self.models].cpu()
        self.kept: list[tuple[State, Ending] | None] = [None] * self.count
        self.last: tuple[State, Tensor] | None = None

    def finished(self, step: int) -> bool:
        """Measures where a check is due; True when every model has stopped."""
        if step % self.stopping.every:
            return False
        state, found = self._measured()
        below = found < self.reference.to(found)
        for i in range(self.count):
            if self.kept[i] is None and below[i]:
                self.kept[i] = self._nearest(i, step, state, found)
        self.last = (state, found)
        return all(kept is not None for kept in self.kept)

    def _measured(self) -> tuple[State, Tensor]:
        state = self.descent.state
        outputs, targets = self.outputs(state, self.inputs), self.targets[:, : self.stopping.rows]
        return state, self.stopping.measure(outputs, targets).cpu()

    def _nearest(self, i: int, step: int, state: State, found: Tensor) -> tuple[State, Ending]:
        if self.last is None:
            return self.one(state, i), self._ending("too fast", i, found, 0, 0)
        earlier, seen = self.last
        if abs(self.reference[i] - seen[i]) < abs(self.reference[i] - found[i]):
            before = step - self.stopping.every
            return self.one(earlier, i), self._ending("crossed", i, seen, step, before)
        return self.one(state, i), self._ending("crossed", i, found, step, step)

    def _ending(self, status: str, i: int, found: Tensor, steps: int, kept: int) -> Ending:
        reached, reference = float(found[i]), float(self.reference[i])
        return Ending(status, steps, kept, self.stopping.words, reached, reference)

    def ended(self, steps: int) -> tuple[State, tuple[Ending, ...]]:
        """The kept states; models that never stopped keep their last one."""
        final, found = self._measured()
        all_kept = [
            kept or (self.one(final, i), self._ending("never crossed", i, found, steps, steps))
            for i, kept in enumerate(self.kept)
        ]
        return self.packed([state for state, _ in all_kept]), tuple(told for _, told in all_kept)


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

    def ended(self, steps: int) -> tuple[State, tuple[Ending, ...]]:
        """The chosen states; the gradients of all steps were computed."""
        chosen = [self.rewinding.choose(outputs) for outputs in torch.stack(self.seen, dim=1)]
        states = [self.one(self.states[at], i) for i, at in enumerate(chosen)]
        kept = [self.rewinding.steps[at] for at in chosen]
        endings = [Ending("finished" if at == steps else "rewound", steps, at) for at in kept]
        return self.packed(states), tuple(endings)
