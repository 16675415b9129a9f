"""Handwritten digits (scikit-learn, 8x8 pixels, 1,437 train and 360 test rows) and a small MLP."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from attribution import Recipe, Task


def _data() -> tuple[TensorDataset, TensorDataset]:
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=360, random_state=0)
    x_train, x_test = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    y_train, y_test = (torch.tensor(part) for part in parts[2:])
    return TensorDataset(x_train, y_train), TensorDataset(x_test, y_test)


def mlp() -> nn.Module:
    """An MLP 64-64-64-10 with ReLU: 8,970 parameters."""
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


train, test = _data()

task = Task(
    "digits",
    train,
    test,
    model=mlp,
    recipe=Recipe(epochs=30, batch_size=32, peak_rate=0.1, momentum=0.9, weight_decay=5e-4),
)
