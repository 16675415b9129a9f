"""One checkpoint's features on disk: layout, provenance, and how a block is computed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from attribution import effects
from attribution.devices import repeatable
from attribution.forget import ForgetSet
from attribution.gradients.projection import Projection
from attribution.gradients.projector import GradientProjector, gradient_projector
from attribution.model import Model
from attribution.outputs import evaluate
from attribution.task import State, Task
from attribution.training import threads
from stores import (
    ArraySpec,
    Place,
    Provenance,
    Store,
    StoreSpec,
    Where,
    check_provenance,
    digest,
    mapped,
    place,
    versions,
)

KIND = "features"
CACHE_BYTES = 2**20  # of rows that are converted at once; fits a core's cache
BLOCK_BYTES = 16 * 2**20  # of the features of one block
ROWS_AT_ONCE = 128  # of one forward pass
Which = Literal["all", "train"]
DTYPES = ("float16", "float32", "float64")

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Layout:
    """Sizes of a checkpoint's arrays.

    Args:
        targets: number of targets.
        outputs: number of outputs.
        features: number of features, k.
        dtype: of the features on disk.
        outputs_dtype: of the outputs.
    """

    targets: int
    outputs: int
    features: int
    dtype: str
    outputs_dtype: str

    def spec(self, block: int | None) -> StoreSpec:
        """The store's layout, in blocks of so many targets; None: of about 16 MiB."""
        row = self.outputs * self.features * np.dtype(self.dtype).itemsize
        rows = min(self.targets, block or max(1, BLOCK_BYTES // row))
        sizes = (self.targets, self.outputs, self.features)
        arrays = {
            # One object a block, so that a block can be mapped into memory.
            "features": ArraySpec(("target", "output", "feature"), sizes, self.dtype, sizes[1]),
            "outputs": ArraySpec(("target", "output"), sizes[:2], self.outputs_dtype),
        }
        if self.dtype == "float16":
            arrays["scale"] = ArraySpec(("target", "output"), sizes[:2], "float32")
        return StoreSpec(KIND, "target", rows, arrays)


def create_store(
    path: Where,
    task: Task,
    model: Model,
    checkpoint: int,
    projection: Projection,
    *,
    dtype: str,
    block: int | None,
    device: str,
) -> Store:
    """Opens or creates the store of one checkpoint's features.

    Args:
        path: folder of the store.
        task: the task.
        model: the checkpoint.
        checkpoint: its number.
        projection: settings.
        dtype: of the features on disk.
        block: targets of a block; None: as many as make about 16 MiB.
        device: where features are computed.

    Returns:
        The store.

    Raises:
        ValueError: it exists and was made from other data, another checkpoint or projection.
    """
    module = task.new_model(0)
    projector = gradient_projector(module, projection, checkpoint)
    outputs = evaluate(module, model.state, task.targets([0])[0])
    sizes = (len(task.target_ids), outputs.shape[1], projector.size)
    layout = Layout(*sizes, dtype, str(outputs.dtype).removeprefix("torch."))
    forgotten = list(model.forgotten.ids) if model.forgotten else []
    settings = task.settings() | {
        "checkpoint": checkpoint,
        "weights": model.digest(),
        "forgotten": digest(*forgotten),
        "projection": projection.settings(),
        "matrices": projector.plan.digest(),
        "device": torch.device(device).type,
    }
    recorded = {
        "versions": versions("torch", "numpy", "datamodel-matching"),
        "sources": task.sources(),
    }
    _refuse_other_settings(path, settings)
    return Store.open_or_create(
        path,
        layout.spec(block),
        Provenance(settings, recorded),
        constants={f"weights_{i}": value.numpy() for i, value in enumerate(model.state.values())},
        ids={"train": task.train_ids, "target": task.target_ids},
        attributes={
            "keys": list(model.state),
            "forgotten": forgotten,
            "provenance": dict(model.provenance),
        },
    )


def _refuse_other_settings(path: Where, settings: Mapping[str, Any]) -> None:
    """Names the setting that differs before the store names the shape that follows from it."""
    if place(path).taken():
        store = Store.open(path, KIND)
        stored = Provenance(store.provenance.settings)
        check_provenance(stored, Provenance(settings), store.path)


def stored_model(task: Task, store: Store) -> Model:
    """The checkpoint that a store's features belong to.

    Args:
        task: what it was trained for.
        store: the store.

    Returns:
        The model.
    """
    told = store.attributes
    state = {
        str(k): torch.from_numpy(store.constant(f"weights_{i}")) for i, k in enumerate(told["keys"])
    }
    ids = [str(row) for row in told["forgotten"]]
    forgotten = ForgetSet.of(task, ids, "forgotten") if ids else None
    return Model(task, state, forgotten, told["provenance"])


def stored_projector(task: Task, store: Store) -> GradientProjector:
    """The projector that made a store's features.

    Args:
        task: gives the model.
        store: the store.

    Returns:
        The projector.

    Raises:
        ValueError: its matrices are others now.
    """
    settings = store.provenance.settings
    projection = Projection.of(settings["projection"])
    projector = gradient_projector(task.new_model(0), projection, int(settings["checkpoint"]))
    if projector.plan.digest() != settings["matrices"]:
        raise ValueError(
            f"{store.path} was made with other projection matrices than this model and this"
            " version of numpy give: open it with the task and the versions that made it, which"
            " it records"
        )
    return projector


def refuse_changed_task(task: Task, store: Store) -> None:
    """Refuses to add features of other data, or of another model, to a store.

    Args:
        task: the task as it is now.
        store: of a checkpoint's features.

    Raises:
        ValueError: names each setting that differs.
    """
    wanted = task.settings()
    stored = {name: store.provenance.settings.get(name) for name in wanted}
    check_provenance(Provenance(stored), Provenance(wanted), store.path)


@dataclass(frozen=True)
class FeatureBlock:
    """Computes and writes one block of the features of some checkpoints.

    Args:
        task: the task.
        paths: of the checkpoints' stores; each has the same blocks.
        device: where to compute.
    """

    task: Task
    paths: tuple[str, ...]
    device: str = "cpu"
    # A worker keeps this object for all its blocks, and with it the latest checkpoint.
    latest: dict[int, tuple[GradientProjector, State]] = field(default_factory=dict, repr=False)

    def __call__(self, number: int) -> None:
        """Writes block `number % blocks` of checkpoint `number // blocks`."""
        first = Store.open(self.paths[0], KIND)
        checkpoint, block = divmod(number, first.spec.blocks)
        store = Store.open(self.paths[checkpoint], KIND)
        span = store.spec.span(block)
        with threads(1), repeatable(self.device):
            found = self._computed(checkpoint, store, np.arange(span.start, span.stop))
        store.write_block(block, _arrays(store, *found))

    def _computed(self, checkpoint: int, store: Store, targets: Numbers) -> tuple[Numbers, Numbers]:
        projector, state = self._opened(checkpoint, store)
        inputs, _ = self.task.targets(targets)
        pieces = inputs.split(ROWS_AT_ONCE)
        parts = [_of_rows(projector, state, rows.to(self.device)) for rows in pieces]
        features, outputs = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
        return features, outputs

    def _opened(self, checkpoint: int, store: Store) -> tuple[GradientProjector, State]:
        if checkpoint not in self.latest:
            self.latest.clear()
            projector = stored_projector(self.task, store)
            projector.module.to(self.device)
            state = stored_model(self.task, store).state
            moved = {name: tensor.to(self.device) for name, tensor in state.items()}
            self.latest[checkpoint] = projector, moved
        return self.latest[checkpoint]


def _of_rows(projector: GradientProjector, state: State, inputs: Tensor) -> tuple[Tensor, Tensor]:
    run = projector.linearise(state, inputs)
    every = torch.eye(run.outputs.shape[1]).to(run.outputs).expand(len(inputs), -1, -1)
    return run.features(every).cpu(), run.outputs.cpu()


def _arrays(store: Store, features: Numbers, outputs: Numbers) -> dict[str, Numbers]:
    dtype = store.spec.array("features").dtype
    if dtype != "float16":
        return {"features": features.astype(dtype, copy=False), "outputs": outputs}
    scale = half_scale(features)
    scaled = (features / scale[..., None]).astype(np.float16)
    return {"features": scaled, "outputs": outputs, "scale": scale}


def half_scale(features: Numbers) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Power of two by which each vector is divided before it is rounded to float16.

    The largest number of a vector then lies in [2^14, 2^15), so that what is 2^28 times smaller
    still has all 11 bits, and dividing by it rounds nothing.

    Args:
        features: [..., k].

    Returns:
        Scales [...]; 1 for a vector of zeros.

    Example:
        >>> half_scale(np.array([[3.0, -5.0], [0.0, 0.0]])).tolist()
        [0.000244140625, 1.0]
    """
    largest = torch.from_numpy(np.abs(features).max(-1))
    return np.asarray(effects.half_scale(largest).numpy(), np.float32)


def in_full(stored: Numbers, scale: Numbers | None) -> Numbers:
    """Features as they are computed with: float16 times its scale, others as they are.

    Args:
        stored: [row, output, k], in the dtype on disk.
        scale: [row, output]; None without one.

    Returns:
        [row, output, k], float32 or wider.
    """
    return stored if scale is None else _widened(stored) * scale[..., None]


def blocks_of(task: Task, spec: StoreSpec, which: Which) -> range:
    """Numbers of the blocks that hold all targets, or training rows.

    Args:
        task: gives the number of training rows; they come first.
        spec: layout of the store.
        which: "all" or "train".

    Returns:
        The numbers.
    """
    return range(spec.blocks if which == "all" else -(-len(task.train_ids) // spec.block))


def block_features(store: Store, block: int) -> Numbers:
    """Features of one block as they are computed with, a copy, [row, output, k].

    Args:
        store: of a checkpoint's features.
        block: number of a block.

    Returns:
        The features.

    Raises:
        ValueError: the block is pending or damaged.
    """
    scale = store.numpy("scale", block) if "scale" in store.spec.arrays else None
    return in_full(store.numpy("features", block), scale)


def block_view(store: Store, block: int) -> Numbers:
    """Features of one block as they are computed with; mapped from the disk where they can be.

    Args:
        store: of a checkpoint's features.
        block: number of a block.

    Returns:
        The features, [row, output, k], not to be written to.

    Raises:
        ValueError: the block is pending or damaged.
    """
    if "scale" in store.spec.arrays:
        return block_features(store, block)
    return mapped(store, "features", block)


def block_product(store: Store, block: int, direction: Numbers, rows: Numbers) -> Numbers:
    """J d for some rows of one block; a block of which most is wanted is read as a whole.

    Args:
        store: of a checkpoint's features.
        block: number of a block.
        direction: d, [k], of the dtype that features are computed with.
        rows: positions within the block, [row].

    Returns:
        [row, output].

    Raises:
        ValueError: the block is pending or damaged.
    """
    values = mapped(store, "features", block)
    scale = mapped(store, "scale", block) if "scale" in store.spec.arrays else None
    some = 2 * len(rows) < len(values)
    if some:
        values, scale = values[rows], None if scale is None else scale[rows]
    found = _times(values.reshape(-1, len(direction)), direction).reshape(values.shape[:2])
    found = found if scale is None else found * scale
    return found if some else found[rows]


def _times(rows: Numbers, direction: Numbers) -> Numbers:
    if rows.dtype == direction.dtype:
        return rows @ direction
    found = np.empty(len(rows), direction.dtype)
    height = max(1, CACHE_BYTES // direction.nbytes)
    for start in range(0, len(rows), height):
        piece = slice(start, start + height)
        found[piece] = _widened(rows[piece]) @ direction
    return found


def _widened(halves: Numbers) -> Numbers:
    # numpy converts float16 number by number.
    return torch.from_numpy(halves).float().numpy()


def checkpoint_paths(path: Where) -> list[Place]:
    """Folders of the checkpoints' stores, checkpoint-0 first.

    Args:
        path: the folder they lie in.

    Returns:
        The folders, up to the first number that is missing.
    """
    numbered = (place(path) / f"checkpoint-{number}" for number in count())
    return list(takewhile(lambda part: part.taken(), numbered))
