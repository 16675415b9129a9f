"""Bring your own training: any function of (indices, seed, device) that returns a state dict.

Run it from the project's folder: python examples/own_training_loop.py
"""

import numpy as np
import torch
from torch import Tensor, nn

from attribution import ForgetSet, Oracle, Task, draw_subsets, fit_datamodels, train_models
from examples.digits import mlp, test, train
from unlearning import Matching

EPOCHS = 8
BATCH_SIZE = 64  # rows
RATE = 3e-3  # of AdamW, with a cosine schedule


def fit(indices: np.ndarray, seed: int, device: torch.device) -> dict[str, Tensor]:
    """A training loop as people write it; all its randomness comes from the seed."""
    torch.manual_seed(seed)
    inputs, labels = (tensor[indices].to(device) for tensor in train.tensors)
    model = mlp().to(device)
    batches = -(-len(indices) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * batches)
    for _ in range(EPOCHS):
        # Alike in size: a row of a short last batch would count for many.
        for rows in torch.randperm(len(indices)).tensor_split(batches):
            loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.state_dict()


# The version stands for the function in every store made with it: change it when fit changes.
task = Task("digits-own-loop", train, test, model=mlp, train=fit, version="2")


def main(models: int = 200, full_models: int = 20) -> None:
    """Few models, so that the example ends soon; more of them predict better."""
    subsets = draw_subsets(task, models=full_models, design="full", seed=1)
    full = train_models(task, subsets, to="runs/own/full", keep="weights")
    subsets = draw_subsets(task, models=models, design="half", seed=0)
    ensemble = train_models(task, subsets, to="runs/own/ensemble")
    datamodel = fit_datamodels(ensemble, anchor=full, to="runs/own/datamodel")

    forget = ForgetSet.at(task, range(100, 120))
    result = Matching(datamodel)(full.model(0), task, forget)
    print(f"{len(forget)} rows unlearned in {result.seconds:.2f} s")

    subsets = draw_subsets(task, models=full_models, design="full", without=forget, seed=2)
    oracle = Oracle(full, train_models(task, subsets, to="runs/own/oracles"))
    predicted, measured = (c.change(forget, targets=forget.rows).mean for c in (datamodel, oracle))
    print(f"correlation of predicted and measured changes of their logits:"
          f" {np.corrcoef(predicted.ravel(), measured.ravel())[0, 1]:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
