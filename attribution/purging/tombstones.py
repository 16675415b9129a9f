"""Tombstones: which rows were purged from a run, as salted digests of their ids."""

import hashlib
import json
import secrets
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from attribution.forget import ForgetSet
from attribution.retained import retained_task
from attribution.task import Task
from stores import Where, place

FILE = "tombstones.json"
SCHEMA = 1
SALT_BYTES = 16


@dataclass(frozen=True)
class Tombstones:
    """Salted digests of the ids of purged rows.

    They hide an id as long as it cannot be guessed: whoever knows an id can look whether it was
    purged, which is what they are for.

    Args:
        salt: hexadecimal digits, drawn once a run.
        digests: SHA-256 over the salt and an id, one for each purged row.

    Example:
        >>> stones = Tombstones("5a17").adding(["train-3"])
        >>> "train-3" in stones, "train-4" in stones, len(stones)
        (True, False, 1)
    """

    salt: str
    digests: tuple[str, ...] = ()

    @classmethod
    def drawn(cls) -> "Tombstones":
        """No tombstones yet, with a salt of their own."""
        return cls(secrets.token_hex(SALT_BYTES))

    def __len__(self) -> int:
        return len(self.digests)

    def __contains__(self, row: str) -> bool:
        return self.digest(row) in self._known

    @property
    def _known(self) -> frozenset[str]:
        return frozenset(self.digests)

    def digest(self, row: str) -> str:
        """What stands for an id."""
        return hashlib.sha256(f"{self.salt}:{row}".encode()).hexdigest()

    def adding(self, rows: Iterable[str]) -> "Tombstones":
        """These and those of further ids."""
        return Tombstones(self.salt, (*self.digests, *map(self.digest, rows)))

    def matching(self, rows: Sequence[str]) -> list[int]:
        """Positions of the ids that have a tombstone."""
        known = self._known
        return [i for i, row in enumerate(rows) if self.digest(row) in known]


def read_tombstones(where: Where) -> Tombstones:
    """Reads the tombstones of a run.

    Args:
        where: the run's folder.

    Returns:
        Its tombstones; none, with a new salt, where nothing was purged.

    Raises:
        ValueError: the file cannot be read, or is of a later schema.

    Example:
        >>> len(read_tombstones("nowhere"))
        0
    """
    try:
        told = json.loads(place(where).read(FILE))
        if told["schema"] != SCHEMA:
            raise ValueError(f"its schema is {told['schema']}, this version reads {SCHEMA}")
        return Tombstones(str(told["salt"]), tuple(map(str, told["digests"])))
    except (FileNotFoundError, NotADirectoryError):
        return Tombstones.drawn()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"cannot read the tombstones in {str(place(where) / FILE)!r}: {error}; without them"
            " purged rows would come back: restore the file"
        ) from error


def write_tombstones(where: Where, stones: Tombstones) -> None:
    """Writes the tombstones of a run; the file is replaced as a whole.

    Args:
        where: the run's folder.
        stones: all of its tombstones.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> write_tombstones(folder, Tombstones("5a17").adding(["train-3"]))
        >>> "train-3" in read_tombstones(folder)
        True
    """
    text = json.dumps({"schema": SCHEMA} | asdict(stones), indent=2) + "\n"
    place(where).write(FILE, text.encode())


def task_left(task: Task, where: Where) -> Task:
    """Gives a run's task without the rows that were purged from it; a warning tells how many.

    Args:
        task: as it is loaded, perhaps with the purged rows.
        where: the run's folder.

    Returns:
        The task of the rows that are left.

    Raises:
        ValueError: the tombstones cannot be read, or no row is left.

    Example:
        >>> from examples.digits import task
        >>> task_left(task, "nowhere") is task
        True
    """
    gone = purged_rows(task, read_tombstones(where))
    if gone is None:
        return task
    warnings.warn(
        f"{len(gone)} rows of task {task.name!r} were purged from {place(where)} and are left out",
        stacklevel=2,
    )
    return retained_task(task, gone)


def purged_rows(task: Task, stones: Tombstones) -> ForgetSet | None:
    """The rows of a task that have a tombstone.

    Args:
        task: as it is loaded.
        stones: tombstones of a run.

    Returns:
        The rows; None where the task holds none of them.

    Raises:
        ValueError: all rows of the task have one.

    Example:
        >>> from examples.digits import task
        >>> purged_rows(task, Tombstones("5a17").adding(["train-3"])).ids
        ('train-3',)
    """
    gone = stones.matching(task.train_ids)
    return ForgetSet.at(task, gone, "purged") if gone else None
