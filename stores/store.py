"""A store: arrays on disk that are written block by block and survive kills."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast, final

import dask.array
import numpy as np
import zarr

from stores.blocks import (
    check_block,
    checksum,
    mark_file,
    marked,
    refuse_pending,
    refuse_unreadable,
    region,
)
from stores.creation import create_folder
from stores.provenance import Provenance, check_provenance, plain_json, refuse_differences
from stores.schema import Json, StoreSpec, check_schema

if TYPE_CHECKING:
    import xarray


class BlockDone(ValueError):
    """A block is written already; blocks are write-once."""


@final
@dataclass(frozen=True)
class Store:
    """Arrays on disk, all cut into the same blocks, each block written once.

    A block is done when its mark exists, and the mark is written after the arrays: whoever is
    killed leaves whole blocks only. Make one with `create`, `open` or `open_or_create`.

    Args:
        path: Absolute path of the folder, a zarr group of version 3.
        spec: Its arrays and blocks.
        provenance: What made it.

    Example:
        >>> import tempfile
        >>> from stores.schema import ArraySpec
        >>> outputs = ArraySpec(("model", "target"), (3, 4), "float32")
        >>> spec = StoreSpec("outputs", "model", 2, {"outputs": outputs})
        >>> store = Store.create(tempfile.mkdtemp() + "/outputs", spec, Provenance({"seed": 0}))
        >>> store.write_block(1, {"outputs": np.ones((1, 4), np.float32)})
        >>> store.done(), store.pending()
        ([1], [0])
        >>> store.numpy("outputs", 1)
        array([[1., 1., 1., 1.]], dtype=float32)
    """

    path: str
    spec: StoreSpec
    provenance: Provenance

    @staticmethod
    def create(  # noqa: PLR0917 - three optional parts of a store
        path: str | os.PathLike[str],
        spec: StoreSpec,
        provenance: Provenance,
        constants: Mapping[str, np.ndarray] | None = None,
        ids: Mapping[str, Sequence[str]] | None = None,
        attributes: Mapping[str, Json] | None = None,
    ) -> Store:
        """Create a store whose blocks are all pending.

        Args:
            path: Folder that does not exist yet.
            spec: Arrays and blocks.
            provenance: What makes the store.
            constants: Small arrays by name, written whole.
            ids: Ids of the rows by axis, each once.
            attributes: Further JSON values to keep with the store.

        Returns:
            The store.

        Raises:
            ValueError: The path exists or cannot be written, or constants or ids are unusable.
            TypeError: A constant is no array of numbers, an id no text, an attribute no JSON.
        """
        root = {
            "provenance": {"settings": provenance.settings, "recorded": provenance.recorded},
            "attributes": plain_json(attributes or {}, "attributes"),
        }
        create_folder(os.path.abspath(path), spec, root, constants or {}, ids or {})
        return Store(os.path.abspath(path), spec, provenance)

    @staticmethod
    def open(path: str | os.PathLike[str], kind: str | None = None) -> Store:
        """Open a store that exists.

        Args:
            path: Its folder.
            kind: The kind it must be of; None takes any.

        Returns:
            The store.

        Raises:
            ValueError: There is none, or one of another kind or a newer schema version.

        Example:
            >>> Store.open("nowhere")  # doctest: +ELLIPSIS
            Traceback (most recent call last):
                ...
            ValueError: expected a store at ...nowhere, found none; create it, or correct the path
        """
        where = os.path.abspath(path)
        root = _read_root(where)
        check_schema(root, where, kind)
        provenance = root["provenance"]
        return Store(
            where,
            StoreSpec.from_json(root["spec"]),
            Provenance(provenance["settings"], provenance["recorded"]),
        )

    @staticmethod
    def open_or_create(  # noqa: PLR0917 - the arguments of create
        path: str | os.PathLike[str],
        spec: StoreSpec,
        provenance: Provenance,
        constants: Mapping[str, np.ndarray] | None = None,
        ids: Mapping[str, Sequence[str]] | None = None,
        attributes: Mapping[str, Json] | None = None,
    ) -> Store:
        """Open the store that the same arguments created, or create it.

        Args:
            path: Its folder.
            spec: Arrays and blocks; an existing store must have the same.
            provenance: What makes the store; an existing one must have the same settings.
            constants: Small arrays by name; an existing store keeps its own.
            ids: Ids of the rows by axis; an existing store must have the same.
            attributes: Further JSON values; an existing store keeps its own.

        Returns:
            The store.

        Raises:
            ValueError: The existing store differs, or a new one cannot be created.
            TypeError: As for `create`.
        """
        if not os.path.lexists(path):
            try:
                return Store.create(path, spec, provenance, constants, ids, attributes)
            except ValueError:
                # Another process may have created it in between.
                if not os.path.lexists(path):
                    raise
        store = Store.open(path, spec.kind)
        refuse_differences(store.spec.to_json(), spec.to_json(), store.path)
        check_provenance(store.provenance, provenance, store.path)
        _check_same_ids(store, ids or {})
        return store

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Pickle the path only; whoever unpickles it opens the store anew."""
        return Store.open, (self.path,)

    def done(self) -> list[int]:
        """Give the numbers of the blocks that are written."""
        return sorted(marked(self.path))

    def pending(self) -> list[int]:
        """Give the numbers of the blocks that are still to be written."""
        done = marked(self.path)
        return [block for block in range(self.spec.blocks) if block not in done]

    @property
    def complete(self) -> bool:
        """Whether no block is pending."""
        return not self.pending()

    @property
    def attributes(self) -> dict[str, Json]:
        """The JSON values given to `create`."""
        return dict(self._root["attributes"])

    def write_block(self, block: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write one block of every array, then mark it done.

        Args:
            block: Number of a pending block.
            arrays: One array for each name, of exactly the block's shape and the stored dtype.

        Raises:
            ValueError: The block is done already, or an array has another name, shape or dtype
                or a value that is not finite.
            TypeError: A value is no numpy array.
        """
        check_block(self.spec, block, arrays)
        if os.path.exists(mark_file(self.path, block)):
            raise BlockDone(
                f"block {block} of {self.path} is done already and blocks are write-once; "
                "write pending() blocks only, or discard() it first"
            )
        for name, value in arrays.items():
            self._writable(name)[region(self.spec, name, block)] = value
        self._writable("done")[block] = checksum(arrays)

    def numpy(self, name: str, block: int | None = None) -> np.ndarray:
        """Read an array, or one block of it, into memory.

        Args:
            name: Name of the array.
            block: Number of the block; None reads all of them.

        Returns:
            The values, of the shape in the specification, cut to the block if one is given.

        Raises:
            ValueError: The array is unknown, or a block that is wanted is pending or damaged.
        """
        refuse_unreadable(self.path, self.spec, name, None if block is None else [block])
        wanted = ... if block is None else region(self.spec, name, block)
        return np.asarray(self.array(name)[wanted])

    def constant(self, name: str) -> np.ndarray:
        """Read a constant given to `create`.

        Args:
            name: Name of the constant.

        Returns:
            The values.

        Raises:
            ValueError: There is no such constant.
        """
        _check_known("constants", name, self._root["constants"])
        return np.asarray(self._readable(name)[...])

    def ids(self, axis: str) -> list[str]:
        """Read the ids of the rows of an axis.

        Args:
            axis: Name of the axis.

        Returns:
            The ids, in row order.

        Raises:
            ValueError: The store holds no ids of that axis.
        """
        _check_known("ids of the axes", axis, self._root["ids"])
        return [str(name) for name in np.asarray(self._readable(f"{axis}_id")[...])]

    def array(self, name: str) -> zarr.Array[Any]:
        """Give a read-only zarr array; its pending blocks read as fill values.

        Args:
            name: Name of the array.

        Returns:
            The zarr array.

        Raises:
            ValueError: There is no such array.
        """
        self.spec.array(name)
        return self._readable(name)

    def dask(self, name: str) -> dask.array.Array:
        """Give a lazy view whose chunks are whole storage objects.

        Args:
            name: Name of the array.

        Returns:
            A dask array.

        Raises:
            ValueError: The array is unknown, or a block is pending or damaged.
        """
        refuse_unreadable(self.path, self.spec, name)
        lazy = dask.array.from_zarr(self.array(name), chunks=self.spec.chunks(name))
        return cast(dask.array.Array, lazy)

    def to_xarray(self) -> xarray.Dataset:
        """Give a lazy xarray view of all arrays, constants and ids.

        Returns:
            A dataset; ids are coordinates.

        Raises:
            ImportError: xarray is not installed.
            ValueError: A block is pending or damaged.
        """
        try:
            import xarray
        except ImportError as error:
            raise ImportError(
                "expected xarray for to_xarray; install it with "
                "pip install 'datamodel-matching[xarray]'"
            ) from error
        for name in self.spec.arrays:
            refuse_unreadable(self.path, self.spec, name)
        dataset = xarray.open_zarr(self.path, consolidated=False, chunks={})
        dataset = dataset.drop_vars("done").set_coords([f"{axis}_id" for axis in self._root["ids"]])
        dataset.attrs = self.attributes
        return cast("xarray.Dataset", dataset)

    def verify(self) -> list[int]:
        """Read all done blocks again and compare them with their checksums.

        Returns:
            The numbers of the blocks that are damaged; `discard` makes them pending again.
        """
        return [block for block in self.done() if not self._sound(block)]

    def discard(self, block: int) -> None:
        """Take the mark off a block, so that it is pending and can be written again.

        Args:
            block: Number of a done block.

        Raises:
            ValueError: The block is not done.
        """
        try:
            os.remove(mark_file(self.path, block))
        except FileNotFoundError as error:
            raise ValueError(f"expected a done block to discard, got block {block}") from error
        self._set_state("open")

    def finalize(self) -> Store:
        """Declare the store complete and sweep what killed writers left behind.

        Returns:
            The store itself.

        Raises:
            ValueError: A block is pending.
        """
        refuse_pending(self.path, range(self.spec.blocks))
        for leftover in pathlib.Path(self.path).rglob("*.partial"):
            leftover.unlink(missing_ok=True)
        self._set_state("complete")
        return self

    @cached_property
    def _root(self) -> dict[str, Json]:
        return _read_root(self.path)

    @cached_property
    def _handles(self) -> dict[str, zarr.Array[Any]]:
        return {}

    def _readable(self, name: str) -> zarr.Array[Any]:
        if name not in self._handles:
            self._handles[name] = zarr.open_array(f"{self.path}/{name}", mode="r")
        return self._handles[name]

    def _writable(self, name: str) -> zarr.Array[Any]:
        # zarr does not persist this setting, and skips objects that hold fill values only.
        handle = zarr.open_array(f"{self.path}/{name}", mode="r+")
        return handle.with_config({"write_empty_chunks": True})

    def _sound(self, block: int) -> bool:
        try:
            arrays = {name: self.numpy(name, block) for name in self.spec.arrays}
            return checksum(arrays) == int(np.asarray(self._readable("done")[block]))
        except (ValueError, RuntimeError, OSError):
            return False

    def _set_state(self, state: str) -> None:
        zarr.open_group(self.path, mode="r+", use_consolidated=False).attrs["state"] = state


def _read_root(path: str) -> dict[str, Json]:
    try:
        content = json.loads(pathlib.Path(path, "zarr.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"expected a store at {path}, found none; create it, or correct the path"
        ) from error
    return dict(content.get("attributes", {}))


def _check_known(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"expected one of the {what} {', '.join(known) or '(none)'}; got {name!r}")


def _check_same_ids(store: Store, ids: Mapping[str, Sequence[str]]) -> None:
    for axis, names in ids.items():
        if store.ids(axis) != list(names):
            raise ValueError(
                f"{store.path} was made for other {axis} ids; "
                "give another folder, or the same ids in the same order"
            )
