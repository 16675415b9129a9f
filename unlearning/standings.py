"""How methods stand over all forget sets of an evaluation, the nearest to retraining first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unlearning.reading import value

DISTANCES = {"klom": "KLOM", "gaussian_kl": "Gaussian KL"}
"""Distances to retrained models, the preferred one first, and what people call them."""

GIVEN_THE_ANSWER = ("om", "om_absolute")
"""Methods whose targets are the outputs of retrained models."""


@dataclass(frozen=True)
class Standing:
    """One method over the forget sets that it was audited on.

    Args:
        method: its name.
        forget: excess distance on the forget rows, the mean over rows and then over sets.
        forget_p95: the same of the 95th percentiles, over the sets of 20 rows or more.
        retain: excess distance on the retain rows, the mean over rows and then over sets.
        test: likewise on the test rows.
        cost: seconds of one request over those of one retraining, the mean over sets.
        unbiased: KLOM without bias on the forget rows, the mean over sets, and the means of the
            lower and of the upper ends of its 95 % intervals over models. All sets have the same
            models to unlearn, so that their errors may go together: no interval is made narrower.

    Example:
        >>> Standing("dmm", 0.1, 0.2, 0.0, 0.0, 0.5, (0.1, 0.0, 0.2)).method
        'dmm'
    """

    method: str
    forget: float
    forget_p95: float | None
    retain: float | None
    test: float | None
    cost: float | None
    unbiased: tuple[float, float, float] | None


def distance_of(evaluation: Mapping[str, Any]) -> str:
    """Which distance an evaluation is read by: KLOM, or below 80 models the Gaussian KL.

    Args:
        evaluation: what `evaluate_methods` returned; parts of it may be absent.

    Returns:
        `klom` or `gaussian_kl`.

    Example:
        >>> told = {"klom": {"forget": {"mean": None}}, "gaussian_kl": {"forget": {"mean": 0.2}}}
        >>> distance_of({"forget_sets": {"a": {"methods": {"dmm": told}}}})
        'gaussian_kl'
    """
    told = [
        part
        for block in (evaluation.get("forget_sets") or {}).values()
        for part in [block.get("null"), *(block.get("methods") or {}).values()]
    ]
    counted = (name for name in DISTANCES if any(_mean_of(part, name) is not None for part in told))
    return next(counted, "klom")


def standings(evaluation: Mapping[str, Any], distance: str) -> list[Standing]:
    """Sorts methods by their excess distance to retrained models on the forget rows.

    Excess = distance to retrained models - distance between two banks of them, each set alike.

    Args:
        evaluation: what `evaluate_methods` returned.
        distance: `klom` or `gaussian_kl`.

    Returns:
        One entry for each method with a distance on every forget set that it was audited on.

    Example:
        >>> def told(mean):
        ...     return {"klom": {"forget": {"mean": mean}}}
        >>> block = {"null": told(0.4), "methods": {"do_nothing": told(2.4), "dmm": told(0.5)}}
        >>> found = standings({"forget_sets": {"a": block}}, "klom")
        >>> [(standing.method, round(standing.forget, 6)) for standing in found]
        [('dmm', 0.1), ('do_nothing', 2.0)]
    """
    audited: dict[str, list[tuple[Any, Any]]] = {}
    for block in (evaluation.get("forget_sets") or {}).values():
        for method, told in (block.get("methods") or {}).items():
            audited.setdefault(method, []).append((told, block.get("null")))
    found = [_standing(method, pairs, distance) for method, pairs in audited.items()]
    return sorted(filter(None, found), key=lambda standing: (standing.forget, standing.method))


def _mean_of(told: Any, distance: str) -> float | None:
    return value(told, distance, "forget", "mean")


def _standing(method: str, pairs: Sequence[tuple[Any, Any]], distance: str) -> Standing | None:
    def excess(split: str, statistic: str) -> list[float]:
        both = [[value(b, distance, split, statistic) for b in pair] for pair in pairs]
        return [told - null for told, null in both if told is not None and null is not None]

    forget = excess("forget", "mean")
    if len(forget) < len(pairs):
        return None
    parts = ("mean", "low", "high")
    ends = [[value(b, "klom_corrected", "forget", part) for b, _ in pairs] for part in parts]
    means = [_mean([end for end in each if end is not None]) for each in ends]
    whole = all(end is not None for each in ends for end in each)
    costs = [value(told, "cost_over_retrain") for told, _ in pairs]
    return Standing(
        method,
        float(np.mean(forget)),
        _mean(excess("forget", "p95")),
        _mean(excess("retain", "mean")),
        _mean(excess("test", "mean")),
        _mean([cost for cost in costs if cost is not None]),
        (means[0], means[1], means[2]) if whole else None,  # type: ignore[arg-type]
    )


def _mean(numbers: Sequence[float]) -> float | None:
    return float(np.mean(numbers)) if numbers else None
