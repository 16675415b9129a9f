"""NegGrad+: down the loss of the retain rows and up that of the forget rows in the same step."""

from dataclasses import dataclass

from attribution.descent import SGD
from unlearning.method import Plan, Request, check_batchnorm, check_positive, check_share
from unlearning.runner import UnlearningMethod
from unlearning.two_sides import loss_objective, side_by_side, two_sided_plan


@dataclass(frozen=True)
class NegGradPlus(UnlearningMethod):
    """Plain gradient descent on alpha L_R - (1 - alpha) L_F.

    L_R and L_F are mean losses of the retain and the forget rows of a step; the forget rows come
    round again while the retain rows are passed over.

    Args:
        alpha: weight of the retain rows, in (0, 1); the forget rows have the rest.
        epochs: passes over the retain rows.
        rate: learning rate.
        batch_size: retain rows a step.
        forget_batch_size: forget rows a step.
        batchnorm: "frozen" leaves BatchNorm statistics as they are, "update" lets them move.

    Raises:
        ValueError: a number is outside its range.

    Source: SCRUB (arXiv 2302.09880), where it is a baseline.
    """

    alpha: float = 0.8
    epochs: int = 2
    rate: float = 0.1
    batch_size: int = 64
    forget_batch_size: int = 16
    batchnorm: str = "frozen"

    def __post_init__(self) -> None:
        check_positive(self, ("epochs", "rate", "batch_size", "forget_batch_size"))
        check_share(self, "alpha")
        check_batchnorm(self.batchnorm)

    def plan(self, request: Request) -> Plan:
        """Steps on forget and retain rows side by side."""
        order, (forget, retain) = side_by_side(
            request,
            epochs=self.epochs,
            forget_batch=self.forget_batch_size,
            retain_batch=self.batch_size,
        )
        loss = loss_objective(request.task.loss)
        return two_sided_plan(
            request,
            order,
            forget=loss.times(-(1 - self.alpha) * forget),
            retain=loss.times(self.alpha * retain),
            rate=self.rate,
            optimizer=SGD(),
            training=self.batchnorm == "update",
        )
