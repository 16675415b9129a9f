"""What a short last batch does to retrained models: outputs depend on the number of rows.

python examples/benchmarks/last_batch.py trains models of the digits by a plain loop that cuts
epochs in two ways: `split(32)` leaves a last batch of what is over, those of `tensor_split` are
alike in size. Each way it trains on all rows and without 58 to 62 random rows, others for each
model, and prints the root mean square of the change of the mean logits of test rows, less what the
noise of so many models adds. Nothing about the rows differs between 59, 60 and 61 of them, but
without 60 the last batch of `split` holds a single row. About four minutes on two cores.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attribution import Ensemble, Subsets, Task, train_models
from attribution.seeds import generator
from examples.digits import mlp, task, train
from unlearning.cost import hardware

SIZES = (0, 58, 59, 60, 61, 62)
BATCH_SIZE = 32

Cut = Callable[[Tensor], Sequence[Tensor]]
CUTS: dict[str, Cut] = {
    "split": lambda order: order.split(BATCH_SIZE),
    "tensor_split": lambda order: order.tensor_split(-(-len(order) // BATCH_SIZE)),
}


def fit(cut: str, indices: Any, seed: int, device: torch.device) -> dict[str, Tensor]:
    """The recipe of the digits as a loop of one's own."""
    torch.manual_seed(seed)
    inputs, labels = (tensor[indices].to(device) for tensor in train.tensors)
    model, recipe = mlp().to(device), task.recipe
    assert recipe is not None
    settings = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, **settings)
    orders = [torch.randperm(len(indices)) for _ in range(recipe.epochs)]
    batches = [rows for order in orders for rows in CUTS[cut](order)]
    for rows, rate in zip(batches, recipe.rates(len(batches)), strict=True):
        optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
    return model.state_dict()


def ensemble(own: Task, size: int, models: int, folder: str) -> Ensemble:
    """Models that each lack so many random rows of their own."""
    n = len(own.train_ids)
    masks = np.ones((models, n), dtype=bool)
    for index, mask in enumerate(masks):
        mask[generator(size, "lacking", index).choice(n, size, replace=False)] = False
    subsets = Subsets(masks, "random rows", size, np.ones(models, dtype=bool))
    return train_models(own, subsets, f"{folder}/{own.name}-{size}", workers=2)


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=100, help="of each size and cut")
    options = parser.parse_args()
    print(f"{hardware()}; {options.models} models each")
    for name in CUTS:
        own = replace(task, name=name, recipe=None, train=partial(fit, name), version="1")
        with tempfile.TemporaryDirectory() as folder:
            found = {
                size: ensemble(own, size, options.models, folder).outputs[:, len(own.train_ids) :]
                for size in SIZES
            }
        noise = {
            size: outputs.var(0, ddof=1).mean() / len(outputs) for size, outputs in found.items()
        }
        for size in SIZES[1:]:
            change = np.square(found[size].mean(0) - found[0].mean(0)).mean()
            left = (len(own.train_ids) - size) % BATCH_SIZE
            clean = np.sqrt(max(change - noise[0] - noise[size], 0))
            print(f"{name:13s} without {size} rows ({left:2d} over): logits move by {clean:.3f}")


if __name__ == "__main__":
    main()
