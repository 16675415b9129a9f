"""Compare methods with models really retrained: the table behind `dmm evaluate`."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from attribution import Change, Counterfactual, Ensemble, ForgetSet, Oracle, Task
from attribution.lds import agreement
from attribution.outputs import target_margins
from attribution.run import Run
from attribution.task import Rows
from stores import versions
from unlearning.cost import measure_request, measure_retraining
from unlearning.klom import (
    FEWEST_MODELS,
    FEWEST_ROWS_FOR_P95,
    gaussian_kl,
    klom,
    shift,
    spread,
)
from unlearning.method import told_settings
from unlearning.methods import Evidence, build_method, check_method
from unlearning.runner import UnlearnedModels, UnlearningMethod, unlearn_models

SCHEMA = 1
SCATTERED_ROWS = 400
AFFECTED_ROWS = 12
Json = dict[str, Any]


@dataclass(frozen=True)
class Audit:
    """What one forget set is judged by.

    Args:
        task: the task.
        forget: the forget set.
        full: models trained on all rows.
        oracles: models retrained without the forget set, which judge.
        targets: a second, disjoint bank, which gives the oracle its targets and the null.
    """

    task: Task
    forget: ForgetSet
    full: Ensemble
    oracles: Ensemble
    targets: Ensemble

    @property
    def splits(self) -> dict[str, Rows]:
        """Positions among the targets of each audited split; all retain rows, not a sample."""
        n, total = len(self.task.train_ids), len(self.task.target_ids)
        return {
            "forget": self.forget.rows,
            "retain": self.forget.retained,
            "test": np.arange(n, total),
        }


def evaluate_methods(
    run: Run,
    forget_sets: Sequence[ForgetSet],
    methods: Sequence[str],
    *,
    n_models: int = 100,
    seed: int = 0,
    predictor: str = "datamodel",
    settings: Mapping[str, Mapping[str, str]] | None = None,
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
        predictor: which predictions matching uses.
        settings: changed settings by method name and field.
        device: where to compute.
        workers: processes; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The evaluation, plain values; its JSON form is a promise of the project.

    Raises:
        ValueError: an unknown method, a repeated name of a forget set, or too few full models.
    """
    _check(run, forget_sets, methods, n_models)
    where: Json = {"device": device, "workers": workers, "scheduler": scheduler}
    retrain = measure_retraining(run.task, device)
    blocks: Json = {}
    bar = tqdm(total=len(forget_sets) * len(methods), desc="unlearning", unit="audit", disable=None)
    with bar:
        for forget in forget_sets:
            banks = [run.bank(forget, which, n_models, **where) for which in (0, 1)]
            audit = Audit(run.task, forget, run.full, *banks)
            given = _evidence(run, audit, predictor)
            block = _forget_block(audit, run.predictor(predictor), predictor, n_models)
            block["methods"] = {}
            for name in methods:
                changed = (settings or {}).get(name)
                method = build_method(name, given, changed)
                unlearned, told = _audited(audit, method, n_models, seed, device)
                told["cost_over_retrain"] = _ratio(told["seconds"], retrain["seconds"])
                block["methods"][name] = told
                if name == "dmm":
                    _fill_affected(block["affected"], audit, unlearned)
                bar.update()
            blocks[forget.name] = block
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
            "forget_sets": blocks,
        }
    )
    return evaluation


def _check(
    run: Run, forget_sets: Sequence[ForgetSet], methods: Sequence[str], n_models: int
) -> None:
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
    if not 2 <= n_models <= len(run.full):
        raise ValueError(
            f"the run has {len(run.full)} full models: n_models must lie between 2 and that,"
            f" got {n_models}"
        )


def _evidence(run: Run, audit: Audit, predictor: str) -> Evidence:
    return Evidence(
        predictor=lambda: run.predictor(predictor),
        oracle=lambda: Oracle(audit.full, audit.targets),
        moments=lambda: run.moments,
    )


def hardware() -> str:
    """The machine in words: processor, cores, accelerator.

    Returns:
        A line for a table's caption.

    Example:
        >>> "cores" in hardware()
        True
    """
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    except OSError:
        pass
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{name}, {os.cpu_count()} cores", *cards])


def _distances(audit: Audit, margins: np.ndarray[Any, Any], oracles: np.ndarray[Any, Any]) -> Json:
    """KLOM where there are models enough, Gaussian KL, shift and spread of each split."""
    enough = min(len(margins), len(oracles)) >= FEWEST_MODELS
    measures = {"gaussian_kl": gaussian_kl} | ({"klom": klom} if enough else {})
    found = {name: measure(margins, oracles) for name, measure in measures.items()}
    told: Json = {"klom": {split: {"mean": None, "p95": None} for split in audit.splits}}
    for name, values in found.items():
        told[name] = {split: _summary(values[rows]) for split, rows in audit.splits.items()}
    apart, wide = shift(margins, oracles), spread(margins, oracles)
    told["shift"] = {split: _mean(apart[rows]) for split, rows in audit.splits.items()}
    told["spread"] = {split: _mean(wide[rows]) for split, rows in audit.splits.items()}
    return told


def _summary(values: np.ndarray[Any, Any]) -> Json:
    enough = len(values) >= FEWEST_ROWS_FOR_P95
    return {"mean": _mean(values), "p95": float(np.percentile(values, 95)) if enough else None}


def _mean(values: np.ndarray[Any, Any]) -> float | None:
    return float(values.mean()) if values.size else None


def _forget_block(audit: Audit, counterfactual: Counterfactual, name: str, n_models: int) -> Json:
    change = counterfactual.change(audit.forget)
    null = _distances(audit, audit.targets.margins, audit.oracles.margins)
    return {
        "size": len(audit.forget),
        "kind": audit.forget.kind,
        "null": null,
        "oracle_accuracy": _accuracy(audit, audit.oracles.outputs),
        "predictions": {name: _predictions(audit, change, n_models)},
        "rows": {name: _rows(audit, change, n_models)},
        "affected": _affected(audit, change, n_models),
    }


def _accuracy(audit: Audit, outputs: np.ndarray[Any, Any]) -> Json:
    _, labels = audit.task.targets()
    values = torch.from_numpy(outputs)
    quality = audit.task.loss.quality(values, labels.expand(values.shape[:-1])).numpy()
    return {split: _mean(quality[:, rows]) for split, rows in audit.splits.items()}


def _audited(
    audit: Audit, method: UnlearningMethod, n_models: int, seed: int, device: str
) -> tuple[UnlearnedModels, Json]:
    unlearned = unlearn_models(
        method, audit.full, audit.task, audit.forget, count=n_models, seed=seed, device=device
    )
    told = _distances(audit, unlearned.margins, audit.oracles.margins)
    told["accuracy"] = _accuracy(audit, unlearned.outputs)
    told["status"] = unlearned.status
    told["settings"] = told_settings(method)
    return unlearned, told | measure_request(method, audit.full.model(0), audit.forget, device)


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


# -- predictions against measured changes ----------------------------------------------------


def _margins_after(audit: Audit, change: Change, n_models: int) -> np.ndarray[Any, Any]:
    return target_margins(audit.task, change.applied(audit.full.outputs[:n_models]))


def _predictions(audit: Audit, change: Change, n_models: int) -> Json:
    full, oracles = audit.full.outputs[:n_models], audit.oracles.outputs
    before = target_margins(audit.task, full)
    after = _margins_after(audit, change, n_models)
    logits = (change.mean, oracles.mean(0) - full.mean(0), change.std, _error(full, oracles))
    margins = (
        after.mean(0) - before.mean(0),
        audit.oracles.margins.mean(0) - before.mean(0),
        _margin_std(audit, full.mean(0) + change.mean, change.std),
        _error(before, audit.oracles.margins),
    )
    return {
        kind: {
            split: asdict(agreement(*(values[rows] for values in parts)))
            for split, rows in audit.splits.items()
            if len(rows)
        }
        for kind, parts in (("margins", margins), ("logits", logits))
    }


def _error(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Standard error of a difference of mean outputs."""
    parts = [values.var(0, ddof=1) / len(values) for values in (before, after)]
    return np.asarray(np.sqrt(parts[0] + parts[1]))


def _margin_std(
    audit: Audit, outputs: np.ndarray[Any, Any], std: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Uncertainty of the margin from that of the outputs, to first order, outputs independent."""
    _, labels = audit.task.targets()
    values = torch.from_numpy(outputs).requires_grad_()
    audit.task.loss.margin(values, labels).sum().backward()
    assert values.grad is not None
    return np.asarray(np.sqrt(np.square(values.grad.numpy() * std).sum(-1)))


def _rows(audit: Audit, change: Change, n_models: int) -> Json:
    """Mean margins of the forget rows, some other rows and the test rows, for a scatter plot."""
    places = np.concatenate([r[:SCATTERED_ROWS] for r in audit.splits.values()])
    split = [s for s, rows in audit.splits.items() for _ in rows[:SCATTERED_ROWS]]
    before = target_margins(audit.task, audit.full.outputs[:n_models]).mean(0)
    std = _margin_std(audit, audit.full.outputs[:n_models].mean(0) + change.mean, change.std)
    columns = {
        "before": before,
        "predicted": _margins_after(audit, change, n_models).mean(0),
        "std": std,
        "retrained": audit.oracles.margins.mean(0),
    }
    ids = [audit.task.target_ids[i] for i in places]
    told = {name: [round(float(v), 4) for v in values[places]] for name, values in columns.items()}
    return {"id": ids, "split": split} | told


def _affected(audit: Audit, change: Change, n_models: int) -> list[Json]:
    """The rows whose margin retraining moves most."""
    before = target_margins(audit.task, audit.full.outputs[:n_models]).mean(0)
    predicted = _margins_after(audit, change, n_models).mean(0)
    retrained = audit.oracles.margins.mean(0)
    top = np.argsort(-np.abs(retrained - before), kind="stable")[:AFFECTED_ROWS]
    _, labels = audit.task.targets(top)
    where = {int(i): split for split, rows in audit.splits.items() for i in rows}
    return [
        {
            "id": audit.task.target_ids[i],
            "split": where[int(i)],
            "label": str(label.item()),
            "before": float(before[i]),
            "predicted": float(predicted[i]),
            "retrained": float(retrained[i]),
        }
        for i, label in zip(top, labels, strict=True)
    ]


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
