"""Ridge regressions whose retrained solution is known in closed form, as tasks of the project."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from attribution import ForgetSet, Model, SquaredError, Task

Vector = np.ndarray[Any, np.dtype[np.float64]]

TEST_ROWS = 100
LABEL_NOISE = 0.5  # standard deviation; labels without noise have variance 1
LIKENESS = 0.5  # correlation of two rows of the coherent set
COMMON_SHIFT = 1.0  # added to the labels of the coherent set, in the unit of labels


@dataclass(frozen=True)
class Shape:
    """Size and spectrum of a problem: feature i has variance decay(i).

    Args:
        name: what tables call it.
        rows: number of training rows.
        variances: of the features, [feature].
    """

    name: str
    rows: int
    variances: Vector = field(repr=False)


def shapes(scale: int = 1) -> list[Shape]:
    """The four spectra of the suite.

    Args:
        scale: 1 for 80 rows and 400 features; 2 for half as many, and so on.

    Returns:
        Three problems of more features than rows, and one of fewer.
    """
    rows, features = 80 // scale, 400 // scale
    i = np.arange(1.0, features + 1)
    return [
        Shape("flat", rows, np.ones(features)),
        Shape("power law", rows, i**-0.5),
        Shape("exponential", rows, np.exp(-i * scale / 10)),
        Shape("few features", rows, np.ones(rows // 4)),
    ]


@dataclass(frozen=True)
class Problem:
    """Ridge regression, sum over rows of (x_i w - y_i)^2 / 2 + penalty |w|^2 / 2.

    The first tenth of the rows are alike and have labels shifted together.

    Args:
        shape: its size and spectrum.
        penalty: the regularisation, in the unit of a sum of losses.
        seed: of data and forget sets.
    """

    shape: Shape
    penalty: float
    seed: int

    @cached_property
    def _drawn(self) -> tuple[Vector, Vector, Vector, Vector]:
        random = np.random.default_rng([self.seed, 1])
        deviations = np.sqrt(self.shape.variances)
        n, d = self.shape.rows, len(deviations)
        x = random.standard_normal((n + TEST_ROWS, d))
        alike = n // 10
        x[:alike] = np.sqrt(1 - LIKENESS) * x[:alike] + np.sqrt(LIKENESS) * x[alike]
        x *= deviations
        truth = random.standard_normal(d) / np.sqrt(self.shape.variances.sum())
        y = x @ truth + LABEL_NOISE * random.standard_normal(len(x))
        y[:alike] += COMMON_SHIFT
        return x[:n], y[:n], x[n:], y[n:]

    @property
    def x(self) -> Vector:
        """Inputs of the training rows, [train, feature]."""
        return self._drawn[0]

    @property
    def y(self) -> Vector:
        """Labels of the training rows, [train]."""
        return self._drawn[1]

    @property
    def x_test(self) -> Vector:
        """Inputs of the test rows, [test, feature]."""
        return self._drawn[2]

    @cached_property
    def full(self) -> Vector:
        """Weights trained on all rows, [feature]."""
        return self.solution(np.arange(len(self.x)))

    def solution(self, rows: Any) -> Vector:
        """Weights trained on some rows, X^T (X X^T + penalty I)^-1 y, [feature]."""
        x, y = self.x[rows], self.y[rows]
        return np.asarray(x.T @ np.linalg.solve(x @ x.T + self.penalty * np.eye(len(x)), y))

    @cached_property
    def task(self) -> Task:
        """The problem as a task in float64; training is the closed form."""
        x, y, x_test, y_test = (torch.from_numpy(part) for part in self._drawn)
        width = x.shape[1]

        def train(indices: Any, seed: int, device: torch.device) -> dict[str, Tensor]:
            del seed
            return {"weight": torch.from_numpy(self.solution(indices))[None].to(device)}

        return Task(
            f"ridge, {self.shape.name}",
            TensorDataset(x, y),
            TensorDataset(x_test, y_test),
            model=lambda: nn.Linear(width, 1, bias=False, dtype=torch.float64),
            train=train,
            version="1",
            loss=SquaredError(),
            objective="sum",
        )

    @cached_property
    def model(self) -> Model:
        """The model trained on all rows."""
        return Model(self.task, {"weight": torch.from_numpy(self.full)[None]})

    @cached_property
    def forget_sets(self) -> dict[str, ForgetSet]:
        """A tenth of the rows: random ones, and those that are alike."""
        n = len(self.x)
        alike = np.arange(n // 10)
        random = np.random.default_rng([self.seed, 2])
        drawn = random.choice(np.arange(len(alike) + 1, n), len(alike), replace=False)
        return {
            "random": ForgetSet.at(self.task, drawn, "random"),
            "coherent": ForgetSet.at(self.task, alike, "coherent"),
        }
