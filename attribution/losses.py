"""Losses: value, derivatives with respect to the outputs, margin; nothing else knows the loss."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# Numbers in a row; the widest vector registers hold so many of them.
SHORT = 16


def softmax(outputs: Tensor) -> Tensor:
    """Softmax over the last axis.

    torch's own kernel vectorises within a row and so is slow on rows of ten numbers, which shows
    in a step of many small models; short rows are taken side by side.

    Args:
        outputs: logits, [..., output].

    Returns:
        Probabilities, [..., output].

    Example:
        >>> softmax(torch.zeros(2, 4))[0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    if outputs.shape[-1] > SHORT:
        return outputs.softmax(-1)
    return outputs.movedim(-1, 0).softmax(0).movedim(0, -1)


def one_hot(labels: Tensor, outputs: Tensor) -> Tensor:
    """Rows of the identity at the labels, in the shape and dtype of the outputs.

    Args:
        labels: class numbers, [...].
        outputs: any tensor [..., output] whose shape, dtype and device are taken.

    Returns:
        Zeros with a one at each label, [..., output].

    Example:
        >>> one_hot(torch.tensor([1]), torch.zeros(1, 3))
        tensor([[0., 1., 0.]])
    """
    classes = torch.arange(outputs.shape[-1], device=outputs.device)
    return (labels.unsqueeze(-1) == classes).to(outputs.dtype)


class Loss(ABC):
    """A loss of one row, as a function of the model outputs z and the label y."""

    @abstractmethod
    def check_labels(self, labels: Tensor, outputs: int) -> None:
        """Refuses labels that the loss cannot take.

        Args:
            labels: of all rows of a split, [row] or [row, output].
            outputs: number of outputs of the model.

        Raises:
            ValueError: says what they are, and what they must be.
        """

    @abstractmethod
    def classes(self, labels: Tensor) -> Tensor:
        """Class number of each row, [...]; 0 where labels are no classes."""

    @abstractmethod
    def value(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Loss of each row, [...], from outputs [..., output]."""

    @abstractmethod
    def gradient(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Derivative of the loss with respect to the outputs, [..., output]."""

    @abstractmethod
    def hessian(self, outputs: Tensor) -> Tensor:
        """Second derivative with respect to the outputs, [..., output, output]."""

    @abstractmethod
    def margin(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The one number of a row that audits compare, [...]."""

    @abstractmethod
    def quality(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """How right each row is, [...]: 1 or 0 for a class, minus the squared error else."""


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Softmax cross-entropy, l = logsumexp(z) - z_y; labels are class numbers.

    Its margin is z_y - logsumexp of the other logits (Attribute-to-Delete, arXiv 2410.23232).

    Example:
        >>> loss = CrossEntropy()
        >>> loss.value(torch.zeros(1, 10), torch.tensor([3]))
        tensor([2.3026])
        >>> loss.margin(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor([2.])
    """

    def check_labels(self, labels: Tensor, outputs: int) -> None:
        """Refuses labels that are no class numbers below the number of outputs."""
        if labels.is_floating_point() or labels.ndim != 1:
            raise ValueError(
                f"labels have dtype {labels.dtype} and shape {tuple(labels.shape)}: cross-entropy"
                " takes class numbers as labels, one integer a row"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= outputs:
            raise ValueError(
                f"labels run from {int(labels.min())} to {int(labels.max())}, the model has"
                f" {outputs} outputs"
            )

    def classes(self, labels: Tensor) -> Tensor:
        """The labels."""
        return labels.long()

    def value(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each row, in nats."""
        chosen = outputs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return outputs.logsumexp(-1) - chosen

    def gradient(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Probabilities minus the one-hot label."""
        chosen = labels.long().unsqueeze(-1)
        less = torch.full((), -1, dtype=outputs.dtype, device=outputs.device)
        return softmax(outputs).scatter_add(-1, chosen, less.expand(chosen.shape))

    def hessian(self, outputs: Tensor) -> Tensor:
        """R = diag(p) - p p^T."""
        p = softmax(outputs)
        return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)

    def margin(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Logit of the label minus logsumexp of the others."""
        chosen = outputs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        others = outputs.masked_fill(one_hot(labels, outputs).bool(), -torch.inf)
        return chosen - others.logsumexp(-1)

    def quality(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """1 where the largest logit is the label's, else 0."""
        return (outputs.argmax(-1) == labels).to(outputs.dtype)


@dataclass(frozen=True)
class BinaryCrossEntropy(Loss):
    """Cross-entropy of one logit, l = ln(1 + exp(-(2 y - 1) z)); labels are 0 or 1, of any dtype.

    Its margin is (2 y - 1) z, the log odds of the label, as that of two logits is.

    Example:
        >>> loss = BinaryCrossEntropy()
        >>> loss.value(torch.zeros(1, 1), torch.tensor([1]))
        tensor([0.6931])
        >>> loss.margin(torch.tensor([[2.0], [2.0]]), torch.tensor([1, 0]))
        tensor([ 2., -2.])
    """

    def check_labels(self, labels: Tensor, outputs: int) -> None:
        """Refuses labels other than 0 and 1, and models of more than one output."""
        if outputs != 1:
            raise ValueError(
                f"labels are those of one logit, the model has {outputs} outputs: use CrossEntropy"
                " for one logit a class"
            )
        if labels.ndim != 1:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}: binary cross-entropy takes one number a"
                " row, 0 or 1"
            )
        wrong = labels[(labels != 0) & (labels != 1)]
        if len(wrong):
            raise ValueError(f"labels must be 0 or 1, got {wrong[0].item()}")

    def classes(self, labels: Tensor) -> Tensor:
        """The labels, whole numbers whatever their dtype."""
        return labels.long()

    def value(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each row, in nats."""
        return -functional.logsigmoid(self.margin(outputs, labels))

    def gradient(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Probability of 1 minus the label."""
        return outputs.sigmoid() - labels.reshape(outputs.shape).to(outputs.dtype)

    def hessian(self, outputs: Tensor) -> Tensor:
        """R = p (1 - p)."""
        return (outputs.sigmoid() * (-outputs).sigmoid()).unsqueeze(-1)

    def margin(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The logit, with its sign turned where the label is 0."""
        return (2 * labels.to(outputs.dtype) - 1) * outputs[..., 0]

    def quality(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """1 where the logit is above 0 and the label 1, or else both are not; else 0."""
        return ((outputs[..., 0] > 0) == (labels > 0)).to(outputs.dtype)


@dataclass(frozen=True)
class SquaredError(Loss):
    """Squared error, l = |z - y|^2 / 2; labels are numbers, [...] or [..., output].

    Its margin is the first output itself, so that audits compare predictions.

    Example:
        >>> SquaredError().value(torch.tensor([[3.0]]), torch.tensor([1.0]))
        tensor([2.])
    """

    def check_labels(self, labels: Tensor, outputs: int) -> None:
        """Refuses labels that are not finite, or not as many as there are outputs."""
        if labels.numel() != len(labels) * outputs:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, the model has {outputs} outputs: squared"
                " error takes one number for each"
            )
        if not torch.isfinite(labels).all():
            raise ValueError("labels must be finite")

    def classes(self, labels: Tensor) -> Tensor:
        """All rows are of one class."""
        return torch.zeros(len(labels), dtype=torch.long)

    def value(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Half the squared distance of each row."""
        return self.gradient(outputs, labels).square().sum(-1) / 2

    def gradient(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Outputs minus labels."""
        return outputs - labels.reshape(outputs.shape).to(outputs.dtype)

    def hessian(self, outputs: Tensor) -> Tensor:
        """The identity."""
        width = outputs.shape[-1]
        identity = torch.eye(width, dtype=outputs.dtype, device=outputs.device)
        return identity.expand(*outputs.shape[:-1], width, width)

    def margin(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The first output."""
        del labels
        return outputs[..., 0]

    def quality(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Minus the squared error."""
        return -2 * self.value(outputs, labels)
