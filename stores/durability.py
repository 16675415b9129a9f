"""Whether stores and runs are to survive a loss of power, too."""

from __future__ import annotations

import os


def durable() -> bool:
    """Whether what is written reaches the disk before anything relies on it.

    Returns:
        True where the environment variable DATAMODEL_MATCHING_DURABLE is 1; local workers inherit
        it.

    Example:
        >>> durable()
        False
    """
    return os.environ.get("DATAMODEL_MATCHING_DURABLE", "0") == "1"
