"""Evaluations of the form that `dmm evaluate` writes, made up, and what a page says of them."""

import copy
import html
import io
import re
from typing import Any
from unittest import mock

import numpy as np
from matplotlib.figure import Figure

from unlearning.report import render_report

SETS = {"rand10": 10, "rand50": 50, "rand140": 140, "coherent60": 60}
METHODS = ["do_nothing", "dmm", "om", "pgu", "dmm_pgu", "gradient_ascent", "fine_tune"]
SPLITS = ["forget", "retain", "test"]


def made_evaluation(sets: list[str]) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "schema": 1,
        "task": "digits",
        "n_models": 100,
        "seed": 7,
        "hardware": "2 CPU cores",
        "versions": {"numpy": "2.4.6"},
        "train_rows": 1437,
        "klom": {"direction": "KL(unlearned||oracle)", "bins": 20},
        "retrain": {"seconds": 1.88, "gradient_evaluations": 43110},
        "forget_sets": {name: _block(SETS[name], generator) for name in sets},
    }


def _block(size: int, generator: np.random.Generator) -> dict[str, Any]:
    return {
        "size": size,
        "kind": "random",
        "null": {"klom": distances(0.35, size)},
        "methods": {
            name: _results(float(generator.uniform(0.4, 3)), index, size)
            for index, name in enumerate(METHODS)
        },
        "oracle_accuracy": dict.fromkeys(SPLITS, 0.9),
        "predictions": {
            "datamodel": {
                output: {split: _fit(0.9 - size / 1000) for split in SPLITS}
                for output in ("margins", "logits")
            }
        },
        "rows": {"datamodel": _rows(size, generator)},
        "affected": [_affected("train-17", "forget"), _affected("test-4", "test")],
    }


def distances(mean: float, size: int) -> dict[str, Any]:
    p95 = {"forget": 2 * mean if size >= 20 else None, "retain": 0.7, "test": 0.7}
    means = {"forget": mean, "retain": 0.36, "test": 0.37}
    return {split: {"mean": means[split], "p95": p95[split]} for split in SPLITS}


def _results(mean: float, index: int, size: int) -> dict[str, Any]:
    return {
        "klom": distances(mean, size),
        "gaussian_kl": distances(mean / 10, size),
        "shift": dict.fromkeys(SPLITS, 0.2 * index),
        "spread": dict.fromkeys(SPLITS, 0.7 + 0.1 * index),
        "accuracy": dict.fromkeys(SPLITS, 0.95),
        "seconds": 0.05 * index,
        "gradient_evaluations": 1000 * index,
        "cost_over_retrain": 0.07 * index,
        "status": {"matched": 98, "diverged": 2},
    }


def with_attacks(evaluation: dict[str, Any], *, relearning: bool = False) -> dict[str, Any]:
    """What an audit of attacks adds: methods numbered from 1, the null 0."""
    for block in evaluation["forget_sets"].values():
        for number, told in enumerate([block["null"], *block["methods"].values()]):
            told.update(_attacked(number))
            if relearning:
                told["relearning"] = {"steps": 40 - number, "sooner": 0.5 + number / 20}
    return evaluation


def _attacked(number: int) -> dict[str, Any]:
    corrected = {"mean": number / 10, "low": number / 10 - 0.03, "high": number / 10 + 0.04}
    sure = {split: {"mean": 0.5 + number / 100, "p95": 0.6} for split in SPLITS}
    worst = {"id": f"train-{number}", "shift": -1.5 - number, "klom": None}
    epsilon = {"median": 1.61 + number, "quality": 0.17, "separated": 0.0, "largest": 4.595}
    return {
        "klom_corrected": dict.fromkeys(SPLITS, corrected),
        "logit_distance": dict.fromkeys(SPLITS, number / 5),
        "tow": 1 - number / 1000,
        "harmed": [worst, worst],
        "attacks": {
            "ulira": {"accuracy": sure, "auc": dict(sure)},
            "loss": {"auc": 0.55, "rate": 0.012},
            "rmia": {"auc": 0.6 + number / 100, "rate": 0.034},
            "epsilon": epsilon,
        },
    }


def _fit(r2: float) -> dict[str, Any]:
    fit = {"slope": 1.25, "r2": r2, "corr": 0.95, "ceiling": 0.985}
    widths = {"width": {"80": 1.31, "95": 2.01}, "constant_width": {"80": 1.71, "95": 2.61}}
    scores = {"interval_score": {"80": 2.47, "95": 4.1}}
    scores |= {"retrained_models": 23.46, "most_models": 50.0}
    return {**fit, **widths, **scores, "coverage": {"80": 0.8 + r2 / 10, "95": 0.9}}


def with_newton(evaluation: dict[str, Any]) -> dict[str, Any]:
    """A second predictor, which matching used, and both sets taken together."""
    for block in evaluation["forget_sets"].values():
        newton = copy.deepcopy(block["predictions"]["datamodel"])
        newton["margins"]["forget"] |= {"r2": 0.97, "width": {"80": 1.81, "95": 2.8}}
        block["predictions"]["newton"] = newton
        block["rows"]["newton"] = block["rows"]["datamodel"]
    first, *_ = evaluation["forget_sets"].values()
    pooled = {"kind": "random", "size": None, "sets": list(evaluation["forget_sets"])}
    pooled |= {"predictions": copy.deepcopy(first["predictions"])}
    return evaluation | {"predictor": "newton", "pooled": [pooled]}


def _rows(size: int, generator: np.random.Generator) -> dict[str, Any]:
    split = ["forget"] * size + ["retain"] * 30 + ["test"] * 40
    columns = {
        name: [float(number) for number in generator.normal(mean, 3, len(split))]
        for name, mean in (("before", 9), ("predicted", 5), ("retrained", 5))
    }
    return {"id": [f"row-{index}" for index in range(len(split))], "split": split, **columns}


def _affected(row: str, split: str) -> dict[str, Any]:
    margins = {"before": 9.12, "predicted": 4.2, "retrained": -3.9, "unlearned": None}
    return {"id": row, "split": split, "label": "8", **margins}


def page_of(evaluation: dict[str, Any], **options: Any) -> str:
    return render_report(evaluation, **{"title": "Unlearning on digits", **options})


def text_of_page(evaluation: dict[str, Any], **options: Any) -> str:
    """The text of a page whose figures are not laid out and saved, which takes most of the time."""
    with mock.patch("matplotlib.figure.Figure.savefig", _save_nothing):
        return text_of(page_of(evaluation, **options))


def _save_nothing(figure: Figure, file: io.StringIO, **_: Any) -> None:
    file.write('<svg viewBox="0 0 1 1"></svg>')


def text_of(page: str) -> str:
    """What a person reads: no tags, no figures, plain spaces."""
    body = re.sub(r"<style.*?</style>|<svg.*?</svg>|</t[dh]>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", body)).split())


def figures_of(page: str) -> list[str]:
    return re.findall(r"<figure.*?</figure>", page, flags=re.DOTALL)
