"""Runs a method for one model, or for many at once: one code path."""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from attribution import Ensemble, ForgetSet, Model, Task
from attribution.descent import unstack
from attribution.model import check_state, with_forgotten
from attribution.outputs import Array, evaluate, evaluate_many, target_margins
from attribution.paths import at_once
from attribution.task import State
from unlearning.ending import Ending
from unlearning.execution import Diverged, execute
from unlearning.method import Plan, Request, told_settings


@dataclass(frozen=True)
class Unlearned:
    """One model after unlearning.

    Args:
        model: the new model.
        ending: how the steps ended, in numbers and words.
        seconds: wall time, prediction included.
        history: mean objective of the visited rows before the first and after the last step.
        gradient_evaluations: rows that a gradient was computed for.
    """

    model: Model
    ending: Ending
    seconds: float
    history: tuple[float, ...]
    gradient_evaluations: int

    @property
    def status(self) -> str:
        """How the steps ended, in a word."""
        return self.ending.status


@dataclass(frozen=True)
class UnlearnedModels:
    """Many models after unlearning the same rows.

    Args:
        task: what they were trained for.
        states: stacked state dicts, each tensor [model, ...].
        forgotten: all rows they have forgotten.
        endings: how the steps of each model ended.
        seconds: wall time of all together.
        gradient_evaluations: rows that a gradient was computed for, mean over models.
        digests: digest of the weights that each model's stored moments belong to.
        moments: of the retain rows' inputs, each [model, *moment_shape], which they carry to their
            next request; None for models that have seen no projected one.
        since: of the forgotten rows, those that these moments still count; None for none.
        device: where outputs are computed.
    """

    task: Task
    states: State = field(repr=False)
    forgotten: ForgetSet
    endings: tuple[Ending, ...]
    seconds: float
    gradient_evaluations: float
    digests: tuple[str, ...] = field(repr=False)
    moments: State | None = field(repr=False)
    since: ForgetSet | None = None
    device: str | torch.device = "cpu"

    def __len__(self) -> int:
        """The number of models."""
        return len(self.endings)

    @property
    def status(self) -> dict[str, int]:
        """How many models ended how."""
        return dict(Counter(ending.status for ending in self.endings))

    @cached_property
    def outputs(self) -> Array:
        """Outputs on all targets, [model, target, output].

        Raises:
            Diverged: some are not finite, though all weights are.
        """
        found = self._evaluated()
        if not torch.isfinite(found).all():
            raise Diverged("unlearning diverged: some outputs are not finite; lower the rate")
        return found.numpy()

    def _evaluated(self) -> Tensor:
        inputs, _ = self.task.targets()
        module = self.task.new_model(0)
        many = at_once(module, inputs[:2], self.device, training=False)
        states = {name: tensor.to(self.device) for name, tensor in self.states.items()}
        module = module.to(self.device)
        if many:
            return evaluate_many(module, states, inputs)
        each = [evaluate(module, unstack(states, i), inputs) for i in range(len(self))]
        return torch.stack(each)

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
        left = still_there(task, forget, model.forgotten)
        digest = _moments_digest(model)
        request = Request(
            task=task,
            forget=left,
            already=model.forgotten,
            states={name: tensor[None].to(device) for name, tensor in model.state.items()},
            numbers=(int(model.provenance.get("index", 0)),),
            digests=(digest,),
            moments=(model.moments,),
            seed=seed,
            device=torch.device(device),
            many=False,
            since=model.since,
        )
        plan = self.plan(request)
        ran = execute(plan, request)
        told = {
            "method": type(self).__name__,
            "settings": told_settings(self),
            "unlearning_seed": seed,
        }
        state = {name: tensor.cpu() for name, tensor in unstack(ran.states, 0).items()}
        new = with_forgotten(model, state, left, **told, moments=digest)
        if plan is not None and plan.moments is not None:
            moments = {name: held.cpu() for name, held in unstack(plan.moments, 0).items()}
            new = replace(new, moments=moments, since=None)
        seconds = time.perf_counter() - start
        return Unlearned(new, ran.endings[0], seconds, ran.history, int(ran.evaluations[0]))

    @abstractmethod
    def plan(self, request: Request) -> Plan | None:
        """The steps to take, or None to leave the models as they are."""


def _moments_digest(model: Model) -> str:
    return str(model.provenance.get("moments") or model.digest())


def still_there(task: Task, forget: ForgetSet, already: ForgetSet | None) -> ForgetSet:
    """Rows of a request that a model has not forgotten before.

    Args:
        task: whose training rows they are.
        forget: rows to forget.
        already: rows that it has forgotten.

    Returns:
        What is left to forget.

    Raises:
        ValueError: nothing is left, or the rows are drawn from other data.

    Example:
        >>> from examples.digits import task
        >>> few, one = (ForgetSet.at(task, rows) for rows in ([3, 4], [3]))
        >>> still_there(task, few, one).ids
        ('train-4',)
    """
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
    models: Ensemble | UnlearnedModels,
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
        models: an ensemble that kept its weights, or what came of an earlier request.
        task: what they were trained for.
        forget: rows to forget; rows they have forgotten before stay forgotten.
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
    states, digests, held = _start(models, numbers)
    before = models.without if isinstance(models, Ensemble) else models.forgotten
    left = still_there(task, forget, before)
    request = Request(
        task=task,
        forget=left,
        already=before,
        states={name: tensor.to(device) for name, tensor in states.items()},
        numbers=tuple(numbers),
        digests=digests,
        moments=tuple(unstack(held, i) if held else None for i in range(len(numbers))),
        seed=seed,
        device=torch.device(device),
        many=at_once(
            task.new_model(0), task.rows("train", left.rows[:1])[0], device, training=False
        ),
        since=models.since if isinstance(models, UnlearnedModels) else None,
    )
    plan = method.plan(request)
    ran = execute(plan, request)
    carried, since = held, left.union(task, request.since) if held is not None else None
    if plan is not None and plan.moments is not None:
        carried, since = plan.moments, None
    return UnlearnedModels(
        task=task,
        states={name: tensor.cpu() for name, tensor in ran.states.items()},
        forgotten=request.wanted,
        endings=ran.endings,
        seconds=time.perf_counter() - start,
        gradient_evaluations=float(np.mean(ran.evaluations)),
        digests=digests,
        moments=None if carried is None else {n: tensor.cpu() for n, tensor in carried.items()},
        since=since,
        device=torch.device(device),
    )


def _start(
    models: Ensemble | UnlearnedModels, numbers: range
) -> tuple[State, tuple[str, ...], State | None]:
    """States of these models, the digests that name their stored moments, and those they carry."""
    if isinstance(models, UnlearnedModels):
        first = slice(len(numbers))
        held = models.moments
        return (
            {name: tensor[first] for name, tensor in models.states.items()},
            models.digests[first],
            None if held is None else {name: tensor[first] for name, tensor in held.items()},
        )
    states = models.states(numbers)
    _check_seen(models)
    digests = tuple(Model(models.task, unstack(states, i)).digest() for i in numbers)
    return states, digests, None


def _check_seen(models: Ensemble) -> None:
    seen = ~models.without.mask if models.without else np.ones(models.masks.shape[1], dtype=bool)
    if (models.masks != seen).any():
        raise ValueError(
            f"the models of {models.store.path} were trained on different rows: unlearn them one by"
            " one, or an ensemble of design 'full'"
        )


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
