"""Slow and obvious implementations of what an audit measures, model by model."""

import math

import numpy as np


def _smoothed_kl(unlearned, oracles, edges):
    """KL(p || q) of two lists of margins in given bins, half a count added to every bin of q."""
    p = np.histogram(unlearned, edges)[0] / len(unlearned)
    q = (np.histogram(oracles, edges)[0] + 0.5) / (len(oracles) + (len(edges) - 1) / 2)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def jackknifed_kl(unlearned, oracles, bins):
    """Of one target, with every model of either side really left out once."""
    pooled = [*unlearned, *oracles]
    edges = np.linspace(min(pooled), max(pooled), bins + 1)
    whole = _smoothed_kl(unlearned, oracles, edges)
    n, m = len(unlearned), len(oracles)
    without = [_smoothed_kl(np.delete(unlearned, i), oracles, edges) for i in range(n)]
    without_oracle = [_smoothed_kl(unlearned, np.delete(oracles, i), edges) for i in range(m)]
    own = (n - 1) * (whole - np.mean(without))
    return whole + own + (m - 1) * (whole - np.mean(without_oracle))
