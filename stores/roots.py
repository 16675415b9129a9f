"""The root of a store: what its zarr.json tells beside the arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from stores.places import Place
from stores.schema import Json

ROOT = "zarr.json"
DISCARDS = "discards"  # how often the root was written because a block was discarded


def read_node(where: Place) -> dict[str, Json]:
    """Read the zarr.json of a group or an array.

    Args:
        where: Where it lies.

    Returns:
        What it tells.

    Raises:
        ValueError: It is no whole JSON.
        OSError: There is none, or it cannot be read.

    Example:
        >>> import tempfile
        >>> from stores.places import place
        >>> where = place(tempfile.mkdtemp())
        >>> where.write("zarr.json", b'{"node_type": "group"}')
        >>> read_node(where)
        {'node_type': 'group'}
    """
    text = where.read(ROOT)
    try:
        return {"node_type": None, **json.loads(text)}
    except (ValueError, TypeError) as error:
        raise _damaged(where) from error


def read_root(where: Place) -> dict[str, Json]:
    """Read the attributes of a store's root.

    Args:
        where: Where the store lies.

    Returns:
        The attributes.

    Raises:
        ValueError: There is no store, or its zarr.json is damaged.
        OSError: It cannot be read.

    Example:
        >>> from stores.folder import Folder
        >>> read_root(Folder("nowhere"))
        Traceback (most recent call last):
            ...
        ValueError: expected a store at nowhere, found none; create it, or correct the path
    """
    try:
        content = read_node(where)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"expected a store at {where}, found none; create it, or correct the path"
        ) from error
    return dict(content.get("attributes", {}))


def write_attributes(where: Place, changes: Mapping[str, Json]) -> dict[str, Json]:
    """Write attributes into a store's root, whose file is replaced as a whole.

    Args:
        where: Where the store lies.
        changes: The new values by name; all other attributes stay.

    Returns:
        All attributes.

    Raises:
        ValueError: The root's zarr.json is damaged.
        OSError: There is none, or it cannot be read or written.

    Example:
        >>> import tempfile
        >>> from stores.places import place
        >>> where = place(tempfile.mkdtemp())
        >>> where.write("zarr.json", b'{"node_type": "group", "attributes": {"state": "open"}}')
        >>> write_attributes(where, {"state": "complete"})
        {'state': 'complete'}
    """
    content = read_node(where)
    if not isinstance(content.get("attributes"), dict):
        raise _damaged(where)
    content["attributes"] |= changes
    where.write(ROOT, json.dumps(content, indent=2).encode())
    return dict(content["attributes"])


def refuse_rewritten(where: Place, opened: Mapping[str, Json]) -> None:
    """Refuse a store that was replaced by another one since it was opened.

    Args:
        where: Where the store lies.
        opened: The attributes of its root at that time.

    Raises:
        ValueError: They differ in more than what changes with the blocks, or there is no store any
            more.
    """
    if _lasting(read_root(where)) != _lasting(opened):
        raise ValueError(f"{where} was rewritten since it was opened; open it again")


def _lasting(root: Mapping[str, Json]) -> dict[str, Json]:
    return {name: value for name, value in root.items() if name not in {"state", DISCARDS}}


def _damaged(where: Place) -> ValueError:
    return ValueError(
        f"{where}/{ROOT} is damaged; restore it from a copy, or remove {where} and run the"
        " command that made it again"
    )


def check_known(what: str, name: str, known: Sequence[str]) -> None:
    """Refuse a name that a store does not have.

    Args:
        what: What is named, in the plural.
        name: The name.
        known: The names there are.

    Raises:
        ValueError: The name is unknown.

    Example:
        >>> check_known("constants", "mask", ["mask", "judge"])
    """
    if name not in known:
        raise ValueError(f"expected one of the {what} {', '.join(known) or '(none)'}; got {name!r}")


def check_ids_equal(
    path: str, stored: Mapping[str, Sequence[str]], wanted: Mapping[str, Sequence[str]]
) -> None:
    """Refuse a store of other rows.

    Args:
        path: The store, for the message.
        stored: Its ids by axis.
        wanted: The ids that it should have.

    Raises:
        ValueError: They differ.

    Example:
        >>> check_ids_equal("runs/a", {"train": ["a", "b"]}, {"train": ("a", "b")})
    """
    for axis, names in wanted.items():
        if list(stored[axis]) != list(names):
            raise ValueError(
                f"{path} was made for other {axis} ids; "
                "give another folder, or the same ids in the same order"
            )
