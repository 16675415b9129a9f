"""Tables of Markdown, and the lines that say what made a page."""

import shlex
import sys
from collections.abc import Sequence

from stores import versions
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
    """The command that runs now, as a sentence.

    Returns:
        It.

    Example:
        >>> made_by().startswith("Made by `python ")
        True
    """
    return f"Made by `python {shlex.join(sys.argv)}`; all seeds are those of the code."


def machine() -> str:
    """This machine and the versions of what computes here, as a sentence.

    Returns:
        It.

    Example:
        >>> "torch" in machine()
        True
    """
    known = versions("torch", "numpy", "zarr", "dask", "datamodel-matching")
    return f"{hardware()}; {', '.join(f'{name} {version}' for name, version in known.items())}."
