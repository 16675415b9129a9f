"""Runs every method on every problem of the suite."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attribution.task import Rows
from examples.convex.methods import counterfactuals, methods, noise_deviation, oracle
from examples.convex.problems import Problem, Vector, shapes
from examples.convex.theory import TARGETS, Theory

PENALTIES = (0.01, 1.0, 100.0)
EARLY = 50  # steps
REACHED = 1e-6  # error at which a method has arrived at the retrained solution
CLEAR = 1.25  # factor by which a winner is ahead
GRADIENT, GROUP = "gradient descent", "matching, group"
SPLITS = ("forget", "retain", "test")


@dataclass(frozen=True)
class Errors:
    """Errors of one method on one problem and forget set, over those of the full model.

    Args:
        weights: |w - w*| / |w0 - w*|, [seed, mark].
        outputs: the same of the outputs on the rows of a split, by split.
    """

    weights: Vector
    outputs: Mapping[str, Vector]


@dataclass(frozen=True)
class Result:
    """One problem and one kind of forget set, over seeds.

    Args:
        shape: name of the spectrum.
        penalty: the regularisation.
        forget: kind of forget set.
        marks: numbers of steps, [mark].
        errors: by method.
        floors: error that a kind of target leaves, by theory, each [seed].
        conditions: condition numbers of gradient descent and of matching, each [seed].
        noise: expected error of noisy descent from its noise alone at the last step, [seed].
    """

    shape: str
    penalty: float
    forget: str
    marks: Rows
    errors: Mapping[str, Errors]
    floors: Mapping[str, Vector]
    conditions: Mapping[str, Vector]
    noise: Vector

    @property
    def name(self) -> str:
        """Spectrum, regularisation and forget set in words."""
        return f"{self.shape}, penalty {self.penalty:g}, {self.forget} rows"

    def median(self, method: str) -> Vector:
        """Median over seeds of the weights' error, [mark]."""
        return np.asarray(np.median(self.errors[method].weights, axis=0))

    def arrival(self, method: str) -> int | None:
        """The first mark at which the median error is at most 1e-6."""
        there = np.flatnonzero(self.median(method) <= REACHED)
        return int(self.marks[there[0]]) if len(there) else None

    @property
    def winner(self) -> str:
        """Gradient descent or matching group targets: which clearly arrives first.

        "both" if the later one takes less than 1.25 times as many steps, "none" if no one arrives.
        """
        arrivals = {name: self.arrival(name) for name in (GRADIENT, GROUP)}
        there = {name: at for name, at in arrivals.items() if at is not None}
        if not there:
            return "none"
        ahead, behind = min(there, key=lambda name: there[name]), max(there.values())
        return ahead if len(there) == 1 or behind >= CLEAR * there[ahead] else "both"


def marks_until(steps: int) -> Rows:
    """Numbers of steps at which errors are measured: 0, then about evenly in the logarithm."""
    return np.unique([0, EARLY, *np.geomspace(1, steps, 60).round().astype(np.int64)])


def run(
    seeds: Sequence[int] = range(5),
    *,
    steps: int = 1000,
    penalties: Sequence[float] = PENALTIES,
    scale: int = 1,
    names: Sequence[str] | None = None,
) -> list[Result]:
    """Runs the suite.

    Args:
        seeds: of data, forget sets and noise; one repeat each.
        steps: budget of every method.
        penalties: regularisations.
        scale: 1 for problems of full size, 2 for half of it.
        names: of the spectra; None: all.

    Returns:
        A result for each spectrum, penalty and kind of forget set.
    """
    marks = marks_until(steps)
    chosen = [shape for shape in shapes(scale) if names is None or shape.name in names]
    results = []
    for shape in chosen:
        for penalty in penalties:
            repeats = [_measure(Problem(shape, penalty, seed), marks) for seed in seeds]
            results += [
                _gathered((shape.name, penalty, kind), marks, [one[kind] for one in repeats])
                for kind in repeats[0]
            ]
    return results


@dataclass(frozen=True)
class _Measured:
    theory: Theory
    paths: Mapping[str, Vector]


def _measure(problem: Problem, marks: Rows) -> dict[str, _Measured]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        targets = counterfactuals(problem, folder)
        for kind, forget in problem.forget_sets.items():
            theory = Theory(problem, forget)
            every = methods(targets | {"oracle": oracle(problem, forget, folder)})
            found[kind] = _Measured(theory, {n: path(theory, marks) for n, path in every.items()})
    return found


def _gathered(key: tuple[str, float, str], marks: Rows, each: Sequence[_Measured]) -> Result:
    theories = [one.theory for one in each]
    return Result(
        *key,
        marks,
        errors={name: _errors([(m.theory, m.paths[name]) for m in each]) for name in each[0].paths},
        floors={kind: np.array([theory.floor(kind) for theory in theories]) for kind in TARGETS},
        conditions={
            GRADIENT: np.array([theory.descent.condition for theory in theories]),
            GROUP: np.array([theory.matching.condition for theory in theories]),
        },
        noise=np.array([t.noise(noise_deviation(t.problem), int(marks[-1])) for t in theories]),
    )


def _errors(each: Iterable[tuple[Theory, Vector]]) -> Errors:
    weights, outputs = [], []
    for theory, path in each:
        weights.append(theory.errors(path))
        outputs.append({split: theory.output_errors(path, split) for split in SPLITS})
    return Errors(
        np.array(weights), {split: np.array([one[split] for one in outputs]) for split in SPLITS}
    )


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results as plain values."""
    return [
        {
            "shape": result.shape,
            "penalty": result.penalty,
            "forget": result.forget,
            "steps": result.marks.tolist(),
            "winner": result.winner,
            "errors": {
                name: {"weights": found.weights.tolist()}
                | {split: values.tolist() for split, values in found.outputs.items()}
                for name, found in result.errors.items()
            },
            "floors": {kind: values.tolist() for kind, values in result.floors.items()},
            "conditions": {name: values.tolist() for name, values in result.conditions.items()},
            "noise": result.noise.tolist(),
        }
        for result in results
    ]
