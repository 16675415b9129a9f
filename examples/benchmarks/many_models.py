"""Train many small models at once against one by one: models per second and their ratio.

python examples/benchmarks/many_models.py prints both and the ratio, measured in one run. One by
one is a plain PyTorch loop as fast as we can write it: tensors in memory, no DataLoader, fused
SGD, on 1 and on 2 threads, the better of them. Many at once is `train_models` on as many worker
processes as there are cores. The two are timed in turns, so that a busy machine slows both.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from attribution import draw_subsets, train_models
from attribution.training import threads
from examples.digits import task
from stores import versions
from unlearning.cost import hardware


def one_by_one(seed: int, threads_used: int) -> float:
    """Seconds to train one model in a plain loop."""
    recipe = task.recipe
    assert recipe is not None
    inputs, labels = task.rows("train", np.arange(len(task.train_ids)))
    with threads(threads_used):
        start = time.perf_counter()
        torch.manual_seed(seed)
        model = task.model()
        optimizer = torch.optim.SGD(
            model.parameters(),
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        rates = iter(recipe.rates(recipe.steps(len(inputs))))
        for _ in range(recipe.epochs):
            for rows in torch.randperm(len(inputs)).split(recipe.batch_size):
                optimizer.param_groups[0]["lr"] = next(rates)
                loss = cross_entropy(model(inputs[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return time.perf_counter() - start


def many_at_once(models: int, repeat: int, folder: str, workers: int | None) -> float:
    """Seconds a model of an ensemble, its outputs computed and stored."""
    subsets = draw_subsets(task, models=models, design="full", seed=repeat)
    start = time.perf_counter()
    train_models(task, subsets, to=Path(folder) / str(repeat), workers=workers)
    return (time.perf_counter() - start) / models


def main() -> None:
    """Prints both speeds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=None)
    options = parser.parse_args()
    alone: dict[int, list[float]] = {1: [], 2: []}
    together = []
    with tempfile.TemporaryDirectory() as folder:
        # The first call starts the worker processes, which later calls keep.
        many_at_once(100, options.repeats, folder, options.workers)
        for repeat in range(options.repeats):
            for count, taken in alone.items():
                taken.append(one_by_one(repeat, count))
            together.append(many_at_once(options.models, repeat, folder, options.workers))
    print(f"{hardware()}; {versions('torch')}; {options.repeats} repeats, median (range)")
    for count, taken in alone.items():
        print(f"one by one, {count} threads: {_told(taken)} s a model")
    print(f"{options.models} at once: {_told(together)} s a model")
    best = min(alone.values(), key=median)
    ratios = [a / b for a, b in zip(best, together, strict=True)]
    print(f"ratio: {_told(ratios)}")


def _told(values: list[float]) -> str:
    return f"{median(values):.4g} ({min(values):.4g}-{max(values):.4g})"


if __name__ == "__main__":
    main()
