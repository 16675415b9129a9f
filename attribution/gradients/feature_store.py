"""One checkpoint's features on disk: layout, provenance, and how a block is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution import effects
from attribution.devices import repeatable
from attribution.forget import ForgetSet
from attribution.gradients.projection import Directions, Projection
from attribution.gradients.projector import GradientProjector, gradient_projector
from attribution.gradients.stored_directions import direction_constants, stored_directions
from attribution.gradients.stored_factors import (
    factor_attributes,
    factor_constants,
    worth_keeping,
)
from attribution.model import Model
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
    place,
    versions,
)

KIND = "features"
BLOCK_BYTES = 16 * 2**20  # of the features of one block
ROWS_AT_ONCE = 128  # of one forward pass
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
        factors: numbers of a row's factors; 0 where none are kept.
    """

    targets: int
    outputs: int
    features: int
    dtype: str
    outputs_dtype: str
    factors: int = 0

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
        if self.factors:
            size = self.targets, self.factors
            arrays["factors"] = ArraySpec(("target", None), size, self.dtype, self.factors)
        return StoreSpec(KIND, "target", rows, arrays)


def create_store(
    path: Where,
    task: Task,
    model: Model,
    checkpoint: int,
    projection: Projection,
    *,
    dtype: str,
    factors: bool,
    block: int | None,
    device: str,
    times: Sequence[float] = (),
    directions: Mapping[str, Directions] | None = None,
) -> Store:
    """Opens or creates the store of one checkpoint's features.

    Args:
        path: folder of the store.
        task: the task.
        model: the checkpoint.
        checkpoint: its number.
        projection: settings.
        dtype: of the features on disk.
        factors: whether to keep factors where it is worth it; an existing store stays as it is.
        block: targets of a block; None: as many as make about 16 MiB.
        device: where features are computed.
        times: of the segments of its training, if it is the mean of one.
        directions: principal ones, of its training; None: all are random.

    Returns:
        The store.

    Raises:
        ValueError: it exists and was made from other data, another checkpoint or projection.
    """
    module = task.new_model(0)
    # One step of the parameters goes through all segments of a training.
    training, segment = divmod(checkpoint, len(times) or 1)
    projector = gradient_projector(module, projection, training, directions)
    run = projector.linearise(model.state, task.targets([0, 0])[0])
    forgotten = list(model.forgotten.ids) if model.forgotten else []
    settings = task.settings() | {
        "checkpoint": checkpoint,
        "weights": model.digest(),
        "forgotten": digest(*forgotten),
        "projection": projection.settings(),
        "matrices": projector.plan.digest(),
        "device": torch.device(device).type,
    }
    if times:
        settings["segment"] = {"number": segment, "times": list(times)}
    recorded = {
        "versions": versions("torch", "numpy", "datamodel-matching"),
        "sources": task.sources(),
    }
    there = _same_settings(path, settings)
    kept = worth_keeping(run.factors, run.outputs.shape[1], projector.size, dtype)
    if not (factors if there is None else "factors" in there.spec.arrays):
        kept = None
    layout = Layout(
        len(task.target_ids),
        run.outputs.shape[1],
        projector.size,
        dtype,
        str(run.outputs.dtype).removeprefix("torch."),
        kept.size(run.outputs.shape[1]) if kept else 0,
    )
    constants: dict[str, Numbers] = {
        f"weights_{i}": value.numpy() for i, value in enumerate(model.state.values())
    }
    constants |= direction_constants(directions or {})
    attributes = {
        "keys": list(model.state),
        "forgotten": forgotten,
        "provenance": dict(model.provenance),
    }
    if directions:
        attributes["principal"] = list(directions)
    return Store.open_or_create(
        path,
        layout.spec(block),
        Provenance(settings, recorded),
        constants=constants | (factor_constants(kept) if kept else {}),
        ids={"train": task.train_ids, "target": task.target_ids},
        attributes=attributes | (factor_attributes(kept) if kept else {}),
    )


def _same_settings(path: Where, settings: Mapping[str, Any]) -> Store | None:
    """What is there; names a setting that differs before the shape that follows from it is."""
    if not place(path).taken():
        return None
    store = Store.open(path, KIND)
    check_provenance(Provenance(store.provenance.settings), Provenance(settings), store.path)
    return store


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
    segments = len(settings["segment"]["times"]) if "segment" in settings else 1
    training = int(settings["checkpoint"]) // segments
    directions = stored_directions(store) if projection.principal else None
    projector = gradient_projector(task.new_model(0), projection, training, directions)
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
        store.write_block(block, _as_stored(store, found))

    def _computed(self, checkpoint: int, store: Store, targets: Numbers) -> dict[str, Numbers]:
        projector, state = self._opened(checkpoint, store)
        inputs, _ = self.task.targets(targets)
        factored = "factors" in store.spec.arrays
        parts = [
            _of_rows(projector, state, rows.to(self.device), factored=factored)
            for rows in inputs.split(ROWS_AT_ONCE)
        ]
        return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}

    def _opened(self, checkpoint: int, store: Store) -> tuple[GradientProjector, State]:
        if checkpoint not in self.latest:
            self.latest.clear()
            projector = stored_projector(self.task, store)
            projector.module.to(self.device)
            state = stored_model(self.task, store).state
            moved = {name: tensor.to(self.device) for name, tensor in state.items()}
            self.latest[checkpoint] = projector, moved
        return self.latest[checkpoint]


def _of_rows(
    projector: GradientProjector, state: State, inputs: Tensor, *, factored: bool
) -> State:
    run = projector.linearise(state, inputs)
    every = torch.eye(run.outputs.shape[1]).to(run.outputs).expand(len(inputs), -1, -1)
    if not factored:
        return {"features": run.features(every).cpu(), "outputs": run.outputs.cpu()}
    rows = run.factor_rows(every)
    assert run.factors is not None
    found = {"features": run.factors.dense(rows), "factors": rows, "outputs": run.outputs}
    return {name: values.cpu() for name, values in found.items()}


def _as_stored(store: Store, found: dict[str, Numbers]) -> dict[str, Numbers]:
    dtype = store.spec.array("features").dtype
    if dtype != "float16":
        kept = {name: found[name] for name in found if name != "outputs"}
        return found | {name: values.astype(dtype, copy=False) for name, values in kept.items()}
    scale = half_scale(found["features"])
    scaled = (found["features"] / scale[..., None]).astype(np.float16)
    return {"features": scaled, "outputs": found["outputs"], "scale": scale}


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


def checkpoint_paths(path: Where) -> list[Place]:
    """Folders of the checkpoints' stores, checkpoint-0 first.

    Args:
        path: the folder they lie in.

    Returns:
        The folders, up to the first number that is missing.
    """
    numbered = (place(path) / f"checkpoint-{number}" for number in count())
    return list(takewhile(lambda part: part.taken(), numbered))
