"""ResNet-9 on all of CIFAR-10, for a GPU: what each step takes, and what a request comes to.

python examples/benchmarks/resnet9.py trains models on all rows, stores projected
gradients of one of them, predicts what forgetting a random and a coherent set would do, unlearns
each by matching that prediction, by matching the retrained models themselves (om) and by PGU, and
holds the results against models retrained without the set. Group Newton is uncalibrated here, so
several dampings and temperatures are shown; dmm takes the last. Seconds are of one run each, costs
are shares of one training of one model. Margins as they are and retrained are means over models,
those of a request are of the first model alone.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from attribution import (
    Ensemble,
    ForgetSet,
    GroupNewton,
    Model,
    Moments,
    Oracle,
    Task,
    compute_moments,
    draw_subsets,
    featurize,
    parse_forget,
    train_models,
)
from attribution.gradients import Projection
from attribution.outputs import target_margins
from attribution.training import train_one
from examples.cifar import cifar10_from, images
from unlearning import Matching, ProjectedGradient, UnlearningMethod
from unlearning.cost import hardware

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETS = ("random:500:0", "cluster:500:0")
SIZES = Projection(inputs=16, outputs=8, features=128)
Result = TypeVar("Result")
Margins = np.ndarray[Any, Any]


def timed(name: str, action: Callable[[], Result]) -> tuple[Result, float]:
    """What an action gives, and its seconds, which are printed."""
    start = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    print(f"{name}: {taken:.1f} s", flush=True)
    return result, taken


def trained(task: Task, to: Path, models: int, without: ForgetSet | None) -> Ensemble:
    """Models trained on all rows, or on all but a forget set."""
    subsets = draw_subsets(task, models=models, design="full", without=without, seed=1)
    return train_models(task, subsets, to, keep="weights", device=DEVICE, workers=0)


def told(task: Task, forget: ForgetSet, margins: Margins) -> str:
    """Mean margin and accuracy on the forgotten rows and on the test rows, over models."""
    test = np.arange(len(task.train_ids), len(task.target_ids))
    parts = (margins[..., forget.rows], margins[..., test])
    return ", ".join(
        f"{name} margin {part.mean():6.2f} accuracy {100 * (part > 0).mean():5.1f} %"
        for name, part in zip(("forget", "test"), parts, strict=True)
    )


def compare(
    full: Ensemble, newton: list[GroupNewton], moments: Moments, one: float, options: Any
) -> None:
    """One forget set after the other: predictions, unlearned models, retrained ones."""
    task = full.task
    settings = {"passes": options.passes, "rate": options.rate}
    for spec in options.forget:
        forget, to = parse_forget(task, spec), options.to / spec.replace(":", "-")
        print(f"\n{spec}")
        retrained, _ = timed(
            f"retraining {options.models} models, what was there before not counted",
            lambda: trained(task, to, options.models, forget),  # noqa: B023
        )
        print(f"  as it is   {told(task, forget, full.margins)}")
        print(f"  retrained  {told(task, forget, retrained.margins)}")
        wanted = (retrained.margins.mean(0) - full.margins.mean(0))[forget.rows]
        for predictor in newton:
            change = predictor.change(forget, None, forget.rows).mean
            moved = full.outputs[0][forget.rows] + change
            margins = _margins(task, full.outputs[0], forget, moved)
            found = margins - full.margins[0][forget.rows]
            slope, corr = (found @ wanted) / (found @ found), np.corrcoef(found, wanted)[0, 1]
            print(
                f"  predicted at damping {predictor.damping:g}, temperature"
                f" {predictor.temperature:g}: change of margins {found.mean():.2f}, measured"
                f" {wanted.mean():.2f}, slope {slope:.2f}, correlation {corr:.2f}"
            )
        methods = {
            "dmm": Matching(newton[-1], **settings),
            "om": Matching(Oracle(full, retrained), **settings),
            "pgu": ProjectedGradient(moments),
        }
        for name, method in methods.items():
            print(f"  {name:10s} {request(method, full.model(0), forget, one)}", flush=True)


def request(method: UnlearningMethod, model: Model, forget: ForgetSet, one: float) -> str:
    """One request in words: where it ends, its seconds and its share of a retraining."""
    result = method(model, model.task, forget, device=DEVICE)
    margins = target_margins(model.task, result.model.outputs(device=DEVICE))
    share = 100 * result.seconds / one
    return (
        f"{told(model.task, forget, margins)}; {result.seconds:.2f} s, {share:.1f} % of a"
        f" retraining, {result.status}"
    )


def _margins(task: Task, outputs: Margins, forget: ForgetSet, moved: Margins) -> Margins:
    every = outputs.copy()
    every[forget.rows] = moved
    return target_margins(task, every)[forget.rows]


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("runs/resnet9"))
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--damping", type=float, nargs="+", default=[25.0, 250.0, 2500.0])
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--passes", type=float, default=0.3, help="of matching")
    parser.add_argument("--rate", type=float, default=1e-4, help="of matching")
    parser.add_argument("--forget", nargs="+", default=SETS, metavar="SPEC")
    options = parser.parse_args()
    print(f"{hardware()}; torch {torch.__version__}")
    task, _ = timed("reading CIFAR-10", lambda: cifar10_from(images()))
    assert task.recipe is not None
    task = replace(task, recipe=replace(task.recipe, epochs=options.epochs))
    to = options.to
    full, _ = timed(
        f"training {options.models} models, {options.epochs} epochs",
        lambda: trained(task, to / "full", options.models, None),
    )
    moments, _ = timed(
        "moments for PGU", lambda: compute_moments(full, to / "moments", device=DEVICE)
    )
    features, _ = timed(
        "projected gradients of one model",
        lambda: featurize(
            task, full.checkpoints(1), to / "features", projection=SIZES, device=DEVICE
        ),
    )
    rows, outputs = len(task.target_ids), task.new_model(0)(task.targets([0])[0]).shape[1]
    print(f"  {rows} rows x {outputs} outputs x {features.width} features")
    newton = [
        GroupNewton(task, features, damping=damping, temperature=temperature, steps=1)
        for temperature in options.temperature
        for damping in options.damping
    ]
    for temperature in options.temperature:
        timed(f"curvature at {temperature:g}", lambda: features.curvature(0, temperature))  # noqa: B023
    _, one = timed(
        "training of one model alone",
        lambda: train_one(task, np.arange(len(task.train_ids)), 0, 0, torch.device(DEVICE)),
    )
    compare(full, newton, moments, one, options)


if __name__ == "__main__":
    main()
