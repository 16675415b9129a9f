"""PGU: ascend on the forget rows in directions that leave the retain rows' computation alone."""

from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from attribution import CrossEntropy
from attribution.descent import SGD
from attribution.losses import one_hot, softmax
from attribution.moments import Moments
from unlearning.method import Plan, Request, Stopping, check_positive, epochs_order
from unlearning.projection import Gammas, GradientProjection
from unlearning.runner import UnlearningMethod

WATCHED = "accuracy on the forget rows"
ENTROPIES = ("raise", "lower_others")


@dataclass(frozen=True)
class ProjectedGradient(UnlearningMethod):
    """Projected gradient unlearning with the paper's loss; reads no retain row.

    Minimises the mean over the forget rows of -log(1 - (p_y - offset)) + entropy_weight x
    sum_c p_c log p_c by plain gradient descent, each step projected out of the retain rows' core
    gradient space. A model stops at the first epoch where its accuracy on the forget rows is
    below its test accuracy, as stored at precompute, and keeps this epoch or the one before,
    whichever is nearer. The ending says how: `crossed`; `too fast`, where the accuracy
    was below before the first step and nothing is changed; or `never crossed`.

    To undo poisoned labels, let `entropy` be "lower_others": the second term becomes
    -entropy_weight x sum_{c != y} q_c log q_c with q_c = p_c / (1 - p_y), so that what leaves the
    wrong label y gathers in one other class; and let `reference` be what a model that never saw
    the poison reaches on the wrong labels, which is about 0.

    The new model carries the retain rows' moments, so that its next request projects out of the
    space without the rows of this one, and reads none of them. Rows that a method without a
    projection has forgotten before are read once, to take them out of the space too.

    Args:
        moments: of the models' inputs, stored at precompute.
        gamma: share of the singular values of a layer's inputs that is protected.
        epochs: at most so many passes over the forget rows.
        rate: learning rate of the first epoch.
        last_rate: learning rate of the last epoch; between them it falls exponentially.
        batch_size: rows a step.
        offset: bounds the first term's derivative by 1 / offset.
        entropy_weight: of the second term.
        threshold: what gamma is a share of: "values", S, or "squares", S^2.
        layer_gammas: a gamma of their own for some layers, by name.
        entropy: "raise" the entropy of all classes, or "lower_others".
        reference: accuracy on the forget rows below which a model stops; None: its test accuracy.

    Raises:
        ValueError: a number is outside its range, or a word is unknown.

    Source: PGU (arXiv 2312.04095). The authors stop on validation accuracy, which they measure
        each epoch; here it is the stored one, so that no other row is read. Where no epoch crosses
        they return the model as it was; here the last epoch is kept, and said to be that.
    """

    moments: Moments
    gamma: float = 0.8
    epochs: int = 100
    rate: float = 0.1
    last_rate: float = 0.01
    batch_size: int = 64
    offset: float = 0.05
    entropy_weight: float = 0.2
    threshold: str = "values"
    layer_gammas: Gammas = field(default_factory=lambda: MappingProxyType({}))
    entropy: str = "raise"
    reference: float | None = None

    def __post_init__(self) -> None:
        check_positive(self, ("epochs", "rate", "last_rate", "batch_size", "offset"))
        if not 0 <= self.entropy_weight < np.inf:
            raise ValueError(
                "ProjectedGradient.entropy_weight must be finite and not negative, got"
                f" {self.entropy_weight}"
            )
        if self.entropy not in ENTROPIES:
            raise ValueError(f"entropy must be 'raise' or 'lower_others', got {self.entropy!r}")
        if self.reference is not None and not 0 <= self.reference <= 1:
            raise ValueError(f"reference must lie in [0, 1], got {self.reference}")
        _ = self.projection

    @property
    def projection(self) -> GradientProjection:
        """What every step is projected by."""
        return GradientProjection(self.moments, self.gamma, self.threshold, self.layer_gammas)

    def plan(self, request: Request) -> Plan:
        """Projected steps on the forget rows."""
        if not isinstance(request.task.loss, CrossEntropy):
            kind = type(request.task.loss).__name__
            raise ValueError(f"PGU's loss needs class probabilities; the task's loss is {kind}")
        inputs, labels = request.rows(request.forget.rows)
        order = epochs_order(len(inputs), self.epochs, self.batch_size, request)
        per_epoch = order.shape[1] // self.epochs
        rates = np.geomspace(self.rate, self.last_rate, self.epochs).repeat(per_epoch)

        def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
            del targets
            right = request.task.loss.quality(outputs, labels.expand(outputs.shape[:-1]))
            return right.mean(-1)

        bound = self.projection.bind(request)
        return Plan(
            inputs=inputs,
            labels=labels,
            order=order,
            rates=rates,
            cotangent=self._derivative,
            value=self._value,
            optimizer=SGD(),
            project=bound,
            moments=bound.moments,
            stopping=Stopping(per_epoch, len(inputs), WATCHED, accuracy, self._references(request)),
        )

    def _references(self, request: Request) -> Tensor:
        if self.reference is not None:
            return torch.full((len(request.digests),), self.reference, dtype=torch.float64)
        numbers = [self.moments.find_digest(digest) for digest in request.digests]
        return self.moments.accuracy(numbers)

    def _value(self, outputs: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        del targets
        p, y = softmax(outputs), one_hot(labels, outputs)
        bounded = -torch.log(1 + self.offset - (p * y).sum(-1))
        negative_entropy = torch.special.xlogy(p, p).sum(-1)
        if self.entropy == "lower_others":
            q = softmax(outputs.masked_fill(y > 0, -torch.inf))
            negative_entropy = -torch.special.xlogy(q, q).sum(-1)
        return torch.add(bounded, negative_entropy, alpha=self.entropy_weight)

    def _derivative(self, outputs: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        del targets
        p, y = softmax(outputs), one_hot(labels, outputs)
        chosen = (p * y).sum(-1, keepdim=True)
        first = chosen / (1 + self.offset - chosen) * (y - p)
        if self.entropy == "lower_others":
            second = -_entropy_slope(softmax(outputs.masked_fill(y > 0, -torch.inf)))
        else:
            second = _entropy_slope(p)
        return first + self.entropy_weight * second


def _entropy_slope(p: Tensor) -> Tensor:
    """Derivative of sum p log p with respect to the logits."""
    logs = torch.log(p.clamp_min(torch.finfo(p.dtype).tiny))
    return p * (logs - (p * logs).sum(-1, keepdim=True))
