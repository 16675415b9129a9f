"""How well group Newton predicts retraining, and what matching its predictions leaves.

python examples/benchmarks/newton_quality.py takes 5 seeded draws each of 50 and 140 random digits
and one coherent set of 60 of each class that has one, none of them in the calibration bank, and
prints for each kind of set: R2 on the forget rows (margins; logits over their ceiling), slope,
coverage and width of the 80 % intervals, how many models would have to be retrained for their mean
to be as near; KLOM after matching with 5 and 10 % of a retraining's gradients, with the share of
do-nothing's excess that it removes; and coverage over all sets, on rows that are kept too. "One
step" is the first Newton step with the damping, temperature and factors fitted for three. It uses
the run of `make demo`, or another one (--run; say one of dmm precompute --newton-segments 2), and
stores its banks there (about twelve minutes on two cores, one of them with --no-matching).
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from attribution import Counterfactual, ForgetSet, Run, StagedNewton, parse_forget, precompute
from attribution.agreement import Comparison, pooled_agreement
from unlearning import DoNothing, Matching, klom, margins, unlearn_models
from unlearning.audit import Audit
from unlearning.cost import hardware
from unlearning.predictions import Comparisons, Judged

EPOCHS = 30
SHARES = (0.05, 0.10)  # of the gradients of a retraining that matching may take


@dataclass(frozen=True)
class Group:
    """Forget sets of one kind, each with its audit."""

    name: str
    audits: list[Audit]


def coherent_sets(run: Run, size: int) -> list[ForgetSet]:
    """The first seeded cluster of each class that has enough rows."""
    found: dict[int, ForgetSet] = {}
    for seed in range(200):
        try:
            forget = parse_forget(run.task, f"cluster:{size}:{seed}")
        except ValueError:
            continue
        label = int(run.task.rows("train", forget.rows[:1])[1])
        found.setdefault(label, forget)
    return [found[label] for label in sorted(found)]


def groups(run: Run, models: int, draws: int) -> list[Group]:
    """Random sets of 50 and 140, and the coherent ones."""
    sets = {
        f"rand{size}": [parse_forget(run.task, f"random:{size}:{s}") for s in range(draws)]
        for size in (50, 140)
    } | {"coherent60": coherent_sets(run, 60)}
    return [
        Group(
            name,
            [
                Audit(run.task, forget, run.full, *(run.bank(forget, w, models) for w in (0, 1)))
                for forget in forgets
            ],
        )
        for name, forgets in sets.items()
    ]


def judge(predictor: Counterfactual, group: Group) -> list[Comparisons]:
    """Predicted beside measured changes of each set."""
    return [Judged(audit, predictor.change(audit.forget)).comparisons for audit in group.audits]


def compare(judged: Sequence[Comparisons]) -> dict[str, Any]:
    """Agreement on the forget rows: means over sets, and intervals pooled."""
    told: dict[str, Any] = {}
    for kind in ("margins", "logits"):
        parts: list[Comparison] = [one[kind]["forget"] for one in judged]
        each = [pooled_agreement([part]) for part in parts]
        shares = [one.r2 / one.ceiling for one in each]
        told[kind] = {
            "r2": float(np.mean([one.r2 for one in each])),
            "of_ceiling": float(np.mean(shares)),
            "worst": float(np.min(shares)),
            "slope": float(np.mean([one.slope for one in each])),
        }
        together = pooled_agreement(parts)
        told[kind] |= {
            "coverage": together.coverage["80"],
            "width": together.width["80"],
            "constant_width": together.constant_width["80"],
            "retrained_models": together.retrained_models,
        }
    return told


def over_all(judged: Sequence[Comparisons]) -> dict[str, Any]:
    """Intervals pooled over sets of all kinds, by kind of output and of row."""
    told: dict[str, Any] = {}
    for kind in ("margins", "logits"):
        for split in ("forget", "retain", "test"):
            found = pooled_agreement([one[kind][split] for one in judged])
            told.setdefault(kind, {})[split] = {
                "coverage": found.coverage,
                "width": found.width["80"],
                "constant_width": found.constant_width["80"],
            }
    return told


def tell_over_all(name: str, told: dict[str, Any]) -> None:
    """Prints one predictor's intervals over all sets."""
    for kind, splits in told.items():
        for split, row in splits.items():
            inside = row["coverage"]
            print(
                f"all sets   {name:9s} {kind:7s} {split:6s} inside 80 % {inside['80']:.2f}, 95 %"
                f" {inside['95']:.2f}, width {row['width']:.2f} (constant"
                f" {row['constant_width']:.2f})"
            )


def matched(predictor: Counterfactual, group: Group, models: int) -> dict[str, Any]:
    """KLOM by split after matching, and the shares of do-nothing's excess that it removes."""
    methods: dict[str, Any] = {"do_nothing": DoNothing()}
    methods |= {f"{share:.0%}": Matching(predictor, passes=share * EPOCHS) for share in SHARES}
    values: dict[str, dict[str, list[Any]]] = {}
    for audit in group.audits:
        outcomes = {"null": audit.targets.margins}
        for name, method in methods.items():
            after = unlearn_models(method, audit.full, audit.task, audit.forget, count=models)
            outcomes[name] = margins(after, audit.task)
        for name, found in outcomes.items():
            distance = klom(found, audit.oracles.margins)
            for split, rows in audit.splits.items():
                values.setdefault(name, {}).setdefault(split, []).append(distance[rows])
    return {
        name: {split: _summary(parts) for split, parts in splits.items()}
        | {"removed": _removed(values, name)}
        for name, splits in values.items()
    }


def _summary(parts: Sequence[Any]) -> dict[str, Any]:
    pooled = np.concatenate(parts)
    each = [round(float(part.mean()), 2) for part in parts]
    return {"mean": float(pooled.mean()), "p95": float(np.percentile(pooled, 95)), "sets": each}


def _removed(values: dict[str, dict[str, list[Any]]], name: str) -> list[float]:
    null, nothing, after = (
        np.concatenate(values[who]["forget"]) for who in ("null", "do_nothing", name)
    )
    return [
        float(1 - (measure(after) - measure(null)) / (measure(nothing) - measure(null)))
        for measure in (np.mean, lambda rows: np.percentile(rows, 95))
    ]


def tell(name: str, group: Group, told: dict[str, Any]) -> None:
    """Prints one predictor's figures on one kind of set."""
    for kind in ("margins", "logits"):
        row = told[kind]
        print(
            f"{group.name:10s} {name:9s} {kind:7s} R2 {row['r2']:.2f}, of the ceiling"
            f" {row['of_ceiling']:.2f} (worst {row['worst']:.2f}), slope {row['slope']:.2f}, inside"
            f" 80 % {row['coverage']:.2f}, width {row['width']:.2f} (constant"
            f" {row['constant_width']:.2f}), as near as {row['retrained_models']:.1f} models"
        )
    for way, row in told.get("klom", {}).items():
        cells = [
            f"{s} {row[s]['mean']:.2f}/{row[s]['p95']:.2f}" for s in ("forget", "retain", "test")
        ]
        mean, high = row["removed"]
        print(
            f"{group.name:10s} {name:9s} {way:10s} KLOM", "  ".join(cells),
            f" removes {mean:.0%} / {high:.0%}; sets {row['forget']['sets']}",
        )  # fmt: skip


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="runs/digits")
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument(
        "--predictors", nargs="+", default=["one step", "newton", "combined", "residual", "linear"]
    )
    parser.add_argument("--no-matching", action="store_true", help="leave KLOM out")
    parser.add_argument("--out", help="also write the numbers as JSON")
    options = parser.parse_args()
    run = precompute("examples/digits.py:task", options.run)
    known: dict[str, Any] = {
        "one step": lambda: replace(run.newton, steps=1),
        "newton": lambda: run.newton,
        "staged": lambda: StagedNewton(run.newton),
        "datamodel": lambda: run.datamodel,
        "combined": lambda: run.combined,
        "residual": lambda: run.residual,
        "linear": lambda: run.linear,
    }
    chosen = {name: known[name]() for name in options.predictors}
    print(f"{hardware()}; {options.models} models a bank; {run.calibration}")
    told: dict[str, Any] = {}
    every: dict[str, list[Comparisons]] = {name: [] for name in chosen}
    for group in groups(run, options.models, options.draws):
        for name, predictor in chosen.items():
            judged = judge(predictor, group)
            every[name] += judged
            found = compare(judged)
            if not options.no_matching:
                found["klom"] = matched(predictor, group, options.models)
            tell(name, group, found)
            told.setdefault(group.name, {})[name] = found
    told["all"] = {name: over_all(judged) for name, judged in every.items()}
    for name, found in told["all"].items():
        tell_over_all(name, found)
    if options.out:
        Path(options.out).write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
