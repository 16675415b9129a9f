"""The store of an ensemble: its arrays, and what it was made from."""

from typing import Any

import numpy as np
import torch

from attribution.outputs import evaluate
from attribution.paths import takes_channels_last
from attribution.products import products_by
from attribution.segments import task_times
from attribution.subsets import Subsets
from attribution.task import Task
from stores import ArraySpec, Provenance, Store, StoreSpec, Where, digest, place, versions

# Models trained together; more of them no longer run faster. Weights of more than so many numbers
# leave a processor's cache, and then few at once are as fast as many and lost sooner to a kill.
MODELS_AT_ONCE, NUMBERS_AT_ONCE = 50, 500_000


def ensemble_store(
    task: Task,
    subsets: Subsets,
    to: Where,
    *,
    keep: str,
    device: str,
    many: bool,
    models_at_once: int | None,
    segments: int = 0,
) -> Store:
    """Opens or creates the store of an ensemble.

    Args:
        task: what is trained.
        subsets: rows of each model.
        to: folder of the store.
        keep: "outputs", or "weights" for the state dicts too.
        device: where models are trained.
        many: whether a block's models are trained at once.
        models_at_once: models of a block; None: 50, on a processor fewer where they have more than
            10,000 parameters, and 1 where trained one by one.
        segments: parts of training whose mean weights are kept as well.

    Returns:
        The store.

    Raises:
        ValueError: a bad number, subsets of other rows, or a store made from something else.
    """
    if keep not in ("outputs", "weights"):
        raise ValueError(f"keep must be 'outputs' or 'weights', got {keep!r}")
    if models_at_once is not None and models_at_once < 1:
        raise ValueError(f"models_at_once must be above 0, got {models_at_once}")
    times = _times(task, subsets, keep, segments)
    _refuse_other_segments(to, segments)
    rows = subsets.masks.shape[1]
    if rows != len(task.train_ids):
        raise ValueError(
            f"the subsets are drawn from {rows} rows, task {task.name!r} has {len(task.train_ids)}:"
            " draw them with this task"
        )
    block = models_at_once or (_at_once(task, device) if many else 1)
    keys = list(task.new_model(0).state_dict()) if keep == "weights" else []
    arrays = _arrays(task, len(subsets), keep, segments)
    return Store.open_or_create(
        to,
        StoreSpec("ensemble", "model", min(block, len(subsets)), arrays),
        _provenance(task, subsets, device, many, block),
        constants={"mask": subsets.masks, "judge": subsets.judges} | times,
        ids={"train": task.train_ids, "target": task.target_ids},
        attributes={
            "design": subsets.design,
            "seed": subsets.seed,
            "without": list(subsets.without),
            "keys": keys,
        }
        | ({"segments": segments} if segments else {}),
    )


def state_keys(store: Store) -> dict[str, str]:
    """Keys of the state dict by the names of the arrays that hold them.

    Args:
        store: of an ensemble.

    Returns:
        Key by name; empty where no weights are kept.
    """
    return {f"weights_{i}": str(key) for i, key in enumerate(store.attributes["keys"])}


def kept_segments(store: Store) -> int:
    """Number of segments of each training whose mean weights are kept.

    Args:
        store: of an ensemble.

    Returns:
        The number; 0 where none are.
    """
    return int(str(store.attributes.get("segments", 0)))


def segment_keys(store: Store, segment: int) -> dict[str, str]:
    """Keys of the state dict by the names of the arrays that hold their means over a segment.

    Args:
        store: of an ensemble.
        segment: number of the segment.

    Returns:
        Key by name.
    """
    return {f"segment_{segment}_{name}": key for name, key in state_keys(store).items()}


def _refuse_other_segments(to: Where, segments: int) -> None:
    if not place(to).taken():
        return
    found = kept_segments(Store.open(to))
    if found != segments:
        raise ValueError(
            f"{to} was trained with segments={found}, this call asks for {segments}: give another"
            " folder, or the same number"
        )


def _times(
    task: Task, subsets: Subsets, keep: str, segments: int
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    if not segments:
        return {}
    if keep != "weights":
        raise ValueError(f"mean weights of {segments} segments are kept with keep='weights' only")
    counts, inverse = np.unique(subsets.masks.sum(1), return_inverse=True)
    each = [task_times(task, rows, segments) for rows in counts.tolist()]
    return {"times": np.array(each)[inverse]}


def _at_once(task: Task, device: str) -> int:
    if torch.device(device).type != "cpu":
        return MODELS_AT_ONCE
    parameters = sum(parameter.numel() for parameter in task.new_model(0).parameters())
    return min(MODELS_AT_ONCE, max(1, NUMBERS_AT_ONCE // max(1, parameters)))


def _arrays(task: Task, models: int, keep: str, segments: int) -> dict[str, ArraySpec]:
    module = task.new_model(0)
    outputs = evaluate(module, module.state_dict(), task.targets([0])[0])
    shape = (models, len(task.target_ids), outputs.shape[1])
    dtype = str(outputs.dtype).removeprefix("torch.")
    arrays = {"outputs": ArraySpec(("model", "target", "output"), shape, dtype)}
    if keep == "weights":
        for i, tensor in enumerate(module.state_dict().values()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            axes = ("model", *(None for _ in tensor.shape))
            parts = ["", *(f"segment_{segment}_" for segment in range(segments))]
            spec = ArraySpec(axes, (models, *tensor.shape), dtype)
            arrays |= {f"{part}weights_{i}": spec for part in parts}
    return arrays


def _provenance(task: Task, subsets: Subsets, device: str, many: bool, block: int) -> Provenance:
    settings = task.settings() | {
        "device": torch.device(device).type,
        "design": subsets.design,
        "seed": subsets.seed,
        "models": len(subsets),
        "masks": digest(subsets.masks),
        "without": digest(*subsets.without),
        "path": _path(task, device, many),
        "models_at_once": block,
    }
    recorded = {
        "device": device,
        "versions": versions("torch", "numpy", "datamodel-matching"),
        "products": products_by(),
        "sources": task.sources(),
    }
    return Provenance(settings, recorded)


def _path(task: Task, device: str, many: bool) -> str:
    if many:
        return "many at once"
    rows = task.targets([0, 1] if len(task.target_ids) > 1 else [0])[0].to(device)
    turned = takes_channels_last(task.new_model(0), rows, training=True, backward=True)
    return "one by one, channels last" if turned else "one by one"
