"""Taking rows out of a store: it is written anew without them and takes the old one's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stores.blocks import refuse_unreadable
from stores.durability import durable
from stores.places import Place, Where, place
from stores.provenance import Provenance
from stores.roots import read_node, read_root, write_attributes
from stores.schema import ArraySpec, Json, StoreSpec
from stores.store import Store
from stores.verification import unsound
from stores.writing import BlockWriter

ASIDE = ".purged"
_STAMP = "purge"

Revision = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Gives the arrays of a block that are not copied, from its old positions along the block axis."""


@dataclass(frozen=True)
class Remains:
    """What a store holds once rows are gone.

    Args:
        positions: Positions that stay by axis, ascending; all other axes stay whole.
        provenance: What the store says it was made from.
        constants: Constants that change, by name; None drops one, all others stay.
        attributes: All attributes.
        shapes: New shapes of arrays whose unnamed axes change too.
        revise: Gives the arrays that are computed and not copied; None copies all of them.
        costly: Gives further constants that change, once the store is written.
    """

    positions: Mapping[str, np.ndarray]
    provenance: Provenance
    constants: Mapping[str, np.ndarray | None] = field(default_factory=dict)
    attributes: Mapping[str, Json] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    revise: Revision | None = None
    costly: Callable[[], Mapping[str, np.ndarray]] | None = None


def take_rows_out(where: Where, token: str, remains: Callable[[Store], Remains]) -> None:
    """Replace a store by one without some rows; killed at any moment, the same call finishes.

    The new store is written beside the old one, which is removed once the new one is whole. Blocks
    that would need a pending block of the old store are pending in the new one.

    Args:
        where: The store.
        token: Names this removal; a store that bears it is done.
        remains: Tells what stays of the store.

    Raises:
        ValueError: There is no store.
        RuntimeError: A block that is needed is damaged, or an object of it is missing.
        OSError: The new store cannot be written.

    Example:
        >>> import tempfile
        >>> outputs = ArraySpec(("model", "target"), (2, 3), "float32")
        >>> spec = StoreSpec("outputs", "model", 1, {"outputs": outputs})
        >>> store = Store.create(tempfile.mkdtemp() + "/outputs", spec, Provenance({"seed": 0}))
        >>> store.write_block(0, {"outputs": np.array([[1, 2, 3]], np.float32)})
        >>> kept = Remains({"target": np.array([0, 2])}, store.provenance)
        >>> take_rows_out(store.path, "5a17", lambda _: kept)
        >>> left = Store.open(store.path)
        >>> left.numpy("outputs", 0), left.pending(), taken_out(left.path)
        (array([[1., 3.]], dtype=float32), [1], '5a17')
    """
    old = place(where)
    aside = old.parent / f"{old.name}{ASIDE}"
    if taken_out(old) != token:
        if taken_out(aside) != token:
            aside.clear()
            store = Store.open(old)
            _write_anew(store, aside, remains(store))
            write_attributes(aside, {_STAMP: token})
            if durable():
                aside.sync(aside.walk())
        old.clear()
        aside.move(old)
    aside.clear()


def taken_out(where: Where) -> str | None:
    """Give the token of the last removal of rows from a store.

    Args:
        where: The store.

    Returns:
        The token; None where nothing was taken out, or no store is.

    Raises:
        ValueError: The store's zarr.json is damaged.

    Example:
        >>> taken_out("nowhere")
    """
    try:
        token = read_node(place(where)).get("attributes", {}).get(_STAMP)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if token is None else str(token)


def remaining_spec(spec: StoreSpec, remains: Remains) -> StoreSpec:
    """Give the layout of a store once rows are gone; blocks keep their length.

    Args:
        spec: Its layout.
        remains: What stays.

    Returns:
        The layout.

    Raises:
        ValueError: Nothing stays along some axis.

    Example:
        >>> spec = StoreSpec("masks", "model", 2, {"mask": ArraySpec(("model",), (3,), "bool")})
        >>> kept = Remains({"model": np.array([0])}, Provenance({}))
        >>> remaining_spec(spec, kept).arrays["mask"].shape
        (1,)
    """
    arrays = {name: _shortened(spec, name, remains) for name in spec.arrays}
    length = next(iter(arrays.values())).shape[spec.block_axis(next(iter(arrays)))]
    return StoreSpec(spec.kind, spec.axis, min(spec.block, length), arrays)


def _shortened(spec: StoreSpec, name: str, remains: Remains) -> ArraySpec:
    array = spec.array(name)
    kept = tuple(
        len(remains.positions[axis]) if axis is not None and axis in remains.positions else length
        for axis, length in zip(array.axes, array.shape, strict=True)
    )
    shape = remains.shapes.get(name, kept)
    rows = array.rows
    if rows is not None:
        rows = min(rows, shape[1 if spec.block_axis(name) == 0 else 0])
    return replace(array, shape=shape, rows=rows)


def _write_anew(store: Store, aside: Place, remains: Remains) -> None:
    root, spec = read_root(store.place), remaining_spec(store.spec, remains)
    kept: dict[str, np.ndarray | None] = {n: store.constant(n) for n in root["constants"]}
    kept.update(remains.constants)
    kept.update(remains.costly() if remains.costly else {})
    constants = {name: value for name, value in kept.items() if value is not None}
    ids = {axis: _kept_ids(store, axis, remains) for axis in root["ids"]}
    new = Store.create(aside, spec, remains.provenance, constants, ids, remains.attributes)
    done, checked = set(store.done()), set[int]()
    for number in range(spec.blocks):
        block = _block(store, remains, spec.span(number))
        if done.issuperset(block.sources):
            _refuse_damaged(store, set(block.sources) - checked)
            checked.update(block.sources)
            revised = remains.revise(block.positions[spec.axis]) if remains.revise else {}
            with new.writing(number) as writer:
                _copy(block, writer, revised)
    if new.complete:
        new.finalize()


def _refuse_damaged(store: Store, blocks: set[int]) -> None:
    # What is copied gets a mark of its own: nothing would tell afterwards that it was damaged.
    damaged = unsound(store, sorted(blocks))
    if damaged:
        raise RuntimeError(
            f"blocks {damaged} of {store.path} are damaged: restore them from a copy, or remove the"
            " store and have it made again; then call this again"
        )


def _kept_ids(store: Store, axis: str, remains: Remains) -> Sequence[str]:
    names = store.ids(axis)
    return [names[i] for i in remains.positions[axis]] if axis in remains.positions else names


def _block(store: Store, remains: Remains, span: slice) -> _Block:
    kept = remains.positions.get(store.spec.axis, np.arange(store.spec.length))[span]
    sources = np.unique(kept // store.spec.block).tolist()
    return _Block(store, sources, {**remains.positions, store.spec.axis: kept})


@dataclass(frozen=True)
class _Block:
    """What becomes one block: positions in the old store by axis."""

    store: Store
    sources: list[int]
    positions: Mapping[str, np.ndarray]

    def wanted(self, name: str) -> list[np.ndarray]:
        array = self.store.spec.array(name)
        return [
            self.positions.get(axis or "", np.arange(length))
            for axis, length in zip(array.axes, array.shape, strict=True)
        ]

    def values(self, name: str, wanted: Sequence[np.ndarray]) -> np.ndarray:
        array = self.store.array(name)
        values = np.asarray(array[tuple(slice(each[0], each[-1] + 1) for each in wanted)])
        for axis, each in enumerate(wanted):
            if len(each) < values.shape[axis]:
                values = values.take(each - each[0], axis)
        return values


def _copy(block: _Block, writer: BlockWriter, revised: Mapping[str, np.ndarray]) -> None:
    spec = writer.spec
    sums: dict[str, Any] = {}
    # Sums last: they are formed anew from what is copied.
    formed = {array.sum: name for name, array in spec.arrays.items() if _cut(block, name)}
    for name in sorted(spec.arrays, key=lambda name: name in formed):
        if name in revised:
            writer.append(name, revised[name])
        elif name in formed:
            writer.append(name, _scaled(block, formed[name], sums[formed[name]]))
        else:
            refuse_unreadable(block.store.place, block.store.spec, name, block.sources)
            sums[name] = _copy_array(block, writer, name)


def _cut(block: _Block, name: str) -> bool:
    array = block.store.spec.array(name)
    return array.sum is not None and array.axes[0] in block.positions


def _copy_array(block: _Block, writer: BlockWriter, name: str) -> Any:
    """Copies an array slab by slab and gives the sum over its first axis where one is stored."""
    spec, (first, *others) = writer.spec, block.wanted(name)
    height = len(first) if spec.block_axis(name) == 0 else spec.chunks(name)[0]
    total: Any = 0
    for start in range(0, len(first), height):
        values = block.values(name, [first[start : start + height], *others])
        writer.append(name, values)
        if spec.array(name).sum is not None:
            total = total + values.sum(0, dtype=np.float64)
    return total


def _scaled(block: _Block, name: str, total: np.ndarray) -> np.ndarray:
    array = block.store.spec.array(name)
    if array.scale is not None:
        total = total * block.values(array.scale, block.wanted(array.scale))
    assert array.sum is not None
    return total.astype(block.store.spec.array(array.sum).dtype)
