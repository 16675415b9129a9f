"""The report of an evaluation: one page of HTML that a person reads, with nothing to load."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jinja2
from markupsafe import Markup
from numpy.typing import NDArray

from unlearning.budget_panels import budget_panels
from unlearning.drawing import LOWEST
from unlearning.figures import (
    MARKERS,
    SPREAD_BAND,
    Mark,
    cost_figure,
    distance_figure,
    margins_figure,
    method_colours,
    ratio_figure,
    thumbnail,
)
from unlearning.reading import pick, value
from unlearning.standings import DISTANCES, GIVEN_THE_ANSWER, distance_of, standings
from unlearning.tables import pooled_name
from unlearning.wording import as_models, as_number, as_percent, as_range, as_seconds, listed

SCHEMA = 1
DRAWN = ("datamodel", "newton")
SPLITS = {"forget": "forgotten rows", "retain": "retained rows", "test": "test rows"}

_LABELS = {  # name: as tables and prose say it, as figures say it
    "do_nothing": ("do nothing", "do nothing"),
    "dmm": ("datamodel matching (dmm)", "dmm"),
    "dmm_pgu": ("dmm inside PGU's projection", "dmm, PGU"),
    "om": ("oracle matching (om)", "om"),
    "om_absolute": ("oracle matching, absolute", "om, absolute"),
    "match_reference": ("matching a held-out reference", "held-out reference"),
    "match_untrained": ("matching untrained models", "untrained models"),
    "pgu": ("PGU with its own loss", "PGU"),
    "gradient_ascent": ("gradient ascent", "gradient ascent"),
    "fine_tune": ("fine-tune", "fine-tune"),
    "neggrad_plus": ("NegGrad+", "NegGrad+"),
    "ascent_descent": ("ascent-descent", "ascent-descent"),
    "scrub": ("SCRUB", "SCRUB"),
    "ssd": ("SSD", "SSD"),
    "salun": ("SalUn", "SalUn"),
    "bad_teacher": ("bad teacher", "bad teacher"),
}
_STAGES = ("before", "predicted", "retrained", "unlearned")


def render_report(
    evaluation: Mapping[str, Any],
    *,
    title: str,
    thumbnails: Mapping[str, NDArray[Any]] | None = None,
    missing: Sequence[str] = (),
) -> str:
    """Write an evaluation as one self-contained HTML page.

    Args:
        evaluation: What `dmm evaluate` writes; numbers may be null and blocks may be absent.
        title: Heading of the page.
        thumbnails: Images by row id, [height, width] or [height, width, 3]; of the most affected
            rows only the forgotten ones are shown. None shows none.
        missing: Sentences on evidence that is missing, added to those the page finds itself.

    Returns:
        The page; equal arguments give equal text.

    Raises:
        ValueError: The evaluation has another schema, or a column or image of a wrong shape.

    Example:
        >>> page = render_report({"schema": 1, "forget_sets": {}}, title="Digits")
        >>> page.startswith("<!doctype html>")
        True
    """
    found = evaluation.get("schema")
    if found != SCHEMA:
        raise ValueError(
            f"expected an evaluation of schema {SCHEMA}, got {found!r}; write it again with this "
            f"version's `dmm evaluate`"
        )
    distance = distance_of(evaluation)
    return _environment().get_template("report.html.j2").render(
        evaluation=evaluation,
        sets=_sets(evaluation),
        title=title,
        splits=SPLITS,
        band=SPREAD_BAND,
        distance=distance,
        distance_name=DISTANCES[distance],
        headline=_headline_method(evaluation),
        standings=standings(evaluation, distance),
        nearest=_nearest(evaluation, distance),
        side_effect=_side_effect(evaluation, distance),
        colours=_colours(evaluation),
        shapes={name: MARKERS[marker] for name, marker in _shapes(evaluation).items()},
        figures=_figures(evaluation, distance),
        predicted=list(_predicted(evaluation)),
        affected={name: _affected(block, thumbnails) for name, block in _sets(evaluation).items()},
        images={row: thumbnail(image) for row, image in (thumbnails or {}).items()},
        with_thumbnails=thumbnails is not None,
        missing=missing,
    )  # fmt: skip


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        number=as_number, percent=as_percent, seconds=as_seconds, range=as_range, label=_label,
        listed=listed,
    )  # fmt: skip
    environment.globals.update(
        value=value, pick=pick, methods=_methods, predictors=_predictors, lacking=_lacking,
        narrower=_narrower, drawn=_drawn, as_models=as_models,
    )  # fmt: skip
    return environment


# -- reading the evaluation: anything may be absent or null ---------------------------------


def _sets(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return dict(evaluation.get("forget_sets") or {})


def _methods(block: Any) -> dict[str, Any]:
    """Give the methods of a forget set: the known ones in their order, then the others."""
    methods = pick(block, "methods") or {}
    names = [*(name for name in _LABELS if name in methods), *sorted(set(methods) - set(_LABELS))]
    return {name: methods[name] for name in names}


def _all_methods(evaluation: Mapping[str, Any]) -> list[str]:
    union = {name: None for block in _sets(evaluation).values() for name in _methods(block)}
    return list(_methods({"methods": union}))


def _label(method: str, *, short: bool = False) -> str:
    return _LABELS.get(method, (method, method))[short]


def _colours(evaluation: Mapping[str, Any]) -> dict[str, str]:
    return method_colours(_all_methods(evaluation))


def _shapes(evaluation: Mapping[str, Any]) -> dict[str, str]:
    markers = list(MARKERS)
    return {name: markers[index % len(markers)] for index, name in enumerate(_sets(evaluation))}


def _entries(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Every forget set, method and its results."""
    for name, block in _sets(evaluation).items():
        for method, results in _methods(block).items():
            yield name, method, results


# -- what the sentences are about; their words are in the template --------------------------


def _headline_method(evaluation: Mapping[str, Any]) -> str | None:
    names = _all_methods(evaluation)
    preferred = [name for name in ("dmm", "dmm_pgu", "om", "pgu") if name in names]
    return next(iter([*preferred, *(name for name in names if name != "do_nothing")]), None)


def _nearest(evaluation: Mapping[str, Any], distance: str) -> dict[str, list[tuple[str, float]]]:
    """Sort the forget sets (with the score) under the method nearest to retraining on each."""
    nearest: dict[str, list[tuple[str, float]]] = {}
    for name, block in _sets(evaluation).items():
        scores = [
            (score, method)
            for method, results in _methods(block).items()
            if method not in GIVEN_THE_ANSWER
            and (score := value(results, distance, "forget", "mean")) is not None
        ]
        if scores:
            score, method = min(scores)
            nearest.setdefault(method, []).append((name, score))
    return nearest


def _side_effect(evaluation: Mapping[str, Any], distance: str) -> tuple[float, str, str] | None:
    """Find where rows that were not forgotten moved away most: increase, forget set, split."""
    method = str(_headline_method(evaluation))
    found = []
    for name, block in _sets(evaluation).items():
        for split in ("retain", "test"):
            before = value(block, "methods", "do_nothing", distance, split, "mean")
            after = value(block, "methods", method, distance, split, "mean")
            if before is not None and after is not None:
                found.append((round(after, 2) - round(before, 2), name, split))
    return max(found, default=None)


def _predictors(evaluation: Mapping[str, Any], *path: str) -> dict[str, list[float]]:
    """Collect one number of every predictor over the forget sets."""
    found: dict[str, list[float]] = {}
    for block in _sets(evaluation).values():
        for predictor, result in (pick(block, "predictions") or {}).items():
            if (number := value(result, *path)) is not None:
                found.setdefault(predictor, []).append(number)
    return found


def _predicted(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, bool]]:
    """Every forget set and predictor with its agreement, then several sets taken together."""
    blocks = [(name, block, False) for name, block in _sets(evaluation).items()]
    blocks += [(pooled_name(group), group, True) for group in evaluation.get("pooled") or []]
    for title, block, pooled in blocks:
        for predictor, kinds in (pick(block, "predictions") or {}).items():
            yield title, predictor, kinds, pooled


def _narrower(evaluation: Mapping[str, Any], predictor: str) -> tuple[int, int]:
    """On how many forget sets error bars of one width would have to be wider, and of how many."""
    found = []
    for block in _sets(evaluation).values():
        margins = pick(block, "predictions", predictor, "margins", "forget")
        own, constant = (value(margins, key, "80") for key in ("width", "constant_width"))
        if own is not None and constant is not None:
            found.append(own < constant)
    return sum(found), len(found)


def _lacking(evaluation: Mapping[str, Any], key: str) -> list[str]:
    return [name for name, block in _sets(evaluation).items() if not pick(block, key)]


# -- figures and the table of rows ----------------------------------------------------------


def _figures(evaluation: Mapping[str, Any], distance: str) -> dict[str, Any]:
    return {
        "margins": list(_margin_panels(evaluation)),
        "distance": list(_distance_panels(evaluation, distance)),
        "spread": _ratio(evaluation, "spread"),
        "shift": _ratio(evaluation, "shift"),
        "cost": _cost(evaluation, distance),
        "budgets": budget_panels(
            _sets(evaluation),
            distance,
            DISTANCES[distance],
            {name: (_label(name, short=True), c) for name, c in _colours(evaluation).items()},
        ),
    }


def _mark(evaluation: Mapping[str, Any], name: str, method: str, x: float, y: Any = None) -> Mark:
    colour, marker = _colours(evaluation)[method], _shapes(evaluation)[name]
    return Mark(_label(method, short=True), colour, name, marker, x, y)


def _margin_panels(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, Markup]]:
    for name, block in _sets(evaluation).items():
        told = pick(block, "rows") or {}
        for predictor in _drawn(evaluation, told):
            figure = margins_figure(
                told[predictor],
                _statistics(pick(block, "predictions", predictor, "margins", "forget")),
                description=f"Margins of {name} predicted by {predictor} against retrained ones",
            )
            yield f"{name}, predicted by {predictor}", figure


def _drawn(evaluation: Mapping[str, Any], predictors: Iterable[str]) -> list[str]:
    """The predictor that matching used and the two basic ones; all where that is not known."""
    used = pick(evaluation, "predictor")
    return [name for name in predictors if used in (None, name) or name in DRAWN]


def _statistics(margins: Any) -> list[str]:
    ceiling = value(margins, "ceiling")
    best = "" if ceiling is None else f" (ceiling {as_number(ceiling)})"
    ends = {"slope": "", "r2": best, "corr": ""}
    return [
        f"{'R²' if key == 'r2' else key} {as_number(found)}{ends[key]}"
        for key in ends
        if (found := value(margins, key)) is not None
    ]


def _distance_panels(evaluation: Mapping[str, Any], key: str) -> Iterator[tuple[str, Markup]]:
    limits = _distance_limits(evaluation, key)
    for name, block in _sets(evaluation).items():
        marks = [
            _mark(evaluation, name, method, mean, value(results, key, "forget", "p95"))
            for method, results in _methods(block).items()
            if (mean := value(results, key, "forget", "mean")) is not None
        ]
        null = pick(block, "null", key, "forget")
        if marks:
            yield (
                name,
                distance_figure(
                    marks,
                    (value(null, "mean"), value(null, "p95")),
                    limits=limits,
                    label=f"{DISTANCES[key]} of the forgotten rows",
                    description=f"{DISTANCES[key]} of each method on the forgotten rows of {name}",
                ),
            )


def _distance_limits(evaluation: Mapping[str, Any], key: str) -> tuple[float, float]:
    blocks = [results for _, _, results in _entries(evaluation)]
    blocks += [pick(block, "null") for block in _sets(evaluation).values()]
    numbers = [
        number
        for block in blocks
        for statistic in ("mean", "p95")
        if (number := value(block, key, "forget", statistic)) is not None
    ]
    low, high = min(numbers, default=0.1), max(numbers, default=1.0)
    return max(low, LOWEST) / 1.3, max(high, 2 * LOWEST) * 1.3


def _ratio(evaluation: Mapping[str, Any], kind: Literal["spread", "shift"]) -> Markup | None:
    marks = [
        _mark(evaluation, name, method, number)
        for name, method, results in _entries(evaluation)
        if (number := value(results, kind, "forget")) is not None
    ]
    description = f"{kind.capitalize()} of every method on the forgotten rows"
    return ratio_figure(marks, kind=kind, description=description) if marks else None


def _cost(evaluation: Mapping[str, Any], distance: str) -> Markup | None:
    marks = []
    for name, method, results in _entries(evaluation):
        cost = value(results, "cost_over_retrain")
        mean = value(results, distance, "forget", "mean")
        null = value(_sets(evaluation)[name], "null", distance, "forget", "mean")
        if cost is not None and mean is not None and null is not None:
            marks.append(_mark(evaluation, name, method, cost, mean - null))
    description = "Cost of every method against its excess distance on the forgotten rows"
    return cost_figure(
        marks, label=DISTANCES[distance], description=description
    ) if marks else None  # fmt: skip


def _affected(block: Any, thumbnails: Mapping[str, NDArray[Any]] | None) -> list[dict[str, Any]]:
    """Give the most affected rows with their place on the strip and the image, where allowed."""
    rows = [dict(row) for row in pick(block, "affected") or []]
    found = [value(row, key) for row in rows for key in _STAGES]
    numbers = [number for number in found if number is not None]
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    for row in rows:
        row["strip"] = {
            key: round(6 + 108 * (number - low) / ((high - low) or 1.0), 1)
            for key in _STAGES
            if (number := value(row, key)) is not None
        }
        image = (thumbnails or {}).get(str(row.get("id"))) if row.get("split") == "forget" else None
        row["thumbnail"] = None if image is None else thumbnail(image)
    return rows
