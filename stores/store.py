"""A store: arrays on disk that are written block by block and survive kills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import final

import numpy as np

from stores.blocks import refuse_pending
from stores.contents import Contents
from stores.creation import create_group
from stores.places import Where, place
from stores.provenance import Provenance, check_provenance, plain_json, refuse_differences
from stores.roots import check_ids_equal, read_root, refuse_rewritten
from stores.schema import Json, StoreSpec, check_schema
from stores.verification import complete, discard, unsound
from stores.writing import BlockWriter, writing


@final
@dataclass(frozen=True)
class Store(Contents):
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

    def verify(self) -> list[int]:
        """Read all done blocks again and compare them with their checksums.

        Returns:
            The numbers of the blocks that are damaged; `discard` makes them pending again.
        """
        return unsound(self, self.done())

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
