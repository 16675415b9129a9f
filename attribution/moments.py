"""Second moments of every layer's inputs: what PGU must know of the training rows, once."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attribution.devices import where_to_run
from attribution.ensemble import Ensemble
from attribution.gradients.convolution import patches
from attribution.model import Model
from attribution.outputs import evaluate
from attribution.task import State, Task
from attribution.training import threads
from stores import (
    ArraySpec,
    Provenance,
    Store,
    StoreSpec,
    Where,
    in_turns,
    run_blocks,
    versions,
)

ROWS_AT_ONCE = 256


def layers(module: nn.Module) -> dict[str, nn.Module]:
    """Layers whose weights have an input space: Linear and Conv2d, by name.

    Args:
        module: a model.

    Returns:
        The layers, in order.

    Raises:
        ValueError: no such layer at all.

    Example:
        >>> list(layers(nn.Sequential(nn.Linear(3, 2), nn.ReLU())))
        ['0']
    """
    named = dict(module.named_modules())
    found: dict[str, nn.Module] = {
        name: part for name, part in named.items() if isinstance(part, nn.Linear | nn.Conv2d)
    }
    if not found:
        raise ValueError("the model has no Linear or Conv2d layer: there is nothing to project")
    return found


def moment_shape(layer: nn.Module) -> tuple[int, ...]:
    """Shape of the second moments of a layer's input vectors.

    Args:
        layer: Linear or Conv2d.

    Returns:
        (width, width), width being in, or in / groups x kernel height x kernel width; with several
        groups (group, width, width), because each group's weights see their own channels alone.

    Example:
        >>> moment_shape(nn.Conv2d(3, 8, kernel_size=5)), moment_shape(nn.Conv2d(4, 8, 3, groups=2))
        ((75, 75), (2, 18, 18))
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    width = weight[0].numel()
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return (width, width) if groups == 1 else (groups, width, width)


def layer_vectors(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Vectors that a layer's weight is multiplied with: features, or unfolded patches.

    Args:
        layer: Linear or Conv2d; its own stride, padding, dilation and groups are used.
        inputs: its input, [row, ..., in] or [row, in, height, width].

    Returns:
        [vector, width]; of a convolution with several groups [group, vector, width].

    Example:
        >>> layer_vectors(nn.Conv2d(3, 8, 3, stride=2), torch.zeros(2, 3, 7, 7)).shape
        torch.Size([18, 27])
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    assert isinstance(layer, nn.Conv2d)
    found = patches(layer, inputs)
    vectors = found.transpose(1, 2).reshape(-1, found.shape[1])
    if layer.groups == 1:
        return vectors
    return vectors.reshape(len(vectors), layer.groups, -1).transpose(0, 1)


def input_moments(module: nn.Module, state: Mapping[str, Tensor], inputs: Tensor) -> State:
    """Uncentred second moments of each layer's input vectors, C = sum x x^T, in eval mode.

    Args:
        module: gives the structure; it is not changed.
        state: state dict of the model.
        inputs: rows, [row, ...].

    Returns:
        By layer name, of the layer's `moment_shape`, float64, on the state's device.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> input_moments(model, model.state_dict(), torch.eye(2))[""]
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)

    Source: PGU (arXiv 2312.04095), core gradient space.
    """
    sums: State = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            vectors = layer_vectors(layer, given[0]).double()
            sums[name] = sums.get(name, 0) + vectors.mT @ vectors

        return add

    found = layers(module)
    handles = [part.register_forward_pre_hook(hook(name)) for name, part in found.items()]
    try:
        for rows in inputs.split(ROWS_AT_ONCE):
            evaluate(module, state, rows)
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums[name] for name in found if name in sums}


@dataclass(frozen=True)
class Moments:
    """Input moments of the models of an ensemble over all training rows.

    Args:
        store: where they lie.
    """

    store: Store = field(repr=False)

    @classmethod
    def open(cls, path: Where) -> "Moments":
        """Opens stored moments.

        Args:
            path: folder of the store.

        Returns:
            The moments.

        Raises:
            ValueError: no such store, or blocks are missing.
        """
        store = Store.open(path, "moments")
        if store.pending():
            raise ValueError(f"{store.path} is not finished: run the command that makes it again")
        return cls(store)

    def find_digest(self, digest: str) -> int:
        """Number of a model within the store.

        Args:
            digest: digest of the weights that the moments were taken with.

        Returns:
            The number.

        Raises:
            ValueError: no moments are stored for it.
        """
        known = [row.tobytes().hex() for row in self.store.numpy("digest")]
        if digest not in known:
            raise ValueError(
                f"{self.store.path} holds no input moments of this model: compute them for its"
                " ensemble with compute_moments(ensemble, to=...)"
            )
        return known.index(digest)

    def layers(self, models: Sequence[int]) -> State:
        """Moments of some models by layer name, each [model, *moment_shape], float64."""
        names = [str(name) for name in self.store.attributes["layers"]]
        return {
            name: torch.from_numpy(self.store.numpy(f"moment_{i}")[list(models)])
            for i, name in enumerate(names)
        }

    def accuracy(self, models: Sequence[int]) -> Tensor:
        """Test accuracy of some models when the moments were taken, [model]."""
        return torch.from_numpy(self.store.numpy("accuracy")[list(models)])


@dataclass(frozen=True)
class _MomentBlock:
    task: Task
    ensemble: Store
    path: str
    device: str

    def __call__(self, block: int) -> None:
        store = Store.open(self.path, "moments")
        span = store.spec.span(block)
        ensemble = Ensemble(self.task, self.ensemble)
        with threads(1):
            parts = [self._of(ensemble.model(i)) for i in range(span.start, span.stop)]
        store.write_block(block, {name: np.stack([p[name] for p in parts]) for name in parts[0]})

    def _of(self, model: Model) -> dict[str, Any]:
        inputs, _ = self.task.rows("train", np.arange(len(self.task.train_ids)))
        module = self.task.new_model(0).to(self.device)
        state = {name: tensor.to(self.device) for name, tensor in model.state.items()}
        found = input_moments(module, state, inputs)
        arrays = {f"moment_{i}": value.cpu().numpy() for i, value in enumerate(found.values())}
        arrays["digest"] = np.frombuffer(bytes.fromhex(model.digest()), dtype=np.uint8)
        arrays["accuracy"] = np.array(_test_quality(self.task, module, state))
        return arrays


def _test_quality(task: Task, module: nn.Module, state: State) -> float:
    if not task.test_ids:
        return 1.0
    inputs, labels = task.rows("test", np.arange(len(task.test_ids)))
    outputs = evaluate(module, state, inputs)
    return float(task.loss.quality(outputs, labels).mean())


def compute_moments(
    ensemble: Ensemble,
    to: Where,
    *,
    device: str = "cpu",
    workers: int | None = 0,
    scheduler: str | None = None,
) -> Moments:
    """Computes and stores the input moments of every model of an ensemble, and its test accuracy.

    Args:
        ensemble: models with their weights.
        to: folder of the store.
        device: where to compute.
        workers: processes; None for one per core or GPU, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The moments.

    Raises:
        ValueError: the ensemble kept no weights, or the store was made from another one.

    Example:
        >>> import tempfile
        >>> from attribution import draw_subsets, train_models
        >>> from examples.digits import task
        >>> subsets = draw_subsets(task, models=1, design="full", seed=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     full = train_models(task, subsets, f"{folder}/full", keep="weights", workers=0)
        ...     moments = compute_moments(full, f"{folder}/moments")
        ...     [tuple(value.shape) for value in moments.layers([0]).values()]
        [(1, 64, 64), (1, 64, 64), (1, 64, 64)]
    """
    task, count = ensemble.task, len(ensemble)
    module = task.new_model(0)
    ensemble.states([0])
    shapes = {name: moment_shape(part) for name, part in layers(module).items()}
    arrays = {
        f"moment_{i}": ArraySpec(("model", *[None] * len(shape)), (count, *shape), "float64")
        for i, shape in enumerate(shapes.values())
    }
    arrays["digest"] = ArraySpec(("model", None), (count, 32), "uint8")
    arrays["accuracy"] = ArraySpec(("model",), (count,), "float64")
    store = Store.open_or_create(
        to,
        StoreSpec("moments", "model", min(20, count), arrays),
        Provenance(
            {"ensemble": dict(ensemble.store.provenance.settings)},
            {"versions": versions("torch", "datamodel-matching"), "device": device},
        ),
        attributes={"layers": list(shapes)},
    )
    if store.pending():
        work = in_turns(_MomentBlock(task, ensemble.store, store.path, device), store)
        title = f"moments of {os.path.basename(ensemble.store.path)}"
        where = where_to_run(device, workers, scheduler)
        run_blocks(work, store.pending(), title=title, **where)
    return Moments.open(store.finalize().path)
