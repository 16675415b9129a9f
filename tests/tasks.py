"""Tiny tasks, and ensembles written by hand, shared by the tests."""

import functools

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import TensorDataset

from attribution import BinaryCrossEntropy, Ensemble, Recipe, SquaredError, Task
from stores import ArraySpec, Provenance, Store, StoreSpec

RECIPE = Recipe(epochs=3, batch_size=8, peak_rate=0.1)
DECAYING = Recipe(epochs=30, batch_size=32, peak_rate=0.02, weight_decay=1e-2)
SPLIT = slice(0, 340), slice(340, None)
CPU = torch.device("cpu")


def small_mlp():
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


def normalised_mlp():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


def blob_data(rows, seed):
    """Two classes in three dimensions, their rows taking turns."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 2
    return TensorDataset(torch.randn(rows, 3, generator=random) + 1.5 * labels[:, None], labels)


def blobs(rows=37, test_rows=11, **changes):
    fields = {"model": small_mlp, "recipe": RECIPE} | changes
    return Task("blobs", blob_data(rows, 1), blob_data(test_rows, 2), **fields)


def binary(rows=37, test_rows=11, **changes):
    """One logit; labels are 0.0 and 1.0."""
    parts = (blob_data(count, seed).tensors for count, seed in ((rows, 1), (test_rows, 2)))
    data = [TensorDataset(inputs, labels.float()) for inputs, labels in parts]
    hidden = lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))  # noqa: E731
    fields = {"model": hidden, "recipe": RECIPE, "loss": BinaryCrossEntropy()}
    return Task("binary", *data, **(fields | changes))


def line_data(rows, seed, dtype=torch.float32):
    """Four features and a noisy linear label."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 4, generator=random, dtype=dtype)
    noise = torch.randn(rows, generator=random, dtype=dtype)
    slopes = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=dtype)
    return TensorDataset(inputs, inputs @ slopes + 3 + 0.3 * noise)


def line(rows=37, test_rows=11, **changes):
    fields = {"model": lambda: nn.Linear(4, 1), "recipe": RECIPE, "loss": SquaredError()}
    return Task("line", line_data(rows, 1), line_data(test_rows, 2), **(fields | changes))


@functools.cache
def diabetes_data():
    """Scikit-learn's diabetes, inputs and labels with mean 0 and standard deviation 1."""
    inputs, labels = load_diabetes(return_X_y=True)
    parts = ((values - values.mean(0)) / values.std(0) for values in (inputs, labels))
    return [torch.tensor(part, dtype=torch.float32) for part in parts]


def diabetes(**changes):
    """Progression of a disease from ten measurements; 340 training and 102 test rows."""
    inputs, labels = diabetes_data()
    train, test = (TensorDataset(inputs[rows], labels[rows]) for rows in SPLIT)
    fields = {"model": lambda: nn.Linear(10, 1), "recipe": DECAYING, "loss": SquaredError()}
    return Task("diabetes", train, test, **(fields | changes))


def ridge_training(data, penalty):
    """A user's own training: ridge with a free intercept, by least squares on more rows."""

    def train(indices, seed, device):
        del seed, device
        inputs, labels = data.tensors[0][indices], data.tensors[1][indices]
        width = inputs.shape[1]
        means = inputs.mean(0), labels.mean()
        more = penalty**0.5 * torch.eye(width, dtype=inputs.dtype)
        wanted = torch.cat([labels - means[1], torch.zeros(width, dtype=inputs.dtype)])
        weight = torch.linalg.lstsq(torch.cat([inputs - means[0], more]), wanted).solution
        return {"weight": weight[None], "bias": (means[1] - means[0] @ weight)[None]}

    return train


def ridge_task(rows=31, test_rows=9, penalty=2.0, **changes):
    """Linear regression in float64 with the user's own closed-form training."""
    train, test = (
        line_data(count, seed, torch.float64) for seed, count in ((1, rows), (2, test_rows))
    )
    fields = {
        "model": lambda: nn.Linear(4, 1, dtype=torch.float64),
        "train": ridge_training(train, penalty),
        "version": "1",
        "loss": SquaredError(),
    }
    return Task("ridge", train, test, **(fields | changes))


def write_ensemble(path, task, masks, outputs, *, without=(), judges=None, block=5):
    """An ensemble whose masks [model, train] and outputs [model, target, output] are given."""
    array = ArraySpec(("model", "target", "output"), outputs.shape, outputs.dtype.name)
    store = Store.create(
        path,
        StoreSpec("ensemble", "model", min(block, len(outputs)), {"outputs": array}),
        Provenance({"written": "by hand"}),
        constants={
            "mask": masks,
            "judge": np.ones(len(masks), dtype=bool) if judges is None else judges,
        },
        ids={"train": task.train_ids, "target": task.target_ids},
        attributes={"design": "half", "seed": 0, "without": list(without), "keys": []},
    )
    for number in store.pending():
        store.write_block(number, {"outputs": outputs[store.spec.span(number)]})
    return Ensemble.open(store.finalize().path, task)
