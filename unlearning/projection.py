"""Core gradient spaces: directions in which a step would change what the retain rows compute."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.descent import Project, stack, unstack
from attribution.moments import Moments, input_moments
from attribution.task import State
from unlearning.method import Request

# Eigenvalues of a downdated moment below minus this share of the largest are no rounding.
INDEFINITE = 1e-6


def core_projector(moment: Tensor, gamma: float) -> Tensor:
    """Projector on the leading input directions of a layer.

    With singular values S = sqrt(eigenvalues), the first k = #{cumsum(S) / sum(S) <= gamma}
    eigenvectors U_k (at least one) give P = U_k U_k^T.

    Args:
        moment: uncentred second moments of a layer's inputs, [..., width, width].
        gamma: share of the sum of S to keep, in (0, 1]; 1 keeps all and so freezes the layer.

    Returns:
        P, [..., width, width], in the moment's dtype.

    Example:
        >>> core_projector(torch.diag(torch.tensor([9.0, 1.0])), gamma=0.8)
        tensor([[1., 0.],
                [0., 0.]])

    Source: PGU (arXiv 2312.04095); the threshold is on S, as in the authors' experiments.
    """
    values, vectors = torch.linalg.eigh(moment)
    if (values[..., 0] < -INDEFINITE * values[..., -1]).any():
        warnings.warn(
            "the downdated second moments are indefinite: the model has changed since they were"
            " taken, or they belong to other rows; negative directions are dropped",
            stacklevel=2,
        )
    singular = values.flip(-1).clamp_min(0).sqrt()
    share = singular.cumsum(-1) / singular.sum(-1, keepdim=True)
    kept = (share <= gamma + 1e-12).sum(-1).clamp_min(1)
    leading = torch.arange(values.shape[-1], device=values.device) < kept.unsqueeze(-1)
    basis: Tensor = vectors.flip(-1) * leading.unsqueeze(-2)
    return basis @ basis.mT


def retain_moments(moments: Moments, request: Request) -> State:
    """Second moments of the retain rows' inputs, from the stored ones and the forget rows alone.

    C_retain = C_all - C_forget, for each model and layer. Only the rows to forget now are read:
    what was forgotten before stays in the protected space, and a model that has changed since its
    moments were taken gives them approximately.

    Args:
        moments: of all training rows, stored at precompute.
        request: models and forget set.

    Returns:
        By layer name, [model, width, width], float64.
    """
    inputs, _ = request.rows(request.forget.rows)
    module = request.module
    count = len(request.numbers)
    forget = stack(
        [input_moments(module, unstack(request.states, i), inputs) for i in range(count)]
    )
    numbers = [moments.find_digest(digest) for digest in request.digests]
    stored = moments.layers(numbers)
    return {name: stored[name].to(request.device) - forget[name] for name in forget}


@dataclass(frozen=True)
class GradientProjection:
    """Projects every update out of the retain rows' core gradient space, layer by layer.

    A weight's update D becomes D - D P; biases, normalisation and all other parameters do not
    move, because their inputs lie in every retain row's space.

    Args:
        moments: of the models' inputs, stored at precompute.
        gamma: share of the singular values that is protected, in (0, 1].

    Raises:
        ValueError: gamma outside its range.

    Source: PGU (arXiv 2312.04095), without its loss.
    """

    moments: Moments
    gamma: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], got {self.gamma}")

    def bind(self, request: Request) -> "BoundProjection":
        """The projectors of a request's models."""
        dtype = next(iter(request.states.values())).dtype
        retained = retain_moments(self.moments, request)
        return BoundProjection(
            {
                f"{name}.weight".lstrip("."): core_projector(moment, self.gamma).to(dtype)
                for name, moment in retained.items()
            }
        )


@dataclass(frozen=True)
class BoundProjection:
    """Projectors of some models by parameter name, each [model, width, width]."""

    projectors: State

    def __call__(self, index: int | None) -> Project:
        """The projection of one model's updates, or of all models' stacked ones."""
        chosen = self.projectors if index is None else unstack(self.projectors, index)

        def project(updates: State) -> State:
            return {name: _outside(update, chosen.get(name)) for name, update in updates.items()}

        return project


def _outside(update: Tensor, projector: Tensor | None) -> Tensor:
    if projector is None:
        return torch.zeros_like(update)
    flat = update.reshape(*projector.shape[:-2], -1, projector.shape[-1])
    return (flat - flat @ projector).reshape(update.shape)
