"""How much retrained models add to group Newton, by their number.

python examples/benchmarks/residual_models.py trains more and more subset models and prints, for
the datamodel alone, for its weighed sum with group Newton, and for group Newton with the datamodel
of what it lacks (fitted to at most 300 of the models), R2 on the forget rows: margins, and logits
over their ceiling, means over random sets of 50 and 140 rows and clusters of 60, and the worst.
Weights are fitted on the calibration bank of `make demo`'s run. All that is trained lies in the
folder given; the run is only read.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from attribution import (
    Change,
    Combined,
    Counterfactual,
    Ensemble,
    Run,
    draw_subsets,
    fit_datamodels,
    parse_forget,
    train_models,
)
from attribution.agreement import pooled_agreement
from attribution.cases import Case, cases_of
from attribution.combined import weigh
from attribution.residual import models_like_requests, residual_models
from unlearning.audit import Audit
from unlearning.cost import hardware
from unlearning.predictions import Judged

SETS = {"rand50": "random:50:{}", "rand140": "random:140:{}", "cluster60": "cluster:60:{}"}
RESIDUAL_MODELS = 300


@dataclass(frozen=True)
class Bench:
    """A run and a folder for what is trained beside it."""

    run: Run
    folder: Path

    @cached_property
    def cases(self) -> list[Case]:
        """The forget sets of the run's calibration bank."""
        bank = Ensemble.open(self.run.path / "calibration" / "bank", self.run.task)
        return cases_of(bank, self.run.full.outputs)

    @cached_property
    def told(self) -> list[Change]:
        """What group Newton says of them."""
        return [self.run.newton.change(case.forget) for case in self.cases]

    def weighed(self, second: Counterfactual, *, trusted: bool = True) -> Combined:
        """Group Newton and a second predictor, weighed on the bank."""
        both = [second.change(case.forget) for case in self.cases]
        weights = weigh(self.cases, list(zip(self.told, both, strict=True)), trusted=trusted)
        return Combined(self.run.newton, second, weights)


def audits(bench: Bench, seeds: Sequence[int], models: int) -> dict[str, list[Audit]]:
    """Forget sets by kind, each with a bank retrained without it."""
    found: dict[str, list[Audit]] = {kind: [] for kind in SETS}
    run = bench.run
    for kind, pattern in SETS.items():
        for seed in seeds:
            try:
                forget = parse_forget(run.task, pattern.format(seed))
            except ValueError:  # the class of a cluster has too few rows
                continue
            subsets = draw_subsets(run.task, models=models, design="full", seed=7, without=forget)
            bank = train_models(run.task, subsets, bench.folder / f"oracles-{kind}-{seed}-{models}")
            found[kind].append(Audit(run.task, forget, run.full, bank, bank))
    return found


def predictors(bench: Bench, models: int, seed: int) -> Iterator[tuple[str, Counterfactual]]:
    """What so many retrained models give."""
    run, folder = bench.run, bench.folder / f"{models}-{seed}"
    subsets = draw_subsets(run.task, models=models, design="mixed", seed=seed)
    ensemble = train_models(run.task, subsets, folder / "ensemble")
    plain = fit_datamodels(ensemble, anchor=run.full, to=folder / "plain", workers=None)
    yield "datamodel", plain
    yield "newton + datamodel", bench.weighed(plain)
    chosen = models_like_requests(ensemble, RESIDUAL_MODELS, seed)
    left = residual_models(
        ensemble, run.newton, folder, anchor=run.full, models=chosen, workers=None
    )
    lacking = fit_datamodels(left, anchor=run.full, to=folder / "lacking", workers=None)
    yield f"residual ({len(chosen)})", bench.weighed(lacking, trusted=False)


def tell(name: str, predictor: Counterfactual, groups: dict[str, list[Audit]]) -> None:
    """Prints one line: every kind of set."""
    cells = []
    for kind, group in groups.items():
        shares, margins = [], []
        for audit in group:
            found = Judged(audit, predictor.change(audit.forget)).comparisons
            m, z = (
                pooled_agreement([p])
                for p in (found["margins"]["forget"], found["logits"]["forget"])
            )
            margins.append(m.r2)
            shares.append(z.share_of_ceiling)
        cells.append(
            f"{kind} (n {len(group)}) margins {np.mean(margins):.2f} +- {np.std(margins):.2f},"
            f" logits {np.mean(shares):.2f} +- {np.std(shares):.2f} (worst {min(shares):.2f})"
        )
    print(f"{name:24s}", "; ".join(cells), flush=True)


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="runs/digits")
    parser.add_argument("--to", default="runs/residual-models")
    parser.add_argument("--models", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(100, 108)))
    parser.add_argument("--oracles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=50, help="of the subset models")
    options = parser.parse_args()
    bench = Bench(Run.open(options.run), Path(options.to))
    groups = audits(bench, options.seeds, options.oracles)
    print(f"{hardware()}; {options.oracles} oracles a set; +- is over the sets")
    tell("0: newton", bench.run.newton, groups)
    for count in options.models:
        for name, predictor in predictors(bench, count, options.seed):
            tell(f"{count}: {name}", predictor, groups)


if __name__ == "__main__":
    main()
