"""The project's own methods as full-batch steps on a ridge regression, followed step by step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution import (
    Change,
    Counterfactual,
    ForgetSet,
    GroupNewton,
    LinearDatamodel,
    Oracle,
    Projection,
    Task,
    draw_subsets,
    featurize,
    fit_trak,
    train_models,
)
from attribution.descent import SGD
from attribution.seeds import generator
from attribution.task import Rows, State
from examples.convex.problems import Problem, Vector
from examples.convex.theory import Theory
from unlearning import AscentDescent, FineTune, Matching, UnlearningMethod
from unlearning.method import Plan, Request, Rewinding

NOISE = 1e-3  # of noisy gradient descent, each step, over the length of the full weights
ADAM_RATES = (1e-3, 3e-3, 1e-2)  # times the largest of the full weights
ASCENT_EPOCHS = (1, 10)
ASCENT_RATES = (0.1, 1.0)  # times the descent's


@dataclass(frozen=True)
class RowByRow(Counterfactual):
    """Sum of the exact changes of removing each row alone: influence with leverage correction.

    Args:
        newton: predicts what removing one row does.
    """

    newton: GroupNewton

    def check_task(self, task: Task) -> None:
        """Refuses a task with other rows than the predictor's."""
        self.newton.check_task(task)

    def change(
        self, forget: ForgetSet, already: ForgetSet | None = None, targets: Rows | None = None
    ) -> Change:
        """Predicted change; nothing may be gone already."""
        if already is not None:
            raise ValueError("rows are taken out of a model trained on all rows only")
        task = self.newton.task
        each = [self.newton.change(ForgetSet.at(task, [i]), None, targets) for i in forget.rows]
        mean = np.sum([change.mean for change in each], axis=0)
        return replace(each[0], mean=mean)


def counterfactuals(problem: Problem, folder: str) -> dict[str, Counterfactual]:
    """Targets by kind, from gradients of the full model that are not projected.

    Args:
        problem: the ridge regression.
        folder: where features and scores are stored.

    Returns:
        Predictors: TRAK scores, group Newton row by row, and group Newton.
    """
    whole = Projection(inputs=problem.x.shape[1], outputs=1)
    features = featurize(
        problem.task, [problem.model], f"{folder}/features", projection=whole, dtype="float64"
    )
    newton = GroupNewton(problem.task, features, damping=problem.penalty)
    scores = fit_trak(features, f"{folder}/trak", damping=problem.penalty, dtype="float64")
    return {
        "first-order": LinearDatamodel.from_scores(scores),
        "leverage": RowByRow(newton),
        "group": newton,
    }


def oracle(problem: Problem, forget: ForgetSet, folder: str) -> Oracle:
    """The oracle of one forget set; two models each, all alike, since training is exact."""
    full, bank = (
        train_models(
            problem.task,
            draw_subsets(problem.task, models=2, design="full", without=without),
            f"{folder}/{name}",
            workers=0,
        )
        for name, without in (("full", None), (f"without-{forget.name}", forget))
    )
    return Oracle(full, bank)


@dataclass(frozen=True)
class Followed(UnlearningMethod):
    """Another method's plan with changed fields; the weights are kept at some of its steps.

    Of a linear model without intercept the outputs on unit vectors are the weights.

    Args:
        method: makes the plan.
        marks: numbers of steps at which weights are kept; the last one ends the plan.
        changed: fields of the plan to replace.
        seen: takes the weights, one [step, feature] a run.
    """

    method: UnlearningMethod
    marks: Rows
    changed: Mapping[str, Any] = field(default_factory=dict)
    seen: list[Vector] = field(default_factory=list)

    def plan(self, request: Request) -> Plan:
        """The other method's plan with changed fields, followed."""
        plan = self.method.plan(request)
        assert plan is not None
        units = torch.eye(plan.inputs.shape[1], dtype=plan.inputs.dtype)
        kept = Rewinding(tuple(self.marks.tolist()), units, self._keep)
        return replace(plan, stopping=kept, **self.changed)

    def _keep(self, outputs: Tensor) -> int:
        self.seen.append(outputs[..., 0].numpy())
        return len(outputs) - 1


def followed(method: UnlearningMethod, theory: Theory, marks: Rows, **changed: Any) -> Vector:
    """Weights of a method at some of its steps, [step, feature]."""
    run = Followed(method, marks, changed)
    run(theory.problem.model, theory.problem.task, theory.forget, seed=theory.problem.seed)
    return run.seen[0]


def descent(theory: Theory, marks: Rows, **changed: Any) -> Vector:
    """Gradient descent on the ridge objective of the retain rows, at rate 2 / (L + mu)."""
    rows = len(theory.forget.retained)
    method = FineTune(epochs=int(marks[-1]), rate=rows * theory.descent.rate, batch_size=rows)
    # The task's loss has no penalty: it is the optimiser's weight decay.
    decay = SGD(weight_decay=theory.problem.penalty / rows)
    return followed(method, theory, marks, optimizer=decay, **changed)


def noisy_descent(theory: Theory, marks: Rows) -> Vector:
    """Gradient descent on the retain rows; each step adds normal noise to each weight.

    Source: Langevin unlearning (arXiv 2401.10371), without its guarantee or projection.
    """
    random = generator(theory.problem.seed, "noise of noisy gradient descent")
    deviation = noise_deviation(theory.problem)

    def noise(updates: State) -> State:
        return {
            name: update + deviation * torch.from_numpy(random.standard_normal(update.shape))
            for name, update in updates.items()
        }

    return descent(theory, marks, project=lambda _: noise)


def noise_deviation(problem: Problem) -> float:
    """Standard deviation of the noise that each weight gets at each step."""
    return float(NOISE * np.linalg.norm(problem.full) / np.sqrt(len(problem.full)))


def ascent_descent(theory: Theory, marks: Rows) -> Vector:
    """Ascent on F before each of the first descents; the best of the grid."""
    retained, steps = len(theory.forget.retained), int(marks[-1])
    rate = retained * theory.descent.rate
    decay = SGD(weight_decay=theory.problem.penalty / retained)
    found = []
    for epochs in ASCENT_EPOCHS:
        for share in ASCENT_RATES:
            method = AscentDescent(
                epochs=steps - epochs,
                forget_epochs=epochs,
                rate=rate,
                forget_rate=share * rate,
                batch_size=retained,
                forget_batch_size=len(theory.forget),
            )
            found.append(followed(method, theory, marks, optimizer=decay))
    return _best(found, theory)


def matching(counterfactual: Counterfactual, theory: Theory, marks: Rows) -> Vector:
    """Matching on all rows by gradient descent, at rate 2 / (L + mu)."""
    rows, steps = len(theory.problem.x), int(marks[-1])
    # The objective's curvature is 2 / rows X^T X.
    rates = np.full(steps, rows / 2 * theory.matching.rate)
    method = _matching(counterfactual, rows, steps)
    return followed(method, theory, marks, optimizer=SGD(), rates=rates)


def matching_as_shipped(counterfactual: Counterfactual, theory: Theory, marks: Rows) -> Vector:
    """Matching on all rows with its own optimiser, Adam at a falling rate; the best of the grid."""
    rows, steps = len(theory.problem.x), int(marks[-1])
    method = _matching(counterfactual, rows, steps)
    largest = float(np.abs(theory.problem.full).max())
    return _best(
        [followed(replace(method, rate=r * largest), theory, marks) for r in ADAM_RATES], theory
    )


def _matching(counterfactual: Counterfactual, rows: int, steps: int) -> Matching:
    return Matching(
        counterfactual,
        passes=float(steps),
        batch_size=rows,
        forget_multiplier=1,
        retain_multiplier=0.0,
        retain_extra=rows,
    )


def _best(found: list[Vector], theory: Theory) -> Vector:
    """The path of the smallest error, in the geometric mean over its marks."""
    return min(found, key=lambda path: float(np.log(theory.errors(path)).mean()))


def methods(targets: Mapping[str, Counterfactual]) -> dict[str, Callable[[Theory, Rows], Vector]]:
    """Every method of the suite by name, as a function of the theory and the marks.

    Args:
        targets: predictors by kind of target; "oracle" among them.
    """
    matched = {
        f"matching, {kind}": lambda theory, marks, found=found: matching(found, theory, marks)
        for kind, found in targets.items()
    }
    return {
        "gradient descent": descent,
        "noisy descent": noisy_descent,
        "ascent-descent": ascent_descent,
        **matched,
        "matching, group, Adam": lambda theory, marks: matching_as_shipped(
            targets["group"], theory, marks
        ),
    }
