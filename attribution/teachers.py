"""Teachers: outputs to match on the forget rows that are no prediction of retrained models.

What retraining would do to a row is not asked; methods that match such outputs are what
predictions are compared with.
"""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from attribution.counterfactual import Change, Counterfactual, check_ids
from attribution.ensemble import Ensemble
from attribution.forget import ForgetSet
from attribution.losses import SquaredError
from attribution.outputs import Array, evaluate
from attribution.seeds import derive_seed
from attribution.task import Rows, Task


@dataclass(frozen=True)
class Teacher(Counterfactual):
    """Outputs to match on the forget rows; on other rows nothing changes.

    change(x) = mean output wanted - mean(full)(x) for the rows that are forgotten now, else 0.

    Args:
        full: models trained on all rows.
    """

    full: Ensemble

    @abstractmethod
    def wanted(self, rows: Rows) -> tuple[Array, Array]:
        """Mean output wanted of some training rows and its uncertainty, each [row, output]."""

    def check_task(self, task: Task) -> None:
        """Refuses a task with other rows than the ensemble's."""
        own = self.full.task
        check_ids(task, own.train_ids, own.target_ids, self.full.store.path)

    def change(
        self, forget: ForgetSet, already: ForgetSet | None = None, targets: Rows | None = None
    ) -> Change:
        """From the mean output of models trained on all rows to that wanted."""
        outputs = self.full.outputs
        mean, std = np.zeros_like(outputs[0]), np.zeros_like(outputs[0])
        rows = np.flatnonzero(forget.mask & ~already.mask if already else forget.mask)
        if len(rows):
            wanted, std[rows] = self.wanted(rows)
            mean[rows] = wanted - outputs[:, rows].mean(0)
        chosen = slice(None) if targets is None else targets
        return Change(mean[chosen], std[chosen], outputs[:, chosen].std(0, ddof=1))


@dataclass(frozen=True)
class HeldOutReference(Teacher):
    """What models output on test rows of the same class, which no training has seen.

    wanted(x) = mean(full) of the test rows with x's label; its uncertainty is their spread.

    Args:
        full: models trained on all rows.

    Raises:
        ValueError: labels are no classes, or a class has no test row.

    Source: ReGUn (arXiv 2603.11210), its reference outputs as targets of one matching loop.

    Example:
        >>> import tempfile
        >>> from attribution import draw_subsets, train_models
        >>> from examples.digits import task
        >>> subsets = draw_subsets(task, models=2, design="full")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     full = train_models(task, subsets, f"{folder}/full", workers=0)
        ...     forget = ForgetSet.of(task, ["train-3"])
        ...     change = HeldOutReference(full).change(forget)
        >>> [int(np.count_nonzero(change.mean.any(1))), change.mean.shape]
        [1, (1797, 10)]
    """

    def wanted(self, rows: Rows) -> tuple[Array, Array]:
        """Mean and spread of the test rows of each row's class."""
        task = self.full.task
        if isinstance(task.loss, SquaredError):
            raise ValueError(f"task {task.name!r} has no classes that test rows could stand for")
        tests = np.arange(len(task.train_ids), len(task.target_ids))
        labels, known = (task.targets(places)[1].numpy() for places in (rows, tests))
        missing = np.setdiff1d(labels, known)
        if missing.size:
            raise ValueError(
                f"no test row of task {task.name!r} has the label {missing[0]}, so that its"
                " forgotten rows have no held-out reference"
            )
        outputs = self.full.outputs[:, tests].mean(0)
        of_class = {label: outputs[known == label] for label in np.unique(labels)}
        parts = [of_class[label] for label in labels]
        return np.stack([p.mean(0) for p in parts]), np.stack([p.std(0) for p in parts])


@dataclass(frozen=True)
class UntrainedTeacher(Teacher):
    """What newly initialised models output: the bad teacher, as targets of one matching loop.

    Args:
        full: models trained on all rows.
        models: newly initialised models, whose mean output is wanted.
        seed: of their initialisation.

    Raises:
        ValueError: fewer than 2 models.

    Source: "Can Bad Teaching Induce Forgetting?" (arXiv 2205.08096).

    Example:
        >>> import tempfile
        >>> from attribution import draw_subsets, train_models
        >>> from examples.digits import task
        >>> subsets = draw_subsets(task, models=2, design="full")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     full = train_models(task, subsets, f"{folder}/full", workers=0)
        ...     forget = ForgetSet.of(task, ["train-3"])
        ...     change = UntrainedTeacher(full).change(forget, targets=forget.rows)
        ...     after = change.applied(full.outputs[:, forget.rows])
        >>> bool(abs(after.mean(0)).max() < 1)
        True
    """

    models: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.models < 2:
            raise ValueError(f"an untrained teacher needs 2 models or more, got {self.models}")

    def wanted(self, rows: Rows) -> tuple[Array, Array]:
        """Mean over the models and its standard error."""
        task, seed = self.full.task, derive_seed(self.seed, "untrained teacher")
        inputs, _ = task.targets(rows)
        new = [task.new_model(seed, number) for number in range(self.models)]
        outputs = np.stack([evaluate(m, m.state_dict(), inputs).numpy() for m in new])
        return outputs.mean(0), outputs.std(0, ddof=1) / self.models**0.5
