"""Which block of features covers which parameters of a model."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attribution.gradients.convolution import CONVOLUTIONS, ConvolutionBlock
from attribution.gradients.layers import (
    NORMALISATIONS,
    Block,
    EmbeddingBlock,
    LinearBlock,
    NormalisationBlock,
    Sides,
)
from attribution.gradients.projection import (
    Directions,
    Projection,
    SparseProjection,
    orthogonal_matrices,
    sparse_projection,
)
from stores import digest

# Exact types: a subclass may compute something else from the same parameters.
FACTORISED = (nn.Linear, nn.Embedding, *CONVOLUTIONS, *NORMALISATIONS)

Signature = tuple[object, ...]


@dataclass(frozen=True)
class Other:
    """A parameter without a factorised form: its gradient, flattened, is projected sparsely.

    Args:
        name: of the parameter.
        shape: of the parameter.
        sparse: the projection.
    """

    name: str
    shape: tuple[int, ...]
    sparse: SparseProjection


@dataclass(frozen=True)
class Plan:
    """The blocks of a model's features, in order, and what feeds them.

    Args:
        aliases: all names of each trainable parameter, by its first name.
        keys: names that a state must have.
        layers: number of its block for each layer, by the layer's name.
        blocks: blocks of layers.
        others: parameters that follow them.
    """

    aliases: Mapping[str, tuple[str, ...]]
    keys: tuple[str, ...]
    layers: Mapping[str, int]
    blocks: Sequence[Block]
    others: Sequence[Other]

    @property
    def firsts(self) -> list[str]:
        """The first layer of each block."""
        named = {number: name for name, number in reversed(list(self.layers.items()))}
        return [named[number] for number in range(len(self.blocks))]

    @property
    def sizes(self) -> list[int]:
        """Number of features of each block, then of each other parameter."""
        return [block.size for block in self.blocks] + [other.sparse.size for other in self.others]

    def digest(self) -> str:
        """Digest of all matrices; they differ if a version of numpy draws other numbers."""
        parts = [matrix for block in self.blocks for matrix in block.matrices]
        parts += [matrix for other in self.others for matrix in other.sparse.matrices]
        return digest(*(part.numpy() for part in parts))


def make_plan(
    module: nn.Module,
    projection: Projection,
    checkpoint: int,
    directions: Mapping[str, Directions] | None = None,
) -> Plan:
    """Assigns every trainable parameter of a model to a block of features.

    Layers of one type that share all their parameters share a block. A parameter that is shared
    in another way, or whose layer has no factorised form, stands alone.

    Args:
        module: the model.
        projection: settings.
        checkpoint: number of the checkpoint.
        directions: of the layers whose sides are not projected at random, by the first name of
            each; see `principal_directions`.

    Returns:
        The plan.

    Raises:
        ValueError: nothing is trainable, or a layer mixes rows or changes its weights in eval
            mode; names it. Or directions are asked for and not given, or do not fit the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 3))
        >>> make_plan(model, Projection(), 0).sizes
        [512, 63]
    """
    if bool(projection.principal) != (directions is not None):
        raise ValueError(
            "principal directions follow from a model and data: give those of principal_directions"
            " with a projection that has principal features, and none with principal=0"
        )
    named = dict(module.named_modules())
    for name, layer in named.items():
        _refuse_layer(name, layer)
    aliases = _aliases(module)
    if not aliases:
        raise ValueError("the model has no trainable parameter: none requires a gradient")
    parameters = dict(module.named_parameters())
    owners = _owners(named.values())
    own = {id(parameters[name]): name for name in aliases if len(owners[id(parameters[name])]) == 1}
    draw = _Draw(projection, checkpoint, own, directions or {})
    layers = {name: layer for name, layer in named.items() if draw.covers(layer)}
    # The first layer of each signature names the matrices.
    first = {_signature(layer): name for name, layer in reversed(layers.items())}
    blocks = {
        name: draw.block(name, layer)
        for name, layer in layers.items()
        if first[_signature(layer)] == name
    }
    numbers = {name: number for number, name in enumerate(blocks)}
    _refuse_unknown(blocks, directions or {})
    covered = {name for block in blocks.values() for name in block.names}
    return Plan(
        aliases,
        tuple(module.state_dict()),
        {name: numbers[first[_signature(layer)]] for name, layer in layers.items()},
        list(blocks.values()),
        [draw.other(name, parameters[name]) for name in aliases if name not in covered],
    )


@dataclass(frozen=True)
class _Draw:
    projection: Projection
    checkpoint: int
    own: Mapping[int, str]
    directions: Mapping[str, Directions]

    def covers(self, layer: nn.Module) -> bool:
        return type(layer) in FACTORISED and any(self._names(layer))

    def block(self, name: str, layer: nn.Module) -> Block:
        weight, bias = self._names(layer)
        if isinstance(layer, nn.Linear):
            inner = layer.in_features * bool(weight) + bool(bias)
            return LinearBlock(weight, bias, self._sides(name, 1, layer.out_features, inner))
        if isinstance(layer, nn.Embedding):
            assert weight is not None
            sides = self._sides(name, 1, layer.embedding_dim, layer.num_embeddings)
            return EmbeddingBlock(weight, None, sides, layer.padding_idx)
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            return self._convolution(name, layer, weight, bias)
        return self._normalisation(name, layer, weight, bias)

    def other(self, name: str, parameter: Tensor) -> Other:
        shape = tuple(parameter.shape)
        return Other(name, shape, self._sparse(name, parameter.numel()))

    def _names(self, layer: nn.Module) -> tuple[str | None, str | None]:
        # Reparametrised weights are plain tensors: the parameters behind them stand alone.
        weight, bias = (layer._parameters.get(part) for part in ("weight", "bias"))
        return self.own.get(id(weight)), self.own.get(id(bias))

    def _convolution(
        self, name: str, layer: nn.Conv1d | nn.Conv2d, weight: str | None, bias: str | None
    ) -> Block:
        inner = layer.weight[0].numel() * bool(weight) + bool(bias)
        sides = self._sides(name, layer.groups, layer.out_channels // layer.groups, inner)
        return ConvolutionBlock(weight, bias, tuple(layer.weight.shape), sides)

    def _normalisation(
        self, name: str, layer: nn.Module, weight: str | None, bias: str | None
    ) -> Block:
        assert isinstance(layer.weight, Tensor)
        width = layer.weight.numel() * (bool(weight) + bool(bias))
        sparse = self._sparse(f"{name}.vectors", width)
        trailing = isinstance(layer, nn.LayerNorm | nn.RMSNorm)
        return NormalisationBlock(weight, bias, tuple(layer.weight.shape), trailing, sparse)

    def _sides(self, name: str, groups: int, out: int, inner: int) -> Sides:
        known = self.directions.get(name)
        if known is not None:
            known.check(name, groups, out, inner)
            return Sides(groups, out, inner, known.outputs, known.inputs, known.sparse)
        k_out, k_in = self.projection.outputs, self.projection.inputs
        outputs = orthogonal_matrices(self._random(f"{name}.outputs"), groups, k_out, out)
        inputs = orthogonal_matrices(self._random(f"{name}.inputs"), groups, k_in, inner)
        products = self._sparse(f"{name}.products", groups * min(k_out, out) * min(k_in, inner))
        return Sides(groups, out, inner, outputs, inputs, products)

    def _sparse(self, name: str, width: int) -> SparseProjection:
        return sparse_projection(self._random(name), self.projection.features, width)

    def _random(self, name: str) -> np.random.Generator:
        return self.projection.random(self.checkpoint, name)


def _aliases(module: nn.Module) -> dict[str, tuple[str, ...]]:
    names = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names[id(parameter)].append(name)
    return {found[0]: tuple(found) for found in names.values()}


def _signature(layer: nn.Module) -> Signature:
    own = [id(layer._parameters.get(part)) for part in ("weight", "bias")]
    return type(layer), *own, getattr(layer, "groups", 1), getattr(layer, "padding_idx", None)


def _owners(modules: Iterable[nn.Module]) -> Mapping[int, set[Signature]]:
    owners = defaultdict(set)
    for module in modules:
        known = type(module) in FACTORISED
        for name, parameter in module._parameters.items():
            # A parameter that someone registered on such a layer is none of the layer's own.
            usual = known and name in ("weight", "bias")
            owners[id(parameter)].add(_signature(module) if usual else (id(module), name))
    return owners


def _refuse_unknown(blocks: Iterable[str], directions: Iterable[str]) -> None:
    unknown = set(directions) - set(blocks)
    if unknown:
        raise ValueError(
            f"there are directions of {min(unknown)!r}, but the model has no such layer, or not as"
            " the first of its parameters: they were found for another model"
        )


def _refuse_layer(name: str, layer: nn.Module) -> None:
    if isinstance(layer, _BatchNorm) and layer.running_mean is None:
        raise ValueError(
            f"layer {name!r} has no running statistics, so in eval mode too the outputs of one row"
            " depend on the others: per-example gradients do not exist; set"
            " track_running_stats=True"
        )
    for setting in ("max_norm", "scale_grad_by_freq"):
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and getattr(layer, setting):
            raise ValueError(
                f"layer {name!r} has {setting}={getattr(layer, setting)!r}, which is no part of"
                " the gradient of one row: build it without"
            )
