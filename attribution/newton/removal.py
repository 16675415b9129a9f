"""One checkpoint's problem of retraining without some rows, before a damping is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from attribution.newton.inverse import Damped, Removed, without
from attribution.newton.linearised import Linearised, Weights, retrain


@dataclass(frozen=True)
class Removal:
    """What `retrain` needs, of which most is alike for all dampings and numbers of steps.

    Args:
        problem: the linearised model.
        weights: of each training row before and after, each [train].
        pull: sum_i (before_i - after_i) J_i^T g_i, [feature].
        removed: sum_i (1 - after_i) J_i^T R_i J_i, R at the checkpoint.
        kept: sum of the weights after.
    """

    problem: Linearised = field(repr=False)
    weights: Weights = field(repr=False)
    pull: Tensor = field(repr=False)
    removed: Removed = field(repr=False)
    kept: float

    def steps(self, damped: Damped, numbers: Sequence[int]) -> list[Tensor]:
        """The step d of the projected parameters, [feature], for each number of Newton steps.

        Args:
            damped: H + lambda I of all rows.
            numbers: Newton steps at most.

        Returns:
            d for each of these numbers.

        Raises:
            TooLittleDamping: what is left is not positive definite.
        """
        inverse, lambda_ = without(damped, self.removed), damped.damping
        return [
            retrain(self.problem, self.weights, lambda_, self.pull, inverse, steps=number)
            for number in numbers
        ]
