"""What all figures are drawn with: style, ticks, and inline SVG that is the same in every run."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

# Matplotlib is imported where something is drawn: most commands draw nothing.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

INK, GREY, FAINT = "#1f2328", "#8b929a", "#d5d9de"
LOWEST = 0.02  # distances below this are all "the same" on the logarithmic axis

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
}


def set_ticks(
    axis: Axis, at: Sequence[float], text: Callable[[float], str] = "{:g}".format
) -> None:
    """Label an axis at these values, as far as they are in view, and nowhere else.

    Args:
        axis: The axis; its limits are set already.
        at: Values.
        text: Writes a value.

    Example:
        >>> from matplotlib.figure import Figure
        >>> axes = Figure().subplots()
        >>> _ = axes.set_xlim(0, 2)
        >>> set_ticks(axes.xaxis, [1, 3])
        >>> [float(tick) for tick in axes.get_xticks()]
        [1.0]
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(FixedLocator([tick for tick in at if low <= tick <= high]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(NullLocator())


def as_svg(draw: Callable[[Axes], None], *, description: str, size: tuple[float, float]) -> Markup:
    """Draw one pair of axes as an inline SVG element.

    Args:
        draw: Draws into the axes.
        description: The text in its place for who cannot see it; no other figure of the page has
            the same.
        size: Width and height in inches.

    Returns:
        The SVG element.

    Example:
        >>> as_svg(lambda axes: None, description="nothing", size=(2, 1))[:4]
        Markup('<svg')
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Salted like this, the ids inside a figure are the same in every run and unique on the page.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": description}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    return _inline(buffer.getvalue(), description)


def _inline(document: str, description: str) -> Markup:
    body = document[document.index("<svg") :]
    body = re.sub(r"<!--.*?-->|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    box = re.search(r'viewBox="[^"]*"', body)
    assert box is not None  # matplotlib always writes it
    opening = f'<svg {box[0]} role="img" aria-label="{escape(description)}">'
    return Markup(re.sub(r"\s*\n\s*", "\n", opening + body[body.index(">") + 1 :]))
