"""Computes and stores the features of checkpoints, block by block."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from attribution.devices import where_to_run
from attribution.gradients.feature_reading import Which, blocks_of
from attribution.gradients.feature_store import DTYPES, FeatureBlock
from attribution.gradients.features import Features
from attribution.gradients.projection import Directions, Projection
from attribution.gradients.training_stores import TrainingStores
from attribution.model import Model, check_state
from attribution.task import Task
from stores import Store, Where, in_turns, run_blocks


def featurize(
    task: Task,
    checkpoints: Sequence[Model],
    to: Where,
    *,
    projection: Projection = Projection(),  # noqa: B008 - frozen
    dtype: str = "float32",
    factors: bool = True,
    times: Sequence[float] = (),
    block: int | None = None,
    device: str = "cpu",
    workers: int | None = 0,
    scheduler: str | None = None,
    targets: Which = "all",
    directions: Sequence[Mapping[str, Directions]] | None = None,
) -> Features:
    """Computes and stores the features of every output of some checkpoints on the targets.

    Interrupted at any moment, the same call computes the unfinished blocks only and ends with
    the same bits, whatever the workers.

    Args:
        task: the data; its targets are the training rows, then the test rows.
        checkpoints: trained models of the task.
        to: folder; the features of each checkpoint are a store in it.
        projection: settings.
        dtype: of the features on disk: float16 (with a scale for each target and output),
            float32 or float64.
        factors: whether to keep, beside features in full precision of a model whose layers are all
            Linear, are called once and see one position a row, the two vectors a layer that they
            are made of, where they are half as many numbers or less: products with the features
            then read those only. False for a model that calls its layers otherwise for some rows.
            What is there already stays as it is.
        times: of the segments of training whose mean weights the checkpoints are, all segments of
            one training one after the other, see `Ensemble.along` and `Ensemble.times`; (): each
            checkpoint stands for itself, as the end of a training does.
        block: targets of a block; None: as many as make about 16 MiB. Another block changes the
            numbers in their last digits, so a store made with another one is refused.
        device: where to compute.
        workers: processes; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.
        targets: "train" to leave blocks of test rows alone pending until they are asked for.
        directions: principal ones, of each training; None: where the projection asks for them,
            they are found by `principal_directions`, one training a worker, and kept in the stores.

    Returns:
        The features.

    Raises:
        ValueError: bad settings; directions of another number of trainings, or that the projection
            does not ask for; a checkpoint or a layer of the model does not fit; its outputs are not
            finite; or a store was made from other data, another checkpoint or another projection.
        BlocksFailed: blocks failed repeatedly; what was finished is kept.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from attribution import Model, Projection, featurize
        >>> from examples.digits import mlp, task
        >>> model, folder = Model(task, mlp().state_dict()), tempfile.mkdtemp() + "/features"
        >>> small = Projection(inputs=4, outputs=2)
        >>> part = featurize(task, [model], folder, projection=small, block=500, targets="train")
        >>> part.stores[0].pending()
        [3]
        >>> float(part.product(0, np.zeros(24), np.array([1796])).sum())
        0.0
        >>> part.stores[0].pending()
        []

    Source: TRAK (arXiv 2303.14186) projects gradients of one output; the projection by layers is
    LoGra's (arXiv 2405.13954).
    """
    _check_settings(checkpoints, dtype, block, targets, times)
    _check_directions(directions, projection, len(checkpoints) // (len(times) or 1))
    task.check()
    for number, model in enumerate(checkpoints):
        check_state(task, model.state, f"checkpoint {number}")
    where = where_to_run(device, workers, scheduler)
    layout = {"dtype": dtype, "factors": factors, "block": block}
    creating = TrainingStores(
        task, checkpoints, str(to), projection, times, device, directions, layout
    )
    # All of them before any block: `Features.open` refuses what has pending ones, so that an
    # interrupted call does not look like one for fewer checkpoints.
    stores = _created(creating, where)
    found = Features(task, stores, device)
    _check_rows_apart(found)
    wanted = set(blocks_of(task, stores[0].spec, targets))
    missing = [
        number * store.spec.blocks + pending
        for number, store in enumerate(stores)
        for pending in store.pending()
        if pending in wanted
    ]
    work = FeatureBlock(task, tuple(store.path for store in stores), device)
    run_blocks(in_turns(work, *stores), missing, title=f"features of {task.name}", **where)
    for store in stores:
        if store.complete:
            store.finalize()
    return found


def _created(creating: TrainingStores, where: Mapping[str, Any]) -> tuple[Store, ...]:
    """The stores of all checkpoints; what is there already is checked first."""
    trainings = range(len(creating))
    known = {
        training: creating.stores(training) for training in trainings if creating.there(training)
    }
    missing = [training for training in trainings if training not in known]
    if creating.projection.principal and creating.directions is None:
        run_blocks(creating, missing, title=f"directions of {creating.task.name}", **where)
    opened = (known.get(training) or creating.stores(training) for training in trainings)
    return tuple(store for stores in opened for store in stores)


def _check_directions(
    directions: Sequence[Mapping[str, Directions]] | None, projection: Projection, trainings: int
) -> None:
    if directions is None:
        return
    if not projection.principal:
        raise ValueError("directions go with a projection that has principal features")
    if len(directions) != trainings:
        raise ValueError(
            f"expected the directions of each of {trainings} trainings, got {len(directions)}"
        )


def _check_settings(
    checkpoints: Sequence[Model],
    dtype: str,
    block: int | None,
    targets: str,
    times: Sequence[float],
) -> None:
    if not checkpoints:
        raise ValueError("featurize needs at least one checkpoint, got none")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if block is not None and block < 1:
        raise ValueError(f"block must be 1 target or more, got {block}")
    if times and len(checkpoints) % len(times):
        raise ValueError(
            f"expected checkpoints of all {len(times)} segments of each training, got"
            f" {len(checkpoints)}: give the models of Ensemble.along"
        )
    for number, model in enumerate(checkpoints):
        told, wanted = model.provenance.get("segment"), number % len(times) if times else None
        if "ensemble" in model.provenance and told != wanted:
            raise ValueError(
                f"checkpoint {number} is {_called(told)} where {_called(wanted)} is expected: give"
                " Ensemble.along and its times, or Ensemble.checkpoints without times"
            )
    if any(not 0 < time < float("inf") for time in times):
        raise ValueError(f"times must be above 0 and finite, got {tuple(times)}")
    if targets not in get_args(Which):
        raise ValueError(f"targets must be 'all' or 'train', got {targets!r}")


def _called(segment: int | None) -> str:
    return "a trained model" if segment is None else f"the mean of segment {segment}"


def _check_rows_apart(features: Features) -> None:
    """A layer that takes another axis for the rows cannot do so at two batch sizes."""
    inputs, _ = features.task.targets([0])
    projector, state = features.projector(0), features.model(0).state
    for rows in (2, 3):
        projector.linearise(state, inputs.expand(rows, *inputs.shape[1:]))
