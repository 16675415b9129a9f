"""Computes the curvatures of several checkpoints at the same time."""

from collections.abc import Sequence
from dataclasses import dataclass

from attribution.devices import where_to_run
from attribution.gradients.features import Features
from stores import run_blocks


def compute_curvatures(
    features: Features,
    temperatures: Sequence[float],
    checkpoints: Sequence[int] | None = None,
    *,
    workers: int | None = 0,
    scheduler: str | None = None,
) -> None:
    """Computes and keeps the curvatures of checkpoints at some temperatures.

    They are those of `Features.curvature`. Work that asks for them later, in several processes,
    finds them there instead of computing the same one twice.

    Args:
        features: what they are made from.
        temperatures: what outputs are divided by before the loss.
        checkpoints: their numbers; None: all.
        workers: processes; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Raises:
        BlocksFailed: blocks failed repeatedly; what was finished is kept.

    Example:
        >>> import tempfile
        >>> from attribution import Model, Projection, featurize
        >>> from examples.digits import mlp, task
        >>> model, folder = Model(task, mlp().state_dict()), tempfile.mkdtemp() + "/features"
        >>> few = featurize(task, [model], folder, projection=Projection(inputs=4, outputs=2))
        >>> compute_curvatures(few, [1.0, 2.0])
        >>> few.curvature(0, 2.0).shape
        (24, 24)
    """
    numbers = range(len(features)) if checkpoints is None else checkpoints
    pairs = tuple((checkpoint, t) for t in temperatures for checkpoint in numbers)
    work = _Curvatures(features, pairs)
    where = where_to_run(features.device, workers, scheduler)
    run_blocks(work, range(len(pairs)), title="curvatures", **where)


@dataclass(frozen=True)
class _Curvatures:
    features: Features
    pairs: tuple[tuple[int, float], ...]

    def __call__(self, block: int) -> None:
        self.features.curvature(*self.pairs[block])
