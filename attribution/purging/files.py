"""Files of a run beside its stores: which of them tell of rows that are purged."""

import html
import json
import re
from collections.abc import Sequence

import markupsafe

from attribution.folders import leftover, lone_arrays, store_places
from attribution.model import TORCH_FILES
from attribution.prediction_files import is_prediction_table
from attribution.purging.journal import FILE as JOURNAL
from attribution.purging.tombstones import FILE as TOMBSTONES
from stores import Place

# What precompute keeps; none of it names a row.
_KEPT = ("run.json", "calibration.json", TOMBSTONES, JOURNAL)
# What is measured on models and rows as they were before.
_DERIVED = ("evaluation.json", "evaluation.previous.json", "report.html", "tuned.json")
MODELS = (".safetensors", *TORCH_FILES)


def telling_files(run: Place, ids: Sequence[str]) -> list[str]:
    """Names of the files that tell of rows: what is measured on them, and whatever names an id.

    Tables of predictions are among them, whatever they name: they do not tell of which forget set
    they are. Models are left out: their weights are another matter, and they hold salted digests of
    ids.

    Args:
        run: the run's folder.
        ids: of the rows.

    Returns:
        Names below the folder, in order.

    Example:
        >>> import tempfile
        >>> from stores import place
        >>> run = place(tempfile.mkdtemp())
        >>> run.write("page.html", b"<td>train-3</td>")
        >>> run.write("other.html", b"<td>train-30</td>")
        >>> telling_files(run, ["train-3"])
        ['page.html']
    """
    return [name for name in loose_files(run) if name in _DERIVED or _tells(run.read(name), ids)]


def _tells(content: bytes, ids: Sequence[str]) -> bool:
    return is_prediction_table(content) or tells(content, ids)


def loose_files(run: Place) -> list[str]:
    """Names of the files that no command of ours needs: what lies beside stores and models.

    Args:
        run: the run's folder.

    Returns:
        Names below the folder, in order.

    Example:
        >>> import tempfile
        >>> from stores import place
        >>> run = place(tempfile.mkdtemp())
        >>> run.write("run.json", b"{}")
        >>> run.write("notes.pdf", b"")
        >>> loose_files(run)
        ['notes.pdf']
    """
    stores = tuple(f"{name}/" for name in (*store_places(run), *lone_arrays(run)))
    return [
        name
        for name in run.walk()
        if not (name.startswith(stores) or name in _KEPT or name.endswith(MODELS) or leftover(name))
    ]


def leftovers(run: Place) -> tuple[list[str], list[str]]:
    """Folders and files that killed writers left behind.

    Args:
        run: the run's folder.

    Returns:
        Names of folders, and of files outside them.

    Example:
        >>> import tempfile
        >>> from stores import place
        >>> run = place(tempfile.mkdtemp())
        >>> run.write("full.0123.tmp/mask/c/0", b"")
        >>> run.write("run.json.partial", b"")
        >>> leftovers(run)
        (['full.0123.tmp'], ['run.json.partial'])
    """
    names = [name for name in run.walk() if leftover(name)]
    folders = {match[1] for name in names if (match := re.match(r"((?:.*?/)?[^/]*\.tmp)/", name))}
    files = [name for name in names if not name.startswith(tuple(f"{f}/" for f in folders))]
    return sorted([*folders, *lone_arrays(run)]), files


def tells(content: bytes, ids: Sequence[str]) -> bool:
    """Whether a text names one of some ids, spelled as in plain text, JSON, HTML or CSV.

    Args:
        content: the text in UTF-8.
        ids: the ids.

    Returns:
        True where one of them stands alone; a part of a longer word is another id.

    Example:
        >>> tells(b"train-3,train-5", ["train-5"]), tells(b"train-50", ["train-5"])
        (True, False)
    """
    alone = rb"(?<![0-9A-Za-z])%s(?![0-9A-Za-z])"
    texts = [text for row in ids for text in _spellings(row)]
    return any(text in content and re.search(alone % re.escape(text), content) for text in texts)


def _spellings(row: str) -> set[bytes]:
    json_texts = (json.dumps(row)[1:-1], json.dumps(row, ensure_ascii=False)[1:-1])
    # Both escape quotes, each in its own way.
    html_texts = (html.escape(row), str(markupsafe.escape(row)))
    texts = (row, *json_texts, *html_texts, row.replace('"', '""'))
    return {text.encode() for text in texts}
