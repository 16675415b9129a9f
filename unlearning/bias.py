"""KLOM without the bias of few models, and how far other models would move it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attribution.seeds import generator
from unlearning.klom import BINS, Array, Bins, bin_numbers

RESAMPLES = 200
MODELS_A_BIN = 5
_AT_ONCE = 20


@dataclass(frozen=True)
class CorrectedMean:
    """A mean over targets and how far other models would move it.

    Args:
        mean: of the corrected KLOM over the targets.
        low: lower end of its 95 % interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float


def corrected_klom(unlearned: Array, oracles: Array) -> Array:
    """KL divergence of margins, unlearned models against oracles, with the bias of few models gone.

    KLOM of two equal samples of 100 models is .35 and not 0, and a shift by one standard deviation
    reads 1.2 and not .5, because q is nearly 0 in bins that no oracle happened to fall in. Here
    q = (d + 1/2) / (M + bins / 2) with d of M oracles in the bin and p = c / N, the bins are those
    of KLOM but no more than one for 5 models, and both samples are jackknifed: N f - (N - 1) x the
    mean of f with one model left out.

    Direction: lower is better. Reference: the oracles. Null: 0, single targets a little to either
    side. Of normal margins, means over 1,000 targets: equal .01, .02, .01 and .01 and shifted by 1
    sd .46, .49, .49 and .49 at 20, 50, 100 and 200 models; two banks of 100 oracles of the digits
    example .02. What 100 oracles cannot resolve stays too low: a shift by 4 sd reads 3.8, not 8,
    and normal margins of 2 and 4 times the oracles' spread read .41 and 1.26, not .81 and 6.1: it
    is no measure of models that differ far more than the oracles do; KLOM and the spread are.
    Unlike KLOM, which reads .45 where two banks read .35, it sees samples of half the spread: .32.

    Args:
        unlearned: margins [model, target].
        oracles: margins [model, target], of models retrained without the forget set.

    Returns:
        The divergence of each target, in nats, [target]; it may be below 0.

    Raises:
        ValueError: the shapes do not fit, a margin is not a number, or a side has one model.

    Example:
        >>> first, second = np.random.default_rng(0).normal(size=(2, 100, 500))
        >>> [round(float(corrected_klom(first + d, second).mean()), 1) for d in (0, 1)]
        [0.0, 0.5]

    Source: Krichevsky and Trofimov 1981 (the half); Miller 1974 (jackknife of an entropy).
    """
    first, second, bins = _binned(unlearned, oracles)
    tables = _Tables.of(len(first), len(second), bins)
    return tables.divergence(_counts(first, bins), _counts(second, bins))


def corrected_mean(
    unlearned: Array, oracles: Array, *, resamples: int = RESAMPLES, seed: int = 0
) -> CorrectedMean:
    """Mean of the corrected KLOM over targets, with its 95 % interval by a bootstrap over models.

    Whole models are drawn anew on either side, because the margins of one model stand and fall
    together; bins stay as they are. The ends are the mean plus the 2.5 % and 97.5 % quantiles of
    the resampled means about their own mean, which carry the bias of drawing models twice.

    Args:
        unlearned: margins [model, target].
        oracles: margins [model, target].
        resamples: how often the models are drawn anew.
        seed: of the draws.

    Returns:
        Mean and interval; not numbers where there is no target.

    Raises:
        ValueError: as `corrected_klom`, or no resamples.

    Example:
        >>> rows = np.sqrt(np.arange(100.0))[:, None]
        >>> found = corrected_mean(rows, rows + 1)
        >>> found.low < found.mean < found.high
        True

    Source: Efron 1979.
    """
    if resamples < 1:
        raise ValueError(f"expected at least 1 resample, got {resamples}")
    if not np.shape(unlearned)[-1]:
        return CorrectedMean(*[float("nan")] * 3)
    first, second, bins = _binned(unlearned, oracles)
    tables = _Tables.of(len(first), len(second), bins)
    mean = float(tables.divergence(_counts(first, bins), _counts(second, bins)).mean())
    random = generator(seed, "bootstrap over models")
    members = [_members(side, bins).astype(np.float32) for side in (first, second)]
    found: list[float] = []
    while len(found) < resamples:
        some = min(_AT_ONCE, resamples - len(found))
        counts = (_drawn_counts(side, some, random) for side in members)
        found += tables.divergence(*counts).mean(-1).tolist()
    low, high = np.percentile(np.subtract(found, np.mean(found)), [2.5, 97.5])
    return CorrectedMean(mean, mean + float(low), mean + float(high))


def _binned(unlearned: Array, oracles: Array) -> tuple[Bins, Bins, int]:
    fewest = min(len(unlearned), len(oracles))
    if fewest < 2:
        raise ValueError(
            f"a jackknife needs at least 2 models, got {len(unlearned)} and {len(oracles)}"
        )
    bins = int(np.clip(fewest // MODELS_A_BIN, 2, BINS))
    return *bin_numbers(unlearned, oracles, bins), bins


def _members(places: Bins, bins: int) -> Any:
    """Whether each model lies in each bin, [bin, model, target]."""
    return places == np.arange(bins)[:, None, None]


def _counts(places: Bins, bins: int) -> Bins:
    """Models in each bin, [bin, target]."""
    return np.asarray(_members(places, bins).sum(1))


def _drawn_counts(members: Array, resamples: int, random: np.random.Generator) -> Bins:
    """Models in each bin after drawing models with replacement, [resample, bin, target]."""
    models = members.shape[1]
    times = random.multinomial(models, np.full(models, 1 / models), size=resamples)
    # Whole numbers, exact in float32; torch multiplies many small matrices faster than numpy.
    drawn = torch.from_numpy(times.astype(np.float32)) @ torch.from_numpy(members)
    return np.asarray(drawn.long().numpy().swapaxes(0, 1))


@dataclass(frozen=True)
class _Tables:
    """The jackknifed divergence is a sum over bins of functions of the counts alone.

    Args:
        own: c (c ln c - (c - 1) ln(c - 1)) / N for c of the unlearned models, [count].
        other: jackknifed ln(d + 1/2) for d of the oracles, [count].
        constant: what does not depend on the counts.
        models: N.
    """

    own: Array
    other: Array
    constant: float
    models: int

    @staticmethod
    def of(models: int, oracles: int, bins: int) -> "_Tables":
        c, d = np.arange(models + 1.0), np.arange(oracles + 1.0)
        half = np.log(d + 0.5)
        less = np.log(np.maximum(d - 0.5, 0.5))  # times 0 where d = 0
        kept = oracles - 1
        total = oracles * np.log(oracles + bins / 2) - kept * np.log(kept + bins / 2)
        return _Tables(
            own=c * (_x_log_x(c) - _x_log_x(np.maximum(c - 1, 0))) / models,
            other=half + kept / oracles * d * (half - less),
            constant=float(total - _x_log_x(models) + _x_log_x(models - 1)),
            models=models,
        )

    def divergence(self, counts: Bins, oracle_counts: Bins) -> Array:
        """From counts [..., bin, target] to the divergence of each target, [..., target]."""
        crossed = counts / self.models * self.other[oracle_counts]
        return np.asarray((self.own[counts] - crossed).sum(-2) + self.constant)


def _x_log_x(x: Any) -> Any:
    return x * np.log(np.maximum(x, 1))
