"""Quality against cost: one method of matching at several budgets of gradient evaluations."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from attribution import Task
from unlearning.audit import Audit
from unlearning.cost import measure_request
from unlearning.measures import told_divergences
from unlearning.methods.matching import Matching
from unlearning.runner import UnlearningMethod, unlearn_models

# Shares of the gradient evaluations of one retraining.
REPEATS = 3  # timed requests at each budget
SHARES = (0.01, 0.02, 0.05, 0.1, 0.3)


def budgeted(method: Matching, task: Task, share: float) -> Matching:
    """The method with a share of the gradient evaluations of one retraining.

    passes = share x epochs of the task's recipe.

    Args:
        method: how to match.
        task: tells the epochs of a retraining.
        share: above 0.

    Returns:
        The method.

    Raises:
        ValueError: the task has no recipe, so that the cost of a retraining is not known.

    Example:
        >>> from attribution import UntrainedTeacher
        >>> from examples.digits import task
        >>> budgeted(Matching(UntrainedTeacher(None)), task, 0.05).passes
        1.5
    """
    check_budgets(task)
    assert task.recipe is not None
    return replace(method, passes=share * task.recipe.epochs)


def check_budgets(task: Task) -> None:
    """Refuses a task whose retraining has no known number of gradient evaluations.

    Args:
        task: the task.

    Raises:
        ValueError: it has no recipe.

    Example:
        >>> from examples.digits import task
        >>> check_budgets(task)
    """
    if task.recipe is None:
        raise ValueError(
            f"task {task.name!r} trains by a function of its own, so that a share of a retraining"
            " is not known: leave --budgets out"
        )


def quality_by_budget(
    audit: Audit,
    methods: Mapping[str, UnlearningMethod],
    *,
    models: int,
    retrain: float,
    seed: int = 0,
    device: str = "cpu",
    shares: Sequence[float] = SHARES,
) -> dict[str, list[dict[str, Any]]]:
    """How near methods of matching come to the audit's oracles at several budgets.

    Args:
        audit: the forget set and its oracles.
        methods: by name; those that do not match outputs are left out.
        models: so many full models are unlearned at each budget.
        retrain: seconds of one retraining of one model.
        seed: of the unlearning.
        device: where to compute.
        shares: budgets, in gradient evaluations of one retraining.

    Returns:
        By name, for each budget its share, KLOM and Gaussian KL of every split, and the
        `cost_over_retrain` of one request, prediction included; the share and an `error` alone
        where the method fails at it.
    """
    how: dict[str, Any] = {"count": models, "seed": seed, "device": device}
    return {
        name: [
            {"share": share} | _told(audit, budgeted(method, audit.task, share), retrain, **how)
            for share in shares
        ]
        for name, method in methods.items()
        if isinstance(method, Matching)
    }


def _told(audit: Audit, method: Matching, retrain: float, **how: Any) -> dict[str, Any]:
    try:
        after = unlearn_models(method, audit.full, audit.task, audit.forget, **how)
        told = told_divergences(audit, after.outputs)
        model, device = audit.full.model(0), how["device"]
        taken = measure_request(method, model, audit.forget, device, repeats=REPEATS)
        return told | {"cost_over_retrain": taken["seconds"] / retrain}
    except ValueError as error:
        return {"error": str(error)}
