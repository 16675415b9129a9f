"""Fine-tuning on the retain rows: hope that the model forgets what it no longer sees."""

from dataclasses import dataclass

from unlearning.method import Plan, Request, check_batchnorm, check_positive, loss_plan
from unlearning.runner import UnlearningMethod


@dataclass(frozen=True)
class FineTune(UnlearningMethod):
    """Plain gradient descent on the loss of the retain rows.

    Args:
        epochs: passes over the retain rows.
        rate: learning rate.
        batch_size: rows a step.
        batchnorm: "frozen" leaves BatchNorm statistics as they are, "update" lets them move.

    Raises:
        ValueError: a number is outside its range.
    """

    epochs: int = 3
    rate: float = 0.1
    batch_size: int = 64
    batchnorm: str = "frozen"

    def __post_init__(self) -> None:
        check_positive(self, ("epochs", "rate", "batch_size"))
        check_batchnorm(self.batchnorm)

    def plan(self, request: Request) -> Plan:
        """Descending steps on the retain rows."""
        return loss_plan(
            request,
            request.wanted.retained,
            sign=1,
            epochs=self.epochs,
            rate=self.rate,
            batch_size=self.batch_size,
            training=self.batchnorm == "update",
        )
