"""How much of the distance to retrained models datamodel matching removes, and at what cost.

python examples/benchmarks/unlearning_quality.py takes 5 seeded draws each of 10, 50 and 140 random
digits and one coherent set of 60, audits with two banks of 100 retrained models for each, and
prints, pooled over the random sets: the share of do-nothing's excess KLOM (KLOM - null) on the
forget rows that dmm removes, in the mean and in the 95th percentile; the spread; the retain and
test rows against the null; and the cost of one request over one retraining. It uses the run of
`make demo` and stores its banks there (about six minutes on two cores).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from attribution import Counterfactual, ForgetSet, Oracle, Run, parse_forget, precompute
from unlearning import (
    DoNothing,
    GradientProjection,
    Matching,
    ProjectedGradient,
    UnlearningMethod,
    klom,
    margins,
    spread,
    unlearn_models,
)
from unlearning.cost import hardware, measure_request, measure_retraining

SIZES = (10, 50, 140)
SPLITS = ("forget", "retain", "test")


def audit(run: Run, forget: ForgetSet, models: int) -> dict[str, dict[str, Any]]:
    """KLOM and spread of every audited row, by method and split; two banks give the null."""
    judges, targets = (run.bank(forget, which, models) for which in (0, 1))
    methods: dict[str, UnlearningMethod] = {
        "do_nothing": DoNothing(),
        "dmm": Matching(run.predictor()),
        "dmm_linear": Matching(run.linear),
        "dmm_datamodel": Matching(run.datamodel),
        "dmm_pgu": Matching(run.predictor(), GradientProjection(run.moments)),
        "pgu": ProjectedGradient(run.moments),
        "om": Matching(Oracle(run.full, targets)),
    }
    found = {"null": targets.margins}
    for name, method in methods.items():
        after = unlearn_models(method, run.full, run.task, forget, count=models)
        found[name] = margins(after, run.task)
    n, total = len(run.task.train_ids), len(run.task.target_ids)
    rows = dict(zip(SPLITS, (forget.rows, forget.retained, np.arange(n, total)), strict=True))
    return {
        name: {s: klom(values, judges.margins)[r] for s, r in rows.items()}
        | {"spread": spread(values, judges.margins)[forget.rows]}
        for name, values in found.items()
    }


def pooled(audits: list[dict[str, dict[str, Any]]], name: str, split: str) -> Any:
    """Values of all rows of all forget sets."""
    return np.concatenate([found[name][split] for found in audits])


def removed(audits: list[dict[str, dict[str, Any]]], name: str) -> tuple[float, float]:
    """Shares of do-nothing's excess that a method removes: of the mean and of the P95."""
    null, nothing, after = (pooled(audits, who, "forget") for who in ("null", "do_nothing", name))
    shares = [
        1 - (measure(after) - measure(null)) / (measure(nothing) - measure(null))
        for measure in (np.mean, lambda values: np.percentile(values, 95))
    ]
    return shares[0], shares[1]


def tell(title: str, audits: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Prints and returns the table of some forget sets."""
    told: dict[str, Any] = {}
    print(f"\n{title}: KLOM mean / P95, pooled over {len(audits)} sets")
    for name in audits[0]:
        told[name] = {}
        for split in SPLITS:
            values = pooled(audits, name, split)
            told[name][split] = (float(values.mean()), float(np.percentile(values, 95)))
        told[name]["spread"] = float(pooled(audits, name, "spread").mean())
        cells = [f"{s} {m:.2f} / {p:.2f}" for s, (m, p) in list(told[name].items())[:3]]
        print(f"  {name:13s}", "   ".join(cells), f"  spread {told[name]['spread']:.2f}")
    for name in ("dmm", "dmm_linear", "dmm_datamodel", "dmm_pgu", "pgu", "om"):
        mean, high = told[name]["removed"] = removed(audits, name)
        print(f"  {name} removes {mean:.0%} of the mean excess and {high:.0%} of the P95 excess")
    for name in ("do_nothing", "dmm", "dmm_linear"):
        alone = [one[name]["forget"].mean() - one["null"]["forget"].mean() for one in audits]
        print(f"  mean excess of {name}, set by set:", " ".join(f"{e:.2f}" for e in alone))
    for split in ("retain", "test"):
        names = ("dmm", "dmm_linear", "dmm_datamodel", "do_nothing")
        ratios = {name: told[name][split][1] / told["null"][split][1] for name in names}
        cells = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        print(f"  {split} P95 over the null's: {cells}")
    return told


def main() -> None:
    """Runs the benchmark and prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="runs/digits")
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", help="also write the numbers as JSON")
    options = parser.parse_args()
    run = precompute("examples/digits.py:task", options.run)
    print(f"{hardware()}; {options.models} models a bank; {run.settings.subset_models} models on"
          f" {run.settings.design} subsets; dmm predicts by {run.best}; seeds from"
          f" {options.first_seed}")  # fmt: skip
    told: dict[str, Any] = {}
    everything = []
    for size in SIZES:
        seeds = range(options.first_seed, options.first_seed + options.draws)
        forgets = [parse_forget(run.task, f"random:{size}:{seed}") for seed in seeds]
        audits = [audit(run, forget, options.models) for forget in forgets]
        told[f"rand{size}"] = tell(f"rand{size}", audits)
        everything += audits
    told["pooled"] = tell("all random sets", everything)
    coherent = parse_forget(run.task, f"cluster:60:{options.first_seed}")
    told["coherent60"] = tell("coherent60", [audit(run, coherent, options.models)])
    told["cost"] = {
        "dmm": cost(run, run.predictor(), "dmm"),
        "dmm_linear": cost(run, run.linear, "dmm_linear"),
        "dmm_datamodel": cost(run, run.datamodel, "dmm_datamodel"),
    }
    if options.out:
        Path(options.out).write_text(json.dumps(told, indent=1) + "\n")


def cost(run: Run, predictor: Counterfactual, name: str) -> dict[str, float]:
    """Prints and returns one request over one retraining, in seconds and in gradients."""
    told = {}
    for size in SIZES:
        forget = parse_forget(run.task, f"random:{size}:0")
        retrain = measure_retraining(run.task, forget)
        request = measure_request(Matching(predictor), run.full.model(0), forget)
        told[f"rand{size}"] = request["seconds"] / retrain["seconds"]
        gradients = request["gradient_evaluations"] / retrain["gradient_evaluations"]
        print(f"{name}, rand{size}: one request {request['seconds']:.3f} s, one retraining"
              f" {retrain['seconds']:.3f} s: {told[f'rand{size}']:.1%} of the time,"
              f" {gradients:.1%} of the gradients")  # fmt: skip
    return told


if __name__ == "__main__":
    main()
