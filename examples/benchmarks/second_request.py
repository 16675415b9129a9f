"""Two requests in a row against one request for both sets of rows: do the models end alike?

python examples/benchmarks/second_request.py --recipe examples/results/digits.json
--out examples/results/second_request.md takes the models of a run of the digits (it precomputes one
where there is none) and trains as many others, and as many oracles without two random sets of 50
rows. The run's models forget the first set, and what came of them the second; the other models
forget both at once. For each method it tells the distance of the two ensembles beside its null,
which is the distance when the run's models too forget both at once; and the distance of all three
to the oracles.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from attribution import (
    Ensemble,
    ForgetSet,
    Moments,
    compute_moments,
    draw_subsets,
    parse_forget,
    precompute,
    train_models,
)
from attribution.run import Run
from examples.pages import machine, made_by, table
from unlearning import (
    UnlearnedModels,
    UnlearningMethod,
    corrected_klom,
    klom,
    shift,
    spread,
    unlearn_models,
)
from unlearning.klom import FEWEST_MODELS, Array
from unlearning.methods import Evidence, build_method
from unlearning.recipes import read_recipe

MEASURES = {"KLOM": klom, "KLOM without bias": corrected_klom, "shift": shift, "spread": spread}
OTHER, ORACLES = "one request of other models", "retrained models"
SEED = 9  # no run trains full models with it unless it is asked to

Distances = Mapping[str, Mapping[str, float]]


def distances(left: Array, right: Array, both: ForgetSet) -> dict[str, dict[str, float]]:
    """Means over the rows of each split, by measure."""
    rows = {
        "forget": both.rows,
        "retain": both.retained,
        "test": np.arange(both.total, left.shape[1]),
    }
    found = {name: measure(left, right) for name, measure in MEASURES.items()}
    if len(left) < FEWEST_MODELS:
        del found["KLOM"]
    return {
        name: {split: float(values[where].mean()) for split, where in rows.items()}
        for name, values in found.items()
    }


def compared(
    methods: tuple[UnlearningMethod, UnlearningMethod],
    run: Run,
    others: Ensemble,
    sets: tuple[ForgetSet, ForgetSet, ForgetSet],
    oracles: Ensemble,
) -> dict[tuple[str, str], Distances]:
    """Distances by what was done and what it is held against.

    Args:
        methods: one method, bound to the run's models and to the others.
        run: with the models that get two requests.
        others: models that get one.
        sets: first, second, and both together.
        oracles: models retrained without both.
    """
    (method, with_others), (first, second, both) = methods, sets
    count = len(others)
    before = unlearn_models(method, run.full, run.task, first, count=count)
    ended: dict[str, UnlearnedModels] = {
        "two requests": unlearn_models(method, before, run.task, second),
        "one request": unlearn_models(method, run.full, run.task, both, count=count),
        OTHER: unlearn_models(with_others, others, run.task, both),
    }
    other, found = ended[OTHER].margins, {}
    for who in ("two requests", "one request"):
        found[who, OTHER] = distances(ended[who].margins, other, both)
    for who, after in ended.items():
        found[who, ORACLES] = distances(after.margins, oracles.margins, both)
    return found


def header_of(told: Mapping[tuple[str, str], Distances]) -> list[str]:
    """Header of one method's table; KLOM is not told of few models."""
    return ["what was done", "held against", *next(iter(told.values()))]


def rows_of(told: Mapping[tuple[str, str], Distances]) -> list[list[str]]:
    """Cells of one method's table."""
    return [
        [who, against, *(" / ".join(f"{v:.2f}" for v in of.values()) for of in found.values())]
        for (who, against), found in told.items()
    ]


def main() -> None:
    """Trains what is not there yet, sends the requests and tells what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="runs/digits")
    parser.add_argument("--models", type=int, default=100, help="of each ensemble")
    parser.add_argument("--full-models", type=int, default=100)
    parser.add_argument("--subset-models", type=int, default=4000)
    parser.add_argument("--rows", type=int, default=50, help="of each set")
    parser.add_argument("--seed", type=int, default=0, help="of the sets")
    parser.add_argument("--methods", default="dmm,dmm_datamodel,dmm_pgu,pgu")
    parser.add_argument("--recipe", help="settings of the methods, such as examples/results/*.json")
    parser.add_argument("--out", help="also write the page")
    options = parser.parse_args()
    sizes = {"full_models": options.full_models, "subset_models": options.subset_models}
    run, count = precompute("examples/digits.py:task", options.run, **sizes), options.models
    first, second = (
        parse_forget(run.task, f"random:{options.rows}:{options.seed + i}") for i in (0, 1)
    )
    both = first.union(run.task, second)
    drawn = draw_subsets(run.task, models=count, design="full", seed=SEED)
    others = train_models(run.task, drawn, f"{options.run}/others-{count}", keep="weights")
    held = run.moments, compute_moments(others, f"{options.run}/others-{count}-moments")
    recipe = read_recipe(options.recipe)["settings"] if options.recipe else {}

    def built(name: str, moments: Moments) -> UnlearningMethod:
        evidence = Evidence(run.predictor, lambda: run.oracle(both, count), lambda: moments)
        return build_method(name, evidence, recipe.get(name))

    parts = [
        "# Two requests in a row, and one request for both",
        machine(),
        made_by(),
        f"{count} models; two sets of {options.rows} random rows, {len(both)} together; predictions"
        f" by {run.best}. Means over forget / retain / test rows.",
    ]
    oracles = run.bank(both, 0, count)
    for name in options.methods.split(","):
        pair = built(name, held[0]), built(name, held[1])
        told = compared(pair, run, others, (first, second, both), oracles)
        parts += [f"## {name}", table(header_of(told), rows_of(told))]
    page = "\n\n".join(parts) + "\n"
    print(page)
    if options.out:
        Path(options.out).write_text(page)


if __name__ == "__main__":
    main()
