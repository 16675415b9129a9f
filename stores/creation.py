"""Making a store: laid out in memory, then written as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import zarr
from numpy.dtypes import StringDType
from zarr.abc.buffer import Buffer
from zarr.storage import MemoryStore

from stores.blocks import marked
from stores.metadata import DONE, create_array
from stores.places import Bytes, Place
from stores.schema import AXES, SCHEMA_PREFIX, SCHEMA_VERSION, Json, StoreSpec, check_name
from stores.watching import refuse_changes
from stores.wholes import whole_checksums, whole_layout


def create_group(
    place: Place,
    spec: StoreSpec,
    attributes: Mapping[str, Json],
    constants: Mapping[str, np.ndarray],
    ids: Mapping[str, Sequence[str]],
) -> None:
    """Create a zarr group with empty arrays, all constants and all ids.

    Args:
        place: Where to create it.
        spec: Its arrays.
        attributes: What the root holds beside schema, specification and state.
        constants: Small arrays by name, written whole.
        ids: The ids of the rows by axis.

    Raises:
        ValueError: The place is taken or cannot be written, or constants or ids are unusable.

    Example:
        >>> import tempfile
        >>> from stores.places import place
        >>> from stores.schema import ArraySpec
        >>> spec = StoreSpec("masks", "model", 2, {"mask": ArraySpec(("model",), (3,), "bool")})
        >>> where = place(tempfile.mkdtemp()) / "masks"
        >>> create_group(where, spec, {}, {}, {"model": ["a", "b", "c"]})
    """
    if place.taken():
        raise ValueError(f"{place} exists already; open it, or give another folder")
    # In a bucket a place without a root is free, and these blocks would count as the new store's.
    if marked(place):
        raise ValueError(
            f"{place} has lost its zarr.json but holds blocks: restore that from a copy, or remove"
            " all that lies there"
        )
    _check_constants(spec, constants)
    check_ids(spec, ids)
    refuse_changes()
    try:
        place.fill(_files(spec, attributes, constants, ids))
    except OSError as error:
        raise ValueError(f"cannot write {place}: {error}; give a folder you may write") from error


def check_ids(spec: StoreSpec, ids: Mapping[str, Sequence[str]]) -> None:
    """Refuse ids that cannot name the rows of an axis.

    Args:
        spec: The arrays whose axes are named.
        ids: The ids of the rows by axis.

    Raises:
        ValueError: An axis is unknown, its length differs, or an id occurs twice.
        TypeError: An id is no text.

    Example:
        >>> from stores.schema import ArraySpec
        >>> spec = StoreSpec("masks", "model", 2, {"mask": ArraySpec(("model",), (3,), "bool")})
        >>> check_ids(spec, {"model": ["a", "b", "c"]})
    """
    for axis, names in ids.items():
        if axis not in AXES:
            raise ValueError(f"expected ids of the axes {', '.join(AXES)}; got {axis!r}")
        _check_names(axis, names, _axis_length(spec, axis))


def _check_names(axis: str, names: Sequence[str], length: int | None) -> None:
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"expected texts as ids of {axis!r}, got {wrong[0]!r}; use str()")
    if length is not None and len(names) != length:
        raise ValueError(f"expected {length} ids of the axis {axis!r}, got {len(names)}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"expected each id of {axis!r} once, got {twice[0]!r} twice")


def _axis_length(spec: StoreSpec, axis: str) -> int | None:
    lengths = (
        array.shape[array.axes.index(axis)] for array in spec.arrays.values() if axis in array.axes
    )
    return next(lengths, None)


def _check_constants(spec: StoreSpec, constants: Mapping[str, np.ndarray]) -> None:
    for name, value in constants.items():
        check_name(name)
        if name in spec.arrays:
            raise ValueError(f"expected another name than the array's for the constant {name!r}")
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
            raise TypeError(
                f"expected a numpy array of numbers as the constant {name!r}, "
                f"got {getattr(value, 'dtype', type(value).__name__)}"
            )


def _files(
    spec: StoreSpec,
    attributes: Mapping[str, Json],
    constants: Mapping[str, np.ndarray],
    ids: Mapping[str, Sequence[str]],
) -> dict[str, Bytes]:
    # zarr asks a folder or a service about each file several times before it writes it.
    files: dict[str, Buffer] = {}
    root = _root(spec, attributes, constants, ids)
    group = zarr.create_group(MemoryStore(files), attributes=root)
    for name in (*spec.arrays, DONE):
        create_array(group, spec, name)
    for name, value in constants.items():
        _create_whole(group, name, value, [f"{name}_{index}" for index in range(value.ndim)])
    for axis, names in ids.items():
        _create_whole(group, f"{axis}_id", np.array(list(names), dtype=StringDType()), [axis])
    return {name: content.as_buffer_like() for name, content in files.items()}


def _root(
    spec: StoreSpec,
    attributes: Mapping[str, Json],
    constants: Mapping[str, np.ndarray],
    ids: Mapping[str, Sequence[str]],
) -> dict[str, Json]:
    return {
        "schema": f"{SCHEMA_PREFIX}{spec.kind}",
        "schema_version": SCHEMA_VERSION,
        "state": "open",
        "spec": spec.to_json(),
        "constants": list(constants),
        "ids": list(ids),
        "checksums": whole_checksums(constants, ids),
        # The same bytes have one checksum, whatever they are read as.
        "layouts": {name: whole_layout(value) for name, value in constants.items()},
        **attributes,
    }


def _create_whole(group: zarr.Group, name: str, value: np.ndarray, axes: list[str]) -> None:
    group.create_array(
        name,
        data=value,
        chunks=tuple(max(1, length) for length in value.shape),
        compressors=None,
        dimension_names=axes,
        config={"write_empty_chunks": True},
    )
