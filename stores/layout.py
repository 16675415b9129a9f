"""How matrices of scores are cut, so that rows are read in few requests of a good size."""

from __future__ import annotations

import numpy as np

# Bytes of one training row in one storage object. Shorter pieces need more requests than the disk
# serves at full speed; longer ones leave fewer blocks to compute at once.
_SHORTEST, _LONGEST = 32 * 2**10, 64 * 2**10
_MANY = 8  # blocks that are enough for the workers of one machine


def score_block(targets: int, outputs: int, dtype: str) -> int:
    """Give the number of targets in one block of an array [train, target, output].

    A training row's piece in a block, targets x outputs x bytes of a value, is a whole row where
    that fits into 64 KiB. Longer rows are cut into pieces of 32 to 64 KiB, as many as give eight
    blocks where that is possible. Blocks are equal but for the last one.

    The query decides: a matrix is written once and read by every forget set, and each further
    piece of a row is one more request. Hence a row of up to 64 KiB is one block, which one worker
    computes alone; others share the work from the second block on. Memory does not decide: who
    computes a block does so in steps as narrow as his memory asks for.

    Args:
        targets: Number of targets.
        outputs: Outputs of each.
        dtype: Numpy name of the stored type.

    Returns:
        Targets of a block.

    Raises:
        ValueError: A number is below 1.

    Example:
        >>> score_block(20_000, 1, "float16"), score_block(60_000, 10, "float16")
        (20000, 3158)
        >>> score_block(1797, 10, "float32")
        899
    """
    if min(targets, outputs) < 1:
        raise ValueError(f"expected at least 1 target and 1 output, got {targets} and {outputs}")
    item = outputs * np.dtype(dtype).itemsize
    if targets * item <= _LONGEST:
        return targets
    fewest, largest = -(-_SHORTEST // item), max(1, _LONGEST // item)
    blocks = max(-(-targets // largest), min(_MANY, targets // fewest))
    return -(-targets // blocks)
