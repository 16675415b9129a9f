"""What a store holds: named axes, dtypes and the rule that cuts arrays into blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

Json: TypeAlias = Any
"""A value that JSON can hold: None, bool, int, finite float, str, lists and dicts of them."""

SCHEMA_VERSION = 2
SCHEMA_PREFIX = "datamodel-matching."
AXES = ("model", "train", "target", "output", "feature")
OBJECT_BYTES = 16 * 2**20  # the largest storage object the default cut makes

_RESERVED = (*AXES, "done", *(f"{axis}_id" for axis in AXES))
_LARGEST_ITEM = 8  # bytes; zarr has no portable type for longer numbers


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store: its named axes, shape and dtype.

    Args:
        axes: A name from `AXES` for each dimension, or None for an unnamed one.
        shape: Length of each dimension, at least 1.
        dtype: A numpy name of a bool, integer or float type, such as "float16".
        rows: Chunk length along the first axis that is not the store's block axis; None cuts
            that axis evenly so that a storage object stays within 16 MiB.
        compress: Whether blosc (zstd, bitshuffle) is worth it; it switches off direct reads.
        scale: Name of the array, without the first axis, by which the values are to be multiplied.
        sum: Name of the array, without the first axis, that holds the sum over it, multiplied.

    Raises:
        ValueError: The fields contradict each other.

    Example:
        >>> ArraySpec(("target", "train"), (100, 5000), "float16").nbytes
        1000000
    """

    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: str
    rows: int | None = None
    compress: bool = False
    scale: str | None = None
    sum: str | None = None

    def __post_init__(self) -> None:
        """Check that axes, shape and dtype fit together."""
        _check_axes(self.axes)
        _check_shape(self.axes, self.shape)
        _check_dtype(self.dtype)

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes, uncompressed."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class StoreSpec:
    """The layout of a store: which arrays, and how one axis cuts them all into blocks.

    Args:
        kind: What the store holds, such as "datamodel"; checked when it is opened.
        axis: The axis that is cut into blocks; each array has it exactly once.
        block: Rows of that axis in one block; the last block may be shorter.
        arrays: The arrays by name.

    Raises:
        ValueError: The arrays do not agree on an axis, or a name or size is unusable.

    Example:
        >>> weights = ArraySpec(("train", "target"), (50, 7), "float32")
        >>> spec = StoreSpec("datamodel", "target", 3, {"weights": weights})
        >>> spec.length, spec.blocks, spec.span(2)
        (7, 3, slice(6, 7, None))
    """

    kind: str
    axis: str
    block: int
    arrays: Mapping[str, ArraySpec]

    def __post_init__(self) -> None:
        """Check that every array can be cut the same way."""
        object.__setattr__(self, "arrays", dict(self.arrays))
        _check_store(self)
        for name, array in self.arrays.items():
            _check_array(self, name, array)
            _check_companions(self.arrays, name)
        _check_lengths(self.arrays)

    @property
    def length(self) -> int:
        """Length of the axis that is cut into blocks."""
        first = next(iter(self.arrays.values()))
        return first.shape[first.axes.index(self.axis)]

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return _divide_up(self.length, self.block)

    def span(self, block: int) -> slice:
        """Give the rows of the block axis that belong to one block.

        Args:
            block: Block number, counted from 0.

        Returns:
            A slice of positions along the block axis.

        Raises:
            ValueError: There is no such block.

        Example:
            >>> outputs = ArraySpec(("model",), (5,), "float32")
            >>> StoreSpec("outputs", "model", 2, {"outputs": outputs}).span(1)
            slice(2, 4, None)
        """
        if not 0 <= block < self.blocks:
            raise ValueError(f"expected a block from 0 to {self.blocks - 1}, got {block}")
        return slice(block * self.block, min(self.length, (block + 1) * self.block))

    def block_axis(self, name: str) -> int:
        """Give the dimension of an array along which it is cut into blocks."""
        return self.array(name).axes.index(self.axis)

    def block_shape(self, name: str, block: int) -> tuple[int, ...]:
        """Give the shape of one block of an array, the ragged last one included."""
        shape = list(self.array(name).shape)
        span = self.span(block)
        shape[self.block_axis(name)] = span.stop - span.start
        return tuple(shape)

    def chunks(self, name: str) -> tuple[int, ...]:
        """Give the shape of one storage object of an array."""
        array, position = self.array(name), self.block_axis(name)
        chunks = list(array.shape)
        chunks[position] = min(self.block, self.length)
        if len(chunks) > 1:
            cut = _cut_axis(position)
            chunks[cut] = array.rows or _even_rows(chunks, cut, array.dtype)
        return tuple(chunks)

    def array(self, name: str) -> ArraySpec:
        """Give the specification of one array, or say which names exist."""
        if name not in self.arrays:
            known = ", ".join(sorted(self.arrays))
            raise ValueError(f"expected one of the arrays {known}; got {name!r}")
        return self.arrays[name]

    def to_json(self) -> dict[str, Json]:
        """Give the specification as JSON; `from_json` reads it back.

        Returns:
            A dict of plain values.

        Example:
            >>> spec = StoreSpec("masks", "model", 2, {"mask": ArraySpec(("model",), (3,), "bool")})
            >>> StoreSpec.from_json(spec.to_json()) == spec
            True
        """
        arrays = {name: _array_to_json(array) for name, array in self.arrays.items()}
        return {"kind": self.kind, "axis": self.axis, "block": self.block, "arrays": arrays}

    @staticmethod
    def from_json(value: Mapping[str, Json]) -> StoreSpec:
        """Read a specification that `to_json` gave.

        Args:
            value: The dict of plain values.

        Returns:
            The specification.

        Raises:
            ValueError: A field is missing or cannot be understood.

        Example:
            >>> StoreSpec.from_json({})
            Traceback (most recent call last):
                ...
            ValueError: expected a store specification, got {}: 'arrays'
        """
        try:
            arrays = {name: _array_from_json(array) for name, array in value["arrays"].items()}
            return StoreSpec(value["kind"], value["axis"], value["block"], arrays)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected a store specification, got {value!r}: {error}") from error


def check_schema(attributes: Mapping[str, Json], where: str, kind: str | None) -> None:
    """Refuse attributes of a folder that is no store of this kind and schema version.

    Args:
        attributes: The attributes of the folder's root group.
        where: The folder, for the message.
        kind: The kind that is wanted; None takes any.

    Raises:
        ValueError: It is no store, another kind, or of a newer schema version.

    Example:
        >>> check_schema({"schema": "datamodel-matching.masks", "schema_version": 1}, "x", "masks")
    """
    schema, version = str(attributes.get("schema")), attributes.get("schema_version")
    if not schema.startswith(SCHEMA_PREFIX):
        raise ValueError(f"expected a store of datamodel-matching at {where}, got schema {schema}")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(
            f"{where} has schema version {version}, expected at most {SCHEMA_VERSION}; "
            "open it with the newer version of datamodel-matching that wrote it"
        )
    found = schema.removeprefix(SCHEMA_PREFIX)
    if kind is not None and found != kind:
        raise ValueError(f"expected a store of kind {kind!r} at {where}, got kind {found!r}")


def _divide_up(length: int, part: int) -> int:
    return -(-length // part)


def _cut_axis(block_axis: int) -> int:
    return 1 if block_axis == 0 else 0


def _even_rows(chunks: list[int], cut: int, dtype: str) -> int:
    length = chunks[cut]
    row = int(np.prod(chunks)) // length * np.dtype(dtype).itemsize
    fitting = max(1, OBJECT_BYTES // row)
    # Trailing objects are stored padded, so equal cuts waste the least.
    return _divide_up(length, _divide_up(length, fitting))


def _array_to_json(array: ArraySpec) -> dict[str, Json]:
    value = asdict(array)
    return {**value, "axes": list(array.axes), "shape": list(array.shape)}


def _array_from_json(value: Mapping[str, Json]) -> ArraySpec:
    return ArraySpec(
        axes=tuple(value["axes"]),
        shape=tuple(value["shape"]),
        dtype=value["dtype"],
        rows=value["rows"],
        compress=value["compress"],
        # Stores of schema version 1 have neither.
        scale=value.get("scale"),
        sum=value.get("sum"),
    )


def _check_axes(axes: tuple[str | None, ...]) -> None:
    named = [axis for axis in axes if axis is not None]
    unknown = [axis for axis in named if axis not in AXES]
    if unknown:
        raise ValueError(f"expected axes out of {', '.join(AXES)} or None; got {unknown[0]!r}")
    if len(set(named)) < len(named):
        raise ValueError(f"expected each axis once, got {axes}; name the second one None")


def _check_shape(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> None:
    if len(axes) != len(shape):
        raise ValueError(f"expected one length for each of the axes {axes}; got shape {shape}")
    if any(length < 1 for length in shape):
        raise ValueError(f"expected lengths of at least 1, got shape {shape}")


def _check_dtype(dtype: str) -> None:
    try:
        found = np.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"expected a numpy dtype name, got {dtype!r}") from error
    if found.name != dtype or found.kind not in "biuf" or found.itemsize > _LARGEST_ITEM:
        raise ValueError(
            f"expected the numpy name of a bool, integer or float type, got {dtype!r}; "
            "write it as 'float32', 'int64', 'bool'"
        )


def _check_store(spec: StoreSpec) -> None:
    if not spec.kind or "/" in spec.kind:
        raise ValueError(f"expected a kind such as 'datamodel', got {spec.kind!r}")
    if spec.axis not in AXES:
        raise ValueError(f"expected a block axis out of {', '.join(AXES)}; got {spec.axis!r}")
    if spec.block < 1:
        raise ValueError(f"expected at least 1 row in a block, got block={spec.block}")
    if not spec.arrays:
        raise ValueError("expected at least one array, got none")


def _check_array(spec: StoreSpec, name: str, array: ArraySpec) -> None:
    check_name(name)
    if spec.axis not in array.axes:
        raise ValueError(
            f"expected array {name!r} to have the axis {spec.axis!r}, got {array.axes}"
        )
    if array.rows is None:
        return
    others = [
        length for axis, length in zip(array.axes, array.shape, strict=True) if axis != spec.axis
    ]
    if not others or not 1 <= array.rows <= others[0]:
        limit = f"1 to {others[0]}" if others else "None, as no axis is left to cut"
        raise ValueError(f"expected rows of array {name!r} to be {limit}; got {array.rows}")


def _check_companions(arrays: Mapping[str, ArraySpec], name: str) -> None:
    axes, shape = arrays[name].axes[1:], arrays[name].shape[1:]
    for other in (arrays[name].scale, arrays[name].sum):
        if other is None:
            continue
        found = arrays.get(other)
        if found is None or (found.axes, found.shape) != (axes, shape):
            raise ValueError(
                f"expected an array {other!r} with axes {axes} and shape {shape} for {name!r}, "
                f"got {found}"
            )


def check_name(name: str) -> None:
    """Refuse an array name that zarr or xarray would misread.

    Args:
        name: The name of an array or a constant.

    Raises:
        ValueError: The name is reserved or no identifier.

    Example:
        >>> check_name("weights")
    """
    if not name.isidentifier() or name.startswith("__") or name in _RESERVED:
        raise ValueError(
            f"expected an identifier as the name of an array, got {name!r}; "
            f"reserved are {', '.join(_RESERVED)}"
        )


def _check_lengths(arrays: Mapping[str, ArraySpec]) -> None:
    seen: dict[str, tuple[int, str]] = {}
    for name, array in arrays.items():
        for axis, length in zip(array.axes, array.shape, strict=True):
            if axis is None:
                continue
            known, first = seen.setdefault(axis, (length, name))
            if known != length:
                raise ValueError(
                    f"expected one length of the axis {axis!r}, got {known} in array {first!r} "
                    f"and {length} in array {name!r}; use None for an axis of its own"
                )
