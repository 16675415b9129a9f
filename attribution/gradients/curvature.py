"""The Gauss-Newton matrix of the training loss in the space of the features."""

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.gradients.feature_reading import block_features, blocks_of
from attribution.gradients.feature_store import BLOCK_BYTES
from attribution.losses import Loss
from attribution.task import Task
from attribution.training import threads
from stores import ArraySpec, BlockDone, Provenance, Store, StoreSpec, mapped

Matrix = np.ndarray[Any, np.dtype[np.float64]]


def stored_curvature(
    task: Task, store: Store, temperature: float = 1.0, device: str = "cpu"
) -> Matrix:
    """Curvature of one checkpoint from the store beside its features; computed if missing.

    Args:
        task: gives loss and training rows.
        store: of the checkpoint's features.
        temperature: what outputs are divided by before the loss.
        device: where to compute it if it is missing.

    Returns:
        H = sum_i J_i^T R_i J_i over the training rows, [k, k].

    Raises:
        ValueError: features of training rows are pending, the store beside belongs to other
            features, or it cannot be written.
    """
    width, checkpoint = (
        store.spec.array("features").shape[2],
        store.provenance.settings["checkpoint"],
    )
    kept = Store.open_or_create(
        store.place.parent / _folder(checkpoint, temperature),
        StoreSpec(
            "curvature",
            "feature",
            width,
            {"curvature": ArraySpec(("feature", None), (width, width), "float64")},
        ),
        Provenance(
            {
                "features": dict(store.provenance.settings),
                "block": store.spec.block,
                "temperature": temperature,
            },
            {"device": device},
        ),
    )
    if kept.pending():
        found = train_curvature(task, store, temperature, device)
        try:
            with suppress(BlockDone):  # by another process, with the same bits on the same device
                kept.write_block(0, {"curvature": found})
        except OSError as error:
            raise ValueError(f"cannot write the curvature to {kept.path}: {error}") from error
        kept.finalize()
    return mapped(kept, "curvature", 0)


def train_curvature(
    task: Task, store: Store, temperature: float = 1.0, device: str = "cpu"
) -> Matrix:
    """H = sum_i J_i^T R_i J_i over the training rows, R_i the loss's Hessian at the outputs.

    Blocks are taken in order, one at a time and on one thread, so that the bits depend on
    nothing but the device; products are in the features' dtype, sums over pieces in float64.

    Args:
        task: gives loss and training rows.
        store: of a checkpoint's features.
        temperature: T; R_i is taken at outputs / T and divided by T.
        device: where to compute.

    Returns:
        H, [k, k].

    Raises:
        ValueError: features of training rows are pending.
    """
    width = store.spec.array("features").shape[2]
    found = torch.zeros(width, width, dtype=torch.float64, device=device)
    with threads(1):
        for block in blocks_of(task, store.spec, "train"):
            rows = len(task.train_ids) - store.spec.span(block).start
            features = torch.from_numpy(block_features(store, block)[:rows])
            outputs = torch.from_numpy(store.numpy("outputs", block)[:rows])
            for piece in _pieces(features, outputs):
                found += _sum(task.loss, temperature, *(part.to(device) for part in piece))
    return ((found + found.T) / 2).cpu().numpy()


def _folder(checkpoint: int, temperature: float) -> str:
    return f"curvature-{checkpoint}" + ("" if temperature == 1 else f"-at-{temperature:g}")


def _pieces(features: Tensor, outputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows = max(1, BLOCK_BYTES // (features[0].numel() * features.element_size()))
    return list(zip(features.split(rows), outputs.split(rows), strict=True))


def _sum(loss: Loss, temperature: float, features: Tensor, outputs: Tensor) -> Tensor:
    weighted = (loss.hessian(outputs / temperature) / temperature).to(features) @ features
    return (features.flatten(0, 1).T @ weighted.flatten(0, 1)).double()


def rows_curvature(
    loss: Loss, features: Tensor, outputs: Tensor, temperature: float = 1.0
) -> Matrix:
    """H = sum_i J_i^T R_i J_i over some rows; what they add to the curvature of the training loss.

    Args:
        loss: gives R, its Hessian at the outputs.
        features: J, [row, output, k].
        outputs: of the checkpoint on the rows, [row, output].
        temperature: T; R_i is taken at outputs / T and divided by T.

    Returns:
        H, [k, k].

    Example:
        >>> from attribution.losses import SquaredError
        >>> rows_curvature(SquaredError(), torch.ones(3, 1, 1), torch.zeros(3, 1)).tolist()
        [[3.0]]
    """
    found = sum(_sum(loss, temperature, *piece) for piece in _pieces(features, outputs))
    assert isinstance(found, Tensor)
    return ((found + found.T) / 2).numpy()
