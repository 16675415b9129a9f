"""PGU: ascend on the forget rows in directions that leave the retain rows' computation alone."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution import CrossEntropy
from attribution.descent import SGD
from attribution.losses import one_hot, softmax
from attribution.moments import Moments
from unlearning.method import Plan, Request, Stopping, check_positive, epochs_order
from unlearning.projection import GradientProjection
from unlearning.runner import UnlearningMethod


@dataclass(frozen=True)
class ProjectedGradient(UnlearningMethod):
    """Projected gradient unlearning with the paper's loss; reads no row but the forget rows.

    Minimises the mean over the forget rows of -log(1 - (p_y - offset)) + entropy_weight x
    sum_c p_c log p_c by plain gradient descent, each step projected out of the retain rows' core
    gradient space. A model stops at the first epoch where its accuracy on the forget rows is
    below its test accuracy, as stored at precompute, and keeps this epoch or the one before,
    whichever is nearer. The status says how it ended: `crossed`; `too fast`, where the accuracy
    was below before the first step and nothing is changed; or `never crossed`.

    Args:
        moments: of the models' inputs, stored at precompute.
        gamma: share of the singular values of a layer's inputs that is protected.
        epochs: at most so many passes over the forget rows.
        rate: learning rate of the first epoch.
        last_rate: learning rate of the last epoch; between them it falls exponentially.
        batch_size: rows a step.
        offset: bounds the first term's derivative by 1 / offset.
        entropy_weight: of the second term.

    Raises:
        ValueError: a number is outside its range.

    Source: PGU (arXiv 2312.04095). The authors stop on validation accuracy, which they measure
        each epoch; here it is the stored one, so that no other row is read.
    """

    moments: Moments
    gamma: float = 0.8
    epochs: int = 100
    rate: float = 0.1
    last_rate: float = 0.01
    batch_size: int = 64
    offset: float = 0.05
    entropy_weight: float = 0.2

    def __post_init__(self) -> None:
        check_positive(self, ("epochs", "rate", "last_rate", "batch_size", "offset"))
        GradientProjection(self.moments, self.gamma)

    def plan(self, request: Request) -> Plan:
        """Projected steps on the forget rows."""
        if not isinstance(request.task.loss, CrossEntropy):
            kind = type(request.task.loss).__name__
            raise ValueError(f"PGU's loss needs class probabilities; the task's loss is {kind}")
        inputs, labels = request.rows(request.forget.rows)
        order = epochs_order(len(inputs), self.epochs, self.batch_size, request)
        per_epoch = order.shape[1] // self.epochs
        rates = np.geomspace(self.rate, self.last_rate, self.epochs).repeat(per_epoch)
        reference = self.moments.accuracy(
            [self.moments.find_digest(digest) for digest in request.digests]
        )

        def gap(outputs: Tensor, models: slice) -> Tensor:
            right = request.task.loss.quality(outputs, labels.expand(outputs.shape[:-1]))
            return reference[models].to(right) - right.mean(-1)

        return Plan(
            inputs=inputs,
            labels=labels,
            order=order,
            rates=rates,
            cotangent=self._derivative,
            value=self._value,
            optimizer=SGD(),
            project=GradientProjection(self.moments, self.gamma).bind(request),
            stopping=Stopping(per_epoch, len(inputs), gap),
        )

    def _value(self, outputs: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        del targets
        p = softmax(outputs)
        chosen = (p * one_hot(labels, outputs)).sum(-1)
        negative_entropy = torch.special.xlogy(p, p).sum(-1)
        bounded = -torch.log(1 + self.offset - chosen)
        return torch.add(bounded, negative_entropy, alpha=self.entropy_weight)

    def _derivative(self, outputs: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        del targets
        p, y = softmax(outputs), one_hot(labels, outputs)
        chosen = (p * y).sum(-1, keepdim=True)
        logs = torch.log(p.clamp_min(torch.finfo(p.dtype).tiny))
        first = chosen / (1 + self.offset - chosen) * (y - p)
        second = p * (logs - (p * logs).sum(-1, keepdim=True))
        return first + self.entropy_weight * second
