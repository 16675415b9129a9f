"""Core gradient spaces: directions in which a step would change what the retain rows compute."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from attribution.descent import Project, stack, unstack
from attribution.moments import Moments, input_moments, layers
from attribution.task import State
from unlearning.method import Request

# Eigenvalues of a downdated moment below minus this share of the largest are no rounding.
INDEFINITE = 1e-6
THRESHOLDS = {"values": 0.5, "squares": 1.0}
"""The power of an eigenvalue of C = S^2 that gamma is a share of the sum of."""

Gammas = Mapping[str, float]


def core_projector(moment: Tensor, gamma: float, threshold: str = "values") -> Tensor:
    """Projector on the leading input directions of a layer.

    With singular values S = sqrt(eigenvalues), the first k = #{cumsum(S) / sum(S) <= gamma}
    eigenvectors U_k (at least one) give P = U_k U_k^T; with threshold "squares", S^2 stands for S.

    Args:
        moment: uncentred second moments of a layer's inputs, [..., width, width].
        gamma: share of the sum to keep, in (0, 1]; 1 keeps all and so freezes the layer.
        threshold: "values": gamma is a share of the sum of S, "squares": of the sum of S^2, which
            is the inputs' energy. The same gamma keeps fewer directions with "squares".

    Returns:
        P, [..., width, width], in the moment's dtype.

    Example:
        >>> core_projector(torch.diag(torch.tensor([9.0, 1.0])), gamma=0.8)
        tensor([[1., 0.],
                [0., 0.]])

    Source: PGU (arXiv 2312.04095), which thresholds on S^2; the authors' experiments do on S.
    """
    values, vectors = torch.linalg.eigh(moment)
    if (values[..., 0] < -INDEFINITE * values[..., -1]).any():
        warnings.warn(
            "the downdated second moments are indefinite: the model has changed since they were"
            " taken, or they belong to other rows; negative directions are dropped",
            stacklevel=2,
        )
    powers = values.flip(-1).clamp_min(0) ** THRESHOLDS[threshold]
    share = powers.cumsum(-1) / powers.sum(-1, keepdim=True)
    kept = (share <= gamma + 1e-12).sum(-1).clamp_min(1)
    leading = torch.arange(values.shape[-1], device=values.device) < kept.unsqueeze(-1)
    basis: Tensor = vectors.flip(-1) * leading.unsqueeze(-2)
    return basis @ basis.mT


def retain_moments(moments: Moments, request: Request) -> State:
    """Second moments of the retain rows' inputs, without reading a retain row.

    C_retain = C_before - C_gone, for each model and layer. C_before is what the model carries from
    a projected request before this one, and so lacks the rows of that one too; a model that carries
    none has the stored moments of all rows. C_gone is of the rows to forget now and of those that
    were forgotten before by a request without a projection, which C_before still counts. A model
    that has changed since its moments were taken gives C_gone and the difference approximately.

    Args:
        moments: of all training rows, stored at precompute.
        request: models and forget set.

    Returns:
        By layer name, each [model, *moment_shape], float64.
    """
    inputs, _ = request.rows(request.forget.union(request.task, request.counted).rows)
    before, each = _before(moments, request), []
    for i, held in enumerate(before):
        gone = input_moments(request.module, unstack(request.states, i), inputs)
        each.append({name: held[name].to(request.device) - gone[name] for name in gone})
    return stack(each)


def _before(moments: Moments, request: Request) -> list[Mapping[str, Tensor]]:
    """Moments of each model before this request: those it carries, or else the stored ones."""
    new = [i for i, carried in enumerate(request.moments) if carried is None]
    stored = moments.layers([moments.find_digest(request.digests[i]) for i in new]) if new else {}
    own = {i: unstack(stored, place) for place, i in enumerate(new)}
    return [own[i] if held is None else held for i, held in enumerate(request.moments)]


@dataclass(frozen=True)
class GradientProjection:
    """Projects every update out of the retain rows' core gradient space, layer by layer.

    A weight's update D becomes D - D P, each group of a convolution with its own P; biases,
    normalisation and all other parameters do not move, because their inputs lie in every retain
    row's space. Weights of other layers do not move either, which a warning says. The new model
    carries the retain rows' moments forward to its next request.

    Args:
        moments: of the models' inputs, stored at precompute.
        gamma: share of the singular values that is protected, in (0, 1].
        threshold: what gamma is a share of: "values", S, or "squares", S^2.
        layer_gammas: a gamma of their own for some layers, by name.

    Raises:
        ValueError: a gamma outside its range, or an unknown threshold.

    Source: PGU (arXiv 2312.04095), without its loss.
    """

    moments: Moments
    gamma: float = 0.5
    threshold: str = "values"
    layer_gammas: Gammas = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        for name, gamma in {"gamma": self.gamma, **self.layer_gammas}.items():
            if not 0 < gamma <= 1:
                where = "gamma" if name == "gamma" else f"gamma of layer {name!r}"
                raise ValueError(f"{where} must lie in (0, 1], got {gamma}")
        if self.threshold not in THRESHOLDS:
            raise ValueError(
                f"threshold must be 'values' or 'squares', got {self.threshold!r}: gamma is a share"
                " of singular values or of their squares"
            )

    def bind(self, request: Request) -> "BoundProjection":
        """The projectors of a request's models."""
        dtype = next(iter(request.states.values())).dtype
        _check_weights(request.module)
        retained = retain_moments(self.moments, request)
        unknown = [name for name in self.layer_gammas if name not in retained]
        if unknown:
            raise ValueError(
                f"layer_gammas names {unknown[0]!r}; the layers are: {', '.join(retained)}"
            )
        projectors = {
            f"{name}.weight".lstrip("."): core_projector(
                moment, self.layer_gammas.get(name, self.gamma), self.threshold
            ).to(dtype)
            for name, moment in retained.items()
        }
        return BoundProjection(projectors, retained)


@dataclass(frozen=True)
class BoundProjection:
    """Projectors of some models, and the moments they were made from.

    Args:
        projectors: by parameter name, each [model, ..., width, width].
        moments: of the retain rows by layer name, each [model, *moment_shape].
    """

    projectors: State
    moments: State

    def __call__(self, index: int | None) -> Project:
        """The projection of one model's updates, or of all models' stacked ones."""
        chosen = self.projectors if index is None else unstack(self.projectors, index)

        def project(updates: State) -> State:
            return {name: _outside(update, chosen.get(name)) for name, update in updates.items()}

        return project


def _check_weights(module: nn.Module) -> None:
    """Refuses a weight of two inputs, and names those that no projection is known for."""
    projected = [f"{name}.weight".lstrip(".") for name in layers(module)]
    every = dict(module.named_parameters(remove_duplicate=False))
    for name in projected:
        for other, parameter in every.items():
            if other != name and parameter is every[name]:
                raise ValueError(
                    f"{name!r} and {other!r} are one tensor, whose updates no projection of one"
                    " layer keeps out of what the other computes: use a method without a projection"
                )
    still = [
        name
        for name, parameter in every.items()
        if parameter.ndim > 1 and name not in projected and parameter.requires_grad
    ]
    if still:
        warnings.warn(
            f"projected updates move the weights of Linear and Conv2d layers only:"
            f" {', '.join(still)} will stay as they are",
            stacklevel=2,
        )


def _outside(update: Tensor, projector: Tensor | None) -> Tensor:
    if projector is None:
        return torch.zeros_like(update)
    flat = update.reshape(*projector.shape[:-2], -1, projector.shape[-1])
    return (flat - flat @ projector).reshape(update.shape)
