"""Two requests in a row against one request for both sets of rows: do the models end alike?

python examples/benchmarks/second_request.py trains two banks of 100 models of the digits, and 100
oracles without two random sets of 50 rows. The models of the first bank forget the first set, and
what came of them the second; those of the other bank forget both at once. For dmm, dmm_pgu and pgu
it prints the distance (KLOM, KLOM without bias, shift, spread) of the two ensembles beside its
null, which is the distance when the first bank too forgets both at once; and the distance of all
three to the oracles. What was trained is kept under --to (some minutes on two cores).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from attribution import (
    Ensemble,
    ForgetSet,
    GroupNewton,
    Moments,
    compute_moments,
    draw_subsets,
    featurize,
    parse_forget,
    train_models,
)
from examples.digits import task
from unlearning import (
    GradientProjection,
    Matching,
    ProjectedGradient,
    UnlearnedModels,
    UnlearningMethod,
    corrected_klom,
    klom,
    shift,
    spread,
    unlearn_models,
)
from unlearning.cost import hardware
from unlearning.klom import FEWEST_MODELS

MEASURES = {"klom": klom, "corrected": corrected_klom, "shift": shift, "spread": spread}


def distances(left: Any, right: Any, both: ForgetSet) -> dict[str, dict[str, float]]:
    """Means over the rows of each split, by measure."""
    rows = {
        "forget": both.rows,
        "retain": both.retained,
        "test": np.arange(len(task.train_ids), len(task.target_ids)),
    }
    found = {name: measure(left, right) for name, measure in MEASURES.items()}
    if len(left) < FEWEST_MODELS:
        del found["klom"]
    return {
        name: {split: float(values[where].mean()) for split, where in rows.items()}
        for name, values in found.items()
    }


def tell(title: str, found: dict[str, dict[str, float]]) -> None:
    """Prints one line of the table."""
    cells = [
        f"{name} " + " / ".join(f"{value:.2f}" for value in of.values())
        for name, of in found.items()
    ]
    print(f"  {title:30s}", "   ".join(cells))


def main() -> None:
    """Trains what is not there yet, sends the requests and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", default="runs/second_request")
    parser.add_argument("--models", type=int, default=100, help="of each bank")
    parser.add_argument("--rows", type=int, default=50, help="of each set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", help="also write the numbers as JSON")
    options = parser.parse_args()
    first, second = (
        parse_forget(task, f"random:{options.rows}:{options.seed + i}") for i in (0, 1)
    )
    both = first.union(task, second)
    at: dict[str, Any] = {"workers": options.workers}
    sizes = f"{options.models}-{options.rows}-{options.seed}"

    def trained(name: str, seed: int, **more: Any) -> Ensemble:
        subsets = draw_subsets(task, models=options.models, design="full", seed=seed, **more)
        where = f"{options.to}/{name}-{sizes}"
        return train_models(task, subsets, where, keep="weights", **at)

    banks = trained("full", 1), trained("others", 3)
    oracles = trained("oracles", 2, without=both)
    features = featurize(task, banks[0].checkpoints(8), to=f"{options.to}/features-{sizes}", **at)
    newton = GroupNewton(task, features)
    held = [compute_moments(bank, f"{bank.store.path}-moments", **at) for bank in banks]
    methods: dict[str, Callable[[Moments], UnlearningMethod]] = {
        "dmm": lambda _: Matching(newton),
        "dmm_pgu": lambda moments: Matching(newton, GradientProjection(moments)),
        # As all_methods.py tuned it.
        "pgu": lambda moments: ProjectedGradient(
            moments, rate=0.0751, last_rate=0.0799, gamma=0.828, entropy_weight=0.193
        ),
    }
    print(f"{hardware()}; {options.models} models a bank; two sets of {options.rows} random rows,"
          f" {len(both)} together; means over forget / retain / test rows")  # fmt: skip
    told = {}
    for name, made in methods.items():
        print(name)
        method, others = (made(moments) for moments in held)
        once = unlearn_models(others, banks[1], task, both)
        told[name] = compared(method, banks[0], (first, second, both), once, oracles)
    if options.out:
        Path(options.out).write_text(json.dumps(told, indent=1) + "\n")


def compared(
    method: UnlearningMethod,
    bank: Ensemble,
    sets: tuple[ForgetSet, ForgetSet, ForgetSet],
    others: UnlearnedModels,
    oracles: Ensemble,
) -> dict[str, Any]:
    """Prints and returns what one method gives, on the models of a bank."""
    first, second, both = sets
    before = unlearn_models(method, bank, task, first)
    ended = {
        "two requests": unlearn_models(method, before, task, second),
        "one request": unlearn_models(method, bank, task, both),
        "one, other bank": others,
    }
    told: dict[str, Any] = {"status": {"first request": before.status}}
    for who, after in ended.items():
        told["status"][who] = after.status
        if after is not others:
            told[f"{who}, to other bank"] = distances(after.margins, others.margins, both)
        told[f"{who}, to oracles"] = distances(after.margins, oracles.margins, both)
    for against in ("other bank", "oracles"):
        for title in (title for title in told if title.endswith(against)):
            tell(title, told[title])
    print("  ended:", ", ".join(f"{who} {of}" for who, of in told["status"].items()))
    return told


if __name__ == "__main__":
    main()
