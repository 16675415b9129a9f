"""Numbers and names as people read them, for pages."""

import math
from collections.abc import Sequence

SPACE = "\u00a0"  # keeps a number and its unit on one line


def as_number(value: float | None, digits: int = 2) -> str:
    """A number with thousands apart, a true minus and no minus zero; a dash where there is none.

    Args:
        value: the number; None or not finite gives the dash.
        digits: behind the point.

    Returns:
        The text.

    Example:
        >>> as_number(-1234.5, 1), as_number(-0.001), as_number(None)
        ('−1,234.5', '0.00', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def as_percent(value: float | None, digits: int | None = None) -> str:
    r"""A share in percent, with a digit behind the point below 1 %.

    Args:
        value: the share.
        digits: behind the point; None: as the share asks for.

    Returns:
        The text.

    Example:
        >>> as_percent(0.12), as_percent(0.004)
        ('12\xa0%', '0.4\xa0%')
    """
    scaled = None if value is None else 100 * value
    if digits is None:
        digits = 1 if scaled is not None and 0 < scaled < 1 else 0
    return as_number(scaled, digits) + ("" if scaled is None else f"{SPACE}%")


def as_seconds(value: float | None) -> str:
    r"""A time in seconds with three digits at most.

    Args:
        value: the seconds.

    Returns:
        The text.

    Example:
        >>> as_seconds(1.234), as_seconds(123.4)
        ('1.23\xa0s', '123\xa0s')
    """
    if value is None:
        return "–"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{as_number(value, digits)}{SPACE}s"


def as_range(values: Sequence[float], *, percent: bool = False) -> str:
    r"""The smallest and the largest of some numbers, or one where they read the same.

    Args:
        values: the numbers, at least one.
        percent: whether they are shares.

    Returns:
        The text.

    Example:
        >>> as_range([0.5, 0.25]), as_range([0.1, 0.1], percent=True)
        ('0.25 to 0.50', '10\xa0%')
    """
    text = as_percent if percent else as_number
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    Args:
        names: the names.

    Returns:
        The text.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + "".join(names[-1:])


def as_models(number: float | None, most: float | None) -> str:
    """How many retrained models have a mean that is as near as a prediction.

    Args:
        number: `Agreement.retrained_models`; None where it is not known.
        most: `Agreement.most_models`.

    Returns:
        The number, marked where there may be more; a dash where there is none.

    Example:
        >>> as_models(6.34, 50.0), as_models(50.0, 50.0)
        ('6.3', '≥ 50.0')
    """
    if number is None or most is None or number < most:
        return as_number(number, 1)
    return f"≥ {as_number(number, 1)}"
