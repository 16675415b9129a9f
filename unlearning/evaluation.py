"""Compare methods with models really retrained: the table behind `dmm evaluate`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from attribution import ForgetSet, Oracle
from attribution.outputs import Array
from attribution.run import Run
from stores import versions
from unlearning.audit import Audit
from unlearning.budgets import check_budgets, quality_by_budget
from unlearning.cost import hardware, measure_request, measure_retraining
from unlearning.ending import told_endings
from unlearning.explanation import explained_rows
from unlearning.measures import told_accuracy, told_distances
from unlearning.method import told_settings
from unlearning.methods import Evidence, build_method, check_method
from unlearning.predictions import (
    Judged,
    affected_rows,
    pooled_predictions,
    scattered_rows,
    told_agreement,
)
from unlearning.rankings import rank_subsets
from unlearning.relearning import MODELS, audited_steps, told_relearning
from unlearning.runner import UnlearnedModels, UnlearningMethod, unlearn_models

SCHEMA = 1
Json = dict[str, Any]


def evaluate_methods(
    run: Run,
    forget_sets: Sequence[ForgetSet],
    methods: Sequence[str],
    *,
    n_models: int = 100,
    seed: int = 0,
    predictor: str | None = None,
    predictors: Sequence[str] | None = None,
    settings: Mapping[str, Mapping[str, str]] | None = None,
    lds_models: int = 0,
    relearning: bool = False,
    budgets: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    scheduler: str | None = None,
) -> Json:
    """Audits methods of unlearning against two banks of retrained models.

    Args:
        run: a finished run.
        forget_sets: what to forget, one after the other, each from the full models.
        methods: names of the table.
        n_models: full models and oracles compared; KLOM needs 80.
        seed: of every unlearning.
        predictor: which predictions matching uses; None: the best on the calibration bank.
        predictors: which predictions are compared with the retrained models beside it; None: all
            that the run has.
        settings: changed settings by method name and field.
        lds_models: models trained for linear datamodeling scores; 0: none are computed.
        relearning: also count the steps of training that bring each forget set back, in 20 models
            of every method and in 20 oracles of each bank, which are retrained once more to keep
            their weights.
        budgets: also audit every method of matching at 1, 2, 5, 10 and 30 % of the gradient
            evaluations of a retraining.
        device: where to compute.
        workers: processes; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The evaluation, plain values; its JSON form is a promise of the project. A method that
        diverges or cannot serve the task has no numbers, the status `failed` and an `error`.

    Raises:
        ValueError: an unknown method or predictor, a repeated name of a forget set, too few full
            models, or all methods failed on all forget sets.
    """
    _check(run, forget_sets, methods, n_models)
    if budgets:
        check_budgets(run.task)
    chosen = run.best if predictor is None else predictor
    counterfactuals = {
        name: run.predictor(name)
        for name in (chosen, *(run.predictors if predictors is None else predictors))
    }
    where: Json = {"device": device, "workers": workers, "scheduler": scheduler}
    ranked = rank_subsets(run, lds_models, **where).told() if lds_models else None
    retrain = measure_retraining(run.task, device=device)
    blocks: Json = {}
    compared = []
    bar = tqdm(total=len(forget_sets) * len(methods), desc="unlearning", unit="audit", disable=None)
    with bar:
        for forget in forget_sets:
            banks = [run.bank(forget, which, n_models, **where) for which in (0, 1)]
            audit = Audit(run.task, forget, run.full, *banks)
            given = evidence_of(run, audit, chosen)
            judged = {n: Judged(audit, c.change(forget)) for n, c in counterfactuals.items()}
            compared.append((forget, {name: one.comparisons for name, one in judged.items()}))
            block = _measured(audit) | _predicted(judged, chosen) | {"methods": {}}
            block["retrain"] = measure_retraining(run.task, forget, device=device)
            again = _relearned(run, audit, 0, where) if relearning else None
            if again is not None:
                other = _relearned(run, audit, 1, where)
                block["null"]["relearning"] = told_relearning(other, again)
            built = {
                name: build_method(name, given, (settings or {}).get(name)) for name in methods
            }
            if budgets:
                block["budgets"] = quality_by_budget(
                    audit,
                    built,
                    models=n_models,
                    retrain=block["retrain"]["seconds"],
                    seed=seed,
                    device=device,
                )
            for name, method in built.items():
                unlearned, told = _audited(audit, method, n_models, seed, device)
                if again is not None and unlearned is not None:
                    steps = audited_steps(audit, unlearned.states, device)
                    told["relearning"] = told_relearning(steps, again)
                told["cost_over_retrain"] = _ratio(told["seconds"], block["retrain"]["seconds"])
                block["methods"][name] = told
                if name == "dmm" and unlearned is not None:
                    _fill_affected(block["affected"], audit, unlearned)
                bar.update()
            blocks[forget.name] = block
    _refuse_nothing(blocks)
    evaluation: Json = plain(
        {
            "schema": SCHEMA,
            "task": run.task.name,
            "n_models": n_models,
            "seed": seed,
            "train_rows": len(run.task.train_ids),
            "hardware": hardware(),
            "versions": versions("torch", "numpy", "zarr", "dask", "datamodel-matching"),
            "run": asdict(run.settings) | {"task": os.path.basename(run.settings.task)},
            "klom": {"direction": "KL(unlearned||oracle)", "bins": 20},
            "retrain": retrain,
            "predictor": chosen,
            "purged": run.purged,
            "forget_sets": blocks,
            "pooled": pooled_predictions(compared),
        }
        | ({"lds": ranked} if ranked else {})
        | {"explained": explained_rows(run, blocks)}
    )
    return evaluation


def _check(
    run: Run, forget_sets: Sequence[ForgetSet], methods: Sequence[str], n_models: int
) -> None:
    check_names(forget_sets, methods)
    if not 2 <= n_models <= len(run.full):
        raise ValueError(
            f"the run has {len(run.full)} full models: n_models must lie between 2 and that,"
            f" got {n_models}"
        )


def check_names(forget_sets: Sequence[ForgetSet], methods: Sequence[str]) -> None:
    """Refuses unknown and repeated names.

    Args:
        forget_sets: whose names must differ.
        methods: names of the table, each once.

    Raises:
        ValueError: names the first that is wrong.

    Example:
        >>> check_names([], ["dmm", "pgu"])
    """
    for name in methods:
        check_method(name)
    twice = [name for name in methods if methods.count(name) > 1]
    if twice:
        raise ValueError(f"method {twice[0]!r} is named twice")
    names = [forget.name for forget in forget_sets]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(
            f"two forget sets are called {repeated[0]!r}: name them, as in a=SPEC b=SPEC"
        )


def evidence_of(run: Run, audit: Audit, chosen: str) -> Evidence:
    """What methods may take from a run and from the second bank of an audit.

    Args:
        run: a finished run.
        audit: gives the oracle its targets.
        chosen: name of the predictor that methods get if they ask for no other.

    Returns:
        The evidence.
    """
    return Evidence(
        predictor=lambda name: run.predictor(name or chosen),
        oracle=lambda: Oracle(audit.full, audit.targets),
        moments=lambda: run.moments,
        full=lambda: run.full,
    )


def _refuse_nothing(blocks: Json) -> None:
    """Where no method could serve, the first error tells more than a table without numbers."""
    told = [told for block in blocks.values() for told in block["methods"].values()]
    if told and all("error" in one for one in told):
        raise ValueError(told[0]["error"])


def _measured(audit: Audit) -> Json:
    return {
        "size": len(audit.forget),
        "kind": audit.forget.kind,
        "null": told_distances(audit, audit.targets.outputs),
        "oracle_accuracy": told_accuracy(audit, audit.oracles.outputs),
    }


def _relearned(run: Run, audit: Audit, which: int, where: Json) -> np.ndarray[Any, Any]:
    few = min(len(audit.oracles), MODELS)
    bank = run.bank(audit.forget, which, few, weights=True, **where)
    return audited_steps(audit, bank.states(), where["device"])


def _predicted(judged: Mapping[str, Judged], predictor: str) -> Json:
    return {
        "predictions": {name: told_agreement(one.comparisons) for name, one in judged.items()},
        "rows": {name: scattered_rows(one) for name, one in judged.items()},
        "affected": affected_rows(judged[predictor]),
    }


def _audited(
    audit: Audit, method: UnlearningMethod, n_models: int, seed: int, device: str
) -> tuple[UnlearnedModels | None, Json]:
    """The models and what is told of them; of a method that fails, its error and no number."""
    try:
        unlearned = unlearn_models(
            method, audit.full, audit.task, audit.forget, count=n_models, seed=seed, device=device
        )
        told = _told(audit, unlearned.outputs)
    except ValueError as error:
        return None, _failed(audit, n_models, str(error)) | {"settings": told_settings(method)}
    told["status"] = unlearned.status
    told["endings"] = told_endings(unlearned.endings)
    told["settings"] = told_settings(method)
    return unlearned, told | measure_request(method, audit.full.model(0), audit.forget, device)


def _told(audit: Audit, outputs: Array) -> Json:
    return told_distances(audit, outputs) | {"accuracy": told_accuracy(audit, outputs)}


def _failed(audit: Audit, models: int, error: str) -> Json:
    told = _without_numbers(_told(audit, audit.targets.outputs))
    told |= {"status": {"failed": models}, "error": error, "endings": {}}
    return told | {"seconds": None, "repeats": 0, "gradient_evaluations": None}


def _without_numbers(told: Mapping[str, Any]) -> Json:
    return {
        key: _without_numbers(part) if isinstance(part, Mapping) else None
        for key, part in told.items()
    }


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _fill_affected(rows: list[Json], audit: Audit, unlearned: UnlearnedModels) -> None:
    means = unlearned.margins.mean(0)
    for row in rows:
        row["unlearned"] = float(means[audit.task.positions[row["id"]]])


def plain(value: Any) -> Any:
    """Plain values of JSON; numbers that are not finite become None.

    Args:
        value: mappings, lists, numbers and texts, those of numpy too.

    Returns:
        The same as plain values.

    Example:
        >>> plain({"klom": np.float32("nan"), "sizes": (1, 2.0)})
        {'klom': None, 'sizes': [1, 2.0]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
