"""Figures of the report: deterministic inline SVG that scales from a phone to a desk.

Every figure takes a `description`: the text in its place for who cannot see it. No two figures of
a page share one, because the ids inside a figure are made from it.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from unlearning.drawing import FAINT, GREY, INK, as_svg, set_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

Point: TypeAlias = tuple[float, float]

SOFT = "#b9cfe0"
SPREAD_BAND = (0.8, 1.25)

MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}

_COLOURS = {  # Okabe and Ito: told apart with every common colour blindness
    "do_nothing": "#7f7f7f", "dmm": "#0072b2", "dmm_pgu": "#56b4e9", "om": "#009e73",
    "pgu": "#e69f00", "gradient_ascent": "#d55e00", "fine_tune": "#cc79a7",
}  # fmt: skip
_FURTHER_COLOURS = (  # Tol: those of his muted scheme and of others that are none of the above
    "#332288", "#882255", "#117733", "#999933", "#661100", "#44aa99", "#aa4499", "#88ccee",
    "#ddcc77", "#cc6677", "#225555",
)  # fmt: skip
_TICKS = tuple(digit * 10.0**power for power in range(-4, 6) for digit in (1, 3))
_SIDES = (  # of a point, where its label may stand: offset and alignment
    (0, 6, "center", "bottom"), (7, 0, "left", "center"),
    (-7, 0, "right", "center"), (0, -6, "center", "top"),
)  # fmt: skip
_ROWS_DRAWN = {"forget": 400, "test": 250}


@dataclass(frozen=True)
class Mark:
    """One method on one forget set, as a figure places it.

    Args:
        label: The method's short name.
        colour: The method's, the same in every figure.
        marker: Matplotlib's, one for each forget set.
        x: Where it stands on the horizontal axis.
        y: Its second value (P95, or the excess distance); None where there is none.

    Example:
        >>> Mark("dmm", "#0072b2", "rand50", "o", 0.49, 0.8).x
        0.49
    """

    label: str
    colour: str
    forget_set: str
    marker: str
    x: float
    y: float | None = None


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """Give each method its colour; names this package does not know get further ones in order.

    Args:
        methods: Method names, without repeats.

    Returns:
        A hexadecimal colour by method name.

    Example:
        >>> method_colours(["dmm", "mine"])
        {'dmm': '#0072b2', 'mine': '#332288'}
    """
    further = itertools.cycle(_FURTHER_COLOURS)
    return {name: _COLOURS.get(name) or next(further) for name in methods}


def thumbnail(image: NDArray[Any]) -> str:
    """Turn an image into a PNG data URI.

    Args:
        image: [height, width] grey or [height, width, 3]; floats outside [0, 1] are stretched
            from their minimum to their maximum.

    Returns:
        The text of an image's `src`.

    Raises:
        ValueError: The array is not an image of those shapes.

    Example:
        >>> thumbnail(np.zeros((2, 2), np.uint8))[:22]
        'data:image/png;base64,'
    """
    pixels = np.asarray(image)
    if pixels.size == 0 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ValueError(
            f"expected a thumbnail of shape [height, width] or [height, width, 3], got "
            f"{list(pixels.shape)}; move the colour axis last and leave batch axes out"
        )
    low, high = (0, 255) if pixels.dtype == np.uint8 else (0, 1)
    values = np.nan_to_num(pixels.astype(np.float64))
    if values.min() < low or values.max() > high:
        low, high = values.min(), values.max()
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    scaled = (values - low) / ((high - low) or 1)
    imsave(buffer, scaled, cmap="gray", vmin=0, vmax=1, format="png", metadata={"Software": ""})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def margins_figure(rows: Mapping[str, Any], notes: Sequence[str], *, description: str) -> Markup:
    """Draw predicted against retrained margins, with what the model said before in grey.

    Args:
        rows: Columns `split`, `before`, `predicted`, `retrained`, one entry a row; None allowed.
        notes: Lines to print in the free corner.

    Returns:
        The SVG element.

    Raises:
        ValueError: The columns differ in length.

    Example:
        >>> rows = {"split": ["forget"], "before": [9], "predicted": [4], "retrained": [3]}
        >>> margins_figure(rows, ["R² 0.9"], description="margins")[:4]
        Markup('<svg')
    """
    columns = _columns(rows)

    def draw(axes: Axes) -> None:
        _draw_margins(axes, columns)
        text, frame = "\n".join(notes), axes.transAxes
        axes.text(0.98, 0.03, text, transform=frame, ha="right", va="bottom", fontsize=8.5)

    return as_svg(draw, description=description, size=(5.0, 4.1))


def _columns(rows: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    columns: dict[str, NDArray[Any]] = {
        name: np.asarray(rows.get(name) or (), dtype=str if name == "split" else np.float64)
        for name in ("split", "before", "predicted", "retrained")
    }
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"expected row columns of one length, got {lengths}; write the evaluation again"
        )
    usable = np.isfinite(columns["predicted"]) & np.isfinite(columns["retrained"])
    return {name: column[usable] for name, column in columns.items()}


def _draw_margins(axes: Axes, columns: Mapping[str, NDArray[Any]]) -> None:
    from matplotlib.collections import LineCollection

    forget, test = _evenly(columns, "forget"), _evenly(columns, "test")
    x, before, predicted = (columns[name] for name in ("retrained", "before", "predicted"))
    shown = np.concatenate([forget, test])
    values = np.concatenate([x[shown], predicted[shown], before[forget], [0.0]])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    pad = 0.05 * (high - low) or 1.0
    axes.set(xlim=(low - pad, high + pad), ylim=(low - pad, high + pad))
    axes.locator_params(nbins=6, integer=True)
    axes.axhline(0, color=FAINT, linewidth=0.6, zorder=0)
    axes.axvline(0, color=FAINT, linewidth=0.6, zorder=0)
    axes.axline((0, 0), slope=1, color=GREY, linewidth=0.8, zorder=1)
    axes.scatter(x[test], predicted[test], s=7, color=SOFT, linewidths=0, zorder=2)
    stems = np.stack([x[forget], before[forget], x[forget], predicted[forget]], 1)
    axes.add_collection(
        LineCollection(list(stems.reshape(-1, 2, 2)), colors=FAINT, linewidths=0.7, zorder=1.5)
    )
    axes.scatter(x[forget], before[forget], s=11, c="white", edgecolors=GREY, lw=0.7, zorder=3)
    axes.scatter(x[forget], predicted[forget], s=13, color=INK, linewidths=0, zorder=4)
    axes.set(xlabel="margin, really retrained", ylabel="margin, predicted")


def _evenly(columns: Mapping[str, NDArray[Any]], split: str) -> NDArray[np.int64]:
    positions = np.flatnonzero(columns["split"] == split)
    wanted = min(len(positions), _ROWS_DRAWN[split])
    return np.asarray(positions[np.linspace(0, len(positions) - 1, wanted).astype(int)])


def distance_figure(
    marks: Sequence[Mark],
    null: tuple[float | None, float | None],
    *,
    limits: tuple[float, float],
    label: str,
    description: str,
) -> Markup:
    """Draw the mean (x, filled) and P95 (y, open) distance of each method on one forget set.

    Args:
        marks: One a method, in the order to be read from the top.
        null: Mean and P95 between two sets of retrained models, as far as known.
        limits: Both ends of the logarithmic axis; what lies outside is put on the edge.
        label: Name of the distance, with its unit.

    Returns:
        The SVG element.

    Example:
        >>> marks = [Mark("dmm", "#0072b2", "rand50", "o", 0.49, 0.8)]
        >>> distance_figure(marks, (0.3, 0.6), limits=(0.1, 10), label="KLOM", description="b")[:4]
        Markup('<svg')
    """

    def draw(axes: Axes) -> None:
        for value, dashes in zip(null, ("-", (0, (3, 2))), strict=True):
            if value is not None:
                axes.axvline(value, color=INK, linewidth=0.9, linestyle=dashes, zorder=1)
        for row, mark in enumerate(marks):
            ends = np.clip([mark.x, mark.x if mark.y is None else mark.y], *limits)
            axes.plot(ends, [row, row], color=mark.colour, linewidth=1.6, zorder=2)
            axes.plot(ends[:1], [row], "o", color=mark.colour, markersize=6.5, zorder=4)
            if mark.y is not None:
                axes.plot(ends[1:], [row], "o", mec=mark.colour, mfc="white", ms=5.5, clip_on=False)
        _method_rows(axes, [mark.label for mark in marks])
        axes.set(xscale="log", xlim=limits, xlabel=label)
        set_ticks(axes.xaxis, _TICKS)

    return as_svg(draw, description=description, size=(5.0, 0.95 + 0.27 * max(len(marks), 2)))


def ratio_figure(
    marks: Sequence[Mark], *, kind: Literal["spread", "shift"], description: str
) -> Markup:
    """Draw spread or shift of every method, one row a method and one shape a forget set.

    Args:
        marks: The values in `x`; the marks of a method stand on its row.
        kind: "spread" (around 1, with the band .8 to 1.25) or "shift" (from 0).

    Returns:
        The SVG element.

    Example:
        >>> marks = [Mark("dmm", "#0072b2", "rand50", "o", 0.95)]
        >>> ratio_figure(marks, kind="spread", description="spread")[:4]
        Markup('<svg')
    """
    labels = list(dict.fromkeys(mark.label for mark in marks))
    sets = list(dict.fromkeys(mark.forget_set for mark in marks))

    def draw(axes: Axes) -> None:
        (_spread_axis if kind == "spread" else _shift_axis)(axes, [mark.x for mark in marks])
        low, high = axes.get_xlim()
        for mark in marks:
            offset = 0.8 * ((sets.index(mark.forget_set) + 0.5) / len(sets) - 0.5)
            x, y = float(np.clip(mark.x, low, high)), labels.index(mark.label) + offset
            axes.plot([x], [y], mark.marker, color=mark.colour, ms=5, mew=0, clip_on=False)
        _method_rows(axes, labels)

    return as_svg(draw, description=description, size=(5.0, 0.95 + 0.42 * max(len(labels), 2)))


def _spread_axis(axes: Axes, values: Sequence[float]) -> None:
    low, high = max(min([0.5, *values]), 0.02) / 1.15, max([2.0, *values]) * 1.15
    axes.axvspan(*SPREAD_BAND, color="#eceef0", linewidth=0, zorder=0)
    axes.axvline(1, color=INK, linewidth=0.9, zorder=1)
    axes.set(xscale="log", xlim=(low, high))
    axes.set_xlabel("spread over models ÷ spread of retrained models")
    set_ticks(axes.xaxis, (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50))


def _shift_axis(axes: Axes, values: Sequence[float]) -> None:
    axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(-0.05, 1.2 * max([1.0, *values]))
    set_ticks(axes.xaxis, (0, 0.5, 1, 2, 5, 10, 20, 50, 100))
    axes.set_xlabel("shift of the mean, in standard deviations")


def cost_figure(marks: Sequence[Mark], *, label: str, description: str) -> Markup:
    """Draw cost against the distance left: left and low is better.

    Args:
        marks: Cost over retraining in `x` (0.07 is 7 %), excess distance in `y`.
        label: Name of the distance.

    Returns:
        The SVG element.

    Example:
        >>> marks = [Mark("dmm", "#0072b2", "rand50", "o", 0.07, 0.14)]
        >>> cost_figure(marks, label="KLOM", description="cost")[:4]
        Markup('<svg')
    """
    placed = [mark for mark in marks if mark.y is not None]
    # Free methods have no place on a logarithmic axis: they stand at its edge.
    edge = min([mark.x for mark in placed if mark.x > 0], default=0.01) / 4

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
        axes.axvline(1, color=GREY, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
        points = [(max(mark.x, edge), float(mark.y or 0.0)) for mark in placed]
        across, up = [1.0, *(x for x, _ in points)], [-0.05, 1.0, *(y for _, y in points)]
        axes.set_yscale("symlog", linthresh=0.3)
        axes.set_ylim(1.15 * min(up) - 0.02, 1.6 * max(up))
        axes.set(xscale="log", xlim=(edge / 1.4, 1.5 * max(across)))
        set_ticks(axes.yaxis, (-3, -1, -0.3, -0.1, 0, 0.1, 0.3, 1, 3, 10))
        ticks = [edge, *(tick / 100 for tick in _TICKS if tick / 100 > 1.5 * edge)]
        set_ticks(axes.xaxis, ticks, lambda cost: "0" if cost <= edge else f"{100 * cost:g}")
        axes.set(xlabel="cost, % of one retraining", ylabel=f"{label} above the null")
        for mark, (x, y) in zip(placed, points, strict=True):
            axes.plot(
                [x], [y], mark.marker, color=mark.colour, markersize=6.5, mec="white", mew=0.5
            )
        _label_methods(axes, placed, points)

    return as_svg(draw, description=description, size=(5.4, 4.2))


def _label_methods(axes: Axes, marks: Sequence[Mark], points: Sequence[Point]) -> None:
    from matplotlib.transforms import Bbox

    axes.figure.canvas.figure.draw_without_rendering()
    corners = [axes.transData.transform(point) for point in points]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in corners]
    for label in dict.fromkeys(mark.label for mark in marks):
        own = [point for mark, point in zip(marks, points, strict=True) if mark.label == label]
        _label_one(axes, label, sorted(own, key=lambda point: -point[1]), taken)


def _label_one(axes: Axes, label: str, anchors: Sequence[Point], taken: list[Bbox]) -> None:
    """Put the label beside the first point that has room; leave it out when none has."""
    for anchor in anchors:
        for x, y, horizontal, vertical in _SIDES:
            note = axes.annotate(label, anchor, (x, y), textcoords="offset points", fontsize=8.5)
            note.set(ha=horizontal, va=vertical, color=INK)
            note.set_in_layout(False)
            box = note.get_window_extent()
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                return
            note.remove()


def _method_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", color="#eef0f2", linewidth=0.7)
