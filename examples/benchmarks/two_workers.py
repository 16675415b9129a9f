"""Two worker processes against one, for models trained one by one: models per second.

python examples/benchmarks/two_workers.py prints both speeds and their ratio, measured in one run.
The digits MLP is trained by a user's own loop, so that each model is a block of its own; worker
processes are started before the clock is. One and two workers take turns, so that a busy machine
slows both; with fewer than two free cores the ratio says nothing.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from attribution import Task, draw_subsets, train_models
from attribution.task import Rows, State
from examples.digits import mlp, test, train
from stores import versions
from unlearning.cost import hardware

EPOCHS, BATCH, RATE, MOMENTUM = 30, 32, 0.1, 0.9


def plain_loop(indices: Rows, seed: int, device: torch.device) -> State:
    """Stochastic gradient descent as anyone writes it."""
    inputs, labels = (tensor[indices].to(device) for tensor in train.tensors)
    torch.manual_seed(seed)
    model = mlp().to(device)
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    return model.state_dict()


def seconds(task: Task, models: int, seed: int, workers: int, folder: str) -> float:
    """Seconds that so many models take so many worker processes, once these are there."""
    for count, kind in ((2 * workers, "first"), (models, "timed")):
        subsets = draw_subsets(task, models=count, design="half", seed=seed)
        start = time.perf_counter()
        train_models(task, subsets, Path(folder) / f"{kind}-{workers}-{seed}", workers=workers)
    return time.perf_counter() - start


def main() -> None:
    """Prints models per second of one and of two workers, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    task = Task("digits, own loop", train, test, mlp, train=plain_loop, version="1")
    speeds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for workers, found in speeds.items():
                taken = seconds(task, options.models, repeat, workers, folder)
                found.append(options.models / taken)
    print(f"{hardware()}; {versions('torch', 'numpy', 'distributed')}")
    print(f"{options.repeats} repeats of {options.models} models, median (range)")
    for workers, found in speeds.items():
        print(f"{workers} worker{'s' if workers > 1 else ''}: {_told(found)} models per second")
    print(f"ratio: {_told(list(np.divide(speeds[2], speeds[1])))}")


def _told(values: list[float]) -> str:
    return f"{median(values):.4g} ({min(values):.4g}-{max(values):.4g})"


if __name__ == "__main__":
    main()
