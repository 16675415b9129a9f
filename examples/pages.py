"""Tables of Markdown, and the line that says what made a page."""

import platform
import shlex
import sys
from collections.abc import Sequence

import numpy as np
import torch

from unlearning.cost import hardware


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown.

    Args:
        header: of the columns.
        rows: cells, as many as columns.

    Returns:
        Its lines.

    Example:
        >>> print(table(["a"], [["1"]]))
        | a |
        | --- |
        | 1 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def made_by() -> str:
    """The command that runs now, the machine and versions, as a sentence.

    Returns:
        It.

    Example:
        >>> made_by().startswith("Made by `python ")
        True
    """
    return (
        f"Made by `python {shlex.join(sys.argv)}` on {hardware()}; python"
        f" {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}; all"
        " seeds are those of the code."
    )
