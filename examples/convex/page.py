"""The results of the suite as one self-contained HTML page, and as a text in Markdown."""

from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np

from examples.convex.suite import GRADIENT, GROUP, REACHED, Result
from examples.convex.words import condition, details, findings, overview
from examples.pages import table
from unlearning.curves import Curve, curves_figure

TITLE = "Unlearning in ridge regression, where the retrained solution is known"
LOOKS = {  # colour of each method's line, and whether it is dashed
    "ascent-descent": ("#d55e00", False),
    "noisy descent": ("#e69f00", False),
    GRADIENT: ("#cc79a7", False),
    "matching, first-order": ("#7f7f7f", False),
    "matching, leverage": ("#56b4e9", False),
    "matching, group, Adam": ("#332288", True),
    GROUP: ("#0072b2", False),
    "matching, oracle": ("#009e73", True),
}
LIMITS = (1e-9, 3.0)
HEADINGS = {
    "random": "Forgetting random rows",
    "coherent": "Forgetting rows that are alike",
}


def curves(result: Result) -> list[Curve]:
    """A line a method, from the first step on."""
    return [
        Curve(
            name,
            colour,
            result.marks[1:].tolist(),
            result.median(name)[1:].tolist(),
            result.errors[name].weights.min(0)[1:].tolist(),
            result.errors[name].weights.max(0)[1:].tolist(),
            dashed,
        )
        for name, (colour, dashed) in LOOKS.items()
    ]


def html(results: Sequence[Result], made: str) -> str:
    """The page.

    Args:
        results: of the suite.
        made: how they were made, a sentence.

    Returns:
        HTML with nothing to load.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.j2").render(
        title=TITLE,
        findings=findings(results),
        made=made,
        headings=HEADINGS,
        columns=len({result.penalty for result in results}),
        panels={
            kind: [_panel(result) for result in results if result.forget == kind]
            for kind in dict.fromkeys(result.forget for result in results)
        },
        legend=curves(results[0]),
        overview=overview(results),
        details=details(results),
    )


def _panel(result: Result) -> tuple[str, str, str]:
    figure = curves_figure(
        curves(result),
        limits=LIMITS,
        level=REACHED,
        labels=("steps", "error of the weights"),
        description=f"Error against steps: {result.name}",
    )
    descent, matching = (condition(np.median(result.conditions[n])) for n in (GRADIENT, GROUP))
    title = f"{result.shape}, penalty {result.penalty:g}"
    return title, f"condition number: descent {descent}, matching {matching}", figure


def markdown(results: Sequence[Result], made: str) -> str:
    """Sentences and the overview.

    Args:
        results: of the suite.
        made: how they were made, a sentence.

    Returns:
        The text.
    """
    header, *rows = overview(results)
    lines = [f"# {TITLE}", "", made, "", *(f"- {sentence}" for sentence in findings(results)), ""]
    lines += ["Distance of the weights from the retrained ones after the last step, over that of"]
    lines += ["the full model: median over the seeds (lowest to highest).", ""]
    return "\n".join([*lines, table(header, rows)]) + "\n"
