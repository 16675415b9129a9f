"""Constants and ids: arrays of one storage object each, whose checksums the root records."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from numpy.dtypes import StringDType

from stores.places import Place
from stores.roots import ROOT
from stores.schema import Json
from stores.writing import checksum

_RAW = (
    ({"name": "bytes"},),  # of one byte a number
    ({"name": "bytes", "configuration": {"endian": "little"}},),
)


def whole_checksums(
    constants: Mapping[str, np.ndarray], ids: Mapping[str, Sequence[str]]
) -> dict[str, int]:
    """Give what the root records of constants and ids: the CRC-32 of each.

    Args:
        constants: Small arrays by name.
        ids: Ids of the rows by axis.

    Returns:
        Unsigned 32-bit numbers by name of the zarr array.

    Example:
        >>> whole_checksums({"scale": np.zeros(2, np.uint8)}, {"train": ["a"]})
        {'scale': 1104745215, 'train_id': 2024252428}
    """
    found = {name: _checksum(value) for name, value in constants.items()}
    texts = {axis: np.array(list(names), StringDType()) for axis, names in ids.items()}
    return found | {f"{axis}_id": _checksum(names) for axis, names in texts.items()}


def whole_layout(value: np.ndarray | zarr.Array[Any]) -> list[Json]:
    """Give what the root records of how a constant is to be read.

    Args:
        value: The constant, or the zarr array that holds it.

    Returns:
        Name of its type, and its shape.

    Example:
        >>> whole_layout(np.zeros((2, 3), np.float32))
        ['float32', [2, 3]]
    """
    return [value.dtype.name, list(value.shape)]


def refuse_other_layout(place: Place, array: zarr.Array[Any], recorded: Mapping[str, Json]) -> None:
    """Refuse a constant that would be read as another type or shape than it was written.

    Args:
        place: Where the store lies.
        array: The zarr array.
        recorded: Layouts by name; a store that was made before there were any lacks them.

    Raises:
        ValueError: It is so.
    """
    if recorded.get(array.path, found := whole_layout(array)) != found:
        raise _unusable(place, f"{array.path}/{ROOT}", "damaged")


def read_whole(place: Place, array: zarr.Array[Any], recorded: Mapping[str, Json]) -> np.ndarray:
    """Read a constant or ids.

    Args:
        place: Where the store lies.
        array: The zarr array.
        recorded: Checksums by name; a store that was made before there were any lacks them.

    Returns:
        The values.

    Raises:
        ValueError: The storage object is missing or damaged.
        ConnectionError: The service of a bucket does not answer.
    """
    name = array.path
    # zarr reads a missing object as fill values.
    if array.size and not place.exists(_file(array)):
        raise _unusable(place, name, "missing")
    try:
        values = np.asarray(array[...])
    except ConnectionError:
        raise
    except (ValueError, RuntimeError, OSError) as error:
        raise _unusable(place, name, "damaged") from error
    if name in recorded and _checksum(values) != recorded[name]:
        raise _unusable(place, name, "damaged")
    return values


def map_whole(place: Place, array: zarr.Array[Any], recorded: Mapping[str, Json]) -> np.ndarray:
    """Map a constant from disk, where its object lies there as it would in memory.

    Args:
        place: Where the store lies.
        array: The zarr array.
        recorded: As for `read_whole`.

    Returns:
        The values; writing to them does not reach the disk.

    Raises:
        ValueError: The storage object is missing or damaged.
        ConnectionError: The service of a bucket does not answer.
    """
    if not array.size or not _is_raw(array):
        return read_whole(place, array, recorded)
    name = array.path
    try:
        content = place.mapped(_file(array))
    except FileNotFoundError as error:
        raise _unusable(place, name, "missing") from error
    if len(content) != array.nbytes:
        raise _unusable(place, name, "damaged")
    values = content.view(array.dtype).reshape(array.shape)
    if name in recorded and checksum(values) != recorded[name]:
        raise _unusable(place, name, "damaged")
    return values


def _file(array: zarr.Array[Any]) -> str:
    return "/".join([array.path, "c", *["0"] * array.ndim])


def _is_raw(array: zarr.Array[Any]) -> bool:
    codecs = array.metadata.to_dict()["codecs"]
    return codecs in _RAW and sys.byteorder == "little"


def _checksum(values: np.ndarray) -> int:
    if values.dtype.kind == "T":
        return checksum(np.frombuffer(json.dumps(values.tolist()).encode(), np.uint8))
    return checksum(values.astype(values.dtype.newbyteorder("<"), copy=False))


def _unusable(place: Place, name: str, how: str) -> ValueError:
    return ValueError(
        f"{place}/{name} is {how} and is written with the store only; restore it from a copy, "
        f"or remove {place} and run the same computation again"
    )
