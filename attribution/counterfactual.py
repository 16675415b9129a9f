"""Counterfactuals: predicted outputs of models that never saw the forget set."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from attribution.forget import ForgetSet, parse_forget, read_ids
from attribution.model import Model
from attribution.outputs import Array
from attribution.task import Rows, Task


@dataclass(frozen=True)
class Change:
    """What removing rows does to the outputs, in output units.

    Args:
        mean: change of the mean output over retrainings, [target, output]; with `absolute` the
            mean output of retrained models itself.
        std: uncertainty of that mean, one standard deviation, [target, output].
        noise: spread of one retraining around its mean, [target, output].
        absolute: whether `mean` replaces a model's outputs instead of being added to them.
    """

    mean: Array
    std: Array
    noise: Array
    absolute: bool = False

    def applied(self, outputs: Array) -> Array:
        """Predicted outputs of models that now output this, [..., target, output]."""
        if self.absolute:
            return np.broadcast_to(self.mean, outputs.shape).copy()
        return outputs + self.mean


@dataclass(frozen=True)
class Prediction:
    """Predicted outputs of a model retrained without the forget set.

    Args:
        targets: ids of the targets.
        before: outputs of the model now, [target, output].
        mean: predicted outputs, [target, output].
        std: uncertainty of the mean change, [target, output].
        noise: spread of one retraining, [target, output].
    """

    targets: tuple[str, ...]
    before: Array
    mean: Array
    std: Array
    noise: Array


class Counterfactual(ABC):
    """Anything that predicts what removing a forget set does to the outputs."""

    @abstractmethod
    def change(
        self, forget: ForgetSet, already: ForgetSet | None = None, targets: Rows | None = None
    ) -> Change:
        """Effect of removing all of `forget`, less the effect of what is removed already.

        Args:
            forget: every row that is to be gone in the end, `already` included.
            already: rows that are gone now.
            targets: positions among the task's targets; None: all.

        Returns:
            The change to add.
        """

    @abstractmethod
    def check_task(self, task: Task) -> None:
        """Refuses a task whose rows are not those that the predictions were made from.

        Args:
            task: whose rows and targets will be asked for.

        Raises:
            ValueError: other ids, or in another order.
        """

    def predict(
        self,
        model: Model,
        forget: ForgetSet,
        targets: Sequence[str] | Rows | None = None,
        *,
        device: str = "cpu",
    ) -> Prediction:
        """Predicted outputs of the model retrained without the forget set.

        What the model has forgotten already stays forgotten: the change added is
        effect(forget and already) - effect(already).

        Args:
            model: starting point.
            forget: rows to forget.
            targets: ids or positions of targets; None: all of the task's.
            device: where the model's own outputs are computed.

        Returns:
            The prediction.

        Raises:
            ValueError: an unknown target, or a model of another task.
        """
        self.check_task(model.task)
        places = target_positions(model.task, targets)
        change = self.change(forget.union(model.task, model.forgotten), model.forgotten, places)
        before = model.outputs(places, device=device)
        ids = tuple(model.task.target_ids[i] for i in places)
        return Prediction(ids, before, change.applied(before), change.std, change.noise)


def check_ids(task: Task, train: Sequence[str], targets: Sequence[str], where: str) -> None:
    """Refuses ids that are not a task's, or stand in another order.

    Args:
        task: the task.
        train: ids of the training rows that something was made from.
        targets: ids of its targets.
        where: what the error calls it.

    Raises:
        ValueError: names the first difference.

    Example:
        >>> from examples.digits import task
        >>> check_ids(task, task.train_ids, task.target_ids, "this")
    """
    for what, ids, own in (("row", train, task.train_ids), ("target", targets, task.target_ids)):
        if tuple(ids) != tuple(own):
            pairs = zip_longest(ids, own)
            place, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            raise ValueError(
                f"{where} was made from other rows than those of task {task.name!r}: its {what}"
                f" {place} is {a!r}, the task's is {b!r}"
            )


def target_positions(task: Task, targets: Sequence[str] | Rows | None) -> Rows:
    """Positions of targets among the task's targets.

    Args:
        task: whose targets: its training rows, then its test rows.
        targets: ids or positions; None: all.

    Returns:
        Positions, [target].

    Raises:
        ValueError: an id or position that the task does not have, or none at all.

    Example:
        >>> from examples.digits import task
        >>> target_positions(task, ["train-1", "test-0"])
        array([   1, 1437])
    """
    if targets is None:
        return np.arange(len(task.target_ids))
    unknown = [t for t in targets if isinstance(t, str) and t not in task.positions]
    if unknown:
        raise ValueError(f"unknown target {unknown[0]!r} of task {task.name!r}")
    places = [task.positions[t] if isinstance(t, str) else int(t) for t in targets]
    if not places or min(places) < 0 or max(places) >= len(task.target_ids):
        raise ValueError(f"expected targets among the {len(task.target_ids)} of task {task.name!r}")
    return np.array(places, dtype=np.int64)


def parse_targets(task: Task, spec: str, forget: ForgetSet) -> Rows:
    """Positions of the targets that a command line names.

    Args:
        task: whose targets.
        spec: `train`, `test`, `forget`, comma-separated ids, `@file` (one id a line), or
            training rows as `rows:10:20`, `random:50:seed` or `cluster:60:seed`.
        forget: what `forget` stands for.

    Returns:
        Positions, [target].

    Raises:
        ValueError: an unknown id, no id at all, or a file that cannot be read.
    """
    n, total = len(task.train_ids), len(task.target_ids)
    known = {"train": np.arange(n), "test": np.arange(n, total), "forget": forget.rows}
    if spec in known:
        return known[spec]
    if re.match(r"(rows|random|cluster):", spec):
        return parse_forget(task, spec).rows
    ids = read_ids(spec[1:]) if spec.startswith("@") else spec.split(",")
    named = [row.strip() for row in ids if row.strip()]
    if not named:
        raise ValueError(f"targets {spec!r} are empty: name at least one row")
    return target_positions(task, named)
