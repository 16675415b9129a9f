"""Closed forms of what the methods do to a ridge regression: the reference of the suite."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from attribution import ForgetSet
from examples.convex.problems import Problem, Vector

TARGETS = ("first-order", "leverage", "group")


@dataclass(frozen=True)
class Theory:
    """What theory says about one problem and one forget set F.

    H = X^T X + penalty I over all rows; e are the residuals of the full model, h_i the leverage
    x_i^T H^-1 x_i. What removing F does to the weights is, by kind of target,

        first-order   sum_{i in F} H^-1 x_i e_i
        leverage      sum_{i in F} H^-1 x_i e_i / (1 - h_i)    each row exact, their sum not
        group         H^-1 X_F^T (I - X_F H^-1 X_F^T)^-1 e_F   exact (Woodbury)

    Args:
        problem: the ridge regression.
        forget: F.
    """

    problem: Problem
    forget: ForgetSet

    @cached_property
    def retrained(self) -> Vector:
        """Weights trained without F, [feature]."""
        return self.problem.solution(self.forget.retained)

    @cached_property
    def step(self) -> float:
        """Length of the way from the full to the retrained weights."""
        return float(np.linalg.norm(self.retrained - self.problem.full))

    def errors(self, path: Vector) -> Vector:
        """Distances |w - w*| from the retrained weights over the start's, of [..., feature]."""
        return np.asarray(np.linalg.norm(path - self.retrained, axis=-1) / self.step)

    def output_errors(self, path: Vector, split: str) -> Vector:
        """The same of the outputs on the forget, retain or test rows."""
        x = {
            "forget": self.problem.x[self.forget.rows],
            "retain": self.problem.x[self.forget.retained],
            "test": self.problem.x_test,
        }[split]
        start = np.linalg.norm(x @ (self.problem.full - self.retrained))
        return np.asarray(np.linalg.norm((path - self.retrained) @ x.T, axis=-1) / start)

    def predicted(self, kind: str) -> Vector:
        """Weights that a kind of target belongs to, [feature]."""
        x, y = self.problem.x, self.problem.y
        mine = x[self.forget.rows]
        e: Any = mine @ self.problem.full - y[self.forget.rows]
        h = x.T @ x + self.problem.penalty * np.eye(x.shape[1])
        spread = np.linalg.solve(h, mine.T)
        within = mine @ spread
        if kind == "leverage":
            e = e / (1 - np.diag(within))
        if kind == "group":
            e = np.linalg.solve(np.eye(len(e)) - within, e)
        return np.asarray(self.problem.full + spread @ e)

    def limit(self, outputs: Vector) -> Vector:
        """Where matching these outputs of all training rows by gradient descent ends, [feature].

        w + X^+ (outputs - X w), from the full weights w.
        """
        x, full = self.problem.x, self.problem.full
        return np.asarray(full + np.linalg.lstsq(x, outputs - x @ full, rcond=None)[0])

    def floor(self, kind: str) -> float:
        """Error that a kind of target leaves: |X^+ (targets - X w*)| over the start's error."""
        return float(self.errors(self.limit(self.problem.x @ self.predicted(kind))))

    @cached_property
    def matching(self) -> "Quadratic":
        """The curvature X^T X of matching, on all rows; the penalty has no part in it."""
        return Quadratic.of(self.problem.x, 0.0)

    @cached_property
    def descent(self) -> "Quadratic":
        """The curvature X_R^T X_R + penalty I of gradient descent on the retain rows."""
        return Quadratic.of(self.problem.x[self.forget.retained], self.problem.penalty)

    def matched(self, kind: str, steps: Any) -> Vector:
        """Weights on the way to a kind of target, [step, feature]."""
        return self.matching.path(
            self.problem.full, self.limit(self.problem.x @ self.predicted(kind)), steps
        )

    def descended(self, steps: Any) -> Vector:
        """Weights of gradient descent on the retain rows, [step, feature]."""
        return self.descent.path(self.problem.full, self.retrained, steps)

    def noise(self, deviation: float, steps: int) -> float:
        """Expected distance of noisy gradient descent from the one without, over the start's.

        With r_j = 1 - rate x curvature_j: sqrt(sum_j s^2 (1 - r_j^(2 steps)) / (1 - r_j^2)).

        Args:
            deviation: s, of the noise that each weight gets at each step.
            steps: number of steps.
        """
        shrink = (1 - self.descent.rate * self.descent.values) ** 2
        return float(np.sqrt(deviation**2 * ((1 - shrink**steps) / (1 - shrink)).sum())) / self.step


@dataclass(frozen=True)
class Quadratic:
    """A quadratic objective: its curvatures, and gradient descent on it at the best fixed rate.

    Args:
        values: curvatures in all directions, [direction].
        directions: [direction, feature].
        moved: whether gradient descent moves along a direction.
    """

    values: Vector
    directions: Vector
    moved: Any

    @classmethod
    def of(cls, x: Vector, penalty: float) -> "Quadratic":
        """The quadratic of curvature X^T X + penalty I."""
        _, singular, directions = np.linalg.svd(x)
        values = np.full(x.shape[1], penalty)
        values[: len(singular)] += singular**2
        return cls(values, directions, values > 1e-12 * values[0])

    @property
    def condition(self) -> float:
        """Largest over smallest curvature, L / mu, of the directions that are moved along."""
        found = self.values[self.moved]
        return float(found.max() / found.min())

    @property
    def rate(self) -> float:
        """2 / (L + mu)."""
        found = self.values[self.moved]
        return float(2 / (found.max() + found.min()))

    def path(self, start: Vector, end: Vector, steps: Any) -> Vector:
        """Weights after so many steps of size `rate`, end + (I - rate A)^k (start - end)."""
        shrink = (1 - self.rate * self.values) ** np.asarray(steps)[:, None]
        return np.asarray(end + (shrink * (self.directions @ (start - end))) @ self.directions)
