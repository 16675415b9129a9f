"""Retraining with other weights of some rows, for a model that is linear in its parameters."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.gradients.jacobian import Jacobian
from attribution.losses import Loss
from attribution.newton.conjugate import conjugate
from attribution.newton.inverse import Inverse

Blocks = Callable[[], Iterator[tuple[slice, Jacobian]]]
Weights = tuple[Tensor, Tensor]

# The linearisation itself is far rougher than these.
ENOUGH, INNER_ENOUGH = 1e-2, 0.03
INNER_STEPS = 20


@dataclass(frozen=True)
class Linearised:
    """A model linearised at a checkpoint, z_i(d) = z_i + J_i d, and its training rows.

    The loss takes outputs divided by a temperature T: probabilities at the end of training are
    sharper than those that shaped the model on its way there.

    Args:
        blocks: gives J of consecutive training rows, as often as asked.
        outputs: z, [train, output].
        labels: of the training rows, [train].
        loss: that was minimised.
        temperature: T; 1 leaves the loss as it is.

    Example:
        >>> from attribution.gradients.jacobian import Dense
        >>> from attribution.losses import SquaredError
        >>> j, z, y = Dense(torch.ones(2, 1, 3)), torch.ones(2, 1), torch.tensor([0.0, 2.0])
        >>> problem = Linearised(lambda: iter([(slice(0, 2), j)]), z, y, SquaredError())
        >>> weights = torch.ones(2), torch.tensor([1.0, 0.0])  # the second row is removed
        >>> problem.residual(weights, 1.0, torch.zeros(3))[0]
        tensor([1., 1., 1.])
    """

    blocks: Blocks
    outputs: Tensor
    labels: Tensor
    loss: Loss
    temperature: float = 1.0

    def gradients(self, outputs: Tensor, rows: slice | Tensor) -> Tensor:
        """Derivatives g of T times the loss of some rows at these outputs, [row, output]."""
        return self.loss.gradient(outputs / self.temperature, self.labels[rows])

    def hessians(self, outputs: Tensor) -> Tensor:
        """Second derivatives R of T times the loss at these outputs, [row, output, output]."""
        return self.loss.hessian(outputs / self.temperature) / self.temperature

    def gradient(self) -> Tensor:
        """sum_i J_i^T g_i over all rows at their outputs, [feature]."""
        parts = [j.pulled(self.gradients(self.outputs[span], span)) for span, j in self.blocks()]
        return torch.stack(parts).sum(0)

    def residual(self, weights: Weights, damping: float, step: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the problem that `retrain` solves, and R of every row, after a step.

        Args:
            weights: of each training row before and after, each [train].
            damping: lambda.
            step: d, [feature].

        Returns:
            sum_i J_i^T (after_i g_i(z_i + J_i d) - before_i g_i(z_i)) + lambda d, [feature]; and
            after_i R_i at z_i + J_i d, [train, output, output].
        """
        found, curvatures = damping * step, []
        for span, j in self.blocks():
            rest, (before, after) = self.outputs[span], (w[span, None] for w in weights)
            moved = rest + j.times(step)
            pull = after * self.gradients(moved, span) - before * self.gradients(rest, span)
            found = found + j.pulled(pull)
            curvatures.append(after[..., None] * self.hessians(moved))
        return found, torch.cat(curvatures)

    def curved(self, curvatures: Tensor, damping: float, step: Tensor) -> Tensor:
        """(sum_i J_i^T R_i J_i + lambda I) d, [feature], with R [train, output, output]."""
        found = damping * step
        for span, j in self.blocks():
            bent = torch.einsum("rab,rb->ra", curvatures[span], j.times(step))
            found = found + j.pulled(bent)
        return found


def retrain(
    problem: Linearised,
    weights: Weights,
    damping: float,
    pull: Tensor,
    inverse: Inverse,
    *,
    steps: int,
    held: Tensor | None = None,
) -> list[Tensor]:
    """The steps d that retraining with other weights of the rows takes in the linearised model.

    It solves sum_i J_i^T (after_i g_i(z_i + J_i d) - before_i g_i(z_i)) + lambda d = 0 by Newton's
    method: what the checkpoint leaves of its own gradient is put down to weight decay. The first
    step has R as it is at the checkpoint; the later ones are solved roughly, by conjugate gradients
    that take the first system, or what is near it, as preconditioner.

    Args:
        problem: the linearised model.
        weights: of each training row before and after, each [train]; 0 where it is removed. For a
            mean of losses the weights before are scaled to the sum of those after.
        damping: lambda, in units of the sum of the rows' losses.
        pull: sum_i (before_i - after_i) J_i^T g_i, [feature].
        inverse: solves with sum_i after_i J_i^T R_i J_i + lambda I, R at the checkpoint.
        steps: Newton steps at most, the first included.
        held: lambda_0 d_0, [feature], where lambda_0 of lambda pulls back to d_0 instead of 0.

    Returns:
        d after each step, [feature]; the last one is the solution where there are fewer.

    Example:
        >>> from attribution.gradients.jacobian import Dense
        >>> from attribution.losses import SquaredError
        >>> j, z = Dense(torch.ones(2, 1, 1)), torch.ones(2, 1)
        >>> y = torch.tensor([[0.0], [2.0]])
        >>> problem = Linearised(lambda: iter([(slice(0, 2), j)]), z, y, SquaredError())
        >>> pull = torch.tensor([-1.0])  # of the second row: 1 - 2
        >>> weights = torch.ones(2), torch.tensor([1.0, 0.0])
        >>> retrain(problem, weights, 0.0, pull, Inverse(torch.clone, torch.clone), steps=3)
        [tensor([-1.])]
    """
    held = torch.zeros_like(pull) if held is None else held
    first = pull + held
    before, path, last = torch.zeros_like(pull), [inverse.exact(first)], float(first.norm())
    for _ in range(steps - 1):
        step = path[-1]
        residual, curvatures = problem.residual(weights, damping, step)
        residual = residual - held
        size = float(residual.norm())
        if size > last:
            path.append((before + step) / 2)
            continue
        if size <= ENOUGH * float(first.norm()):
            break
        before, last = step, size
        # R is positive semidefinite: what is found always leads down, settled or not.
        further, _ = conjugate(
            lambda v, r=curvatures: problem.curved(r, damping, v),  # type: ignore[misc]
            residual,
            inverse.rough,
            enough=INNER_ENOUGH,
            most=INNER_STEPS,
        )
        path.append(step - further)
    return path
