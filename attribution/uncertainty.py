"""How sure stored effects are: of regressed ones, and of averages over a few checkpoints."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from attribution.outputs import Array
from attribution.task import Rows
from stores import Store

_MASKS = 2**22  # numbers of masks that are looked at together


class Uncertainty(ABC):
    """Error bars of sums of stored effects, and the factors that such sums are trusted by."""

    @property
    @abstractmethod
    def shrink(self) -> tuple[float, float]:
        """Factors of a target's own row and of other rows, >= 0."""

    @abstractmethod
    def std(self, rows: Rows, mine: Any, targets: Rows) -> Array:
        """Standard deviation of the mean change.

        Args:
            rows: removed rows.
            mine: whether the target's own row is among them, [target].
            targets: positions.

        Returns:
            [target, output].
        """

    @abstractmethod
    def noise(self, targets: Rows) -> Array:
        """Spread of one retraining, [target, output]."""


@dataclass(frozen=True)
class RidgePosterior(Uncertainty):
    """Of effects regressed by ridge on the masks of retrained models.

    With s_i the scale of row i, v the sum of the removed rows' rotated masks, each times its scale,
    and D = 1 / (S + lambda), the variance is variance / lambda x [sum_F s_i^2 - v D v]. Where own
    rows are not penalised the sums leave the own row out, and with a its rotated mask and f its
    scale if it is in F, else 0, (f - a D v)^2 / (a D a) - f^2 comes to the bracket.

    Args:
        store: of fitted datamodels.
    """

    store: Store = field(repr=False)

    @cached_property
    def shrink(self) -> tuple[float, float]:
        """Factors fitted on held-out models."""
        return _fitted_factors(self.store)

    def std(self, rows: Rows, mine: Any, targets: Rows) -> Array:
        """Standard deviation of the ridge posterior."""
        chosen, lambdas = self._small["chosen"][targets], self.store.map_constant("lambdas")
        summed, brackets = self._summed(rows), np.zeros(len(targets))
        for number in np.unique(chosen):
            some = chosen == number
            penalty = float(lambdas[number])
            brackets[some] = self._brackets(rows, summed, penalty, mine[some], targets[some])
        variance = self._small["variance"][targets] * (brackets / lambdas[chosen])[:, None]
        return np.asarray(np.sqrt(variance), dtype=np.float32)

    def noise(self, targets: Rows) -> Array:
        """Spread of the full models."""
        return np.asarray(self._small["noise"][targets])

    @cached_property
    def _small(self) -> dict[str, Any]:
        return {name: self.store.numpy(name) for name in ("variance", "noise", "chosen")}

    def _summed(self, rows: Rows) -> Any:
        """Sum of the rows' rotated masks, each times its scale, [rank]."""
        masks, scales = (self.store.map_constant(name) for name in ("masks", "scales"))
        step = max(1, _MASKS // len(masks))
        few = (rows[i : i + step] for i in range(0, len(rows), step))
        return sum((masks[:, some] @ scales[some] for some in few), start=np.zeros(len(masks)))

    def _brackets(self, rows: Rows, summed: Any, penalty: float, mine: Any, targets: Rows) -> Any:
        """The bracket of the variance of targets that share a lambda, [target]."""
        masks, eigenvalues, scales, free = (
            self.store.map_constant(name) for name in ("masks", "eigenvalues", "scales", "free")
        )
        damped, step = 1 / (eigenvalues + penalty), max(1, _MASKS // len(masks))
        whole = np.square(scales[rows], dtype=np.float64).sum() - damped @ np.square(summed)
        if not free:
            return np.maximum(whole, 0)
        inside = targets < len(scales)
        places = np.minimum(targets, len(scales) - 1)
        forgotten = np.where(mine & inside, scales[places], 0.0)
        parts = (slice(i, i + step) for i in range(0, len(targets), step))
        freed = [
            _freed(np.where(inside[p], masks[:, places[p]], 0), damped, summed, forgotten[p])
            for p in parts
        ]
        return np.maximum(whole + np.concatenate(freed), 0)


def _freed(own: Any, damped: Any, summed: Any, forgotten: Any) -> Any:
    """What comes to the bracket where the own row is not penalised, [target].

    Args:
        own: rotated mask of each target's own row, [rank, target]; 0 for test targets.
        damped: D, [rank].
        summed: rotated masks of all removed rows, each times its scale, [rank].
        forgotten: scale of the own row where it is removed, else 0, [target].
    """
    leverage, across = np.einsum("rt,r,rt->t", own, damped, own), own.T @ (damped * summed)
    # With v of the others: v D v = w D w - f (2 a D w - f a D a), where w is that of all.
    others = forgotten * (2 * across - forgotten * leverage)
    left = forgotten - (across - forgotten * leverage)
    # Nothing tells the effect of a row that every model saw: its uncertainty has no bound.
    unknown = np.where(forgotten > 0, np.inf, 0.0)
    told = np.divide(left**2, leverage, out=unknown, where=leverage > 0)
    return others - 2 * forgotten**2 + told


def _fitted_factors(store: Store) -> tuple[float, float]:
    if "shrink" in store.attributes:  # rows were purged after the fit
        own, other = store.attributes["shrink"]
        return float(own), float(other)
    aa, ab, bb, ay, by = store.numpy("cross_products").sum(0, dtype=np.float64)
    own, other = np.linalg.lstsq(np.array([[aa, ab], [ab, bb]]), np.array([ay, by]))[0]
    return max(0.0, float(own)), max(0.0, float(other))


@dataclass(frozen=True)
class HeldOutSpread(Uncertainty):
    """Of sparse effects regressed by the lasso: how far they miss held-out models.

    With m other rows in F, e^2 the mean squared error of changes of held-out models beyond the
    noise of retraining, for each row that these did not see, and v the variance of the own row's
    effect by least squares, the variance is v, if the own row is in F, + m e^2. It is that of
    forget sets like the held-out models', and says nothing of one row in particular.

    Args:
        store: of fitted datamodels.
    """

    store: Store = field(repr=False)

    @cached_property
    def shrink(self) -> tuple[float, float]:
        """Factors fitted on held-out models."""
        return _fitted_factors(self.store)

    def std(self, rows: Rows, mine: Any, targets: Rows) -> Array:
        """Spread around the predictions of forget sets of this size."""
        own, each = (self._small[name][targets] for name in ("own_variance", "row_variance"))
        inside = np.asarray(mine, dtype=bool)[:, None]
        # Nothing tells the effect of a row that every model saw.
        known = np.where(own < 0, np.inf, own)
        variance = np.where(inside, known, 0) + (len(rows) - inside) * each
        return np.asarray(np.sqrt(variance), dtype=np.float32)

    def noise(self, targets: Rows) -> Array:
        """Spread of the full models."""
        return np.asarray(self._small["noise"][targets])

    @cached_property
    def _small(self) -> dict[str, Any]:
        return {name: self.store.numpy(name) for name in ("own_variance", "row_variance", "noise")}


@dataclass(frozen=True)
class CheckpointSpread(Uncertainty):
    """Of TRAK scores: how far the checkpoints differ; unknown, hence not a number, of one alone.

    Scores by checkpoint are not kept, so the spread is that of the mean of forget sets of the same
    size drawn at random. With m rows of the N that are not the target's own, V the sum of their
    scores' variances over the checkpoints and S the variance of their scores' sum, it is

        variance = own variance, if in F, + m / N V + m (m - 1) / (N (N - 1)) (S - V).

    It says nothing of errors that all checkpoints share, such as the linearisation's.

    Args:
        store: of TRAK scores.
    """

    store: Store = field(repr=False)

    @property
    def shrink(self) -> tuple[float, float]:
        """1 and 1: nothing was fitted."""
        return 1.0, 1.0

    def std(self, rows: Rows, mine: Any, targets: Rows) -> Array:
        """Spread over the checkpoints that random forget sets of this size have."""
        train = self.store.spec.arrays["effects"].shape[0]
        others = train - (targets < train)[:, None]
        m = len(rows) - mine[:, None]
        own, each, whole = (
            self._small[name][targets] for name in ("own_variance", "row_variance", "sum_variance")
        )
        pairs = m * (m - 1) / np.maximum(others * (others - 1), 1)
        variance = mine[:, None] * own + m / np.maximum(others, 1) * each + pairs * (whole - each)
        return self._known(np.sqrt(np.maximum(variance, 0)))

    def noise(self, targets: Rows) -> Array:
        """Spread of the checkpoints' outputs: of one retraining, if each is one."""
        return self._known(self._small["noise"][targets])

    @cached_property
    def _small(self) -> dict[str, Any]:
        names = ("own_variance", "row_variance", "sum_variance", "noise")
        return {name: self.store.numpy(name) for name in names}

    def _known(self, values: Any) -> Array:
        single = len(self.store.provenance.settings["features"]) == 1
        return np.where(single, np.nan, values).astype(np.float32)


def uncertainty_of(store: Store) -> Uncertainty:
    """What tells how sure a store's effects are.

    Args:
        store: of fitted datamodels, or of TRAK scores.

    Returns:
        The uncertainty.
    """
    if store.spec.kind == "trak":
        return CheckpointSpread(store)
    return RidgePosterior(store) if "chosen" in store.spec.arrays else HeldOutSpread(store)


def fitted_by_older(store: Store) -> bool:
    """Whether an older version fitted these ridge datamodels, which knew no scales of effects.

    Args:
        store: of fitted datamodels.

    Returns:
        True where it did; nothing tells how sure their effects are any more.
    """
    told = store.provenance.settings.get("method", {})
    return "chosen" in store.spec.arrays and "free" not in told
