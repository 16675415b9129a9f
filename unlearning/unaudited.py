"""What can be said of unlearning where nothing was retrained: the user's own checkpoints alone."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from attribution import Counterfactual, ForgetSet, Model, Oracle, Run
from attribution.task import Rows
from stores import versions
from unlearning.cost import hardware, measure_request
from unlearning.ending import told_endings
from unlearning.evaluation import check_names
from unlearning.method import told_settings
from unlearning.methods import Evidence, build_method
from unlearning.runner import Unlearned

Json = dict[str, Any]

MISSING = (
    "The run holds checkpoints that were given to it and no model retrained without a forget set:"
    " no KLOM, shift or spread, no agreement of predictions with retrained models, and no cost of a"
    " retraining can be told.",
    "Group Newton is not calibrated here: its scale is the theory's, and its error bars are the"
    " plain spread over the checkpoints (none with a single one).",
    "What can be had: accuracy before and after, how near the outputs came to their predictions,"
    " and what a request costs. A recipe in the task, and dmm precompute without --checkpoint, give"
    " the rest.",
)


def evaluate_checkpoints(
    run: Run,
    forget_sets: Sequence[ForgetSet],
    methods: Sequence[str],
    *,
    seed: int = 0,
    predictor: str | None = None,
    device: str = "cpu",
) -> Json:
    """Unlearns one checkpoint by each method and tells what needs no retrained model.

    Args:
        run: a run made from checkpoints.
        forget_sets: what to forget, one after the other, each from the first checkpoint.
        methods: names of the table.
        seed: of every unlearning.
        predictor: which predictions matching uses; None: the best that there is.
        device: where to compute.

    Returns:
        An evaluation of the same schema; what would need retrained models is null, `missing`
        says why, and each method has `mismatch`: the root mean squared distance of its outputs to
        the predicted ones on the forget rows, before and after.

    Raises:
        ValueError: a method that needs retrained models or input moments.
    """
    check_names(forget_sets, methods)
    chosen = run.best if predictor is None else predictor
    built = {name: build_method(name, _evidence(run, chosen), None) for name in methods}
    model, counterfactual = run.model(0), run.predictor(chosen)
    blocks: Json = {}
    for forget in forget_sets:
        found = dict.fromkeys(("forget", "retain", "test"))
        nothing = {split: {"mean": None, "p95": None} for split in found}
        block: Json = {"size": len(forget), "kind": forget.kind, "methods": {}, "predictions": {}}
        block["null"] = {"klom": nothing, "gaussian_kl": nothing, "shift": found, "spread": found}
        for name, method in built.items():
            result = method(model, run.task, forget, seed=seed, device=device)
            told = _told(model, result, forget, counterfactual, device)
            told |= measure_request(method, model, forget, device, repeats=1)
            told |= {"settings": told_settings(method), "cost_over_retrain": None}
            block["methods"][name] = block["null"] | told
        blocks[forget.name] = block
    return {
        "schema": 1,
        "task": run.task.name,
        "n_models": 1,
        "seed": seed,
        "train_rows": len(run.task.train_ids),
        "hardware": hardware(),
        "versions": versions("torch", "numpy", "zarr", "dask", "datamodel-matching"),
        "run": asdict(run.settings) | {"task": os.path.basename(run.settings.task)},
        "klom": {"direction": "KL(unlearned||oracle)", "bins": 20},
        "retrain": {"seconds": None, "gradient_evaluations": None},
        "predictor": chosen,
        "purged": run.purged,
        "forget_sets": blocks,
        "pooled": [],
        "missing": list(MISSING),
    }


def _evidence(run: Run, chosen: str) -> Evidence:
    def no_oracle() -> Oracle:
        raise ValueError(
            f"{run.path} holds checkpoints and no retrained models, so that methods that match"
            " oracles cannot run: leave om out, or precompute without --checkpoint"
        )

    return Evidence(
        predictor=lambda name: run.predictor(name or chosen),
        oracle=no_oracle,
        moments=lambda: run.moments,
    )


def _told(
    model: Model,
    result: Unlearned,
    forget: ForgetSet,
    counterfactual: Counterfactual,
    device: str,
) -> Json:
    after = result.model.outputs(device=device)
    wanted = counterfactual.predict(model, forget, forget.rows, device=device)
    n, total = len(model.task.train_ids), len(model.task.target_ids)
    splits = {"forget": forget.rows, "retain": forget.retained, "test": np.arange(n, total)}
    return {
        "accuracy": {split: _accuracy(model, after, rows) for split, rows in splits.items()},
        "mismatch": {
            "before": _distance(wanted.before, wanted.mean),
            "after": _distance(after[forget.rows], wanted.mean),
        },
        "status": {result.status: 1},
        "endings": told_endings([result.ending]),
    }


def _accuracy(model: Model, outputs: Any, rows: Rows) -> float | None:
    if not len(rows):
        return None
    _, labels = model.task.targets(rows)
    return float(model.task.loss.quality(torch.from_numpy(outputs[rows]), labels).mean())


def _distance(one: Any, other: Any) -> float:
    return float(np.sqrt(np.square(one - other).mean()))
