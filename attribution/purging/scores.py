"""Scores without the purged rows: what is ranked or summed over rows is formed anew."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from attribution.effects import PIECE_BYTES
from attribution.gradients import Features
from attribution.purging.context import Context
from attribution.strongest import Strongest
from attribution.task import Rows
from stores import Store, gather, mapped

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Ranked:
    """The strongest of the rows that are left, in positions among them.

    Args:
        context: the purge.
        store: of scores.
        name: of the scores [train, target] that rank the rows; where there is no such array they
            are the effects times `slopes`.
        count: rows of either sign.
    """

    context: Context
    store: Store
    name: str
    count: int

    def __call__(self, targets: Rows) -> dict[str, Numbers]:
        """Arrays `top_rows` and `top_values` of some targets."""
        dtype = getattr(torch, self.store.spec.array("top_values").dtype)
        found, first = Strongest.empty(len(targets), self.count, dtype), 0
        for rows in self._pieces(len(targets)):
            found.add(first, torch.from_numpy(self._ranks(rows, targets)).to(dtype))
            first += len(rows)
        return dict(zip(("top_rows", "top_values"), found.found(), strict=True))

    def _pieces(self, targets: int) -> Iterator[Rows]:
        outputs = math.prod(self.store.spec.array(self._source).shape[2:])
        kept, height = self.context.kept["train"], max(1, PIECE_BYTES // (4 * targets * outputs))
        yield from (kept[start : start + height] for start in range(0, len(kept), height))

    @property
    def _source(self) -> str:
        return self.name if self.name in self.store.spec.arrays else "effects"

    def _ranks(self, rows: Rows, targets: Rows) -> Numbers:
        values = self._in_full(self._source, rows, targets)
        if self._source == self.name:
            return values
        slopes = np.asarray(self.store.array("slopes")[targets[0] : targets[-1] + 1])
        return np.asarray((values * slopes[targets - targets[0]]).sum(2))

    def _in_full(self, name: str, rows: Rows, targets: Rows) -> Numbers:
        across = slice(targets[0], targets[-1] + 1)
        values = np.asarray(self.store.array(name)[rows[0] : rows[-1] + 1, across])
        values = values[rows - rows[0]][:, targets - targets[0]]
        scale = self.store.spec.array(name).scale
        if scale is None:
            return np.asarray(values)
        return np.asarray(
            values * np.asarray(self.store.array(scale)[across])[targets - targets[0]]
        )


@dataclass(frozen=True)
class FewerScores:
    """The strongest rows, and how far the checkpoints differ, without the purged rows.

    The variance over checkpoints of the rows' scores, added up, loses those of the purged rows.
    That of the rows' sum is taken anew from the checkpoints' sums, which are products of the sum of
    the solved rows with the target's features.

    Args:
        ranked: the strongest rows of TRAK scores.
        sources: solved rows and features of each checkpoint.
    """

    ranked: Ranked
    sources: Sequence[tuple[Store, Store]]

    def __call__(self, targets: Rows) -> Mapping[str, Numbers]:
        """The arrays that are not copied, for some targets."""
        found = self.ranked(targets) | self._variances(targets)
        spec = self.ranked.store.spec
        return {name: values.astype(spec.array(name).dtype) for name, values in found.items()}

    def _variances(self, targets: Rows) -> dict[str, Numbers]:
        parts = [self._scores(checkpoint, targets) for checkpoint in range(len(self.sources))]
        gone, others = (np.stack(part) for part in zip(*parts, strict=True))
        store = self.ranked.store
        each = np.asarray(store.array("row_variance")[targets[0] : targets[-1] + 1], np.float64)
        each = each[targets - targets[0]]
        free = max(1, len(others) - 1)
        each = np.maximum(each - gone.var(0).sum(0) * len(gone) / free, 0)
        return {"row_variance": each, "sum_variance": others.var(0) * len(others) / free}

    def _scores(self, checkpoint: int, targets: Rows) -> tuple[Numbers, Numbers]:
        """Scores of the purged rows, [row, target, output]; sum of the others but the own one."""
        task, (solved, features) = self.ranked.context.task, self.sources[checkpoint]
        j = Features(task, (features,)).gather(0, targets).astype(np.float64)
        gone, left = self._solved[checkpoint]
        train = targets < self.ranked.context.gone.total
        others = np.tile(left, (len(targets), 1))
        others[train] -= gather(solved, "rows", targets[train])
        return -np.einsum("rk,tok->rto", gone, j), -np.einsum("tk,tok->to", others, j)

    @cached_property
    def _solved(self) -> list[tuple[Numbers, Numbers]]:
        """Solved purged rows [row, feature] and the sum of those that are left, [feature]."""
        rows = self.ranked.context.gone.rows
        found = []
        for solved, _ in self.sources:
            blocks = (mapped(solved, "rows", block) for block in range(solved.spec.blocks))
            everything = sum(block.sum(0, dtype=np.float64) for block in blocks)
            gone = gather(solved, "rows", rows).astype(np.float64)
            found.append((gone, everything - gone.sum(0)))
        return found


def trak_sources(context: Context, store: Store) -> list[tuple[Store, Store]] | None:
    """What TRAK scores were made from: solved rows and features of each checkpoint.

    Args:
        context: the purge.
        store: of the scores.

    Returns:
        A pair for each checkpoint; None where one is missing or not finished.
    """
    found = []
    for checkpoint, settings in enumerate(store.provenance.settings["features"]):
        features = context.find("features", settings)
        solved = store.place.parent / f"rows-{checkpoint}"
        if features is None or not solved.exists("zarr.json"):
            return None
        found.append((Store.open(solved, "trak-rows"), features))
    return found if all(s.complete for pair in found for s in pair) else None
