"""Reading an evaluation of which any part may be absent or null."""

import math
from collections.abc import Mapping
from typing import Any


def pick(block: Any, *path: str) -> Any:
    """What stands at a path of keys.

    Args:
        block: Nested mappings; anything else holds nothing.
        path: Keys from the outside in.

    Returns:
        It, or None where some part of the path is missing.

    Example:
        >>> pick({"klom": {"forget": 1}}, "klom", "forget"), pick(None, "klom")
        (1, None)
    """
    for key in path:
        block = block.get(key) if isinstance(block, Mapping) else None
    return block


def value(block: Any, *path: str) -> float | None:
    """The number at a path of keys.

    Args:
        block: Nested mappings; anything else holds nothing.
        path: Keys from the outside in.

    Returns:
        It, or None where there is none, or one that is not finite.

    Example:
        >>> value({"klom": 1}, "klom"), value({"klom": "1"}, "klom")
        (1.0, None)
    """
    found = pick(block, *path)
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    return float(found) if is_number and math.isfinite(found) else None
