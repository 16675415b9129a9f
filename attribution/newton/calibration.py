"""Calibration: what a few models really retrained tell about predictions."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from attribution.cases import KINDS, row_kinds
from attribution.counterfactual import Change
from attribution.forget import ForgetSet
from attribution.task import Rows

STEPS = 3  # Newton steps at most, where nothing tells that fewer do


@dataclass(frozen=True)
class Calibration:
    """Settings and factors of group Newton, fitted on models retrained without other forget sets.

    Args:
        damping: lambda, in units of the sum of the rows' losses.
        temperature: T that outputs are divided by before the loss.
        scale: factor on the predicted change, by kind of row (forget, retain, test).
        spread: factor on the spread over checkpoints, which makes it the uncertainty of the mean.
        noise: factor on the spread of the checkpoints' outputs, which makes it that of one
            retraining without the forget set.
        forget_sets: how many sets it was fitted on.
        shared: factor on the spread of the checkpoints' outputs, which makes it what the linear
            model gets wrong where all forget rows change alike; none: 0.
        steps: Newton steps at most.

    Example:
        >>> factors = {"forget": 1.1, "retain": 0.8, "test": 0.9}
        >>> found = Calibration(0.72, 1.4, factors, factors, factors, forget_sets=20)
        >>> found.scale["retain"]
        0.8
    """

    damping: float
    temperature: float
    scale: dict[str, float]
    spread: dict[str, float]
    noise: dict[str, float]
    forget_sets: int
    shared: Mapping[str, float] = field(default_factory=dict)
    steps: int = STEPS

    def applied(
        self, change: Change, forget: ForgetSet, targets: Rows, common: float = 0.0
    ) -> Change:
        """A plain prediction, scaled and with calibrated variances.

        Args:
            change: as it is without calibration, of these targets.
            forget: the rows that are removed in the end; they tell the kind of a target.
            targets: positions among the task's targets, [target].
            common: how much of their change the forget rows have in common; see `common_share`.

        Returns:
            mean x scale, noise x noise, and as std the root of (std x spread)^2 + common x
            (noise x shared)^2, by kind of row.
        """
        kinds = row_kinds(forget, targets)
        scale, spread, noise, shared = (
            np.array([table.get(kind, 0.0) for kind in KINDS], dtype=np.float32)[kinds][:, None]
            for table in (self.scale, self.spread, self.noise, self.shared)
        )
        off = np.sqrt(np.float32(common)) * shared * change.noise
        return Change(change.mean * scale, np.hypot(change.std * spread, off), change.noise * noise)
