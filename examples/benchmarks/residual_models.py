"""How much retrained models tell, alone and beside group Newton, by their number.

python examples/benchmarks/residual_models.py trains more and more subset models and prints, for
the datamodel alone with several shares of `Ridge(alike=)`, for its weighed sum with group Newton,
for group Newton with the datamodel of what it lacks, fitted to more and more of the models that
lack few rows, and for the sum of that and the datamodel, R2 on the forget rows: margins, and logits
over their ceiling, means over random sets of 50 and 140 rows and clusters of 60, and the worst.
Weights are fitted on the calibration bank of `make demo`'s run. All that is trained lies in the
folder given; the run is only read. On two cores it takes nine minutes.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from attribution import (
    Change,
    Combined,
    Counterfactual,
    Ensemble,
    Ridge,
    Run,
    draw_subsets,
    fit_datamodels,
    parse_forget,
    train_models,
)
from attribution.agreement import pooled_agreement
from attribution.calibrating import RESIDUAL_MODELS
from attribution.cases import Case, cases_of
from attribution.combined import weigh
from attribution.residual import models_like_requests, residual_models
from attribution.task import Rows
from examples.pages import machine, made_by, table
from unlearning.audit import Audit
from unlearning.predictions import Judged

SETS = {"50 rows": "random:50:{}", "140 rows": "random:140:{}", "coherent": "cluster:60:{}"}
Groups = dict[str, list[Audit]]


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
        return self.changes(self.run.newton)

    def weighed(
        self, one: Counterfactual, second: Counterfactual, *, trusted: bool, grows: bool
    ) -> Combined:
        """Two predictors, weighed on the bank."""
        first = self.told if one is self.run.newton else self.changes(one)
        pairs = list(zip(first, self.changes(second), strict=True))
        return Combined(one, second, weigh(self.cases, pairs, trusted=trusted, grows=grows))

    def changes(self, predictor: Counterfactual) -> list[Change]:
        """What a predictor says of the bank's forget sets."""
        return [predictor.change(case.forget) for case in self.cases]


def audits(bench: Bench, seeds: Sequence[int], models: int) -> Groups:
    """Forget sets by kind, each with a bank retrained without it."""
    found: Groups = {kind: [] for kind in SETS}
    run = bench.run
    for kind, pattern in SETS.items():
        for seed in seeds:
            spec = pattern.format(seed)
            try:
                forget = parse_forget(run.task, spec)
            except ValueError:  # the class of a cluster has too few rows
                continue
            subsets = draw_subsets(run.task, models=models, design="full", seed=7, without=forget)
            folder = bench.folder / f"oracles-{spec.replace(':', '-')}-{models}"
            bank = train_models(run.task, subsets, folder)
            found[kind].append(Audit(run.task, forget, run.full, bank, bank))
    return found


def predictors(
    bench: Bench, models: int, seed: int, most: Sequence[int], shares: Sequence[float]
) -> Iterator[tuple[str, Counterfactual]]:
    """What so many retrained models give, some of them, or `most` at most, for the residual."""
    run, folder = bench.run, bench.folder / f"{models}-{seed}"
    subsets = draw_subsets(run.task, models=models, design="mixed", seed=seed)
    ensemble = train_models(run.task, subsets, folder / "ensemble")
    for share in shares:
        method, to = Ridge(alike=share), folder / f"alike-{share:g}"
        other = fit_datamodels(ensemble, anchor=run.full, to=to, method=method, workers=None)
        yield f"datamodel, alike {share:g}", other
    plain = fit_datamodels(ensemble, anchor=run.full, to=folder / "datamodel", workers=None)
    yield "datamodel", plain
    yield "newton + datamodel", bench.weighed(run.newton, plain, trusted=True, grows=True)
    for chosen in _distinct(models_like_requests(ensemble, number, seed) for number in most):
        to = folder / f"residual-{len(chosen)}"
        left = residual_models(
            ensemble, run.newton, to, anchor=run.full, models=chosen, workers=None
        )
        lacking = fit_datamodels(left, anchor=run.full, to=to / "lacking", workers=None)
        residual = bench.weighed(run.newton, lacking, trusted=False, grows=False)
        yield f"residual ({len(chosen)})", residual
        yield f"combined ({len(chosen)})", bench.weighed(residual, plain, trusted=True, grows=True)


def _distinct(choices: Iterable[Rows]) -> list[Rows]:
    return list({len(chosen): chosen for chosen in choices}.values())


def line(models: int, name: str, predictor: Counterfactual, groups: Groups) -> list[str]:
    """A line of the table: every kind of set."""
    cells = [str(models), name]
    for group in groups.values():
        shares, margins = [], []
        for audit in group:
            found = Judged(audit, predictor.change(audit.forget)).comparisons
            m, z = (
                pooled_agreement([p])
                for p in (found["margins"]["forget"], found["logits"]["forget"])
            )
            margins.append(m.r2)
            shares.append(z.share_of_ceiling)
        cells += [f"{np.mean(margins):.2f} ({min(margins):.2f})"]
        cells += [f"{np.mean(shares):.2f} ({min(shares):.2f})"]
    return cells


def page(groups: Groups, rows: Sequence[Sequence[str]], oracles: int) -> str:
    """The whole page."""
    sizes = sorted({len(group) for group in groups.values()})
    header = ["subset models", "predictor"]
    header += [f"{kind}, {what}" for kind in groups for what in ("margins", "logits")]
    return f"""# What retrained models tell, alone and beside group Newton, on digits

{machine()}

{made_by()}

R2 on the forget rows, of margins, and of logits over their ceiling: means over
{" or ".join(map(str, sizes))} forget sets of each kind (in brackets the worst set), each held
against {oracles} retrained models. `residual` is group Newton and a datamodel of what it lacks,
fitted to as many models as its brackets say, of those that lack at most a quarter of the rows;
`combined` is that and the datamodel, `newton + datamodel` group Newton and the datamodel, all
weighed on the calibration bank of the run. A run takes {RESIDUAL_MODELS} models for the residual
where it has them, and datamodels with alike {Ridge().alike:g}; 1 is plain ridge.

{table(header, rows)}
"""


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="runs/digits")
    parser.add_argument("--to", default="runs/residual-models")
    parser.add_argument("--models", type=int, nargs="+", default=[300, 1000, 4000])
    parser.add_argument("--most", type=int, nargs="+", default=[150, 600, RESIDUAL_MODELS, 2000])
    parser.add_argument("--alike", type=float, nargs="+", default=[1.0, 0.5, 0.3, 0.2])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(100, 108)))
    parser.add_argument("--oracles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=50, help="of the subset models")
    parser.add_argument("--out", help="also write the page")
    options = parser.parse_args()
    bench = Bench(Run.open(options.run), Path(options.to))
    groups = audits(bench, options.seeds, options.oracles)
    rows = [line(0, "newton", bench.run.newton, groups)]
    for count in options.models:
        told = predictors(bench, count, options.seed, options.most, options.alike)
        for name, predictor in told:
            rows.append(line(count, name, predictor, groups))
            print(" ".join(rows[-1]), flush=True)
    whole = page(groups, rows, options.oracles)
    print(whole)
    if options.out:
        Path(options.out).write_text(whole)


if __name__ == "__main__":
    main()
