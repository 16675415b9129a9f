"""The oracle: outputs of models really retrained without the forget set."""

from dataclasses import dataclass

import numpy as np

from attribution.counterfactual import Change, Counterfactual, check_ids
from attribution.ensemble import Ensemble
from attribution.forget import ForgetSet
from attribution.task import Rows, Task


@dataclass(frozen=True)
class Oracle(Counterfactual):
    """Change of the mean output from models trained on all rows to models without the forget set.

    change = mean(bank) - mean(full); absolute: the mean of the bank itself, the target of the
    paper, which pulls every model to one point and so shrinks their spread.

    Args:
        full: models trained on all rows.
        bank: models trained without the forget set.
        absolute: predict the mean of the bank for every model.

    Raises:
        ValueError: the bank was trained on all rows, or an ensemble holds a single model.

    Source: oracle matching, Attribute-to-Delete (arXiv 2410.23232), algorithm C.1.
    """

    full: Ensemble
    bank: Ensemble
    absolute: bool = False

    def __post_init__(self) -> None:
        if self.bank.without is None:
            raise ValueError(
                f"{self.bank.store.path} was trained on all rows: an oracle needs a bank drawn"
                " with draw_subsets(..., without=forget)"
            )
        for ensemble in (self.full, self.bank):
            if len(ensemble) < 2:
                raise ValueError(
                    f"{ensemble.store.path} holds 1 model: the spread of one retraining needs 2"
                )

    def check_task(self, task: Task) -> None:
        """Refuses a task with other rows than the ensembles'."""
        own = self.full.task
        check_ids(task, own.train_ids, own.target_ids, self.full.store.path)

    def change(
        self, forget: ForgetSet, already: ForgetSet | None = None, targets: Rows | None = None
    ) -> Change:
        """Measured change for the one forget set that the bank was trained without.

        Raises:
            ValueError: another forget set than the bank's, or rows gone already.
        """
        if self.bank.without is None or forget.positions != self.bank.without.positions:
            raise ValueError(
                f"the bank {self.bank.store.path} knows one forget set; {forget.name!r} with"
                f" {len(forget)} rows is another: train a bank without it"
            )
        if already is not None and not self.absolute:
            raise ValueError(
                f"the oracle knows the change from models trained on all rows; this model has"
                f" forgotten {len(already)} rows already: use Oracle(absolute=True)"
            )
        chosen = slice(None) if targets is None else targets
        after, before = self.bank.outputs[:, chosen], self.full.outputs[:, chosen]
        noise = after.std(0, ddof=1)
        error = noise**2 / len(after) + (
            0 if self.absolute else before.var(0, ddof=1) / len(before)
        )
        mean = after.mean(0) if self.absolute else after.mean(0) - before.mean(0)
        return Change(mean, np.sqrt(error), noise, self.absolute)
