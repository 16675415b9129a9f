"""What every regression of outputs on masks shares: its models, their split, and its blocks."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attribution.ensemble import Ensemble
from attribution.gradients import output_cotangents
from attribution.scratch import Columns
from attribution.seeds import generator
from attribution.task import Rows, Task
from stores import ArraySpec, Store, mapped

HELD_OUT = 0.2
TOGETHER = 2**24  # outputs of the full models that are looked at together

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Problem:
    """The models that datamodels are regressed from.

    One more "model" with all rows, the mean of the full models weighted by their number, anchors
    the sum of the effects: subsets of one fixed size leave it undetermined. It is the last one.

    Args:
        task: tells the margins, and how the losses pull.
        ensemble: outputs of the models trained on subsets.
        anchor: outputs of the models trained on all rows.
        held: positions of the held-out models.
        judging: which of them are like a deletion request, positions in `held`.
        number: type of the arithmetic.
    """

    task: Task
    ensemble: Store
    anchor: Store
    held: Tensor
    judging: Tensor
    number: torch.dtype

    def masks(self) -> Tensor:
        """Rows that each model saw, [model, train]; the last saw all."""
        seen = torch.from_numpy(self.ensemble.map_constant("mask"))
        masks = torch.ones(len(seen) + 1, seen.shape[1], dtype=self.number)
        masks[:-1] = seen
        return masks

    def weights(self) -> Tensor:
        """Models that each stands for, [model]."""
        weights = torch.ones(self.ensemble.spec.length + 1)
        weights[-1] = self.anchor.spec.length
        return weights

    def outputs(self, targets: slice) -> Tensor:
        """Outputs of all models on some targets, [model, target, output]."""
        mean = _columns(self.anchor, targets).mean(0, dtype=np.float64)
        parts = _columns(self.ensemble, targets), mean[None]
        return torch.cat([torch.from_numpy(part).to(self.number) for part in parts])

    def noise(self, targets: slice) -> Numbers:
        """Spread of one retraining, [target, output]."""
        return np.asarray(_columns(self.anchor, targets).std(0, ddof=1, dtype=np.float64))

    def pulls(self) -> Tensor:
        """How much the loss of each row still pulls at its outputs, [train], float64.

        The length of its derivative with respect to them, mean over the models trained on all rows.
        """
        n = self.ensemble.map_constant("mask").shape[1]
        models, _, outputs = self.anchor.spec.array("outputs").shape
        step = max(1, TOGETHER // (models * outputs))
        spans = (slice(i, min(i + step, n)) for i in range(0, n, step))
        return torch.cat([self._pulls(span) for span in spans])

    def _pulls(self, rows: slice) -> Tensor:
        labels = self.task.targets(np.arange(rows.start, rows.stop))[1]
        models = torch.from_numpy(_columns(self.anchor, rows))
        each = [self.task.loss.gradient(one.double(), labels).norm(dim=1) for one in models]
        return torch.stack(each).mean(0)

    def slopes(self, targets: slice, outputs: Tensor) -> Tensor:
        """Derivatives of the margins at the full models' mean outputs, [target, output]."""
        labels = self.task.targets(np.arange(targets.start, targets.stop))[1]
        return output_cotangents(self.task.loss, outputs[-1], labels, "margin")[:, 0]

    def judged(self, residuals: Tensor, own: Tensor, outputs: Tensor, targets: slice) -> Tensor:
        """What the shrink factors are fitted from, on held-out models like a deletion request.

        Their change from the full models is regressed on the predicted changes by the own row and
        by all other rows.

        Args:
            residuals: outputs minus predictions by a fit without the held-out models, of these and
                of the last model, [held + 1, target, output].
            own: effect of each target's own row in that fit, [target, output].
            outputs: of all models, [model, target, output].
            targets: which.

        Returns:
            Sums over models and outputs of own x own, own x others, others x others, own x truth
            and others x truth, [target, 5].
        """
        truth = outputs[self.held[self.judging]] - outputs[-1]
        change = truth - residuals[self.judging] + residuals[-1]
        mine = self._own_removed(targets)[:, :, None] * own
        others = change - mine
        pairs = [(mine, mine), (mine, others), (others, others), (mine, truth), (others, truth)]
        return torch.stack([(a * b).sum((0, 2)) for a, b in pairs], 1)

    def _own_removed(self, targets: slice) -> Tensor:
        """-1 where a judging model did not see a target's own row, else 0, [judging, target]."""
        models = self.held[self.judging].numpy()
        seen = self.ensemble.map_constant("mask")[models, targets]
        own = torch.zeros(len(models), targets.stop - targets.start, dtype=self.number)
        own[:, : seen.shape[1]] = torch.from_numpy(seen).to(self.number) - 1
        return own


def problem(ensemble: Ensemble, anchor: Ensemble, seed: int, number: torch.dtype) -> Problem:
    """Splits the models and gathers what is needed to regress from them.

    Args:
        ensemble: models trained on subsets.
        anchor: models trained on all rows.
        seed: of the held-out split.
        number: type of the arithmetic.

    Returns:
        The problem.
    """
    held = _held_out(ensemble, seed)
    judging = torch.from_numpy(np.flatnonzero(ensemble.judges[held]))
    stores = ensemble.store, anchor.store
    return Problem(ensemble.task, *stores, torch.from_numpy(held), judging, number)


def _held_out(ensemble: Ensemble, seed: int) -> Rows:
    # The same share of judges and of others, and never no judge.
    order = generator(seed, "held-out models").permutation(len(ensemble))
    kinds = (order[ensemble.judges[order]], order[~ensemble.judges[order]])
    return np.sort(np.concatenate([kind[: math.ceil(HELD_OUT * len(kind))] for kind in kinds]))


def _columns(store: Store, targets: slice) -> Numbers:
    parts = (mapped(store, "outputs", block)[:, targets] for block in range(store.spec.blocks))
    return np.concatenate(list(parts))


@dataclass(frozen=True)
class Sizes:
    """Lengths of the axes.

    Args:
        models: trained on subsets.
        train: training rows.
        targets: targets.
        outputs: outputs of each.
    """

    models: int
    train: int
    targets: int
    outputs: int


@dataclass(frozen=True)
class Fitted:
    """What a regression found for some targets.

    Args:
        kept: what the effects are made of, [inner, target, output].
        bound: of the effects' sizes, [target, output].
        arrays: what stands beside the effects, by name, [target, ...]; the effect of each target's
            own row `own`, [target, output], among it.
    """

    kept: Tensor
    bound: Tensor
    arrays: Mapping[str, Tensor]


@dataclass(frozen=True)
class Solver(ABC):
    """A regression of one problem, ready to be run for some targets after the others.

    What is found once for all targets lies in the store as constants.

    Args:
        problem: the models.
    """

    problem: Problem

    @abstractmethod
    def inner(self, store: Store) -> int:
        """Numbers that are kept of each target and output."""

    @abstractmethod
    def fit(self, store: Store, outputs: Tensor, noise: Numbers, targets: slice) -> Fitted:
        """Regresses the outputs of some targets.

        Args:
            store: of the datamodel.
            outputs: of all models, [model, target, output].
            noise: spread of one retraining, [target, output].
            targets: which.

        Returns:
            What was found.
        """

    @abstractmethod
    def effects(self, store: Store, kept: Columns, rows: slice) -> Tensor:
        """Effects of some rows on all targets of a block; own rows' are put in their places later.

        Args:
            store: of the datamodel.
            kept: what was kept of these targets.
            rows: which.

        Returns:
            Effects, [row, target, output].
        """


@dataclass(frozen=True)
class Regression(ABC):
    """A way to regress outputs on masks, as a value."""

    name: ClassVar[str]
    sparse: ClassVar[bool]

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Its settings, as JSON."""

    @abstractmethod
    def arrays(self, sizes: Sizes, wide: str) -> dict[str, ArraySpec]:
        """Arrays that its store holds beside those of every regression.

        Args:
            sizes: lengths of the axes.
            wide: name of their type.

        Returns:
            By name.
        """

    @abstractmethod
    def step(self, sizes: Sizes, number: torch.dtype, most: int) -> int:
        """Targets that are fitted at once.

        Args:
            sizes: lengths of the axes.
            number: type of the arithmetic.
            most: bytes of memory that this may take, unless a single target takes more.

        Returns:
            How many.
        """

    @abstractmethod
    def constants(self, models: Problem) -> Mapping[str, Numbers]:
        """Does what is done once for all targets, and gives it for the store to keep."""

    @abstractmethod
    def solver(self, models: Problem) -> Solver:
        """What fits blocks of a store that has those constants."""
