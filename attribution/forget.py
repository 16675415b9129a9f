"""The forget set: training rows that are to be as if they had never been there."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from attribution.seeds import generator
from attribution.task import Rows, Task

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Vectors = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class ForgetSet:
    """Training rows to forget, in the order of the data.

    Args:
        ids: their ids.
        positions: their positions among the training rows, ascending.
        total: number of training rows.
        name: what tables call the set.
        kind: how it was drawn: ids, file, rows, random or cluster.

    Example:
        >>> from examples.digits import task
        >>> forget = ForgetSet.of(task, ["train-403", "train-17"])
        >>> forget.ids, len(forget)
        (('train-17', 'train-403'), 2)
    """

    ids: tuple[str, ...]
    positions: tuple[int, ...]
    total: int
    name: str = "forget"
    kind: str = "ids"

    @classmethod
    def of(
        cls, task: Task, ids: Sequence[str], name: str = "forget", kind: str = "ids"
    ) -> "ForgetSet":
        """The forget set of some ids.

        Args:
            task: whose training rows they are.
            ids: ids of the rows, each once, in any order.
            name: what tables call the set.
            kind: how it was drawn.

        Returns:
            The forget set.

        Raises:
            ValueError: an unknown, repeated or missing id, a test row, or all rows.
            TypeError: a single string instead of a sequence of ids.
        """
        if isinstance(ids, str):
            raise TypeError(f"expected a sequence of ids, got the string {ids!r}: write [{ids!r}]")
        unknown = [row for row in ids if row not in task.positions]
        if unknown:
            near = get_close_matches(unknown[0], task.train_ids, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"unknown id {unknown[0]!r} ({len(unknown)} of {len(ids)} ids are no training rows"
                f" of task {task.name!r}){hint}"
            )
        positions = sorted(task.positions[row] for row in ids)
        return cls._checked(task, positions, name, kind)

    @classmethod
    def at(
        cls, task: Task, positions: Sequence[int] | Rows, name: str = "forget", kind: str = "rows"
    ) -> "ForgetSet":
        """The forget set of some positions among the training rows.

        Args:
            task: whose training rows they are.
            positions: from 0, each once, in any order.
            name: what tables call the set.
            kind: how it was drawn.

        Returns:
            The forget set.

        Raises:
            ValueError: a position outside the data or repeated, none, or all.
        """
        return cls._checked(task, sorted(int(i) for i in positions), name, kind)

    @classmethod
    def _checked(cls, task: Task, positions: list[int], name: str, kind: str) -> "ForgetSet":
        total = len(task.train_ids)
        if not positions:
            raise ValueError(f"forget set {name!r} is empty: name at least one training row")
        if positions[0] < 0 or positions[-1] >= total:
            wrong = positions[0] if positions[0] < 0 else positions[-1]
            row = task.target_ids[wrong] if 0 <= wrong < len(task.target_ids) else wrong
            raise ValueError(f"forget set {name!r}: {row!r} is none of the {total} training rows")
        repeated = {a for a, b in pairwise(positions) if a == b}
        if repeated:
            raise ValueError(
                f"forget set {name!r} names {task.train_ids[min(repeated)]!r} more than once"
            )
        if len(positions) == total:
            raise ValueError(
                f"forget set {name!r} holds all {total} training rows: nothing is left"
            )
        ids = tuple(task.train_ids[i] for i in positions)
        return cls(ids, tuple(positions), total, name, kind)

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def rows(self) -> Rows:
        """Positions as an array, [row]."""
        return np.array(self.positions, dtype=np.int64)

    @cached_property
    def mask(self) -> Mask:
        """True at the rows to forget, [train]."""
        mask = np.zeros(self.total, dtype=bool)
        mask[self.rows] = True
        return mask

    @property
    def retained(self) -> Rows:
        """Positions of all other rows, [row]."""
        return np.flatnonzero(~self.mask)

    def union(self, task: Task, other: "ForgetSet | None") -> "ForgetSet":
        """Rows of either set; the name and kind stay this one's."""
        if other is None:
            return self
        both = set(self.positions) | set(other.positions)
        return ForgetSet.at(task, sorted(both), self.name, self.kind)

    def minus(self, task: Task, other: "ForgetSet | None") -> "ForgetSet | None":
        """Rows of this set that are not in the other; None where none are left."""
        left = sorted(set(self.positions) - set(other.positions if other else ()))
        return ForgetSet.at(task, left, self.name, self.kind) if left else None


def parse_forget(task: Task, spec: str) -> ForgetSet:
    """The forget set that a command line names.

    `[name=]` followed by comma-separated ids, `@file` (one id a line), `rows:10:20` (positions,
    as a Python slice), `random:50:seed` or `cluster:60:seed` (a seeded row and its nearest rows
    of the same class, Euclidean in the task's inputs or its embedding).

    Args:
        task: whose training rows are named.
        spec: the text.

    Returns:
        The forget set; its name is the given one or the text.

    Raises:
        ValueError: the text cannot be read, or the rows cannot be forgotten.

    Example:
        >>> from examples.digits import task
        >>> forget = parse_forget(task, "few=rows:10:13")
        >>> forget.name, forget.ids
        ('few', ('train-10', 'train-11', 'train-12'))
        >>> parse_forget(task, "cluster:60:0").kind
        'cluster'
    """
    name, body = _name_and_body(spec)
    if re.match(r"rows:", body):
        rows = np.arange(len(task.train_ids))[_slice(body)]
        return ForgetSet.at(task, rows, name, "rows")
    ids = named_ids(spec)
    if ids is None:
        kind, size, seed = _drawn(task, body)
        draw = random_rows if kind == "random" else cluster_rows
        return ForgetSet.at(task, draw(task, size, seed), name, kind)
    return ForgetSet.of(task, ids, name, "file" if body.startswith("@") else "ids")


def _name_and_body(spec: str) -> tuple[str, str]:
    named = re.fullmatch(r"([\w.-]+)=(.+)", spec, flags=re.DOTALL)
    return (named[1], named[2]) if named else (spec, spec)


def named_ids(spec: str) -> list[str] | None:
    """The ids that a command line names, whether or not there are such rows.

    Args:
        spec: the text, as for `parse_forget`.

    Returns:
        The ids; None where it tells positions or a draw.

    Raises:
        ValueError: a file of ids cannot be read.

    Example:
        >>> named_ids("two=train-3, train-5"), named_ids("random:50:0")
        (['train-3', 'train-5'], None)
    """
    _, body = _name_and_body(spec)
    if body.startswith("@"):
        return read_ids(body[1:])
    if re.match(r"(rows|random|cluster):", body):
        return None
    return [part.strip() for part in body.split(",") if part.strip()]


def read_ids(path: str) -> list[str]:
    """The ids in a file, one a line.

    Args:
        path: the file.

    Returns:
        The ids.

    Raises:
        ValueError: the file cannot be read.

    Example:
        >>> read_ids("nowhere.txt")
        Traceback (most recent call last):
            ...
        ValueError: cannot read the file of ids 'nowhere.txt': No such file or directory
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot read the file of ids {path!r}: {reason}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _slice(body: str) -> slice:
    found = re.fullmatch(r"rows:(-?\d+|)(?::(-?\d+|))?(?::(-?\d+|))?", body)
    if not found:
        raise ValueError(f"expected rows:START:STOP, a Python slice, got {body!r}")
    ends = [int(part) if part else None for part in found.groups()]
    if found.group(2) is None and ends[0] is not None:
        return slice(ends[0], ends[0] + 1 or None)
    if ends[2] == 0:
        raise ValueError(f"the step of a slice cannot be 0, got {body!r}")
    return slice(*ends)


def _drawn(task: Task, body: str) -> tuple[str, int, int]:
    found = re.fullmatch(r"(random|cluster):(\d+)(?::(\d+))?", body)
    if not found:
        raise ValueError(f"expected random:SIZE:SEED or cluster:SIZE:SEED, got {body!r}")
    size, total = int(found.group(2)), len(task.train_ids)
    if not 0 < size < total:
        raise ValueError(
            f"{body!r} asks for {size} of {total} training rows: take 1 to {total - 1}"
        )
    return found.group(1), size, int(found.group(3) or 0)


def random_rows(task: Task, size: int, seed: int) -> Rows:
    """Positions drawn uniformly without replacement.

    Args:
        task: whose training rows.
        size: how many.
        seed: of the draw.

    Returns:
        Positions, [row].

    Example:
        >>> from examples.digits import task
        >>> len(random_rows(task, 50, seed=0))
        50
    """
    random = generator(seed, "random forget set", size)
    return random.permutation(len(task.train_ids))[:size]


def cluster_rows(task: Task, size: int, seed: int) -> Rows:
    """A seeded row and its nearest rows of the same class, Euclidean in the inputs or `embed`.

    Args:
        task: whose training rows.
        size: how many, the seeded row included.
        seed: of the first row.

    Returns:
        Positions, [row].

    Raises:
        ValueError: the row's class has fewer rows than that.

    Example:
        >>> from examples.digits import task
        >>> _, labels = task.rows("train", cluster_rows(task, 60, seed=0))
        >>> len(labels.unique())
        1
    """
    vectors, groups = row_vectors(task)
    first = int(generator(seed, "cluster forget set").integers(len(vectors)))
    near = nearest_rows(vectors, groups, first)
    if len(near) < size:
        raise ValueError(
            f"cluster:{size}:{seed} asks for {size} rows of the class of"
            f" {task.train_ids[first]!r}, which has {len(near)}: ask for fewer"
        )
    return near[:size]


def row_vectors(task: Task) -> tuple[Vectors, Rows]:
    """A vector and a class number for each training row; a regression has one class.

    Args:
        task: whose training rows; its `embed` is used where it has one.

    Returns:
        Vectors [train, feature] and classes [train].

    Example:
        >>> from examples.digits import task
        >>> row_vectors(task)[0].shape
        (1437, 64)
    """
    inputs, labels = task.rows("train", np.arange(len(task.train_ids)))
    embedded = task.embed(inputs) if task.embed else inputs
    vectors = embedded.reshape(len(inputs), -1).double().numpy()
    return vectors, task.loss.classes(labels).numpy()


def nearest_rows(vectors: Vectors, groups: Rows, first: int) -> Rows:
    """Rows of the first one's class by distance from it, the row itself leading.

    Args:
        vectors: [train, feature].
        groups: class of each row, [train].
        first: position of the row to start from.

    Returns:
        Positions of all rows of the class, nearest first.

    Example:
        >>> nearest_rows(np.array([[0.0], [5.0], [1.0]]), np.zeros(3, dtype=np.int64), 0)
        array([0, 2, 1])
    """
    same = np.flatnonzero(groups == groups[first])
    distances = np.square(vectors[same] - vectors[first]).sum(1)
    distances[same == first] = -1
    return same[np.argsort(distances, kind="stable")]
