"""One block of TRAK scores: products of solved rows with the features of the block's targets."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.dense import product
from attribution.effects import (
    ObjectWriter,
    append,
    half_scale,
    row_pieces,
    stored_wide,
    write_effects,
)
from attribution.gradients import Features, output_cotangents
from attribution.scratch import Columns
from attribution.task import Rows
from attribution.training import threads
from attribution.trak.scores import KIND
from attribution.trak.tally import Tally
from stores import ArraySpec, BlockWriter, Store, mapped

Numbers = np.ndarray[Any, Any]


def margins_differ(features: Features) -> bool:
    """Whether the checkpoints' margins have different derivatives with respect to the outputs.

    If not, a mean effect on the margin follows from the mean effects on the outputs.

    Args:
        features: of the checkpoints.

    Returns:
        The answer; True for cross-entropy of several checkpoints, False for squared error.
    """
    targets = np.arange(len(features.task.target_ids))
    first = margin_slopes(features, 0, targets)
    rest = range(1, len(features))
    return any(not first.equal(margin_slopes(features, other, targets)) for other in rest)


def margin_slopes(features: Features, checkpoint: int, targets: Rows) -> Tensor:
    """Derivatives of the margins at a checkpoint's outputs, [target, output].

    Args:
        features: of the checkpoints.
        checkpoint: number of the checkpoint.
        targets: positions.

    Returns:
        The derivatives.
    """
    outputs = torch.from_numpy(features.outputs(checkpoint, targets))
    labels = features.task.targets(targets)[1]
    return output_cotangents(features.task.loss, outputs, labels, "margin")[:, 0]


def margin_arrays(train: int, targets: int, dtype: str, rows: int) -> dict[str, ArraySpec]:
    """Arrays of effects on margins, where they do not follow from those on the outputs.

    Args:
        train: number of training rows.
        targets: number of targets.
        dtype: of the effects on disk.
        rows: training rows in one storage object, as of the effects.

    Returns:
        By name.

    Example:
        >>> list(margin_arrays(5, 3, "float16", rows=2))
        ['margins', 'margin_scale']
    """
    scale = "margin_scale" if dtype == "float16" else None
    axes = "train", "target"
    found = {"margins": ArraySpec(axes, (train, targets), dtype, rows, scale=scale)}
    if scale:
        found[scale] = ArraySpec(("target",), (targets,), stored_wide(dtype))
    return found


@dataclass(frozen=True)
class ScoreBlock:
    """Computes and writes one block of targets.

    How many targets a block has follows from how its rows are read, how many have their features
    in memory from the memory that they take. The features are brought into the form that products
    need once, and wait in a temporary file unless all of them fit into memory.

    Args:
        features: of the checkpoints.
        rows: what each training row pulls the parameters by, a store for each checkpoint.
        path: of the scores.
        kept: bytes of features that may stay in memory.
        top: rows of either sign that are kept for each target.
    """

    features: Features
    rows: tuple[Store, ...]
    path: str
    kept: int
    top: int

    def __call__(self, block: int) -> None:
        """Computes on one thread, so that the bits do not depend on the machine's cores."""
        store = Store.open(self.path, KIND)
        span = store.spec.span(block)
        targets = np.arange(span.start, span.stop)
        with threads(1), ExitStack() as held:
            columns = [held.enter_context(self._columns(len(targets))) for _ in self.rows]
            bounds = [
                self._prepare(checkpoint, targets, kept) for checkpoint, kept in enumerate(columns)
            ]
            with store.writing(block) as writer:
                self._write(writer, targets, columns, torch.stack(bounds))

    @property
    def _number(self) -> torch.dtype:
        number: torch.dtype = getattr(torch, self.rows[0].spec.array("rows").dtype)
        return number

    def _columns(self, targets: int) -> Columns:
        shape = targets, self._outputs, self.features.width
        return Columns(shape, 0, self._number, self.kept // len(self.rows))

    @property
    def _outputs(self) -> int:
        return self.features.stores[0].spec.array("outputs").shape[1]

    def _prepare(self, checkpoint: int, targets: Rows, kept: Columns) -> Tensor:
        """Keeps a checkpoint's features of the targets; bounds of its scores, [target, output]."""
        # The features as stored, converted and negated.
        each = 3 * self._outputs * self.features.width * self._number.itemsize
        step = max(1, self.kept // each) if kept.on_disk else len(targets)
        lengths = []
        for few in np.split(targets, range(step, len(targets), step)):
            j = -torch.from_numpy(self.features.gather(checkpoint, few)).to(self._number)
            lengths.append(j.norm(dim=2))
            kept.add(j)
        return _longest(self.rows[checkpoint]) * torch.cat(lengths)

    def _write(
        self, writer: BlockWriter, targets: Rows, columns: Sequence[Columns], bounds: Tensor
    ) -> None:
        checkpoints = range(len(self.rows))
        outputs = np.stack([self.features.outputs(c, targets) for c in checkpoints])
        slopes = [margin_slopes(self.features, c, targets).to(self._number) for c in checkpoints]
        on_margins = (bounds * torch.stack(slopes).abs()).mean(0).sum(1)
        tally = Tally.empty(len(columns), targets, outputs.shape[2])
        margin_scale = half_scale(on_margins)
        pieces = self._pieces(writer, columns, slopes, tally, margin_scale)
        write_effects(writer, pieces, bounds.mean(0), self.top)
        append(writer, {"outputs": outputs.mean(0, dtype=np.float64), "noise": _spread(outputs)})
        append(writer, tally.summary())
        if "margins" not in writer.spec.arrays:
            append(writer, {"slopes": slopes[0].numpy()})
        elif "margin_scale" in writer.spec.arrays:
            append(writer, {"margin_scale": margin_scale.numpy()})

    def _pieces(
        self,
        writer: BlockWriter,
        columns: Sequence[Columns],
        slopes: list[Tensor],
        tally: Tally,
        margin_scale: Tensor,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        parts = row_pieces(writer, whole=columns[0].on_disk)
        if "margins" not in writer.spec.arrays:
            for rows in parts:
                mean = tally.mean(rows.start, self._scored(rows, columns))
                yield mean, _on_margins(mean, slopes[0])
            return
        with ObjectWriter(writer, "margins", margin_scale) as objects:
            for rows in parts:
                shape = rows.stop - rows.start, len(tally.targets)
                margins = torch.zeros(shape, dtype=self._number)
                scored = _adding(self._scored(rows, columns), slopes, margins)
                mean = tally.mean(rows.start, scored)
                margins /= len(columns)
                objects.add(margins)
                yield mean, margins

    def _scored(self, rows: slice, columns: Sequence[Columns]) -> Iterator[Tensor]:
        for store, kept in zip(self.rows, columns, strict=True):
            solved = torch.from_numpy(_solved(store, rows))
            yield kept.through(partial(_products, solved))


def _products(solved: Tensor, j: Tensor) -> Tensor:
    return product(solved, j.flatten(0, 1).T).reshape(len(solved), *j.shape[:2])


def _solved(store: Store, rows: slice) -> Numbers:
    size = store.spec.block
    blocks = range(rows.start // size, -(-rows.stop // size))
    parts = [
        mapped(store, "rows", b)[max(0, rows.start - b * size) : rows.stop - b * size]
        for b in blocks
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _adding(scored: Iterator[Tensor], slopes: list[Tensor], margins: Tensor) -> Iterator[Tensor]:
    """Passes scores on and adds their effects on the margins up."""
    for part, slope in zip(scored, slopes, strict=True):
        margins += _on_margins(part, slope)
        yield part


def _on_margins(scores: Tensor, slopes: Tensor) -> Tensor:
    return (scores * slopes).sum(2)


def _longest(rows: Store) -> Tensor:
    """Length of the longest solved row."""
    lengths = [np.linalg.norm(mapped(rows, "rows", b), axis=1) for b in range(rows.spec.blocks)]
    return torch.from_numpy(np.concatenate(lengths)).max()


def _spread(outputs: Numbers) -> Numbers:
    """Standard deviation over the checkpoints; 0 stands for unknown where there is one."""
    if len(outputs) == 1:
        return np.zeros(outputs.shape[1:])
    return np.asarray(outputs.std(0, ddof=1, dtype=np.float64))
