"""How each kind of store changes when rows go: one entry a kind, and no other place knows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from attribution.purging.context import Context
from attribution.purging.files import tells
from attribution.purging.scores import FewerScores, Ranked, trak_sources
from attribution.purging.sums import LessCurvature, LessMoments
from attribution.ridge import fewer_rows
from attribution.ridge_datamodels import expected_scales
from attribution.training import threads
from attribution.uncertainty import fitted_by_older, uncertainty_of
from stores import Provenance, Remains, Store, digest

Change = Callable[[Context, Store, Remains], Remains | None]


@dataclass(frozen=True)
class Kind:
    """What a kind of store holds of rows, beside the axes that its layout names.

    Args:
        constants: axes of its constants, by name.
        id_lists: names of attributes that are lists of ids.
        named: axes that it has ids of; its targets may be some only.
        derived: whether its maker makes it anew; then an unfinished one is removed.
        change: what else changes; where it gives None, the store has to be removed.
    """

    constants: Mapping[str, tuple[str | None, ...]]
    id_lists: tuple[str, ...] = ()
    named: tuple[str, ...] = ("train", "target")
    derived: bool = True
    change: Change = lambda context, store, remains: remains


def remains_of(context: Context, store: Store) -> Remains | None:
    """What is left of a store without the purged rows.

    Args:
        context: the purge.
        store: a store of the run.

    Returns:
        What is left; None where the store has to be removed: nothing is left, it is not finished,
        or what it was made from is missing.

    Raises:
        ValueError: a kind of store that nobody knows how to purge.
    """
    kind = KINDS.get(store.spec.kind)
    if kind is None:
        raise ValueError(
            f"{store.path} is a store of kind {store.spec.kind!r}, which purge does not know: move"
            " it out of the run, or remove it"
        )
    positions = _positions(context, store, kind)
    if not all(len(each) for each in positions.values()) or (kind.derived and store.pending()):
        return None
    attributes = store.attributes
    for name in kind.id_lists:
        attributes[name] = context.ids_left(attributes[name])
    constants = {
        name: _taken(store.constant(name), axes, positions) for name, axes in kind.constants.items()
    }
    plain = Remains(positions, context.provenance(store), constants, attributes)
    return kind.change(context, store, plain)


def names_rows(context: Context, store: Store) -> bool:
    """Whether a store names purged rows: in its ids, its lists of ids, or what it was made from.

    Args:
        context: the purge.
        store: a store of the run, of a kind that is known.

    Returns:
        True where it does.
    """
    kind = KINDS[store.spec.kind]
    lists = [store.ids(axis) for axis in kind.named]
    lists += [store.attributes[name] for name in kind.id_lists]
    return any(context.stones.matching(ids) for ids in lists) or _is_told_of(context, store)


def _is_told_of(context: Context, store: Store) -> bool:
    """Whether the text of a prediction's forget set, as it was typed, names purged rows."""
    if store.spec.kind != "prediction":
        return False
    return tells(store.provenance.settings["forget"].encode(), context.gone.ids)


def _positions(context: Context, store: Store, kind: Kind) -> dict[str, Any]:
    axes = {axis for array in store.spec.arrays.values() for axis in array.axes}
    unnamed = (axes & {"train", "target"}) - set(kind.named)
    found = {axis: context.left(store.ids(axis)) for axis in kind.named}
    return found | {str(axis): context.kept[str(axis)] for axis in unnamed}


def _taken(values: Any, axes: tuple[str | None, ...], positions: Mapping[str, Any]) -> Any:
    for number, axis in enumerate(axes):
        if axis is not None and axis in positions:
            values = values.take(positions[axis], number)
    return values


def _datamodel(context: Context, store: Store, plain: Remains) -> Remains:
    # Fitted on all targets together, the purged rows' own too; predictions are to stay the same.
    shrink = list(uncertainty_of(store).shrink)
    fewer = replace(plain, attributes={**plain.attributes, "shrink": shrink})
    if "chosen" in store.spec.arrays:  # ridge: the lasso's error bars need no masks
        # They served to fit it, and the rows' masks could be solved for from them.
        fitted = dict.fromkeys(("basis", "longest", "maps"))
        turned = partial(_fewer_masks, store, plain.positions["train"])
        fewer = replace(fewer, constants=fitted, costly=turned)
    if "top_rows" not in store.spec.arrays:  # fitted before strongest rows were kept
        return fewer
    shorter = _shorter(store, plain)
    ranked = Ranked(context, store, "margins", shorter["top_rows"][2])
    return replace(fewer, shapes=shorter, revise=ranked)


def _fewer_masks(store: Store, left: Any) -> Mapping[str, Any]:
    # The eigenvalues of all rows' Gram matrix would tell what the masks that are left lack of it,
    # and scales whose squares are 1 in the mean of all rows what those that are left lack of that.
    if fitted_by_older(store):  # it is refused until it is fitted anew, and is not lost till then
        with threads(1):
            older = fewer_rows(torch.from_numpy(store.constant("masks")[:, left]))
        return dict(zip(("eigenvalues", "masks"), (part.numpy() for part in older), strict=True))
    alike = store.provenance.settings["method"]["alike"]
    masks, before = (torch.from_numpy(store.constant(name)) for name in ("masks", "scales"))
    before = before[left].double()
    after = expected_scales((before.square() - alike).clamp_min(0), alike)
    with threads(1):
        found = *fewer_rows(masks[:, left] * (after / before).to(masks)), after.to(masks)
    names = "eigenvalues", "masks", "scales"
    return dict(zip(names, (part.numpy() for part in found), strict=True))


def _moments(context: Context, store: Store, plain: Remains) -> Remains | None:
    models = context.find("ensemble", store.provenance.settings["ensemble"])
    return replace(plain, revise=LessMoments(context, store, models)) if models else None


def _curvature(context: Context, store: Store, plain: Remains) -> Remains | None:
    settings = store.provenance.settings
    features = context.find("features", settings["features"])
    if features is None:
        return None
    block = min(settings["block"], len(context.kept["target"]))
    made = Provenance({**plain.provenance.settings, "block": block}, plain.provenance.recorded)
    return replace(plain, provenance=made, revise=LessCurvature(context, store, features))


def _trak(context: Context, store: Store, plain: Remains) -> Remains | None:
    sources = trak_sources(context, store)
    shorter = _shorter(store, plain)
    ranked = Ranked(context, store, "margins", shorter["top_rows"][2])
    return replace(plain, shapes=shorter, revise=FewerScores(ranked, sources)) if sources else None


def _trak_rows(context: Context, store: Store, plain: Remains) -> Remains:
    # It served to solve the rows, and all of them are there.
    return replace(plain, constants={"factor": None})


def _trak_package(context: Context, store: Store, plain: Remains) -> Remains:
    shorter = _shorter(store, plain)
    ranked = Ranked(context, store, "scores", shorter["top_rows"][2])
    return replace(plain, shapes=shorter, revise=ranked)


def _prior(context: Context, store: Store, plain: Remains) -> None:
    """It served to make the residual's models, and is made anew where they are not finished."""


def _prediction(context: Context, store: Store, plain: Remains) -> Remains | None:
    return None if _is_told_of(context, store) else plain


def _calibration(context: Context, store: Store, plain: Remains) -> Remains | None:
    # Not fitted yet: it would be fitted with another damping, which the rows' number tells.
    return plain if context.run.exists("calibration.json") else None


def _shorter(store: Store, plain: Remains) -> dict[str, tuple[int, ...]]:
    """Shapes of the lists of strongest rows, which are not longer than there are rows."""
    _, signs, count = store.spec.array("top_rows").shape
    targets, rows = (len(plain.positions[axis]) for axis in ("target", "train"))
    return dict.fromkeys(("top_rows", "top_values"), (targets, signs, min(count, rows)))


def _in_run(context: Context, store: Store, plain: Remains) -> Remains | None:
    names, settings = store.attributes["targets"], plain.provenance.settings
    left = context.left(names)
    if len(left) < len(names) and not settings["per_target"]:
        return None  # a mean cannot be taken apart
    places = np.searchsorted(context.kept["target"], store.constant("positions")[left])
    settings = {**settings, "targets": digest(places)}
    return replace(
        plain,
        constants={"positions": places},
        provenance=Provenance(settings, plain.provenance.recorded),
    )


KINDS = {
    # Sums over the rows come first: they are formed from stores that still hold the rows.
    "curvature": Kind({}, named=(), change=_curvature),
    "moments": Kind({}, named=(), change=_moments),
    "trak": Kind({}, change=_trak),
    "trak-rows": Kind({}, named=(), change=_trak_rows),
    "features": Kind({}, ("forgotten",), derived=False),
    "datamodel": Kind({}, change=_datamodel),
    "calibration-choice": Kind({}, named=(), change=_calibration),
    "calibration-changes": Kind({}, named=(), change=_calibration),
    "residual-prior": Kind({}, named=(), change=_prior),
    "in-run-scores": Kind({}, ("targets",), change=_in_run),
    "trak-package-scores": Kind({}, change=_trak_package),
    "prediction": Kind({}, named=("target",), change=_prediction),
    "ensemble": Kind({"mask": ("model", "train")}, ("without",), derived=False),
}
"""What is known of each kind of store, in the order in which stores are rewritten."""
