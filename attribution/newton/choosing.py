"""Chooses group Newton's damping, temperature and number of steps on a calibration bank."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from attribution.cases import Case
from attribution.gradients import compute_curvatures
from attribution.losses import SquaredError
from attribution.newton.calibration import STEPS
from attribution.newton.group import GroupNewton
from attribution.newton.inverse import Damped, TooLittleDamping
from attribution.outputs import Array
from attribution.training import threads
from stores import ArraySpec, Place, Provenance, Store, StoreSpec, in_turns, run_blocks

Numbers = np.ndarray[Any, np.dtype[np.float64]]
Pair = tuple[float, float]  # T, and lambda in units of T^2 x (number of rows) x weight decay

STEPS_TO_CHOOSE = 2
LARGE = 1e300  # a store takes no infinity
APART = 4.0  # a candidate beyond the last one is so many times as large, or as small
MOST_BEYOND = 5
CASES_TOGETHER = 2  # for which one factor of the damped curvature is made
NEAR = 0.01  # what explains all but this share of what the best explains is as good


def choose(
    newton: GroupNewton,
    cases: Sequence[Case],
    to: Place,
    *,
    temperatures: Sequence[float],
    dampings: Sequence[float],
    settings: dict[str, Any],
    where: dict[str, Any],
) -> GroupNewton:
    """Group Newton with the damping, temperature and number of steps that err least on a bank.

    Errors e are shares of each set's own squared change, and 2 |e| / (1 + |e|) is averaged: 1 where
    no change is predicted, and never more than 2, because a set that hardly changes anything may be
    missed by several times its change and must not decide alone. They are estimated without bias
    from two checkpoints; one far below 0 tells that these differ widely, and is as bad.

    As long as the best damping is the smallest or the largest that was tried, one beyond it is
    tried as well, 4 times as small or as large, at most five times: with few epochs the training
    itself holds parameters near their start, much more than its weight decay does. Of numbers of
    steps the fewest is taken that explains all but 1 % of what the best explains: of the distance
    of its error from 1, the error of predicting no change.

    Args:
        newton: gives the features, and the number of steps where it has one.
        cases: the bank's forget sets.
        to: folder for the errors; an interrupted call resumes there.
        temperatures: candidates for T.
        dampings: candidates for lambda, in units of T^2 x (number of rows) x weight decay.
        settings: provenance of the errors.
        where: `workers` and `scheduler` of `run_blocks`.

    Returns:
        It, without calibration.
    """
    if isinstance(newton.task.loss, SquaredError):
        temperatures = (1.0,)  # there are no probabilities that could be too sharp
    search = _Search(replace(newton, calibration=None), cases, to, settings, where)
    pair = _best_pair(search, temperatures, dampings)
    compute_curvatures(newton.features, [pair[0]], **where)
    steps = _fewest_steps(search, pair) if newton.steps is None else newton.steps
    return search.candidate(pair, steps)


def _best_pair(search: "_Search", temperatures: Sequence[float], dampings: Sequence[float]) -> Pair:
    wanted = [(t, damping) for t in temperatures for damping in dampings]
    if len(wanted) == 1:
        return wanted[0]
    compute_curvatures(search.newton.features, temperatures, (0, 1), **search.where)
    errors: dict[Pair, float] = {}
    for number in range(1 + MOST_BEYOND):
        tried = [search.candidate(pair, STEPS_TO_CHOOSE) for pair in wanted]
        errors |= dict(zip(wanted, search.errors(f"round-{number}", tried), strict=True))
        # Where all are too little the largest is the nearest to one that is not.
        best = min(errors, key=lambda pair: (errors[pair], -pair[1]))
        beyond = _beyond(best[1], [damping for _, damping in errors])
        if beyond is None:
            return best
        wanted = [(t, beyond) for t in temperatures]
    if best[1] == max(damping for _, damping in errors):
        warnings.warn(
            f"the best damping on the calibration bank, {search.candidate(best, 1).damping:g}, is"
            " the largest that was tried: gradients of these checkpoints tell little of retraining",
            stacklevel=3,
        )
    return best


def _beyond(best: float, tried: Sequence[float]) -> float | None:
    """The next damping to try, where the best one is the last on either side."""
    if best == max(tried):
        return best * APART
    return best / APART if best == min(tried) else None


def _fewest_steps(search: "_Search", pair: Pair) -> int:
    numbers = range(1, STEPS + 1)
    errors = search.errors("steps", [search.candidate(pair, steps) for steps in numbers])
    near = errors.min() + NEAR * abs(1 - errors.min())
    return next(n for n, error in zip(numbers, errors, strict=True) if error <= near)


@dataclass(frozen=True)
class _Search:
    newton: GroupNewton
    cases: Sequence[Case]
    to: Place
    settings: dict[str, Any]
    where: dict[str, Any]

    def candidate(self, pair: Pair, steps: int) -> GroupNewton:
        """Group Newton with these settings."""
        temperature, damping = pair
        lambda_ = _unit_of_damping(self.newton) * temperature**2 * damping
        return replace(self.newton, temperature=temperature, damping=lambda_, steps=steps)

    def errors(self, name: str, candidates: Sequence[GroupNewton]) -> Numbers:
        """Each candidate's errors, bounded, mean over the bank's sets, [candidate]."""
        # Two checkpoints, the same object for all, so that their curvature is read once.
        few = self.newton.features.first(2)
        candidates = [replace(candidate, features=few) for candidate in candidates]
        shape, block = (len(self.cases), len(candidates)), min(CASES_TOGETHER, len(self.cases))
        arrays = {"errors": ArraySpec(("model", None), shape, "float64")}
        grid = [[c.temperature, c.damping, c.steps] for c in candidates]
        provenance = Provenance(self.settings | {"grid": grid})
        spec = StoreSpec("calibration-choice", "model", block, arrays)
        store = Store.open_or_create(self.to / f"choices-{name}", spec, provenance)
        if store.pending():
            work = in_turns(_Errors(tuple(candidates), tuple(self.cases), store.path), store)
            run_blocks(work, store.pending(), title="calibration", **self.where)
        found = store.finalize().numpy("errors")
        return np.asarray(np.where(found < LARGE, _bounded(found), LARGE).mean(0))


def _bounded(errors: Numbers) -> Numbers:
    return np.asarray(2 * np.abs(errors) / (1 + np.abs(errors)))


@dataclass(frozen=True)
class _Errors:
    candidates: tuple[GroupNewton, ...]
    cases: tuple[Case, ...] = field(repr=False)
    path: str

    def __call__(self, block: int) -> None:
        store = Store.open(self.path)
        with threads(1):
            errors = _errors(self.candidates, self.cases[store.spec.span(block)])
        store.write_block(block, {"errors": errors})


def _errors(candidates: Sequence[GroupNewton], cases: Sequence[Case]) -> Numbers:
    """Errors of the mean over two checkpoints, [case, candidate]; large with too little damping.

    What more checkpoints leave of its variance is alike for all.
    """
    found = np.full((len(cases), len(candidates)), LARGE)
    for (case, candidate), changes in _predicted(candidates, cases).items():
        if len(changes) == 2:
            found[case, candidate] = cases[case].error(*changes)
    return found


def _predicted(
    candidates: Sequence[GroupNewton], cases: Sequence[Case]
) -> dict[tuple[int, int], list[Array]]:
    """Changes that checkpoints predict, by numbers of the case and the candidate."""
    found: dict[tuple[int, int], list[Array]] = defaultdict(list)
    features = candidates[0].features
    for checkpoint in range(len(features)):
        for case, candidate, step in _steps(candidates, cases, checkpoint):
            change = features.product(checkpoint, step.numpy(), cases[case].targets)
            found[case, candidate].append(change)
    return found


def _steps(
    candidates: Sequence[GroupNewton], cases: Sequence[Case], checkpoint: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Steps of all candidates, each with the numbers of its case and candidate.

    A case is prepared once for a temperature, and all cases share the factor for a damping.
    """
    for numbers in _alike(range(len(candidates)), lambda n: candidates[n].temperature):
        newton = candidates[numbers[0]]
        groups = _alike(numbers, lambda n: candidates[n].damping)
        factors = [_damped(candidates[same[0]], checkpoint) for same in groups]
        for case, given in enumerate(cases):
            removal = newton.removal(checkpoint, given.forget)
            for same, damped in zip(groups, factors, strict=True):
                most = [candidates[n].most_steps for n in same]
                with suppress(TooLittleDamping):
                    for n, step in zip(same, removal.steps(damped, most), strict=True):
                        yield case, n, step


def _damped(candidate: GroupNewton, checkpoint: int) -> Damped:
    assert candidate.damping is not None
    # Of a copy, which does not keep it: more than those of one temperature would fill the memory.
    return replace(candidate).damped(checkpoint, candidate.damping)


def _alike(numbers: Iterable[int], key: Callable[[int], float | None]) -> list[list[int]]:
    groups: dict[float | None, list[int]] = {}
    for number in numbers:
        groups.setdefault(key(number), []).append(number)
    return list(groups.values())


def _unit_of_damping(newton: GroupNewton) -> float:
    recipe, rows = newton.task.recipe, len(newton.task.train_ids)
    if recipe is not None and recipe.weight_decay:
        return rows * recipe.weight_decay
    return float(np.diag(newton.features.curvature(0)).mean())
