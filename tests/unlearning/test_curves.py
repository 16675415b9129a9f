import re
from xml.etree import ElementTree

from unlearning.curves import Curve, curves_figure

BLUE, GREEN = "#0072b2", "#009e73"


def _curve(colour: str, *, dashed: bool = False) -> Curve:
    return Curve("a", colour, [1, 10, 1000], [1, 1e-3, 1e-20], [0.5, 1e-3, 0], [2, 1e-2, 1], dashed)


def _figure(*curves: Curve, level: float | None = None, description: str = "curves") -> str:
    figure = curves_figure(
        curves,
        limits=(1e-9, 3.0),
        level=level,
        labels=("steps", "error"),
        description=description,
    )
    return str(figure)


def test_every_curve_has_its_colour_a_band_and_a_place_inside() -> None:
    figure = _figure(_curve(BLUE), _curve(GREEN))
    ElementTree.fromstring(figure.replace("<svg", '<svg xmlns:xlink="x"', 1))
    for colour in (BLUE, GREEN):
        assert f"fill: {colour}" in figure
        assert f"stroke: {colour}" in figure
    assert "nan" not in figure
    height = float(re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', figure)[0])
    lines = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: {BLUE}', figure)
    heights = [float(y) for line in lines for y in re.findall(r"[ML] [\d.-]+ ([\d.-]+)", line)]
    assert len(heights) == 3
    assert 0 < min(heights) < max(heights) < height


def test_dashes_and_the_level_are_drawn_where_asked_for() -> None:
    plain = _figure(_curve(BLUE)).count("stroke-dasharray")
    assert _figure(_curve(BLUE, dashed=True)).count("stroke-dasharray") == plain + 1
    assert _figure(_curve(BLUE), level=1e-6).count("stroke-dasharray") == plain + 1


def test_ticks_are_powers_of_ten() -> None:
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", _figure(_curve(BLUE)))
    assert texts == [
        "1",
        "10",
        "100",
        "1000",
        "steps",
        "10⁻⁹",
        "10⁻⁷",
        "10⁻⁵",
        "10⁻³",
        "0.1",
        "error",
    ]


def test_equal_calls_give_equal_text_and_descriptions_are_told() -> None:
    assert _figure(_curve(BLUE)) == _figure(_curve(BLUE))
    assert 'aria-label="how &lt;it&gt; falls"' in _figure(
        _curve(BLUE), description="how <it> falls"
    )
