"""What a store tells: its arrays, constants and ids, read whole, lazily or mapped from disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import zarr

from stores.blocks import marked, refuse_unmarked, refuse_unreadable, region
from stores.metadata import open_array
from stores.places import Place, place
from stores.provenance import Provenance
from stores.roots import check_known, read_root, refuse_rewritten
from stores.schema import Json, StoreSpec
from stores.wholes import map_whole, read_whole, refuse_other_layout

if TYPE_CHECKING:
    import dask.array
    import xarray


@dataclass(frozen=True)
class Contents(ABC):
    """The reading side of a store; `Store` is the whole of it.

    Args:
        path: Absolute path of the folder, or address of the prefix in a bucket.
        spec: Its arrays and blocks.
        provenance: What made it.
    """

    path: str
    spec: StoreSpec
    provenance: Provenance

    @abstractmethod
    def __reduce__(self) -> tuple[object, ...]:
        """How it travels to another process."""

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
        # A done block becomes pending by `discard` alone, which writes the root.
        if generation is None or known != generation or not done.issuperset(blocks):
            refuse_rewritten(self.place, self._root)
            done = marked(self.place)
            self._memory["marks"] = generation, done
            refuse_unmarked(self.place, blocks, done)

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

    def map_constant(self, name: str) -> np.ndarray:
        """Map a constant from disk, so that only what is touched of it need be in memory.

        It is compared with its checksum at the first call; later calls give the same array. In a
        bucket it is read whole.

        Args:
            name: Name of the constant.

        Returns:
            The values; writing to them does not reach the disk.

        Raises:
            ValueError: There is no such constant, or it is missing or damaged.
        """
        check_known("constants", name, self._root["constants"])
        array = self._readable(name)
        if name not in self._maps:
            self._maps[name] = map_whole(self.place, array, self._root.get("checksums", {}))
        return self._maps[name]

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
            ValueError: There is no such array, or its zarr.json tells another layout.
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
        import dask.array  # with pandas and xarray behind it, half of the time of starting

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

    @cached_property
    def plans(self) -> dict[str, object]:
        """How rows of each array are read, kept for the next query."""
        return {}

    @cached_property
    def _root(self) -> dict[str, Json]:
        return read_root(self.place)

    @cached_property
    def _memory(self) -> dict[str, tuple[object, set[int]]]:
        return {}

    @cached_property
    def _maps(self) -> dict[str, np.ndarray]:
        return {}

    @cached_property
    def _handles(self) -> dict[str, zarr.Array[Any]]:
        return {}

    def _whole(self, name: str) -> np.ndarray:
        return read_whole(self.place, self._readable(name), self._root.get("checksums", {}))

    def _readable(self, name: str) -> zarr.Array[Any]:
        refuse_rewritten(self.place, self._root)
        if name not in self._handles:
            array = open_array(self.place, self.spec, name)
            refuse_other_layout(self.place, array, self._root.get("layouts", {}))
            self._handles[name] = array
        return self._handles[name]
