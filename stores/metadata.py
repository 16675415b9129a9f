"""The zarr.json of a store's arrays: compared with the specification, which the root holds too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.codecs import BloscCodec
from zarr.storage import MemoryStore

from stores.places import Place
from stores.roots import ROOT
from stores.schema import StoreSpec

if TYPE_CHECKING:
    from stores.contents import Contents

DONE = "done"  # the array of the marks

_ENCODING = {"name": "default", "configuration": {"separator": "/"}}


class MetadataGone(ValueError):
    """The zarr.json of an array is missing or cannot be read; the specification tells it anew."""


def create_array(group: zarr.Group, spec: StoreSpec, name: str) -> None:
    """Create an empty array of a store, or that of its marks.

    Args:
        group: The store's root.
        spec: Its layout.
        name: Name of the array; "done" for the marks.

    Example:
        >>> from stores.schema import ArraySpec
        >>> spec = StoreSpec("masks", "model", 2, {"mask": ArraySpec(("model",), (3,), "bool")})
        >>> group = zarr.create_group({})
        >>> create_array(group, spec, "mask")
        >>> group["mask"].chunks
        (2,)
    """
    if name == DONE:
        _create_done(group, spec.blocks)
        return
    array = spec.arrays[name]
    group.create_array(
        name,
        shape=array.shape,
        chunks=spec.chunks(name),
        dtype=array.dtype,
        fill_value=_fill(array.dtype),
        # zarr compresses by default, and only raw objects can be read row by row.
        compressors=_blosc() if array.compress else None,
        filters=None,
        # xarray needs a name for every dimension.
        dimension_names=[axis or f"{name}_{i}" for i, axis in enumerate(array.axes)],
    )


def open_array(
    place: Place, spec: StoreSpec, name: str, mode: Literal["r", "r+"] = "r"
) -> zarr.Array[Any]:
    """Open an array of a store, or one of its constants or ids, as zarr sees it.

    Args:
        place: Where the store lies.
        spec: Its layout; constants and ids are not in it and are taken as they are.
        name: Name of the array.
        mode: "r" to read, "r+" to write too.

    Returns:
        The zarr array.

    Raises:
        ValueError: Its zarr.json is missing or damaged, or tells another layout.
        ConnectionError: The service of a bucket does not answer.
    """
    try:
        array = zarr.open_array(place.zarr(), path=name, mode=mode, zarr_format=3)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        how = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise _gone(place, spec, name, how) from error
    if _is_told(spec, name):
        _refuse_other(place, array, _expected(spec, name))
    return array


def damaged_metadata(store: Contents) -> tuple[list[str], list[str]]:
    """Compare the zarr.json of each array with the specification.

    Args:
        store: The store.

    Returns:
        Names of the arrays whose zarr.json is missing or cannot be read, which `write_metadata`
        writes again; and of those for which it tells another layout than the root, where nobody
        knows which of the two was changed.

    Raises:
        ConnectionError: The service of a bucket does not answer.

    Example:
        >>> import tempfile
        >>> from stores import ArraySpec, Provenance, Store
        >>> spec = StoreSpec("masks", "model", 2, {"mask": ArraySpec(("model",), (3,), "bool")})
        >>> store = Store.create(tempfile.mkdtemp() + "/masks", spec, Provenance({}))
        >>> store.place.remove("mask/zarr.json")
        >>> damaged_metadata(store)
        (['mask'], [])
        >>> write_metadata(store.place, spec, "mask")
        >>> damaged_metadata(store)
        ([], [])
    """
    gone, other = [], []
    for name in (*store.spec.arrays, DONE):
        try:
            open_array(store.place, store.spec, name)
        except MetadataGone:
            gone.append(name)
        except ValueError:
            other.append(name)
    return gone, other


def write_metadata(place: Place, spec: StoreSpec, name: str) -> None:
    """Write the zarr.json of an array again, as the specification tells it.

    Args:
        place: Where the store lies.
        spec: Its layout.
        name: Name of the array; "done" for the marks.
    """
    written: dict[str, Buffer] = {}
    create_array(zarr.create_group(MemoryStore(written)), spec, name)
    place.write(f"{name}/{ROOT}", written[f"{name}/{ROOT}"].to_bytes())


def _is_told(spec: StoreSpec, name: str) -> bool:
    return name in spec.arrays or name == DONE


def _expected(spec: StoreSpec, name: str) -> dict[str, Any]:
    if name == DONE:
        return _layout((spec.blocks,), "uint32", (1,), ["bytes"])
    array = spec.array(name)
    codecs = ["bytes", *["blosc"] * array.compress]
    return _layout(array.shape, array.dtype, spec.chunks(name), codecs)


def _layout(
    shape: Sequence[int], dtype: str, chunks: Sequence[int], codecs: Sequence[str]
) -> dict[str, Any]:
    return {"shape": shape, "dtype": dtype, "chunks": chunks, "codecs": codecs, "keys": _ENCODING}


def _refuse_other(place: Place, array: zarr.Array[Any], expected: dict[str, Any]) -> None:
    told = array.metadata.to_dict()
    codecs: Any = told["codecs"]
    found = _layout(array.shape, str(array.dtype), array.chunks, [c["name"] for c in codecs])
    found["keys"] = told["chunk_key_encoding"]
    if any(codec.get("configuration", {}).get("endian") == "big" for codec in codecs):
        found["dtype"] += " of big endian"
    for what, value in expected.items():
        if found[what] != value:
            raise ValueError(
                f"expected {what} {value} in {place}/{array.path}/{ROOT}, as {place}/{ROOT} tells, "
                f"got {found[what]}; restore whichever was changed from a copy, or remove {place}"
                " and run the same computation again"
            )


def _gone(place: Place, spec: StoreSpec, name: str, how: str) -> ValueError:
    if _is_told(spec, name):
        return MetadataGone(
            f"{place}/{name}/{ROOT} is {how}; restore it from a copy, or have dmm status --discard"
            " write it again"
        )
    return ValueError(
        f"{place}/{name}/{ROOT} is {how}; restore it from a copy, or remove {place} and run the"
        " same computation again"
    )


def _create_done(group: zarr.Group, blocks: int) -> None:
    # One object a mark: processes that share an object lose each other's marks.
    group.create_array(
        DONE,
        shape=(blocks,),
        chunks=(1,),
        dtype="uint32",
        fill_value=0,
        compressors=None,
        filters=None,
        dimension_names=["block"],
    )


def _fill(dtype: str) -> Any:
    return np.nan if np.dtype(dtype).kind == "f" else np.zeros((), dtype)[()]


def _blosc() -> BloscCodec:
    return BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle")
