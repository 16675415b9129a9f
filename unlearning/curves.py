"""A figure of curves on logarithmic axes: how an error falls with the steps taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from unlearning.drawing import FAINT, GREY, as_svg, set_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Curve:
    """A line through the middle of several repeats.

    Args:
        label: What the legend of the page calls it.
        colour: Of the line.
        x: Ascending and above 0.
        y: The middle at each x.
        low: The lowest repeat at each x.
        high: The highest repeat at each x.
        dashed: Whether the line is dashed, so that it shows where another lies below.

    Example:
        >>> Curve("dmm", "#0072b2", [1, 2], [1, 0.1], [0.9, 0.1], [1, 0.2]).dashed
        False
    """

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    dashed: bool = False


def curves_figure(
    curves: Sequence[Curve],
    *,
    limits: tuple[float, float],
    level: float | None = None,
    labels: tuple[str, str],
    description: str,
) -> Markup:
    """Draw curves on logarithmic axes, each with the band of its repeats.

    Args:
        curves: The lines, the last one on top.
        limits: Both ends of the vertical axis; what lies outside is put on the edge.
        level: Where a horizontal line is drawn, or None.
        labels: Names of the axes with their units.
        description: The text in its place for who cannot see it.

    Returns:
        The SVG element.

    Example:
        >>> curve = Curve("dmm", "#0072b2", [1, 2], [1, 0.1], [0.9, 0.1], [1, 0.2])
        >>> curves_figure([curve], limits=(0.01, 2), labels=("steps", "error"), description="c")[:4]
        Markup('<svg')
    """

    def draw(axes: Axes) -> None:
        ends = [curve.x[end] for curve in curves for end in (0, -1)]
        axes.set(xscale="log", yscale="log", xlim=(min(ends), max(ends)), ylim=limits)
        axes.grid(color="#eef0f2", linewidth=0.7)
        if level is not None:
            axes.axhline(level, color=GREY, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
        for place, curve in enumerate(curves):
            _draw(axes, curve, limits, 2 + place)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        for axis in (axes.xaxis, axes.yaxis):
            low, high = np.round(np.log10(axis.get_view_interval()), 6)
            powers = np.arange(np.ceil(low), high + 1)
            set_ticks(axis, (10.0 ** powers[:: -(-len(powers) // 6)]).tolist(), _power)
        axes.tick_params(color=FAINT)

    return as_svg(draw, description=description, size=(4.2, 3.2))


def _draw(axes: Axes, curve: Curve, limits: tuple[float, float], zorder: float) -> None:
    y, low, high = (np.clip(values, *limits) for values in (curve.y, curve.low, curve.high))
    axes.fill_between(curve.x, low, high, color=curve.colour, alpha=0.12, lw=0, zorder=1.5)
    style = (0, (3, 4)) if curve.dashed else "-"
    axes.plot(curve.x, y, color=curve.colour, linewidth=1.6, linestyle=style, zorder=zorder)


def _power(value: float) -> str:
    power = round(np.log10(value))
    return f"{value:g}" if -2 <= power <= 4 else "10" + str(power).translate(_RAISED)
