"""What every regression of outputs on masks shares: its models, their split, and its blocks."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attribution.ensemble import Ensemble
from attribution.gradients import output_cotangents
from attribution.seeds import generator
from attribution.task import Rows, Task
from stores import ArraySpec, Store, mapped

HELD_OUT = 0.2

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Problem:
    """The models that datamodels are regressed from.

    One more "model" with all rows, the mean of the full models weighted by their number, anchors
    the sum of the effects: subsets of one fixed size leave it undetermined. It is the last one.

    Args:
        task: tells the margins.
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
        masks = torch.from_numpy(self.ensemble.constant("mask")).to(self.number)
        return torch.cat([masks, torch.ones_like(masks[:1])])

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
        masks = self.ensemble.constant("mask")[self.held[self.judging].numpy()]
        own = torch.zeros(len(masks), targets.stop - targets.start, dtype=self.number)
        seen = masks[:, targets.start : targets.stop]
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
class Fitter(ABC):
    """A regression of one problem, ready to be run block by block.

    Args:
        problem: the models.
    """

    problem: Problem

    @property
    @abstractmethod
    def constants(self) -> Mapping[str, Numbers]:
        """What its store keeps beside the blocks."""

    @abstractmethod
    def work(self, path: str, top: int) -> Callable[[int], None]:
        """The function that fits and writes one block.

        Args:
            path: of the store.
            top: rows of either sign that are kept for each target.

        Returns:
            It.
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
    def column_bytes(self, sizes: Sizes, number: torch.dtype) -> int:
        """Memory that one target takes while its block is fitted."""

    @abstractmethod
    def prepared(self, models: Problem) -> Fitter:
        """Does what is done once for all targets."""
