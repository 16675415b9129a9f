"""A store: arrays on disk that are written block by block and survive kills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast, final

import dask.array
import numpy as np
import zarr

from stores.blocks import marked, refuse_pending, refuse_unmarked, refuse_unreadable, region
from stores.creation import create_group
from stores.places import Place, Where, place
from stores.provenance import Provenance, check_provenance, plain_json, refuse_differences
from stores.roots import check_ids_equal, check_known, read_root, refuse_rewritten
from stores.schema import Json, StoreSpec, check_schema
from stores.verification import complete, discard, sound
from stores.wholes import read_whole
from stores.writing import BlockWriter, writing

if TYPE_CHECKING:
    import xarray


@final
@dataclass(frozen=True)
class Store:
    """Arrays on disk, all cut into the same blocks, each block written once.

    A block is done when its mark exists, and the mark is written after the arrays: whoever is
    killed leaves whole blocks only. Make one with `create`, `open` or `open_or_create`.

    Args:
        path: Absolute path of the folder, or address of the prefix in a bucket; a zarr group of
            version 3.
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
        path: Where,
        spec: StoreSpec,
        provenance: Provenance,
        constants: Mapping[str, np.ndarray] | None = None,
        ids: Mapping[str, Sequence[str]] | None = None,
        attributes: Mapping[str, Json] | None = None,
    ) -> Store:
        """Create a store whose blocks are all pending.

        Args:
            path: Folder, or prefix in a bucket, where nothing is yet.
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
        where = place(path)
        create_group(where, spec, root, constants or {}, ids or {})
        return Store.open(where)

    @staticmethod
    def open(path: Where, kind: str | None = None) -> Store:
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
        where = place(path)
        root = read_root(where)
        check_schema(root, where.url, kind)
        provenance = root["provenance"]
        made_by = Provenance(provenance["settings"], provenance["recorded"])
        store = Store(where.url, StoreSpec.from_json(root["spec"]), made_by)
        vars(store)["_root"] = root  # read later, it might be that of another store
        return store

    @staticmethod
    def open_or_create(  # noqa: PLR0917 - the arguments of create
        path: Where,
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
        if not place(path).taken():
            try:
                return Store.create(path, spec, provenance, constants, ids, attributes)
            except ValueError:
                # Another process may have created it in between.
                if not place(path).taken():
                    raise
        store = Store.open(path, spec.kind)
        refuse_differences(store.spec.to_json(), spec.to_json(), store.path)
        check_provenance(store.provenance, provenance, store.path)
        check_ids_equal(store.path, {axis: store.ids(axis) for axis in ids or {}}, ids or {})
        return store

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Pickle the path only; whoever unpickles it opens the store anew."""
        return Store.open, (self.path,)

    @cached_property
    def place(self) -> Place:
        """Where the store lies."""
        return place(self.path)

    def done(self) -> list[int]:
        """Give the numbers of the blocks that are written."""
        return sorted(marked(self.place))

    def pending(self) -> list[int]:
        """Give the numbers of the blocks that are still to be written."""
        done = marked(self.place)
        return [block for block in range(self.spec.blocks) if block not in done]

    @property
    def schema_version(self) -> int:
        """Version of the schema that the store was written by."""
        return int(self._root["schema_version"])

    @property
    def complete(self) -> bool:
        """Whether no block is pending."""
        return not self.pending()

    @property
    def attributes(self) -> dict[str, Json]:
        """The JSON values given to `create`."""
        return dict(self._root["attributes"])

    def refuse_pending(self, blocks: Sequence[int]) -> None:
        """Refuse to go on where a block is pending, or the store was rewritten since it was opened.

        Raises:
            ValueError: It is so.
        """
        generation = self.place.generation()
        known, done = self._memory.get("marks", (None, set()))
        # A done block becomes pending by `discard` alone, which writes the root first.
        if generation is None or known != generation or not done.issuperset(blocks):
            refuse_rewritten(self.place, self._root)
            done = marked(self.place)
            self._memory["marks"] = generation, done
            refuse_unmarked(self.place, blocks, done)

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
        self.spec.span(block)
        if set(arrays) != set(self.spec.arrays):
            raise ValueError(
                f"expected the arrays {sorted(self.spec.arrays)} for block {block}, "
                f"got {sorted(arrays)}"
            )
        with self.writing(block) as writer:
            for name, value in arrays.items():
                writer.append(name, value)

    def writing(self, block: int) -> AbstractContextManager[BlockWriter]:
        """Write one block slab by slab, so that it need not fit into memory, then mark it done.

        Args:
            block: Number of a pending block.

        Returns:
            A context that gives the writer; at its end every array must have been appended whole.

        Raises:
            ValueError: The block is done already, or a part of it is missing at the end.

        Example:
            >>> import tempfile
            >>> from stores.schema import ArraySpec
            >>> scores = ArraySpec(("train", "target"), (5, 2), "float32", rows=2)
            >>> spec = StoreSpec("scores", "target", 2, {"scores": scores})
            >>> store = Store.create(tempfile.mkdtemp() + "/scores", spec, Provenance({}))
            >>> with store.writing(0) as writer:
            ...     for rows in (2, 2, 1):
            ...         writer.append("scores", np.zeros((rows, 2), np.float32))
            >>> store.done()
            [0]
        """
        refuse_rewritten(self.place, self._root)
        return writing(self.place, self.spec, block)

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
        refuse_unreadable(self.place, self.spec, name, None if block is None else [block])
        wanted = ... if block is None else region(self.spec, name, block)
        return np.asarray(self.array(name)[wanted])

    def constant(self, name: str) -> np.ndarray:
        """Read a constant given to `create`.

        Args:
            name: Name of the constant.

        Returns:
            The values.

        Raises:
            ValueError: There is no such constant, or it is missing or damaged.
        """
        check_known("constants", name, self._root["constants"])
        return self._whole(name)

    def ids(self, axis: str) -> list[str]:
        """Read the ids of the rows of an axis.

        Args:
            axis: Name of the axis.

        Returns:
            The ids, in row order.

        Raises:
            ValueError: The store holds no ids of that axis, or they are missing or damaged.
        """
        check_known("ids of the axes", axis, self._root["ids"])
        return [str(name) for name in self._whole(f"{axis}_id")]

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
        refuse_unreadable(self.place, self.spec, name)
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
        from stores.views import to_xarray

        return to_xarray(self, self._root["ids"])

    def verify(self) -> list[int]:
        """Read all done blocks again and compare them with their checksums.

        Returns:
            The numbers of the blocks that are damaged; `discard` makes them pending again.
        """
        return [block for block in self.done() if not sound(self, block)]

    def discard(self, block: int) -> None:
        """Take the mark off a block, so that it is pending and can be written again.

        Args:
            block: Number of a done block.

        Raises:
            ValueError: The block is not done.
        """
        discard(self.place, block)

    def finalize(self) -> Store:
        """Declare the store complete and sweep what killed writers left behind.

        Returns:
            The store itself.

        Raises:
            ValueError: A block is pending.
        """
        refuse_pending(self.place, range(self.spec.blocks))
        complete(self.place, self.spec)
        return self

    @cached_property
    def _root(self) -> dict[str, Json]:
        return read_root(self.place)

    @cached_property
    def plans(self) -> dict[str, object]:
        """How rows of each array are read, kept for the next query."""
        return {}

    @cached_property
    def _memory(self) -> dict[str, tuple[object, set[int]]]:
        return {}

    @cached_property
    def _handles(self) -> dict[str, zarr.Array[Any]]:
        return {}

    def _whole(self, name: str) -> np.ndarray:
        return read_whole(self.place, self._readable(name), self._root.get("checksums", {}))

    def _readable(self, name: str) -> zarr.Array[Any]:
        refuse_rewritten(self.place, self._root)
        if name not in self._handles:
            self._handles[name] = zarr.open_array(self.place.zarr(), path=name, mode="r")
        return self._handles[name]
