"""What state the stores of a run are in, and what is damaged."""

from typing import Any, TypeAlias

from attribution.folders import damaged_roots
from attribution.run import Run
from stores import ROOT, Place, Store, damaged_constants, damaged_metadata, write_metadata

StoreState: TypeAlias = dict[str, Any]
"""Name, kind and block counts of a store, and the numbers of its damaged blocks."""


_WRITTEN_AGAIN = "; dmm status --discard writes a zarr.json that is missing or cut short again"


def refuse_unseen(run: Place, *, verify: bool) -> None:
    """Refuses a run of which a part cannot be looked at.

    Args:
        run: its folder.
        verify: whether all of it is to be verified, which stores behind symbolic links cannot be.

    Raises:
        RuntimeError: a store's zarr.json is damaged or gone, or a link is in the way.

    Example:
        >>> from stores import place
        >>> refuse_unseen(place("nowhere"), verify=True)
    """
    if damaged := damaged_roots(run):
        raise RuntimeError(
            f"damaged: {', '.join(f'{run / name}/{ROOT}' for name in damaged)}; restore these from"
            " a copy, or remove their folders and run the command that made them again"
        )
    if verify and (links := run.links()):
        raise RuntimeError(
            f"not verified: {', '.join(links)} in {run} {'are' if len(links) > 1 else 'is'}"
            " elsewhere, by a symbolic link; move what it leads to into the run, in its place"
        )


def store_states(run: Run, *, verify: bool, discard: bool) -> list[StoreState]:
    """The states of all stores of a run.

    Args:
        run: the run.
        verify: whether checksums are recomputed.
        discard: whether damaged blocks are made pending, and the zarr.json of arrays that lack it
            is written again.

    Returns:
        A state for each store.

    Raises:
        RuntimeError: something is damaged that cannot be made pending, or is not to be.
    """
    found, lost = [], []
    for store in run.stores():
        damaged = _damaged_parts(store, mend=discard) if verify else []
        lost += damaged
        # No block can be read by metadata that is damaged, and none need be.
        bad = store.verify() if verify and not damaged else []
        for block in bad if discard else []:
            store.discard(block)
        found.append(
            {
                "store": store.path.removeprefix(f"{run.path}/"),
                "kind": store.spec.kind,
                "blocks": store.spec.blocks,
                "done": len(store.done()),
                "pending": len(store.pending()),
                "bad": bad,
            }
        )
    if lost:
        mended = not discard and any(name.endswith(ROOT) for name in lost)
        raise RuntimeError(
            f"damaged: {', '.join(lost)}; restore these from a copy, or remove their stores and run"
            " the command that made them again" + (_WRITTEN_AGAIN if mended else "")
        )
    blocks = [f"{row['store']} blocks {row['bad']}" for row in found if row["bad"]]
    if blocks and not discard:
        raise RuntimeError(
            f"damaged: {'; '.join(blocks)}; dmm status --run {run.path} --discard makes these"
            " blocks pending, and the command that made them computes them again"
        )
    return found


def _damaged_parts(store: Store, *, mend: bool) -> list[str]:
    """What is damaged beside blocks; metadata that follows from the layout is written again."""
    gone, other = damaged_metadata(store)
    for name in gone if mend else []:
        write_metadata(store.place, store.spec, name)
    arrays = [*other, *([] if mend else gone)]
    constants = [f"{store.path}/{name}" for name in damaged_constants(store)]
    return [*(f"{store.path}/{name}/{ROOT}" for name in arrays), *constants]
