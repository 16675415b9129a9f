"""Ascent-descent: epochs up the loss of the forget rows and down that of the retain rows."""

from dataclasses import dataclass

from attribution.descent import SGD
from unlearning.method import Plan, Request, check_batchnorm, check_positive
from unlearning.runner import UnlearningMethod
from unlearning.two_sides import in_turns, loss_objective, two_sided_plan


@dataclass(frozen=True)
class AscentDescent(UnlearningMethod):
    """Plain gradient steps: up on the forget rows and down on the retain rows, in turns.

    Args:
        epochs: passes over the retain rows.
        forget_epochs: passes over the forget rows, one before each of the first epochs.
        rate: learning rate on the retain rows.
        forget_rate: learning rate on the forget rows.
        batch_size: retain rows a step.
        forget_batch_size: forget rows a step.
        batchnorm: "frozen" leaves BatchNorm statistics as they are, "update" lets them move.

    Raises:
        ValueError: a number is outside its range.

    Source: "Ascent Fails to Forget" (arXiv 2509.26427), where it is called GDA.
    """

    epochs: int = 3
    forget_epochs: int = 2
    rate: float = 0.03
    forget_rate: float = 0.1
    batch_size: int = 64
    forget_batch_size: int = 16
    batchnorm: str = "frozen"

    def __post_init__(self) -> None:
        check_positive(self, ("epochs", "forget_epochs", "rate", "forget_rate"))
        check_positive(self, ("batch_size", "forget_batch_size"))
        if self.forget_epochs > self.epochs:
            raise ValueError(
                f"AscentDescent.forget_epochs must not exceed epochs = {self.epochs}, got"
                f" {self.forget_epochs}"
            )
        check_batchnorm(self.batchnorm)

    def plan(self, request: Request) -> Plan:
        """Steps on forget and retain rows in turns."""
        order, _ = in_turns(
            request,
            epochs=self.epochs,
            forget_epochs=self.forget_epochs,
            forget_batch=self.forget_batch_size,
            retain_batch=self.batch_size,
        )
        loss = loss_objective(request.task.loss)
        return two_sided_plan(
            request,
            order,
            forget=loss.times(-self.forget_rate / self.rate),
            retain=loss,
            rate=self.rate,
            optimizer=SGD(),
            training=self.batchnorm == "update",
        )
