"""What one forget set is judged by: the models before, and models really retrained without it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from attribution import Ensemble, ForgetSet, Task
from attribution.outputs import target_margins
from attribution.task import Rows

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True)
class Audit:
    """What one forget set is judged by.

    Args:
        task: the task.
        forget: the forget set.
        full: models trained on all rows; as many of them are compared as there are oracles.
        oracles: models retrained without the forget set, which judge.
        targets: a second, disjoint bank, which gives the oracle its targets and the null.
    """

    task: Task
    forget: ForgetSet
    full: Ensemble
    oracles: Ensemble
    targets: Ensemble

    @property
    def splits(self) -> dict[str, Rows]:
        """Positions among the targets of each audited split; all retain rows, not a sample."""
        n, total = len(self.task.train_ids), len(self.task.target_ids)
        return {
            "forget": self.forget.rows,
            "retain": self.forget.retained,
            "test": np.arange(n, total),
        }

    @property
    def before(self) -> Array:
        """Outputs of the compared models before, [model, target, output]."""
        return self.full.outputs[: len(self.oracles)]

    @cached_property
    def margins_before(self) -> Array:
        """Their margins, [model, target]."""
        return target_margins(self.task, self.before)
