"""Purge: takes rows out of everything a run holds, and finishes where it was interrupted."""

from dataclasses import dataclass, replace
from functools import partial

from attribution.folders import damaged_roots, store_places
from attribution.forget import ForgetSet, named_ids, parse_forget
from attribution.purging.context import Context
from attribution.purging.files import MODELS, leftovers, loose_files
from attribution.purging.journal import (
    FILE,
    Journal,
    read_journal,
    refuse_overtaken,
    write_journal,
)
from attribution.purging.kinds import KINDS, names_rows, remains_of
from attribution.purging.plan import plan_purge
from attribution.purging.tombstones import (
    Tombstones,
    purged_rows,
    read_tombstones,
    write_tombstones,
)
from attribution.purging.turns import purgers_turn
from attribution.retained import retained_task
from attribution.run import Run, read_settings
from attribution.task import Task
from attribution.task_file import load_task
from stores import ROOT, Place, Remains, Store, Where, place, take_rows_out
from stores.removal import ASIDE


@dataclass(frozen=True)
class Purged:
    """What a purge did.

    Args:
        rows: rows that were purged now.
        already: rows that were asked for and had been purged before.
        finished: whether an interrupted purge was finished.
        rewritten: stores that were written anew without the rows, below the run's folder.
        removed: stores, folders and files that were removed.
        bytes_before: size of the run.
        bytes_after: size of the run now.
        tombstones: rows that were ever purged from the run.
        weights: whether the run holds weights of models, which stay as they were.
        kept: files that are none of ours and name no row, which stay as they were.
    """

    rows: int
    already: int
    finished: bool
    rewritten: tuple[str, ...]
    removed: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    tombstones: int
    weights: bool
    kept: tuple[str, ...] = ()


def purge(path: Where, forget: str | None = None) -> Purged:
    """Removes rows from all that a run holds of them; killed at any moment, the same call finishes.

    Rows, columns, masks, features, lists of strongest rows and ids lose them; sums over the
    training rows are formed without them; evaluations, reports, tuned settings, tables of
    predictions, and pages and banks of oracles that tell of them are removed. Files of another kind
    stay, and are named. Weights of models that were trained on them stay as they are, and so do the
    principal directions that features are projected onto: unlearning is another step. Salted
    digests of the ids stay as tombstones, by which the run leaves the rows out of a task that still
    holds them.

    Args:
        path: the run's folder.
        forget: the rows, as on the command line; None finishes an interrupted purge.

    Returns:
        What was done.

    Raises:
        ValueError: no run, unknown ids or all of them, a store that cannot be purged, a symbolic
            link in the run, other rows than those of an interrupted purge, another command that
            writes to the run at the same time, or None where none was interrupted; nothing has
            changed then.
        RuntimeError: a damaged block or store; nothing has changed then. Or a store was damaged
            since, or one that names the rows came; the purge is finished once it is restored or
            removed.
        OSError: something cannot be written; the same call goes on where it stopped.

    Example:
        >>> purge("nowhere")
        Traceback (most recent call last):
            ...
        ValueError: no purge of ...nowhere was interrupted: name the rows with --forget
    """
    with purgers_turn(path):
        return _purged(place(path), forget)


def _purged(run: Place, forget: str | None) -> Purged:
    _refuse_links(run)
    journal = read_journal(run)
    if journal is not None:
        refuse_overtaken(run, journal)
        context, already = _interrupted(run, journal, forget)
        return _finished(context, journal, already=already, finished=True)
    if forget is None:
        raise ValueError(f"no purge of {run} was interrupted: name the rows with --forget")
    _refuse_lost(run)
    opened = Run.open(run)
    gone, already = _wanted(opened.task, forget, read_tombstones(run))
    if gone is None:
        size, stones = _size(run), read_tombstones(run)
        weights = _holds_weights(run)
        kept = tuple(loose_files(run))
        return Purged(0, already, False, (), (), size, size, len(stones), weights, kept)
    context, journal = plan_purge(run, opened.task, gone)
    write_journal(run, journal)
    refuse_overtaken(run, journal)
    return _finished(context, journal, already=already)


def _refuse_links(run: Place) -> None:
    # What is removed or renamed would be the link, and the rows would stay where it leads to.
    if links := run.links():
        raise ValueError(
            f"{', '.join(links)} in {run} {'are' if len(links) > 1 else 'is'} elsewhere, by a"
            " symbolic link: nothing was purged; move what it leads to into the run, in its place"
        )


def _refuse_lost(run: Place) -> None:
    # Without it nobody can tell a store from what a creation left that was killed.
    if damaged := damaged_roots(run):
        raise RuntimeError(
            f"damaged: {', '.join(f'{run / name}/{ROOT}' for name in damaged)}; nothing was purged:"
            " restore these from a copy, or remove their folders and run the command that made them"
            " again"
        )


def _wanted(task: Task, spec: str, stones: Tombstones) -> tuple[ForgetSet | None, int]:
    """The rows that are still there, and how many have been purged before."""
    ids = named_ids(spec)
    already = [ids[i] for i in stones.matching(ids)] if ids else []
    if not ids or not already:
        return parse_forget(task, spec), 0
    left = [row for row in ids if row not in already]
    return (ForgetSet.of(task, left) if left else None), len(already)


def _interrupted(run: Place, journal: Journal, spec: str | None) -> tuple[Context, int]:
    settings = read_settings(run, finishing=True)
    task = load_task(settings.task, outside=run)
    earlier = purged_rows(task, journal.before)
    task = task if earlier is None else retained_task(task, earlier)
    if task.digests["train"] not in journal.digests:
        raise ValueError(
            f"the purge of {run} was interrupted, and task {task.name!r} holds other rows now:"
            " finish it with the data that it began with"
        )
    gone = ForgetSet.at(task, journal.positions)
    wanted, already = (gone, 0) if spec is None else _wanted(task, spec, journal.before)
    if wanted is None or wanted.positions != gone.positions:
        raise ValueError(
            f"a purge of {len(gone)} other rows from {run} was interrupted: finish it first with"
            f" dmm purge --run {run}"
        )
    return Context(run, task, gone, journal.own, journal.digests), already


def _finished(
    context: Context, journal: Journal, *, already: int = 0, finished: bool = False
) -> Purged:
    run = context.run
    for name in journal.clear:
        (run / name).clear()
    for name in journal.files:
        if run.exists(name):
            run.remove(name)
    for name in filter(partial(_is_there, run), journal.rewrite):
        take_rows_out(run / name, journal.token, lambda store: _remains(context, store))
    folders, _ = leftovers(run)
    for name in folders:
        (run / name).clear()
    _refuse_named(context)
    write_tombstones(run, journal.stones)
    run.remove(FILE)
    return Purged(
        rows=len(context.gone),
        already=already,
        finished=finished,
        rewritten=journal.rewrite,
        removed=(*journal.clear, *journal.files),
        bytes_before=journal.bytes_before,
        bytes_after=_size(run),
        tombstones=len(journal.stones),
        weights=_holds_weights(run),
        kept=tuple(loose_files(run)),
    )


def _is_there(run: Place, name: str) -> bool:
    # A store that was damaged since the plan was made can be removed by hand.
    return (run / name).taken() or (run / f"{name}{ASIDE}").taken()


def _refuse_named(context: Context) -> None:
    # A command that ran when the purge began may have written a store since.
    stores = replace(context).stores
    known = {name: store for name, store in stores.items() if store.spec.kind in KINDS}
    telling = [name for name, store in known.items() if names_rows(context, store)]
    if telling:
        raise RuntimeError(
            f"{', '.join(telling)} in {context.run} came while rows were purged, and names some of"
            f" them: remove it, then finish with dmm purge --run {context.run}"
        )


def _remains(context: Context, store: Store) -> Remains:
    found = remains_of(context, store)
    if found is None:
        raise RuntimeError(
            f"{store.path} is not finished, or what it was made from is missing, since the purge"
            f" began: remove it, then finish with dmm purge --run {context.run}"
        )
    return found


def _holds_weights(run: Place) -> bool:
    stores = [Store.open(run / name) for name in store_places(run)]
    kept = any(s.spec.kind == "ensemble" and s.attributes["keys"] for s in stores)
    return kept or any(name.endswith(MODELS) for name in run.walk())


def _size(run: Place) -> int:
    return sum(run.size(name) for name in run.walk())
