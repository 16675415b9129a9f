"""How matrices of scores are cut, so that rows are read in few requests of a good size."""

from __future__ import annotations

import numpy as np

# Bytes of one training row in one storage object. Shorter pieces need more requests than the disk
# serves at full speed; longer ones leave fewer blocks to compute at once.
_SHORTEST, _LONGEST = 32 * 2**10, 64 * 2**10
_MANY = 8  # blocks that are enough for the workers of one machine


def score_block(targets: int, outputs: int, dtype: str, *, most: int | None = None) -> int:
    """Give the number of targets in one block of an array [train, target, output].

    A training row's piece in a block, targets x outputs x bytes of a value, is 32 to 64 KiB where
    there are targets enough, the shorter the fewer blocks there would be. Blocks are equal but
    for the last one.

    Args:
        targets: Number of targets.
        outputs: Outputs of each.
        dtype: Numpy name of the stored type.
        most: Most targets that a block may take, where memory is the limit; None: no limit.

    Returns:
        Targets of a block.

    Raises:
        ValueError: A number is below 1.

    Example:
        >>> score_block(60_000, 1, "float16"), score_block(60_000, 10, "float16")
        (15000, 3158)
        >>> score_block(1797, 10, "float32")
        599
    """
    if min(targets, outputs, targets if most is None else most) < 1:
        raise ValueError(
            f"expected at least 1 target, output and target of a block, got {targets}, {outputs} "
            f"and {most}"
        )
    item = outputs * np.dtype(dtype).itemsize
    fewest, largest = (max(1, size // item) for size in (_SHORTEST, _LONGEST))
    wanted = min(largest, max(fewest, targets // _MANY), targets, most or targets)
    return -(-targets // -(-targets // wanted))
