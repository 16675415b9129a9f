"""One block of a datamodel: fitted in steps that fit into memory, written slab by slab."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.effects import append, row_pieces, write_effects
from attribution.regression import Fitted, Solver
from attribution.scratch import Columns
from attribution.training import threads
from stores import Store, advance

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class DatamodelBlock:
    """Fits and writes one block of targets.

    How many targets a block has follows from how its rows are read, how many are fitted at once
    from the memory that it takes. What their effects are made of waits in a temporary file until
    all are fitted, unless it fits into memory.

    Args:
        solver: the regression.
        path: of the store.
        step: targets that are fitted at once.
        kept: bytes of what the effects are made of that may stay in memory.
        top: rows of either sign that are kept for each target.
    """

    solver: Solver
    path: str
    step: int
    kept: int
    top: int

    def __call__(self, block: int) -> None:
        """Computes on one thread, so that the bits do not depend on the machine's cores."""
        store = Store.open(self.path, "datamodel")
        span = store.spec.span(block)
        shape = self.solver.inner(store), *store.spec.block_shape("effects", block)[1:]
        number = self.solver.problem.number
        with threads(1), Columns(shape, 1, number, self.kept) as kept:
            found, bound = self._fitted(store, span, kept)
            with store.writing(block) as writer:
                rows = row_pieces(writer, whole=kept.on_disk)
                pieces = self._pieces(store, rows, kept, found, span)
                write_effects(writer, pieces, bound, self.top)
                append(writer, {name: part.numpy() for name, part in found.items()})

    def _fitted(self, store: Store, span: slice, kept: Columns) -> tuple[dict[str, Tensor], Tensor]:
        """What stands beside the effects, and their bound; the rest is kept."""
        bounds: list[Tensor] = []
        found: list[dict[str, Tensor]] = []
        for start in range(span.start, span.stop, self.step):
            targets = slice(start, min(start + self.step, span.stop))
            fitted, beside = self._fit(store, targets)
            kept.add(fitted.kept)
            bounds.append(fitted.bound)
            found.append(beside)
            advance((targets.stop - targets.start) / (2 * (span.stop - span.start)))
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}, torch.cat(
            bounds
        )

    def _fit(self, store: Store, targets: slice) -> tuple[Fitted, dict[str, Tensor]]:
        models = self.solver.problem
        outputs, noise = models.outputs(targets), models.noise(targets)
        fitted = self.solver.fit(store, outputs, noise, targets)
        told = {"noise": torch.from_numpy(noise), "slopes": models.slopes(targets, outputs)}
        return fitted, {**fitted.arrays, **told}

    def _pieces(
        self,
        store: Store,
        rows: Iterator[slice],
        kept: Columns,
        found: dict[str, Tensor],
        span: slice,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        places, train = np.arange(span.start, span.stop), store.spec.array("effects").shape[0]
        for part in rows:
            effects = self.solver.effects(store, kept, part)
            inside = np.flatnonzero((places >= part.start) & (places < part.stop))
            effects[places[inside] - part.start, inside] = found["own"][inside]
            yield effects, (effects * found["slopes"]).sum(2)
            advance((part.stop - part.start) / (2 * train))
