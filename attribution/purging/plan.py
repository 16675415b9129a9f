"""What a purge will do, decided before anything changes."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace

from attribution.forget import ForgetSet
from attribution.purging.context import Context
from attribution.purging.files import leftovers, telling_files
from attribution.purging.journal import Journal
from attribution.purging.kinds import KINDS, remains_of
from attribution.purging.tombstones import Tombstones, read_tombstones
from attribution.retained import retained_task
from attribution.task import Task
from stores import ROOT, Place, Store, damaged_constants, damaged_metadata, digest

_ORACLES = "oracles/"


def plan_purge(run: Place, task: Task, gone: ForgetSet) -> tuple[Context, Journal]:
    """Decides what a purge does to every store and file of a run.

    Args:
        run: the run's folder.
        task: the task with the rows.
        gone: the rows.

    Returns:
        What each step knows, and the journal.

    Raises:
        RuntimeError: a block is damaged.
        ValueError: a store of a kind that cannot be purged.
    """
    before = read_tombstones(run)
    stones = before.adding(gone.ids)
    own = Tombstones(stones.salt, stones.digests[len(before) :])
    context = Context(run, task, gone, own, {})
    _refuse_damaged(context.stores)
    context = replace(context, digests=_digests(context))
    rewrite = _rewritten(context)
    removed = [_with_its_set(name) for name in context.stores if name not in rewrite]
    folders, files = leftovers(run)
    return context, Journal(
        token=secrets.token_hex(8),
        stones=stones,
        earlier=len(before),
        positions=gone.positions,
        digests=context.digests,
        rewrite=tuple(rewrite),
        clear=tuple(dict.fromkeys([*removed, *folders])),
        files=(*files, *telling_files(run, gone.ids)),
        bytes_before=sum(run.size(name) for name in run.walk()),
    )


def _rewritten(context: Context) -> list[str]:
    """Names of the stores that stay without the rows, sums over the rows first."""
    stores = context.stores
    found = [
        name
        for name, store in sorted(stores.items(), key=lambda pair: _order(pair[1]))
        if not _is_bank_of(context, name, store) and remains_of(context, store) is not None
    ]
    # Solved rows serve the scores beside them alone.
    return [name for name in found if _scores_of(name, stores[name]) in (None, *found)]


def _order(store: Store) -> int:
    kind = store.spec.kind
    return list(KINDS).index(kind) if kind in KINDS else len(KINDS)


def _is_bank_of(context: Context, name: str, store: Store) -> bool:
    """Whether a store holds oracles of a forget set that loses rows; its folder names the set."""
    if not name.startswith(_ORACLES) or store.spec.kind != "ensemble":
        return False
    without = store.attributes["without"]
    return len(context.left(without)) < len(without)


def _with_its_set(name: str) -> str:
    # The folder of a set's banks bears a digest of its ids.
    return "/".join(name.split("/")[:2]) if name.startswith(_ORACLES) else name


def _scores_of(name: str, store: Store) -> str | None:
    if store.spec.kind != "trak-rows":
        return None
    return f"{name.rpartition('/')[0]}/scores".removeprefix("/")


def _refuse_damaged(stores: Mapping[str, Store]) -> None:
    # The blocks that are read are removed afterwards: nothing would tell that they were damaged.
    lost = [f"{s.path}/{name}" for s in stores.values() for name in damaged_constants(s)]
    lost += [f"{s.path}/{name}/{ROOT}" for s in stores.values() for name in _damaged_arrays(s)]
    if lost:
        raise RuntimeError(
            f"damaged: {', '.join(lost)}; nothing was purged: restore these from a copy, or remove"
            " their stores and run the command that made them again; dmm status --discard writes a"
            " zarr.json that is missing or cut short again"
        )
    bad = {name: store.verify() for name, store in stores.items()}
    damaged = [f"{name} blocks {blocks}" for name, blocks in bad.items() if blocks]
    if damaged:
        raise RuntimeError(
            f"damaged: {'; '.join(damaged)}; nothing was purged: dmm status --discard makes these"
            " blocks pending, and the command that made them computes them again"
        )


def _damaged_arrays(store: Store) -> list[str]:
    gone, other = damaged_metadata(store)
    return [*gone, *other]


def _digests(context: Context) -> dict[str, str]:
    """Digests that stores bear of data, masks and lists of ids, and what they become."""
    task, gone = context.task, context.gone
    found = {task.digests["train"]: retained_task(task, gone).digests["train"]}
    for store in context.stores.values():
        if store.spec.kind == "ensemble":
            mask = store.constant("mask")
            found[store.provenance.settings["masks"]] = digest(mask[:, gone.retained])
            found |= _list_digest(context, store.attributes["without"])
        if store.spec.kind == "features":
            found |= _list_digest(context, store.attributes["forgotten"])
    return {old: new for old, new in found.items() if old != new}


def _list_digest(context: Context, ids: Sequence[str]) -> dict[str, str]:
    return {digest(*ids): digest(*context.ids_left(ids))}
