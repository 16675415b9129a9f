"""Results that the `trak` package (traker) left in a folder, opened without it."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from attribution.counterfactual import target_positions
from attribution.strongest import strongest
from attribution.task import Task
from stores import ArraySpec, Provenance, Store, StoreSpec, Where

KIND = "trak-package-scores"
MEANING = "scores of the trak package: their scale is arbitrary, their order is not"
BLOCK_BYTES = 2**24

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TrakResults:
    """A results folder of the `trak` package; arrays are mapped from disk, read-only.

    Args:
        folder: its save_dir.
        train: number of training rows.
        width: number of features, the package's "JL dimension".
        models: ids of the checkpoints, ascending.
        targets: number of targets by experiment.
    """

    folder: Path
    train: int
    width: int
    models: tuple[int, ...]
    targets: dict[str, int] = field(default_factory=dict)

    def scores(self, experiment: str) -> Numbers:
        """Final scores of an experiment, [train, target], float16 unless the package was told so.

        Args:
            experiment: its name.

        Returns:
            The scores.

        Raises:
            ValueError: no such experiment, its scores are not finished, or its file is damaged.
        """
        count = self._count(experiment)
        if not _read_json(self.folder / "experiments.json")[experiment]["scores_finalized"]:
            raise ValueError(
                f"the scores of experiment {experiment!r} in {self.folder} are not finished: call"
                " finalize_scores of its TRAKer first"
            )
        return self._mapped(f"scores/{experiment}.mmap", (self.train, count))

    def gradients(self, model: int) -> Numbers:
        """Projected gradients of the training rows' margins, [train, k].

        They are P grad / sqrt(number of parameters), P with entries of variance 1.
        """
        return self._mapped(f"{self._known(model)}/grads.mmap", (self.train, self.width))

    def target_gradients(self, model: int, experiment: str) -> Numbers:
        """The same of an experiment's targets, [target, k]."""
        shape = (self._count(experiment), self.width)
        return self._mapped(f"{self._known(model)}/{experiment}_grads.mmap", shape)

    def features(self, model: int) -> Numbers:
        """Gradients times the inverse Gram matrix over its mean absolute entry, [train, k]."""
        return self._mapped(f"{self._known(model)}/features.mmap", (self.train, self.width))

    def out_to_loss(self, model: int) -> Numbers:
        """Minus the derivative of each training row's loss by its margin, [train]."""
        return self._mapped(f"{self._known(model)}/out_to_loss.mmap", (self.train, 1))[:, 0]

    def _known(self, model: int) -> int:
        if model not in self.models:
            raise ValueError(
                f"expected one of the models {self.models} of {self.folder}, got {model}"
            )
        return model

    def _count(self, experiment: str) -> int:
        if experiment not in self.targets:
            known = ", ".join(self.targets) or "(none)"
            raise ValueError(f"{self.folder} has the experiments {known}, not {experiment!r}")
        return self.targets[experiment]

    def _mapped(self, name: str, shape: tuple[int, int]) -> Numbers:
        path = self.folder / name
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"cannot read {str(path)!r} as an array: {error}") from error
        if found.shape != shape:
            raise ValueError(f"expected {str(path)!r} to have shape {shape}, got {found.shape}")
        return np.asarray(found)


def open_trak_results(path: str | os.PathLike[str]) -> TrakResults:
    """Opens a results folder of the `trak` package.

    Args:
        path: the save_dir of its TRAKer.

    Returns:
        The results.

    Raises:
        ValueError: no results there.

    Example:
        >>> open_trak_results("nowhere")
        Traceback (most recent call last):
            ...
        ValueError: expected results of the trak package in 'nowhere': cannot read ...
    """
    folder = Path(path)
    try:
        told = _read_json(folder / "metadata.json")
        train, width = int(told["train set size"]), int(told["JL dimension"])
        models = sorted(
            int(number) for file in folder.glob("id_*.json") for number in _read_json(file)
        )
        experiments = folder / "experiments.json"
        listed = _read_json(experiments) if experiments.exists() else {}
        targets = {str(name): int(entry["num_targets"]) for name, entry in listed.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"expected results of the trak package in {str(path)!r}: {error}"
        ) from error
    return TrakResults(folder, train, width, tuple(models), targets)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from error


def store_trak_results(
    results: TrakResults,
    experiment: str,
    to: Where,
    *,
    task: Task,
    targets: Sequence[str] | None = None,
    top: int = 20,
) -> Store:
    """Copies the scores of an experiment of the `trak` package into a store, block by block.

    Args:
        results: an opened results folder.
        experiment: name of the experiment.
        to: folder of the store.
        task: gives the ids of the rows.
        targets: ids of the experiment's targets, in its order; None: the task's test rows.
        top: rows of either sign that are kept for each target beside its scores.

    Returns:
        A store with arrays `scores` [train, target], of arbitrary scale, `top_rows` and
        `top_values` [target, sign, row]; the targets' ids are its target ids.

    Raises:
        ValueError: the results are of other numbers of rows, have no such finished experiment,
            hold values that are not finite, or the store was made from something else.
    """
    scores = results.scores(experiment)
    ids = list(task.test_ids if targets is None else targets)
    target_positions(task, ids)
    if scores.shape != (len(task.train_ids), len(ids)):
        raise ValueError(
            f"the scores in {results.folder} are of {scores.shape[0]} training rows and"
            f" {scores.shape[1]} targets, the task has {len(task.train_ids)} and {len(ids)} were"
            " named"
        )
    kept, dtype = min(top, len(scores)), scores.dtype.name
    block = min(len(ids), max(1, BLOCK_BYTES // (len(scores) * scores.dtype.itemsize)))
    ends = ("target", None, None)
    arrays = {
        "scores": ArraySpec(("train", "target"), scores.shape, dtype),
        "top_rows": ArraySpec(ends, (len(ids), 2, kept), "int64"),
        "top_values": ArraySpec(ends, (len(ids), 2, kept), dtype),
    }
    store = Store.open_or_create(
        to,
        StoreSpec(KIND, "target", block, arrays),
        Provenance({"folder": str(results.folder.resolve()), "experiment": experiment, "top": top}),
        ids={"train": task.train_ids, "target": ids},
        attributes={"meaning": MEANING, "models": list(results.models), "width": results.width},
    )
    for number in store.pending():
        part = np.array(scores[:, store.spec.span(number)])
        rows, values = strongest(part, kept)
        store.write_block(number, {"scores": part, "top_rows": rows, "top_values": values})
    return store.finalize()
