"""What nearness to retraining costs: prediction and matching together, on coherent sets.

python examples/benchmarks/cost_quality.py takes one coherent set of 60 digits of each class that
has one and unlearns by `dmm`, with predictors from dear to cheap (combined and group Newton of 8,
4, 2 and 1 checkpoints, the datamodel with TRAK scores and without) and several budgets of matching.
It prints the mean KLOM over the sets, R2 of the predicted changes, and the cost of one request over
one retraining: its gradients, its seconds, and how many of these are prediction. It uses the run of
`make demo` and stores its banks there (about ten minutes on two cores, with nothing beside it).
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from newton_quality import EPOCHS, Group, coherent_sets, compare, judge

from attribution import Counterfactual, GroupNewton, Run, precompute
from attribution.training import threads
from examples.pages import machine, made_by, table
from unlearning import DoNothing, Matching, UnlearningMethod, klom, margins, unlearn_models
from unlearning.audit import Audit
from unlearning.cost import measure_request, measure_retraining

CHECKPOINTS = (8, 4, 2, 1)
SHARES = (0.02, 0.05, 0.10, 0.30)  # of the gradients of a retraining that matching may take
REPEATS = 5


def few(newton: GroupNewton, checkpoints: int) -> GroupNewton:
    """The same from its first checkpoints."""
    return replace(newton, features=newton.features.first(checkpoints))


def predictors(run: Run) -> dict[str, Counterfactual]:
    """From dear to cheap, by name."""
    found: dict[str, Counterfactual] = {}
    newtons = {count: few(run.newton, count) for count in CHECKPOINTS}
    for count, newton in newtons.items():
        residual = replace(run.residual, first=newton)
        found[f"combined, {count}"] = replace(run.combined, first=residual)
    found |= {f"newton, {n}": one for n, one in newtons.items()}
    return found | {"linear": run.linear, "datamodel": run.datamodel}


def distances(audits: Sequence[Audit], told_of: Callable[[Audit], Any]) -> dict[str, Any]:
    """Mean KLOM of each split over the sets, and the largest on forget rows."""
    found: dict[str, list[float]] = {}
    for audit in audits:
        distance = klom(told_of(audit), audit.oracles.margins)
        for split, rows in audit.splits.items():
            found.setdefault(split, []).append(float(distance[rows].mean()))
    told: dict[str, Any] = {split: float(np.mean(each)) for split, each in found.items()}
    return told | {"worst": max(found["forget"])}


def outcome(method: UnlearningMethod) -> Callable[[Audit], Any]:
    """Margins of an audit's models after a method."""
    return lambda audit: margins(
        unlearn_models(method, audit.full, audit.task, audit.forget), audit.task
    )


def seconds_of_prediction(predictor: Counterfactual, audit: Audit) -> float:
    """Median time of one warm query of all targets on one thread."""
    taken = []
    with threads(1):
        predictor.change(audit.forget)
        for _ in range(REPEATS):
            start = perf_counter()
            predictor.change(audit.forget)
            taken.append(perf_counter() - start)
    return median(taken)


def costs(method: UnlearningMethod, audit: Audit, retraining: dict[str, Any]) -> dict[str, float]:
    """One request over one retraining, in gradients and in seconds."""
    request = measure_request(method, audit.full.model(0), audit.forget)
    names = {"gradients": "gradient_evaluations", "seconds": "seconds"}
    return {name: request[key] / retraining[key] for name, key in names.items()}


def main() -> None:
    """Runs the benchmark, prints its table and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="runs/digits")
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--out", help="also write the page")
    options = parser.parse_args()
    run = precompute("examples/digits.py:task", options.run)
    audits = [
        Audit(run.task, forget, run.full, *(run.bank(forget, w, options.models) for w in (0, 1)))
        for forget in coherent_sets(run, 60)
    ]
    group = Group("coherent60", audits)
    rows = [
        [name, "", "", "", *_cells(distances(audits, found)), "", "", ""]
        for name, found in (
            ("two banks", lambda audit: audit.targets.margins),
            ("do nothing", outcome(DoNothing())),
        )
    ]
    retraining = measure_retraining(audits[0].task, audits[0].forget)
    for name, predictor in predictors(run).items():
        agreement = compare(judge(predictor, group))
        shares = [f"{agreement[kind]['of_ceiling']:.2f}" for kind in ("margins", "logits")]
        query = f"{seconds_of_prediction(predictor, audits[0]):.2f} s"
        for share in SHARES:
            method = Matching(predictor, passes=share * EPOCHS)
            cost = costs(method, audits[0], retraining)
            spent = [f"{cost['gradients']:.1%}", f"{cost['seconds']:.0%}", query]
            told = distances(audits, outcome(method))
            rows.append([name, f"{share:.0%}", *shares, *_cells(told), *spent])
            print(" | ".join(rows[-1]), flush=True)
    page = _page(audits, options.models, retraining["seconds"], rows)
    print(page)
    if options.out:
        Path(options.out).write_text(page)


def _cells(told: dict[str, Any]) -> list[str]:
    return [f"{told['forget']:.2f} ({told['worst']:.2f})"] + [
        f"{told[split]:.2f}" for split in ("retain", "test")
    ]


HEADER = [
    "predictor, checkpoints",
    "matching",
    "R2 of margins over its ceiling",
    "of logits",
    "KLOM forget (worst set)",
    "retain",
    "test",
    "gradients",
    "seconds",
    "of them prediction",
]


def _page(
    audits: Sequence[Audit], models: int, seconds: float, rows: Sequence[Sequence[str]]
) -> str:
    text = f"""# Quality against cost on coherent sets of digits

{machine()}

{made_by()}

Means over {len(audits)} coherent sets of 60 rows, one of each class that has one, {models} models
each. Costs are of one request for one model, prediction and matching together, over one retraining
without the rows ({seconds:.2f} s), on one thread, on the first set. Matching takes the share of a
retraining's gradients in the second column. Predictions read what was stored before the request,
so that they add seconds and no gradients; they are warm, that is, not the first of their process.
"""
    return text + "\n" + table(HEADER, rows) + "\n"


if __name__ == "__main__":
    main()
