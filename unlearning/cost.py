"""Cost: one request for one model against one retraining of one model, the same code path."""

import os
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch

from attribution import ForgetSet, Model, Task
from attribution.training import threads, train_one
from unlearning.runner import Unlearned, UnlearningMethod

Result = TypeVar("Result")
REPEATS = 5
LONGEST = 30.0  # seconds after which what was timed so far must do
THREADS = 1


def hardware() -> str:
    """The machine in words: processor, cores, accelerator.

    Returns:
        A line for a table's caption.

    Example:
        >>> "cores" in hardware()
        True
    """
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    except OSError:
        pass
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{name}, {os.cpu_count()} cores", *cards])


def measure_retraining(
    task: Task, forget: ForgetSet | None = None, *, device: str = "cpu", repeats: int = REPEATS
) -> dict[str, Any]:
    """Wall time and gradient evaluations of one retraining of one model.

    Args:
        task: what to train.
        forget: rows to train without; None: on all rows.
        device: where to compute.
        repeats: timed runs, of which the median is taken; fewer where they take over 30 s.

    Returns:
        `seconds`, `repeats` as timed, and `gradient_evaluations` (None for a task's own training
        function).

    Example:
        >>> from examples.digits import task
        >>> measure_retraining(task, repeats=1)["gradient_evaluations"]
        43110
    """
    rows = np.arange(len(task.train_ids)) if forget is None else forget.retained
    with threads(THREADS):
        _, taken = _timed(lambda: train_one(task, rows, 0, 0, torch.device(device)), repeats)
    return taken | {"gradient_evaluations": task.recipe.epochs * len(rows) if task.recipe else None}


def measure_request(
    method: UnlearningMethod,
    model: Model,
    forget: ForgetSet,
    device: str = "cpu",
    *,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """Wall time and gradient evaluations of one unlearning of one model, prediction included.

    Args:
        method: how.
        model: what to change.
        forget: rows to forget.
        device: where to compute.
        repeats: timed runs, of which the median is taken; fewer where they take over 30 s.

    Returns:
        `seconds`, `repeats` as timed, and `gradient_evaluations`.

    Example:
        >>> from examples.digits import mlp, task
        >>> from unlearning import DoNothing
        >>> forget = ForgetSet.of(task, ["train-17"])
        >>> measure_request(DoNothing(), Model(task, mlp().state_dict()), forget)[
        ...     "gradient_evaluations"
        ... ]
        0
    """

    def request() -> Unlearned:
        return method(model, model.task, forget, device=device)

    with threads(THREADS):
        result, taken = _timed(request, repeats)
    return taken | {"gradient_evaluations": result.gradient_evaluations}


def _timed(action: Callable[[], Result], repeats: int) -> tuple[Result, dict[str, Any]]:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = action()
        taken.append(time.perf_counter() - start)
        if sum(taken) > LONGEST:
            break
    return result, {"seconds": median(taken), "repeats": len(taken)}
