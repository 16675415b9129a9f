"""All methods, tuned on sets of their own, against models really retrained: a page of tables.

python examples/benchmarks/all_methods.py --out examples/results/digits.md precomputes the digits
where that is not done, searches settings of every method (the same number of trials for each),
audits all of them on sets that nothing was chosen on, and writes the tables with what made them.
--task, --run, --forget, --models and --trials take it to another task; --trials 0 leaves the
settings as they are. What is trained and tuned is kept in the run. Beside the page it writes a
recipe, PAGE.json, which dmm evaluate --recipe takes.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attribution import ForgetSet, Task, parse_forget, precompute
from attribution.run import Run
from examples.pages import made_by, table
from unlearning.evaluation import evaluate_methods
from unlearning.methods import METHODS
from unlearning.recipes import recipe_of
from unlearning.standings import DISTANCES, distance_of, standings
from unlearning.tables import unbiased_text
from unlearning.tuning import TUNING_SETS, tune_methods, tuned_settings
from unlearning.tuning_spaces import SPACES

SETS = (
    "rand50=random:50:0",
    "rand140=random:140:0",
    "coherent60=cluster:60:0",
    "other60=cluster:60:1",
)
SPLITS = ("forget", "retain", "test")
NEED_ORACLES = ("om", "om_absolute")


def number(value: float | None) -> str:
    """Two digits behind the point."""
    return "-" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    """A share in percent."""
    return "-" if value is None else f"{value:.1%}".replace("%", " %")


def standings_table(evaluation: Mapping[str, Any]) -> str:
    """All methods over all sets, the nearest to retraining first."""
    distance = distance_of(evaluation)
    name = DISTANCES[distance]
    header = ["method", f"excess {name}, forget mean / P95", "retain", "test"]
    header += ["KLOM without bias, forget", "cost"]
    rows = [
        [
            f"`{one.method}`",
            f"{number(one.forget)} / {number(one.forget_p95)}",
            number(one.retain),
            number(one.test),
            unbiased_text(one.unbiased),
            percent(one.cost),
        ]
        for one in standings(evaluation, distance)
    ]
    return table(header, rows)


def set_table(block: Mapping[str, Any], distance: str) -> str:
    """Distances, what bounds them, and cost of every method on one forget set, nearest first."""
    name = DISTANCES[distance]
    header = ["", *(f"{name} {split}" for split in SPLITS), "KLOM without bias, forget"]
    header += ["shift", "spread", "U-LiRA", "accuracy", "cost"]
    named = {"two banks": block["null"]} | dict(
        sorted(block["methods"].items(), key=lambda pair: _forget_mean(pair[1], distance))
    )
    return table(header, [_row(who, told, distance) for who, told in named.items()])


def _forget_mean(told: Mapping[str, Any], distance: str) -> float:
    mean = told[distance]["forget"]["mean"]
    return float("inf") if mean is None else float(mean)


def _row(who: str, told: Mapping[str, Any], distance: str) -> list[str]:
    pairs = [told[distance][split] for split in SPLITS]
    corrected = told["klom_corrected"]["forget"]
    interval = f" ({number(corrected['low'])} to {number(corrected['high'])})"
    return [
        who if who == "two banks" else f"`{who}`",
        *(f"{number(pair['mean'])} / {number(pair['p95'])}" for pair in pairs),
        number(corrected["mean"]) + (interval if corrected["mean"] is not None else ""),
        number(told["shift"]["forget"]),
        number(told["spread"]["forget"]),
        percent(told["attacks"]["ulira"]["accuracy"]["forget"]["mean"]),
        number(told["accuracy"]["forget"]) if "accuracy" in told else "",
        percent(told.get("cost_over_retrain")),
    ]


def budgets_table(block: Mapping[str, Any], distance: str) -> str:
    """Excess distance on the forget rows, and cost, by share of a retraining's gradients."""
    null = block["null"][distance]["forget"]["mean"]
    rows, shares = [], []
    for method, points in block["budgets"].items():
        shares = [percent(point["share"]) for point in points]
        means = [None if "error" in one else one[distance]["forget"]["mean"] for one in points]
        costs = [percent(point.get("cost_over_retrain")) for point in points]
        excess = [number(None if mean is None else mean - null) for mean in means]
        cells = [f"{mean} at {cost}" for mean, cost in zip(excess, costs, strict=True)]
        rows.append([f"`{method}`", *cells])
    return table(["excess at the cost of a request, by gradients of matching", *shares], rows)


def nearer_than_matching(block: Mapping[str, Any], distance: str) -> str:
    """Which methods without retrained models come nearer than dmm, and at what cost."""
    own = block["methods"].get("dmm")
    if own is None:
        return ""
    nearer = [
        f"`{name}` ({number(_forget_mean(told, distance))}, {percent(told['cost_over_retrain'])})"
        for name, told in block["methods"].items()
        if name not in NEED_ORACLES and _forget_mean(told, distance) < _forget_mean(own, distance)
    ]
    mine = f"{number(_forget_mean(own, distance))}, {percent(own['cost_over_retrain'])}"
    return f"Nearer than `dmm` ({mine}) without retrained models: {', '.join(nearer) or 'none'}."


def settings_table(settings: Mapping[str, Mapping[str, str]]) -> str:
    """What tuning chose, and what it left as it was."""
    rows = [
        [
            f"`{name}`",
            ", ".join(f"{field} {value}" for field, value in chosen.items()) or "as it is",
        ]
        for name, chosen in settings.items()
    ]
    return table(["method", "settings"], rows)


def page(evaluation: Mapping[str, Any], settings: Mapping[str, Any], facts: Sequence[str]) -> str:
    """The whole page."""
    distance = distance_of(evaluation)
    versions = ", ".join(f"{name} {version}" for name, version in evaluation["versions"].items())
    parts = [
        f"# All methods on {evaluation['task']}",
        f"{evaluation['hardware']}; {versions}.",
        "\n".join(f"- {fact}" for fact in facts),
        "The nearest to retraining first. Excess is the distance less that of two banks of"
        " retrained models, the mean over the forget sets; cost is one request, prediction"
        " included, over one retraining without the forgotten rows. `om` and `om_absolute` are"
        " given the outputs of retrained models.",
        standings_table(evaluation),
        "KLOM without bias stands with its 95 % bootstrap interval over models, its ends averaged"
        " over the forget sets: all sets have the same models to unlearn, so no interval is made"
        " narrower.",
        "Mean / 95th percentile over rows. KLOM without bias stands with its 95 % bootstrap"
        " interval over models; where the spread is far above 1 it reads too low, and KLOM does"
        " not. The gradients of matching are told in shares of a retraining's.",
    ]
    for name, block in evaluation["forget_sets"].items():
        parts += [f"## {name}, {block['size']} rows", set_table(block, distance)]
        parts.append(nearer_than_matching(block, distance))
        if "budgets" in block:
            parts.append(budgets_table(block, distance))
    parts += ["## Settings", settings_table(settings)]
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    """Precomputes, tunes, audits and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="examples/digits.py:task")
    parser.add_argument("--run", default="runs/digits")
    parser.add_argument("--forget", nargs="+", default=SETS)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--models", type=int, default=100, help="of each bank")
    parser.add_argument("--full-models", type=int, default=100)
    parser.add_argument("--subset-models", type=int, default=4000)
    parser.add_argument("--trials", type=int, default=16, help="of each method; 0: no tuning")
    parser.add_argument("--tune-on", nargs="+", default=TUNING_SETS, help="forget sets")
    parser.add_argument("--tune-models", type=int, help="of each bank; as --models if not given")
    parser.add_argument("--passes", help="gradient evaluations of matching, over training rows")
    parser.add_argument("--budgets", action="store_true")
    parser.add_argument("--predictor")
    parser.add_argument("--out", required=True, help="the page; all numbers go to the run")
    options = parser.parse_args()
    sizes = {"full_models": options.full_models, "subset_models": options.subset_models}
    begin = time.perf_counter()
    run = precompute(options.task, options.run, **sizes)
    methods, count = options.methods.split(","), options.models
    forgets = [parse_forget(run.task, spec) for spec in options.forget]
    facts = [
        made_by(),
        f"Precomputed in {minutes(begin)}, what was there before not counted.",
        *calibrated(run),
    ]
    matching = [name for name in methods if "forget_multiplier" in SPACES[name]]
    held = {name: {"passes": options.passes} for name in matching if options.passes}
    settings: dict[str, dict[str, str]] = {name: dict(held.get(name, {})) for name in methods}
    start = time.perf_counter()
    if options.trials:
        told = tune_methods(
            run,
            methods,
            specs=options.tune_on,
            trials=options.trials,
            n_models=options.tune_models or count,
            predictor=options.predictor,
            held=held,
        )
        settings |= tuned_settings(run, methods, forgets, predictor=options.predictor)
        tuned_on = told[methods[0]]["specs"]
        specs = ", ".join(f"`{spec}`" for spec in tuned_on)
        shared = 100 * most_shared(run.task, forgets, tuned_on)
        facts.append(
            f"{options.trials} settings of each method tried on {specs}, which share at most"
            f" {shared:.0f} % of their rows with an audited set, by {told[methods[0]]['n_models']}"
            " models; score: the mean distance over forget, retain and test rows."
            f" {minutes(start)}, what was tuned before not counted."
        )
    else:
        facts.append("Settings are those that methods ship with; none was tuned on this task.")
    start = time.perf_counter()
    more = {"n_models": count, "settings": settings, "budgets": options.budgets}
    evaluation = evaluate_methods(run, forgets, methods, predictor=options.predictor, **more)
    facts.append(
        f"Audit of {count} models on {', '.join(f'`{spec}`' for spec in options.forget)}, with two"
        f" banks of as many retrained models each, predictions by {evaluation['predictor']}."
        f" {minutes(start)}, banks trained before not counted; {minutes(begin)} in all."
    )
    Path(options.out).write_text(page(evaluation, settings, facts))
    recipe = recipe_of(evaluation, settings, options.forget)
    Path(options.out).with_suffix(".json").write_text(json.dumps(recipe, indent=1) + "\n")
    Path(options.run, "all_methods.json").write_text(json.dumps(evaluation, indent=1) + "\n")


def calibrated(run: Run) -> list[str]:
    """What the calibration bank chose for group Newton, a sentence, if there is a bank."""
    if run.calibration is None:
        return []
    newton = run.calibration.newton
    return [
        f"Group Newton as calibrated: damping {newton.damping:.3g}, temperature"
        f" {newton.temperature:g}, {newton.steps} Newton step(s) at most."
    ]


def most_shared(task: Task, forgets: Sequence[ForgetSet], specs: Sequence[str]) -> float:
    """The largest share of a set's rows that it has in common with one of the others."""
    others = [parse_forget(task, spec) for spec in specs]
    pairs = ((one, other) for one in forgets for other in others)
    return max((one.mask & other.mask).sum() / min(len(one), len(other)) for one, other in pairs)


def minutes(start: float) -> str:
    """Time since then."""
    return f"{(time.perf_counter() - start) / 60:.1f} minutes"


if __name__ == "__main__":
    main()
