"""Time of one group Newton query: 100 forget rows, 1,024 features, 10 logits, 5,000 targets, warm.

python examples/benchmarks/newton_query.py makes a task of 2,000 training and 3,000 test rows,
stores the gradients of 8 untrained checkpoints in a temporary folder (1.6 GB) and prints seconds
per checkpoint and for all 8, for one Newton step and for the linearised problem solved (3 steps).
"""

import argparse
import tempfile
import time
from statistics import median

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from attribution import GroupNewton, Model, Projection, Recipe, Task, featurize, parse_forget
from attribution.training import threads
from unlearning.cost import hardware


def mlp() -> nn.Module:
    """An MLP 64-32-32-10, whose features are 2 x 16 x 26 and 10 x 19 at the sizes below."""
    return nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def rows(count: int, seed: int) -> TensorDataset:
    """Random rows and labels."""
    random = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(count, 64, generator=random), torch.randint(10, (count,), generator=random)
    )


def main() -> None:
    """Prints the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpoints", type=int, default=8)
    options = parser.parse_args()
    recipe = Recipe(epochs=1, batch_size=32, peak_rate=0.1)
    task = Task("query", rows(2000, 0), rows(3000, 1), model=mlp, recipe=recipe)
    models = [Model(task, task.new_model(0, i).state_dict()) for i in range(options.checkpoints)]
    forget = parse_forget(task, "random:100:0")
    targets = np.arange(len(task.target_ids))
    with tempfile.TemporaryDirectory() as folder, threads(options.threads):
        sizes = Projection(inputs=25, outputs=16)
        features = featurize(task, models, f"{folder}/features", projection=sizes, workers=None)
        print(f"{hardware()}; {options.threads} threads; k = {features.width},"
              f" {len(targets)} targets; median of {options.repeats} (range)")  # fmt: skip
        for steps in (1, 3):
            newton = GroupNewton(task, features, damping=1.0, steps=steps)
            newton.change(forget)
            taken = []
            for _ in range(options.repeats):
                start = time.perf_counter()
                newton.change(forget)
                taken.append(time.perf_counter() - start)
            each = [seconds / len(models) for seconds in taken]
            print(f"{steps} Newton step(s): {_told(each)} s a checkpoint,"
                  f" {_told(taken)} s for {len(models)}")  # fmt: skip


def _told(values: list[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


if __name__ == "__main__":
    main()
