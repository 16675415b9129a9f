"""Saliency unlearning: random labels on the forget rows, on the weights that matter to them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attribution.descent import SGD, Project, stack, unstack
from attribution.losses import BinaryCrossEntropy, CrossEntropy, Loss
from attribution.seeds import generator
from attribution.task import State
from unlearning.method import Plan, Request, check_batchnorm, check_positive, check_share
from unlearning.row_gradients import mean_gradient, own_module
from unlearning.runner import UnlearningMethod
from unlearning.two_sides import (
    Objective,
    both_sides,
    loss_objective,
    side_by_side,
    two_sided_plan,
)


@dataclass(frozen=True)
class SaliencyUnlearning(UnlearningMethod):
    """SalUn: plain gradient descent inside a mask on L_F with random labels + alpha L_R.

    The mask holds the weights with the largest derivative, in size, of the forget rows' mean
    loss; all others stay as they are. A forget row's random label is drawn once for each model,
    from the classes other than its own.

    Args:
        share: of the weights that the mask holds, in (0, 1).
        alpha: weight of the retain rows.
        epochs: passes over the retain rows; the forget rows come round again meanwhile.
        rate: learning rate.
        batch_size: retain rows a step.
        forget_batch_size: forget rows a step.
        batchnorm: "frozen" leaves BatchNorm statistics as they are, "update" lets them move.

    Raises:
        ValueError: a number is outside its range.

    Source: SalUn (arXiv 2310.12508).
    """

    share: float = 0.5
    alpha: float = 1.0
    epochs: int = 1
    rate: float = 1e-4
    batch_size: int = 64
    forget_batch_size: int = 16
    batchnorm: str = "frozen"

    def __post_init__(self) -> None:
        check_positive(self, ("alpha", "epochs", "rate", "batch_size", "forget_batch_size"))
        check_share(self, "share")
        check_batchnorm(self.batchnorm)

    def plan(self, request: Request) -> Plan:
        """Masked steps on forget and retain rows side by side."""
        loss = request.task.loss
        if not isinstance(loss, CrossEntropy | BinaryCrossEntropy):
            kind = type(loss).__name__
            raise ValueError(f"SalUn's random labels need classes; the task's loss is {kind}")
        order, (forget, retain) = side_by_side(
            request,
            epochs=self.epochs,
            forget_batch=self.forget_batch_size,
            retain_batch=self.batch_size,
        )
        plan = two_sided_plan(
            request,
            order,
            forget=_drawn_loss(loss).times(forget),
            retain=loss_objective(loss).times(self.alpha * retain),
            rate=self.rate,
            optimizer=SGD(),
            targets=_random_labels(request),
            training=self.batchnorm == "update",
        )
        return replace(plan, project=_masks(request, self.share), spent=len(request.forget))


def _drawn_loss(loss: Loss) -> Objective:
    """The loss of the label in the targets."""
    return Objective(
        lambda outputs, _, targets: loss.value(outputs, targets[..., 0].long()),
        lambda outputs, _, targets: loss.gradient(outputs, targets[..., 0].long()),
    )


def _random_labels(request: Request) -> Tensor:
    """A wrong class for each forget row, [model, row, 1]; 0 for the retain rows."""
    inputs, labels = request.rows(both_sides(request))
    outputs = request.outputs(request.states, inputs[:1]).shape[-1]
    classes, count = max(2, outputs), len(request.forget)
    own = request.task.loss.classes(labels[:count].cpu())
    drawn = torch.zeros(len(request.numbers), len(inputs), 1, dtype=inputs.dtype)
    for i, number in enumerate(request.numbers):
        random = generator(request.seed, "random labels", number)
        shift = torch.from_numpy(random.integers(1, classes, size=count))
        drawn[i, :count, 0] = ((own + shift) % classes).to(inputs.dtype)
    return drawn.to(request.device)


def saliency_mask(gradients: State, share: float) -> State:
    """True at the share of all numbers that are largest in size.

    Args:
        gradients: by parameter name.
        share: of all numbers, rounded to a whole number of them, at least one.

    Returns:
        Masks by parameter name, in the same shapes.

    Example:
        >>> saliency_mask({"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([-4.0, 2.0])}, 0.5)
        {'a': tensor([ True, False]), 'b': tensor([ True, False])}
    """
    sizes = torch.cat([gradient.abs().flatten() for gradient in gradients.values()])
    kept = max(1, round(share * len(sizes)))
    chosen = torch.zeros_like(sizes, dtype=torch.bool)
    chosen[torch.argsort(sizes, descending=True, stable=True)[:kept]] = True
    parts = chosen.split([gradient.numel() for gradient in gradients.values()])
    pairs = zip(gradients.items(), parts, strict=True)
    return {name: part.reshape(gradient.shape) for (name, gradient), part in pairs}


def _masks(request: Request, share: float) -> "BoundMask":
    rows, loss = request.rows(request.forget.rows), request.task.loss
    modules = (own_module(request, i) for i in range(len(request.numbers)))
    gradients = (mean_gradient(module, loss, *rows) for module in modules)
    return BoundMask(stack([saliency_mask(each, share) for each in gradients]))


@dataclass(frozen=True)
class BoundMask:
    """Masks of some models by parameter name, each [model, ...]."""

    masks: State

    def __call__(self, index: int | None) -> Project:
        """The masking of one model's updates, or of all models' stacked ones."""
        chosen = self.masks if index is None else unstack(self.masks, index)

        def project(updates: State) -> State:
            return {name: update * chosen[name] for name, update in updates.items()}

        return project
