"""Seeds: every random thing draws from (seed, purpose, index) alone, never from a shared stream."""

from zlib import crc32

import numpy as np


def derive_seed(seed: int, purpose: str, index: int = 0) -> int:
    """A seed for one purpose and one model, independent of all others.

    Args:
        seed: the user's seed.
        purpose: what is drawn ("weights", "order", ...).
        index: number of the model within its ensemble.

    Returns:
        An integer below 2^63.

    Example:
        >>> derive_seed(0, "order", 3) == derive_seed(0, "order", 3)
        True
        >>> derive_seed(0, "order", 3) == derive_seed(0, "weights", 3)
        False
    """
    sequence = np.random.SeedSequence([seed, crc32(purpose.encode()), index])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def generator(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """A numpy generator for one purpose and one model.

    Args:
        seed: the user's seed.
        purpose: what is drawn.
        index: number of the model within its ensemble.

    Returns:
        The generator.

    Example:
        >>> int(generator(0, "order").integers(10)) == int(generator(0, "order").integers(10))
        True
    """
    return np.random.default_rng(derive_seed(seed, purpose, index))
