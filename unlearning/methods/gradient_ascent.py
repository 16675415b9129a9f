"""Gradient ascent: climb the loss of the forget rows."""

from dataclasses import dataclass

from unlearning.method import Plan, Request, check_batchnorm, check_positive, loss_plan
from unlearning.runner import UnlearningMethod


@dataclass(frozen=True)
class GradientAscent(UnlearningMethod):
    """Plain gradient ascent on the loss of the forget rows.

    Args:
        epochs: passes over the forget rows.
        rate: learning rate.
        batch_size: rows a step.
        batchnorm: "frozen" leaves BatchNorm statistics as they are, "update" lets them move.

    Raises:
        ValueError: a number is outside its range.
    """

    epochs: int = 5
    rate: float = 0.03
    batch_size: int = 64
    batchnorm: str = "frozen"

    def __post_init__(self) -> None:
        check_positive(self, ("epochs", "rate", "batch_size"))
        check_batchnorm(self.batchnorm)

    def plan(self, request: Request) -> Plan:
        """Ascending steps on the forget rows."""
        return loss_plan(
            request,
            request.forget.rows,
            sign=-1,
            epochs=self.epochs,
            rate=self.rate,
            batch_size=self.batch_size,
            training=self.batchnorm == "update",
        )
