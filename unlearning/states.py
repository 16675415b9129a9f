"""What state the stores of a run are in, and what is damaged."""

from typing import Any, TypeAlias

from attribution.folders import damaged_roots
from attribution.run import Run
from stores import ROOT, Place, damaged_constants

State: TypeAlias = dict[str, Any]
"""Name, kind and block counts of a store, and the numbers of its damaged blocks."""


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


def store_states(run: Run, *, verify: bool, discard: bool) -> list[State]:
    """The states of all stores of a run.

    Args:
        run: the run.
        verify: whether checksums are recomputed.
        discard: whether damaged blocks are made pending.

    Returns:
        A state for each store.

    Raises:
        RuntimeError: something is damaged that cannot be made pending, or is not to be.
    """
    found, lost = [], []
    for store in run.stores():
        lost += [f"{store.path}/{name}" for name in damaged_constants(store)] if verify else []
        bad = store.verify() if verify else []
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
        raise RuntimeError(
            f"damaged: {', '.join(lost)}; restore these from a copy, or remove their stores and run"
            " the command that made them again"
        )
    damaged = [f"{row['store']} blocks {row['bad']}" for row in found if row["bad"]]
    if damaged and not discard:
        raise RuntimeError(
            f"damaged: {'; '.join(damaged)}; dmm status --run {run.path} --discard makes these"
            " blocks pending, and the command that made them computes them again"
        )
    return found
