"""The root of a store: what its zarr.json tells beside the arrays."""

from __future__ import annotations

import json

import zarr

from stores.places import Place
from stores.schema import Json


def read_root(where: Place) -> dict[str, Json]:
    """Read the attributes of a store's root.

    Args:
        where: Where the store lies.

    Returns:
        The attributes.

    Raises:
        ValueError: There is no store.

    Example:
        >>> from stores.folder import Folder
        >>> read_root(Folder("nowhere"))
        Traceback (most recent call last):
            ...
        ValueError: expected a store at nowhere, found none; create it, or correct the path
    """
    try:
        content = json.loads(where.read("zarr.json"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected a store at {where}, found none; create it, or correct the path"
        ) from error
    return dict(content.get("attributes", {}))


def set_state(where: Place, state: str) -> None:
    """Write into a store's root whether it is open or complete.

    Args:
        where: Where the store lies.
        state: "open" or "complete".
    """
    group = zarr.open_group(where.zarr(), mode="r+", use_consolidated=False)
    group.attrs["state"] = state
