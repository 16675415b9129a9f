"""KLOM, shift and spread: how far unlearned models are from retrained ones, row by row."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]
Bins = np.ndarray[Any, np.dtype[np.int64]]

BINS = 20
CLIP = 100.0
FLOOR = 1e-5
# With fewer models a histogram of 20 bins says more about chance than about the models.
FEWEST_MODELS = 80
FEWEST_ROWS_FOR_P95 = 20


def bin_numbers(unlearned: Array, oracles: Array, bins: int) -> tuple[Bins, Bins]:
    """Number of the bin that each margin lies in, equal bins over the pooled range of its row.

    Margins are clipped to [-100, 100]; the last bin is closed, so that no model is dropped.

    Args:
        unlearned: margins [model, target].
        oracles: margins [model, target].
        bins: how many.

    Returns:
        Numbers from 0 on of both sides, each [model, target].

    Raises:
        ValueError: the shapes do not fit, or a margin is not a number.

    Example:
        >>> rows = np.array([[0.0], [1.0], [4.0]])
        >>> bin_numbers(rows, rows, 4)[0].ravel()
        array([0, 1, 3])
    """
    u, o = (np.clip(side, -CLIP, CLIP) for side in check_margins(unlearned, oracles))
    lowest = np.minimum(u.min(0), o.min(0))
    highest = np.maximum(u.max(0), o.max(0))
    # np.linspace of all rows at once rounds otherwise as soon as one row is constant.
    edges = np.arange(1, bins)[:, None] * ((highest - lowest) / bins) + lowest
    first, second = (np.zeros(side.shape, dtype=np.int64) for side in (u, o))
    for edge in edges:
        first += u >= edge
        second += o >= edge
    return first, second


def _frequencies(places: Bins) -> Array:
    """Share of models in each bin, [bin, row]."""
    return np.stack([(places == b).mean(0) for b in range(BINS)])


def klom(unlearned: Array, oracles: Array) -> Array:
    """KL divergence of margins, unlearned models against oracles, for each target.

    Margins are clipped to [-100, 100] and counted in 20 equal bins between the pooled minimum
    and maximum of the row, the last bin closed; p are the unlearned models' frequencies, q the
    oracles', raised to 1e-5 where p > 0 and renormalised; KLOM = sum p ln(p / q).

    Direction: lower is better. Reference: the oracles. Null, of equal normal margins: .35 of 100
    models on either side, 3.0 of 20, where it tells little.

    Args:
        unlearned: margins [model, target].
        oracles: margins [model, target], of models retrained without the forget set.

    Returns:
        KLOM of each target, in nats, [target].

    Raises:
        ValueError: the shapes do not fit, or a margin is not a number.

    Example:
        >>> rows = np.sqrt(np.arange(100.0))[:, None]
        >>> klom(rows, rows + 1).round(6)
        array([0.30201])

    Source: Attribute-to-Delete (arXiv 2410.23232); direction and bins as stated here, because
        published implementations differ in both.
    """
    p, q = (_frequencies(places) for places in bin_numbers(unlearned, oracles, BINS))
    q = np.where(p > 0, np.maximum(q, FLOOR), q)
    q = q / q.sum(0)
    ratio = np.log(np.where(p > 0, p, 1.0)) - np.log(np.where(p > 0, q, 1.0))
    return np.asarray((p * ratio).sum(0))


def gaussian_kl(unlearned: Array, oracles: Array) -> Array:
    """KL divergence of two normal distributions fitted to the margins of each target.

    ln(s_o / s_u) + (s_u^2 + (m_u - m_o)^2) / (2 s_o^2) - 1/2.

    Direction: lower is better. Reference: the oracles. Null, of equal normal margins: .02 of 100
    models on either side, .12 of 20.

    Args:
        unlearned: margins [model, target].
        oracles: margins [model, target].

    Returns:
        The divergence of each target, in nats, [target].

    Raises:
        ValueError: the shapes do not fit, or a margin is not a number.

    Example:
        >>> rows = np.arange(5.0)[:, None]
        >>> gaussian_kl(rows, rows)
        array([0.])
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        squares = spread(unlearned, oracles) ** 2, shift(unlearned, oracles) ** 2
        return np.asarray((squares[0] - 1 - np.log(squares[0]) + squares[1]) / 2)


def shift(unlearned: Array, oracles: Array) -> Array:
    """Distance of the mean margins in standard deviations of the oracles, for each target.

    Direction: lower is better. Reference: the oracles. Null, of equal normal margins: .11 of 100
    models on either side, .27 of 20.

    Args:
        unlearned: margins [model, target].
        oracles: margins [model, target].

    Returns:
        |mean difference| / sd of the oracles, [target]; 0 is perfect.

    Raises:
        ValueError: the shapes do not fit, or a margin is not a number.

    Example:
        >>> rows = np.array([[-1.0], [0.0], [1.0]])
        >>> shift(rows + 2, rows)
        array([2.])
    """
    u, o = _samples(unlearned, oracles)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.abs(u.mean(0) - o.mean(0)) / o.std(0, ddof=1))


def spread(unlearned: Array, oracles: Array) -> Array:
    """Standard deviation of the margins relative to the oracles', for each target.

    Direction: 1 is best; below, the unlearned models are too alike. Reference: the oracles. Null,
    of equal normal margins: 1.005 of 100 models on either side, 1.02 of 20.

    Args:
        unlearned: margins [model, target].
        oracles: margins [model, target].

    Returns:
        sd of the unlearned models / sd of the oracles, [target]; 1 is perfect.

    Raises:
        ValueError: the shapes do not fit, or a margin is not a number.

    Example:
        >>> rows = np.array([[-1.0], [0.0], [1.0]])
        >>> spread(2 * rows, rows)
        array([2.])
    """
    u, o = _samples(unlearned, oracles)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(u.std(0, ddof=1) / o.std(0, ddof=1))


def _samples(unlearned: Array, oracles: Array) -> tuple[Array, Array]:
    u, o = check_margins(unlearned, oracles)
    if min(len(u), len(o)) < 2:
        raise ValueError(f"a spread needs at least 2 models, got {len(u)} and {len(o)}")
    return u, o


def check_margins(unlearned: Array, oracles: Array) -> tuple[Array, Array]:
    """Both sides in double precision, refused where they cannot be compared.

    Args:
        unlearned: margins [model, target].
        oracles: margins [model, target].

    Returns:
        Both.

    Raises:
        ValueError: the shapes do not fit, or a margin is not a number.

    Example:
        >>> check_margins(np.zeros((2, 3), dtype=np.float32), np.zeros((1, 3)))[0].dtype
        dtype('float64')
    """
    u, o = np.asarray(unlearned, dtype=np.float64), np.asarray(oracles, dtype=np.float64)
    if u.ndim != 2 or o.ndim != 2 or u.shape[1] != o.shape[1] or 0 in (len(u), len(o)):
        raise ValueError(
            f"expected margins [model, target] of the same targets, got {u.shape} and {o.shape}"
        )
    for name, values in (("unlearned", u), ("oracle", o)):
        if np.isnan(values).any():
            raise ValueError(f"the {name} margins hold values that are not a number")
    return u, o
