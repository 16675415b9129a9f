"""The report's figure of what a smaller or larger budget of matching gives."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from unlearning.curves import Curve, curves_figure
from unlearning.drawing import LOWEST
from unlearning.reading import pick, value


def budget_panels(
    sets: Mapping[str, Any], key: str, distance: str, looks: Mapping[str, tuple[str, str]]
) -> list[tuple[str, Markup]]:
    """Draws the distance of the forgotten rows against the budget, one panel a forget set.

    Args:
        sets: The evaluation's forget sets by name.
        key: Name of the distance in the evaluation.
        distance: Its name in words.
        looks: Label and colour of every method.

    Returns:
        Names of the sets that have budgets, and their figures.

    Example:
        >>> scores = [{"share": s, "klom": {"forget": {"mean": 1 - s}}} for s in (0.1, 0.3)]
        >>> sets = {"few": {"budgets": {"dmm": scores}}}
        >>> [name for name, _ in budget_panels(sets, "klom", "KLOM", {"dmm": ("dmm", "#0072b2")})]
        ['few']
    """
    nulls = [number for b in sets.values() if (number := value(b, "null", key, "forget", "mean"))]
    curves = {name: _curves(block, key, looks) for name, block in sets.items()}
    scores = nulls + [score for one in curves.values() for curve in one for score in curve.y]
    limits = max(min(scores, default=0.1), LOWEST) / 1.2, max([*scores, 2 * LOWEST]) * 1.2
    return [
        (
            name,
            curves_figure(
                curves[name],
                limits=limits,
                level=value(block, "null", key, "forget", "mean"),
                labels=("matching, % of a retraining", distance),
                description=f"{distance} of the forgotten rows of {name} by budget",
            ),
        )
        for name, block in sets.items()
        if curves[name]
    ]


def _curves(block: Any, key: str, looks: Mapping[str, tuple[str, str]]) -> list[Curve]:
    found = []
    for method, points in (pick(block, "budgets") or {}).items():
        pairs = [(value(p, "share"), value(p, key, "forget", "mean")) for p in points]
        told = [(100 * share, score) for share, score in pairs if share and score is not None]
        if len(told) > 1:
            shares, scores = (list(column) for column in zip(*told, strict=True))
            found.append(Curve(*looks[method], shares, scores, scores, scores))
    return found
