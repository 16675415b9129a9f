"""Features of every output on every target, one store a checkpoint, computed block by block."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch

from attribution.counterfactual import check_ids
from attribution.gradients.curvature import stored_curvature
from attribution.gradients.feature_reading import (
    Numbers,
    block_dense,
    block_product,
    blocks_of,
    factor_bytes,
    factored_pieces,
    in_full,
    stored_outputs,
)
from attribution.gradients.feature_store import (
    KIND,
    FeatureBlock,
    checkpoint_paths,
    refuse_changed_task,
    stored_model,
    stored_projector,
)
from attribution.gradients.jacobian import Dense, Factored, Factors, Jacobian
from attribution.gradients.projector import GradientProjector
from attribution.gradients.stored_factors import stored_factors
from attribution.model import Model
from attribution.task import Rows, Task
from stores import (
    BlocksFailed,
    Store,
    Where,
    gather,
    in_turns,
    run_blocks,
)

KEPT_BYTES = 128 * 2**20  # of the factors of all checkpoints' training rows that stay in memory


@dataclass(frozen=True)
class Features:
    """Projected gradients J of every output of some checkpoints on every target.

    J_i = d f(x_i) / d theta P^T, [output, k], in eval mode. Blocks that are still pending are
    computed when they are asked for, and kept; on another device than the others they are the same
    to about 1e-4 of the largest, and so is the curvature.

    Args:
        task: what the checkpoints were trained for.
        stores: one a checkpoint.
        device: where what is missing is computed.

    Example:
        >>> import tempfile
        >>> from attribution import Model, Projection, featurize
        >>> from examples.digits import mlp, task
        >>> folder = tempfile.mkdtemp() + "/features"
        >>> small = Projection(inputs=4, outputs=2)
        >>> found = featurize(task, [Model(task, mlp().state_dict())], folder, projection=small)
        >>> len(found), found.width, found.gather(0, np.array([3])).shape
        (1, 24, (1, 10, 24))
    """

    task: Task = field(repr=False)
    stores: tuple[Store, ...] = field(repr=False)
    device: str = "cpu"

    @classmethod
    def open(cls, path: Where, task: Task, device: str = "cpu") -> "Features":
        """Opens features made from this task.

        Args:
            path: their folder.
            task: the task.
            device: where what is missing is computed.

        Returns:
            The features.

        Raises:
            ValueError: no features there, blocks of training rows are missing, or other rows
                than the task's.
        """
        paths = checkpoint_paths(path)
        if not paths:
            raise ValueError(f"expected features in {str(path)!r}: make them with featurize")
        stores = tuple(Store.open(part, KIND) for part in paths)
        for store in stores:
            check_ids(task, store.ids("train"), store.ids("target"), store.path)
            missing = set(store.pending()) & set(blocks_of(task, store.spec, "train"))
            if missing:
                raise ValueError(
                    f"{store.path} is not finished: {len(missing)} blocks of training rows are"
                    " pending; run the command that makes it again, it resumes"
                )
        return cls(task, stores, device)

    def __len__(self) -> int:
        return len(self.stores)

    def __getstate__(self) -> dict[str, Any]:
        """Its fields alone: what it has read before does not travel to workers."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def times(self) -> tuple[float, ...]:
        """Of the segments of training whose mean weights the checkpoints are, in order.

        (): they stand for themselves, as the ends of trainings do.
        """
        told = self.stores[0].provenance.settings.get("segment")
        if told is None or told["number"] or len(self) % len(told["times"]):
            return ()
        return tuple(told["times"])

    @property
    def trainings(self) -> int:
        """How many trainings the checkpoints come from."""
        return len(self) // (len(self.times) or 1)

    def path(self, training: int) -> range:
        """Numbers of a training's checkpoints, in the order of its segments."""
        segments = len(self.times) or 1
        return range(segments * training, segments * (training + 1))

    @property
    def width(self) -> int:
        """Number of features, k."""
        return self.stores[0].spec.array("features").shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """What features are computed with: float32, or float64 where they are stored so."""
        stored = self.stores[0].spec.array("features").dtype
        return torch.float64 if stored == "float64" else torch.float32

    def model(self, checkpoint: int) -> Model:
        """The checkpoint itself."""
        return stored_model(self.task, self.stores[checkpoint])

    def projector(self, checkpoint: int) -> GradientProjector:
        """The projector of a checkpoint's gradients."""
        if checkpoint not in self._projectors:
            self._projectors[checkpoint] = stored_projector(self.task, self.stores[checkpoint])
        return self._projectors[checkpoint]

    def outputs(self, checkpoint: int, rows: Rows | None = None) -> Numbers:
        """Outputs of a checkpoint on targets, by position; None: on all, [row, output]."""
        wanted = self._positions(rows)
        self._have(checkpoint, wanted)
        return stored_outputs(self.stores[checkpoint], wanted)

    def gather(self, checkpoint: int, rows: Rows) -> Numbers:
        """Features of targets.

        Args:
            checkpoint: number of the checkpoint.
            rows: positions of targets, in any order.

        Returns:
            J, [row, output, k], float32 unless stored wider.

        Raises:
            ValueError: no such position, or features that are pending cannot be computed or kept.
            TypeError: the positions are no integers.
        """
        wanted = self._positions(rows)
        self._have(checkpoint, wanted)
        store = self.stores[checkpoint]
        scale = gather(store, "scale", wanted) if "scale" in store.spec.arrays else None
        return in_full(gather(store, "features", wanted), scale)

    def jacobian(self, checkpoint: int, rows: Rows) -> Jacobian:
        """J of targets, as factors where they are kept.

        Args:
            checkpoint: number of the checkpoint.
            rows: positions of targets, in any order.

        Returns:
            J of these rows.

        Raises:
            ValueError: as for `gather`.
            TypeError: the positions are no integers.
        """
        factors = self._factors(checkpoint)
        if factors is None:
            return Dense(torch.from_numpy(self.gather(checkpoint, rows)))
        wanted = self._positions(rows)
        self._have(checkpoint, wanted)
        found = gather(self.stores[checkpoint], "factors", wanted)
        return Factored(factors, torch.from_numpy(found))

    def product(self, checkpoint: int, direction: Numbers, targets: Rows | None = None) -> Numbers:
        """First-order change J d of the outputs for a direction, block by block.

        Args:
            checkpoint: number of the checkpoint.
            direction: d, [k].
            targets: positions of targets, in any order; None: all.

        Returns:
            J d, [target, output], in the dtype of the features.

        Raises:
            ValueError: as for `gather`, or a direction of another size.
            TypeError: the positions are no integers.
        """
        if direction.shape != (self.width,):
            raise ValueError(f"expected a direction of {self.width} numbers, got {direction.shape}")
        wanted = self._positions(targets)
        self._have(checkpoint, wanted)
        store = self.stores[checkpoint]
        sizes, size = store.spec.array("features").shape, store.spec.block
        dtype = np.promote_types(store.spec.array("features").dtype, np.float32)
        found = np.empty((len(wanted), sizes[1]), dtype)
        for block in np.unique(wanted // size):
            places = np.flatnonzero(wanted // size == block)
            rows = wanted[places] - block * size
            found[places] = block_product(
                store, self._factors(checkpoint), int(block), direction.astype(dtype), rows
            )
        return found

    def blocks(self, checkpoint: int) -> Iterator[tuple[slice, Jacobian]]:
        """J of the training rows piece by piece: as factors, or block by block mapped into memory.

        Args:
            checkpoint: number of the checkpoint.

        Yields:
            Positions of some training rows, in order, and their J.
        """
        store, count = self.stores[checkpoint], len(self.task.train_ids)
        factors = self._factors(checkpoint)
        if factors is not None:
            yield from self._pieces(checkpoint, factors)
            return
        for block in blocks_of(self.task, store.spec, "train"):
            span = store.spec.span(block)
            rows = slice(span.start, min(span.stop, count))
            few = slice(rows.stop - rows.start)
            yield rows, block_dense(store, block, few)

    def first(self, count: int) -> "Features":
        """The features of its first trainings."""
        stores = self.stores[: self.path(count).start]
        return Features(self.task, stores, self.device)

    def ends(self) -> "Features":
        """The features of the last checkpoint of each training.

        They tell no times, unless that is the only one.
        """
        stores = (self.stores[self.path(training)[-1]] for training in range(self.trainings))
        return Features(self.task, tuple(stores), self.device)

    def curvature(
        self, checkpoint: int, temperature: float = 1.0
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Gauss-Newton matrix of the training loss, H = sum_i J_i^T R_i J_i, over training rows.

        R_i is the loss's second derivative at the outputs over the temperature, divided by it. H
        is accumulated in float64 from products in the features' dtype, in the order of the blocks
        on one thread, and kept.

        Args:
            checkpoint: number of the checkpoint.
            temperature: what outputs are divided by before the loss.

        Returns:
            H, [k, k].

        Raises:
            ValueError: it cannot be kept.
        """
        place = checkpoint, temperature
        if place not in self._curvatures:
            store = self.stores[checkpoint]
            self._curvatures[place] = stored_curvature(self.task, store, temperature, self.device)
        return self._curvatures[place]

    def _factors(self, checkpoint: int) -> Factors | None:
        if checkpoint not in self._known_factors:
            self._known_factors[checkpoint] = stored_factors(self.stores[checkpoint])
        return self._known_factors[checkpoint]

    def _pieces(self, checkpoint: int, factors: Factors) -> Iterable[tuple[slice, Jacobian]]:
        """J of the training rows as factors, which stay in memory where they are few."""
        store, count = self.stores[checkpoint], len(self.task.train_ids)
        if checkpoint in self._kept_pieces:
            return self._kept_pieces[checkpoint]
        pieces = factored_pieces(store, factors, count)
        if len(self) * factor_bytes(store, count) > KEPT_BYTES:
            return pieces
        self._kept_pieces[checkpoint] = list(pieces)
        return self._kept_pieces[checkpoint]

    @cached_property
    def _kept_pieces(self) -> dict[int, list[tuple[slice, Factored]]]:
        return {}

    @cached_property
    def _known_factors(self) -> dict[int, Factors | None]:
        return {}

    @cached_property
    def _projectors(self) -> dict[int, GradientProjector]:
        return {}

    @cached_property
    def _curvatures(self) -> dict[tuple[int, float], np.ndarray[Any, np.dtype[np.float64]]]:
        return {}

    def _positions(self, targets: Rows | None) -> Rows:
        count = len(self.task.target_ids)
        wanted = np.arange(count) if targets is None else np.asarray(targets)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise TypeError(
                f"expected positions of targets as a 1-D array of integers, got {wanted.dtype}"
                f" {wanted.shape}; convert a mask with numpy.flatnonzero"
            )
        outside = wanted[(wanted < 0) | (wanted >= count)]
        if outside.size:
            raise ValueError(f"expected positions from 0 to {count - 1}, got {outside[0]}")
        return wanted.astype(np.int64)

    def _have(self, checkpoint: int, targets: Numbers) -> None:
        """Computes the pending blocks that hold some of these targets."""
        store = self.stores[checkpoint]
        pending = set(store.pending())
        if not pending:
            return
        missing = sorted(pending & {int(block) for block in np.unique(targets // store.spec.block)})
        if missing:
            refuse_changed_task(self.task, store)
        try:
            work = in_turns(FeatureBlock(self.task, (store.path,), self.device), store)
            run_blocks(work, missing, title="features", workers=0)
        except BlocksFailed as error:
            raise ValueError(
                f"{store.path} does not have the features of all these targets yet, and computing"
                f" them failed: {next(iter(error.failed.values()))}; compute them where the folder"
                " can be written, with featurize(..., targets='all')"
            ) from error
