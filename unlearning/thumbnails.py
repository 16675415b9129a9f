"""Pictures of rows, shown only when asked for."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attribution import Task

GREY, COLOURS = 2, 3


def report_thumbnails(task: Task, evaluation: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Images of the rows that a report shows: forgotten ones, explained ones and what moved them.

    Args:
        task: gives the inputs: images [channel, height, width] or [height, width], or vectors of
            a square number of pixels.
        evaluation: what `dmm evaluate` wrote.

    Returns:
        By row id, [height, width] or [height, width, 3], scaled to [0, 1].

    Raises:
        ValueError: the inputs are no images.

    Example:
        >>> from examples.digits import task
        >>> rows = [{"id": "train-3", "split": "forget"}]
        >>> report_thumbnails(task, {"forget_sets": {"a": {"affected": rows}}})["train-3"].shape
        (8, 8)
    """
    blocks = (evaluation.get("forget_sets") or {}).values()
    rows = [row for block in blocks for row in (block or {}).get("affected") or ()]
    shown = {row["id"] for row in rows if row.get("split") == "forget"}
    for told in evaluation.get("explained") or ():
        shown |= {told["target"], *(row["id"] for row in told["rows"])}
    if not shown:
        return {}
    ids = sorted(shown)
    unknown = sorted(shown - set(task.target_ids))
    if unknown:
        raise ValueError(
            f"the evaluation is of another task: {task.name!r} has no row {unknown[0]!r}"
        )
    return row_thumbnails(task, ids)


def row_thumbnails(task: Task, ids: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Images of some training or test rows.

    Args:
        task: gives the inputs, as for `report_thumbnails`.
        ids: of the rows, at least one.

    Returns:
        By row id, [height, width] or [height, width, 3], scaled to [0, 1].

    Raises:
        ValueError: the inputs are no images.

    Example:
        >>> from examples.digits import task
        >>> row_thumbnails(task, ["test-3"])["test-3"].shape
        (8, 8)
    """
    inputs, _ = task.targets([task.positions[row] for row in ids])
    return {row: _picture(image.numpy(), task.name) for row, image in zip(ids, inputs, strict=True)}


def _picture(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    if values.ndim == 1 and math.isqrt(values.size) ** 2 == values.size:
        values = values.reshape(math.isqrt(values.size), -1)
    if values.ndim == 3 and values.shape[0] in (1, COLOURS):
        values = values[0] if values.shape[0] == 1 else np.moveaxis(values, 0, -1)
    if values.ndim not in (GREY, COLOURS):
        raise ValueError(
            f"the inputs of task {name!r} are no images, their shape is {values.shape}"
        )
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low or 1.0)
