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

    Example:
        >>> import torch
        >>> from attribution.gradients.jacobian import Dense
        >>> from attribution.losses import SquaredError
        >>> j, z, y = Dense(torch.ones(2, 1, 1)), torch.ones(2, 1), torch.tensor([[0.0], [2.0]])
        >>> problem = Linearised(lambda: iter([(slice(0, 2), j)]), z, y, SquaredError())
        >>> second = Removed(Dense(torch.ones(1, 1, 1)), torch.ones(1, 1, 1))
        >>> weights = torch.ones(2), torch.tensor([1.0, 0.0])
        >>> removal = Removal(problem, weights, torch.tensor([-1.0]), second, kept=1.0)
        >>> removal.steps(Damped(2 * torch.eye(1, dtype=torch.float64), 1.0), [1])
        [tensor([-0.5000])]
    """

    problem: Linearised = field(repr=False)
    weights: Weights = field(repr=False)
    pull: Tensor = field(repr=False)
    removed: Removed = field(repr=False)
    kept: float

    def steps(
        self, damped: Damped, numbers: Sequence[int], held: Tensor | None = None
    ) -> list[Tensor]:
        """The step d of the projected parameters, [feature], for each number of Newton steps.

        Args:
            damped: H + lambda I of all rows.
            numbers: Newton steps at most.
            held: see `retrain`.

        Returns:
            d for each of these numbers.

        Raises:
            TooLittleDamping: what is left is not positive definite.
        """
        inverse, most = without(damped, self.removed), max(numbers)
        path = retrain(
            self.problem,
            self.weights,
            damped.damping,
            self.pull,
            inverse,
            steps=most,
            held=held,
        )
        return [path[min(number, len(path)) - 1] for number in numbers]
