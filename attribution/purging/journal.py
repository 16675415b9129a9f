"""The journal of a purge: what is needed to finish it, written before anything changes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from attribution.purging.tombstones import Tombstones, read_tombstones
from stores import Where, place

FILE = "purge.json"
SCHEMA = 1
_TUPLES = ("positions", "rewrite", "clear", "files")


@dataclass(frozen=True)
class Journal:
    """What a purge does, in this order; it holds no id and nothing of a row.

    Args:
        token: names the purge in the stores that it has rewritten.
        stones: tombstones of the run once the purge is done.
        earlier: how many of them were there before.
        positions: of the purged rows among the training rows that were left before.
        digests: old digest to new one, of data, masks and lists of ids.
        rewrite: stores that are written anew, by their names below the run's folder.
        clear: stores and folders that are removed.
        files: single files that are removed.
        bytes_before: size of the run.
    """

    token: str
    stones: Tombstones
    earlier: int
    positions: tuple[int, ...]
    digests: Mapping[str, str]
    rewrite: tuple[str, ...]
    clear: tuple[str, ...]
    files: tuple[str, ...]
    bytes_before: int

    @property
    def own(self) -> Tombstones:
        """Tombstones of the rows of this purge."""
        return Tombstones(self.stones.salt, self.stones.digests[self.earlier :])

    @property
    def before(self) -> Tombstones:
        """Tombstones that were there before."""
        return Tombstones(self.stones.salt, self.stones.digests[: self.earlier])


def write_journal(where: Where, journal: Journal) -> None:
    """Writes the journal to a run's folder, as a whole, where there is none.

    Args:
        where: the run's folder.
        journal: what is to be done.

    Raises:
        ValueError: another purge has begun meanwhile.

    Example:
        >>> import tempfile
        >>> folder, stones = tempfile.mkdtemp(), Tombstones("5a17").adding(["train-3"])
        >>> journal = Journal("0b", stones, 0, (3,), {}, ("full",), (), ("report.html",), 120)
        >>> write_journal(folder, journal)
        >>> read_journal(folder) == journal
        True
    """
    text = json.dumps({"schema": SCHEMA} | asdict(journal), indent=2) + "\n"
    try:
        place(where).create(FILE, text.encode())
    except FileExistsError as error:
        raise _unfinished(where) from error


def read_journal(where: Where) -> Journal | None:
    """Reads the journal of an unfinished purge.

    Args:
        where: the run's folder.

    Returns:
        The journal; None where no purge is unfinished.

    Raises:
        ValueError: it cannot be read, or is of a later schema.

    Example:
        >>> read_journal("nowhere")
    """
    run = place(where)
    try:
        told = json.loads(run.read(FILE))
        schema = told.pop("schema")
        if schema != SCHEMA:
            raise ValueError(f"its schema is {schema}, this version reads {SCHEMA}")
        stones = Tombstones(told["stones"]["salt"], tuple(told["stones"]["digests"]))
        tuples = {name: tuple(told[name]) for name in _TUPLES}
        return Journal(**told | tuples | {"stones": stones})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read the journal {str(run / FILE)!r}: {error}") from error


def refuse_unfinished(where: Where) -> None:
    """Refuses a run from which rows have been purged in part only.

    Args:
        where: the run's folder.

    Raises:
        ValueError: names the command that finishes the purge.

    Example:
        >>> refuse_unfinished("nowhere")
    """
    if place(where).exists(FILE):
        raise _unfinished(where)


def _unfinished(where: Where) -> ValueError:
    return ValueError(
        f"a purge of {place(where)} was interrupted: finish it with dmm purge --run {where}"
    )


def refuse_overtaken(where: Where, journal: Journal) -> None:
    """Refuses a purge that was planned before another one ended; its journal is removed.

    Args:
        where: the run's folder.
        journal: of the purge.

    Raises:
        ValueError: the run has other tombstones than those that were there when it was planned.

    Example:
        >>> import tempfile
        >>> folder, stones = tempfile.mkdtemp(), Tombstones("5a17").adding(["train-3"])
        >>> refuse_overtaken(folder, Journal("0b", stones, 0, (3,), {}, (), (), (), 120))
    """
    run = place(where)
    # Tombstones come last: the purge may have been killed after it wrote its own.
    if read_tombstones(run).digests not in (journal.before.digests, journal.stones.digests):
        run.remove(FILE)
        raise ValueError(
            f"other rows were purged from {run} meanwhile, and none of these: call it again"
        )
