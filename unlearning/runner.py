"""Runs a method for one model, or for many at once: one code path."""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from attribution import Ensemble, ForgetSet, Model, Task
from attribution.descent import Batch, Descent, stack, unstack, why_one_by_one
from attribution.model import check_state, with_forgotten
from attribution.outputs import Array, evaluate, evaluate_many, target_margins
from attribution.task import State
from attribution.training import row_weights, take
from unlearning.method import Plan, Request, told_settings


@dataclass(frozen=True)
class Unlearned:
    """One model after unlearning.

    Args:
        model: the new model.
        status: how the run ended.
        seconds: wall time, prediction included.
        history: mean objective of the visited rows before the first and after the last step.
        gradient_evaluations: rows that a gradient was computed for.
    """

    model: Model
    status: str
    seconds: float
    history: tuple[float, ...]
    gradient_evaluations: int


@dataclass(frozen=True)
class UnlearnedModels:
    """Many models after unlearning the same rows.

    Args:
        task: what they were trained for.
        states: stacked state dicts, each tensor [model, ...].
        forgotten: all rows they have forgotten.
        status: how many models ended how.
        seconds: wall time of all together.
        gradient_evaluations: rows that a gradient was computed for, mean over models.
    """

    task: Task
    states: State = field(repr=False)
    forgotten: ForgetSet
    status: dict[str, int]
    seconds: float
    gradient_evaluations: float

    @cached_property
    def outputs(self) -> Array:
        """Outputs on all targets, [model, target, output]."""
        inputs, _ = self.task.targets()
        module = self.task.new_model(0)
        if why_one_by_one(module, inputs[:2], training=False) is None:
            return evaluate_many(module, self.states, inputs).numpy()
        count = len(next(iter(self.states.values())))
        each = [evaluate(module, unstack(self.states, i), inputs) for i in range(count)]
        return torch.stack(each).numpy()

    @cached_property
    def margins(self) -> Array:
        """Margins on all targets, [model, target]."""
        return target_margins(self.task, self.outputs)


class UnlearningMethod(ABC):
    """A method of unlearning; calling it unlearns one model.

    Example:
        >>> from examples.digits import mlp, task
        >>> from unlearning import GradientAscent
        >>> model = Model(task, mlp().state_dict())
        >>> result = GradientAscent()(model, task, ForgetSet.of(task, ["train-17"]))
        >>> result.model.forgotten.ids
        ('train-17',)
    """

    def __call__(
        self,
        model: Model,
        task: Task,
        forget: ForgetSet,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> Unlearned:
        """Unlearns one model; the model given is not changed.

        Args:
            model: what to change.
            task: what it was trained for.
            forget: rows to forget; rows it has forgotten before stay forgotten.
            seed: of every draw.
            device: where to compute.

        Returns:
            The new model and how it came about.

        Raises:
            ValueError: the model does not fit the task or has forgotten all these rows already,
                or the method cannot serve the request.
        """
        start = time.perf_counter()
        check_state(task, model.state, "the model")
        left = _still_there(task, forget, model.forgotten)
        digest = _moments_digest(model)
        request = Request(
            task=task,
            forget=left,
            already=model.forgotten,
            states={name: tensor[None].to(device) for name, tensor in model.state.items()},
            numbers=(int(model.provenance.get("index", 0)),),
            digests=(digest,),
            seed=seed,
            device=torch.device(device),
            many=False,
        )
        ran = execute(self.plan(request), request)
        told = {
            "method": type(self).__name__,
            "settings": told_settings(self),
            "unlearning_seed": seed,
        }
        state = {name: tensor.cpu() for name, tensor in unstack(ran.states, 0).items()}
        new = with_forgotten(model, state, left, **told, moments=digest)
        seconds = time.perf_counter() - start
        return Unlearned(new, ran.status[0], seconds, ran.history, int(ran.evaluations[0]))

    @abstractmethod
    def plan(self, request: Request) -> Plan | None:
        """The steps to take, or None to leave the models as they are."""


def _moments_digest(model: Model) -> str:
    return str(model.provenance.get("moments") or model.digest())


def _still_there(task: Task, forget: ForgetSet, already: ForgetSet | None) -> ForgetSet:
    if forget.total != len(task.train_ids):
        raise ValueError(
            f"forget set {forget.name!r} is drawn from {forget.total} rows, task {task.name!r} has"
            f" {len(task.train_ids)}"
        )
    left = forget.minus(task, already)
    if left is None:
        raise ValueError(
            f"the model has forgotten all {len(forget)} rows of {forget.name!r} already"
        )
    return left


def unlearn_models(
    method: UnlearningMethod,
    models: Ensemble,
    task: Task,
    forget: ForgetSet,
    *,
    count: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> UnlearnedModels:
    """Unlearns many models at once; each takes the very steps it would take alone.

    Args:
        method: how.
        models: an ensemble that kept its weights.
        task: what they were trained for.
        forget: rows to forget.
        count: the first so many models; None: all.
        seed: of every draw.
        device: where to compute.

    Returns:
        The new models.

    Raises:
        ValueError: the ensemble kept no weights or has fewer models, or the method cannot serve
            the request.

    Example:
        >>> import tempfile
        >>> from attribution import draw_subsets, train_models
        >>> from examples.digits import task
        >>> from unlearning import DoNothing
        >>> subsets = draw_subsets(task, models=2, design="full")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     full = train_models(task, subsets, f"{folder}/full", keep="weights", workers=0)
        ...     unlearn_models(DoNothing(), full, task, ForgetSet.of(task, ["train-3"])).status
        {'unchanged': 2}
    """
    start = time.perf_counter()
    if count is not None and not 0 < count <= len(models):
        raise ValueError(f"count must lie between 1 and {len(models)} models, got {count}")
    numbers = range(len(models) if count is None else count)
    states = models.states(numbers)
    left = _still_there(task, forget, models.without)
    request = Request(
        task=task,
        forget=left,
        already=models.without,
        states={name: tensor.to(device) for name, tensor in states.items()},
        numbers=tuple(numbers),
        digests=tuple(Model(task, unstack(states, i)).digest() for i in numbers),
        seed=seed,
        device=torch.device(device),
        many=why_one_by_one(task.new_model(0), task.rows("train", left.rows[:1])[0], training=False)
        is None,
    )
    ran = execute(method.plan(request), request)
    return UnlearnedModels(
        task=task,
        states={name: tensor.cpu() for name, tensor in ran.states.items()},
        forgotten=request.wanted,
        status=dict(Counter(ran.status)),
        seconds=time.perf_counter() - start,
        gradient_evaluations=float(np.mean(ran.evaluations)),
    )


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


def margins(models: Ensemble | UnlearnedModels | Sequence[Model], task: Task) -> Array:
    """Margins of models on all targets of a task.

    Args:
        models: an ensemble, unlearned models, or a list of models.
        task: gives labels and loss.

    Returns:
        Margins [model, target], training rows first, then test rows.

    Example:
        >>> from examples.digits import mlp, task
        >>> margins([Model(task, mlp().state_dict())], task).shape
        (1, 1797)
    """
    if isinstance(models, Ensemble | UnlearnedModels):
        return target_margins(task, models.outputs)
    return target_margins(task, np.stack([model.outputs() for model in models]))
