"""All that is measured of unlearned models on one forget set, as plain values."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from attribution.outputs import target_margins
from attribution.task import Rows
from unlearning.attacks import (
    FEWEST_MODELS_FOR_ULIRA,
    MembershipAttack,
    loss_attack,
    rmia,
    ulira,
)
from unlearning.audit import Audit
from unlearning.bias import corrected_mean
from unlearning.epsilon import forgetting_epsilon
from unlearning.klom import (
    FEWEST_MODELS,
    FEWEST_ROWS_FOR_P95,
    Array,
    gaussian_kl,
    klom,
    shift,
    spread,
)
from unlearning.side_effects import logit_distance, most_harmed, tug_of_war

Json = dict[str, Any]


def told_distances(audit: Audit, outputs: Array) -> Json:
    """How far models are from the audit's oracles, by every measure that needs outputs alone.

    Of the second bank of oracles it gives the null of every measure.

    Args:
        audit: the forget set and its oracles.
        outputs: of the models on all targets, [model, target, output].

    Returns:
        By name of the measure; what too few models or rows cannot tell is None. KLOM, Gaussian KL,
        its corrected form, shift, spread, logit distance and U-LiRA are told of every split; the
        attacks on membership and the epsilon are about the forgotten rows; harmed are retain rows.
    """
    margins, oracles = target_margins(audit.task, outputs), audit.oracles.margins
    told = told_divergences(audit, outputs)
    told["klom_corrected"] = _by_split(
        audit, lambda rows: asdict(corrected_mean(margins[:, rows], oracles[:, rows]))
    )
    for name, values in {
        "shift": shift(margins, oracles),
        "spread": spread(margins, oracles),
        "logit_distance": logit_distance(outputs, audit.oracles.outputs),
    }.items():
        told[name] = _means(audit, values)
    told["tow"] = _tug_of_war(audit, outputs)
    ids, retained = audit.task.target_ids, audit.forget.retained
    told["harmed"] = [asdict(row) for row in most_harmed(margins, oracles, ids, retained)]
    told["attacks"] = {
        "ulira": _ulira(audit, margins, oracles),
        **_membership(audit, outputs),
        "epsilon": _epsilon(margins[:, audit.forget.rows], oracles[:, audit.forget.rows]),
    }
    return told


def told_accuracy(audit: Audit, outputs: Array) -> Json:
    """Mean quality of the outputs of each split.

    Args:
        audit: gives the task and the splits.
        outputs: [model, target, output].

    Returns:
        By split; None where a split has no rows.
    """
    return _means(audit, _of_rows(audit, audit.task.loss.quality, outputs))


def told_divergences(audit: Audit, outputs: Array) -> Json:
    """KLOM where there are models enough, and Gaussian KL.

    Args:
        audit: the forget set and its oracles.
        outputs: of the models on all targets, [model, target, output].

    Returns:
        By name of the measure and split, mean and 95th percentile over rows.
    """
    margins, oracles = target_margins(audit.task, outputs), audit.oracles.margins
    enough = min(len(margins), len(oracles)) >= FEWEST_MODELS
    measures = {"gaussian_kl": gaussian_kl} | ({"klom": klom} if enough else {})
    told: Json = {"klom": _by_split(audit, lambda _: {"mean": None, "p95": None})}
    for name, measure in measures.items():
        told[name] = _summaries(audit, measure(margins, oracles))
    return told


def _ulira(audit: Audit, margins: Array, oracles: Array) -> Json:
    if min(len(margins), len(oracles)) < FEWEST_MODELS_FOR_ULIRA:
        nothing = np.full(margins.shape[1], np.nan)
        return {name: _summaries(audit, nothing) for name in ("accuracy", "auc")}
    found = ulira(margins, oracles)
    return {name: _summaries(audit, values) for name, values in asdict(found).items()}


def _membership(audit: Audit, outputs: Array) -> Json:
    """The attacks that see one model: their means over models."""
    value = audit.task.loss.value
    losses, references = (_of_rows(audit, value, o) for o in (outputs, audit.oracles.outputs))
    rows = [audit.splits[split] for split in ("forget", "test")]
    if not len(rows[1]):
        return {name: {"auc": None, "rate": None} for name in ("loss", "rmia")}
    attacked = [losses[:, chosen] for chosen in rows]
    usual = [references[:, chosen] for chosen in rows]
    return {"loss": _told(loss_attack(*attacked)), "rmia": _told(rmia(*attacked, *usual))}


def _told(attack: MembershipAttack) -> Json:
    return {"auc": float(attack.auc.mean()), "rate": float(attack.rate.mean())}


def _epsilon(margins: Array, oracles: Array) -> Json:
    found = forgetting_epsilon(margins, oracles)
    return {
        "median": float(np.median(found.epsilon)),
        "quality": found.quality,
        "separated": float(np.isinf(found.epsilon).mean()),
        "largest": found.largest,
    }


def _tug_of_war(audit: Audit, outputs: Array) -> float | None:
    """ToW over the splits that have rows; None where quality is no accuracy."""
    both = [told_accuracy(audit, o) for o in (outputs, audit.oracles.outputs)]
    ours, theirs = ({k: v for k, v in told.items() if v is not None} for told in both)
    if not all(0 <= value <= 1 for value in [*ours.values(), *theirs.values()]):
        return None
    return tug_of_war(ours, theirs)


def _of_rows(audit: Audit, measure: Callable[..., torch.Tensor], outputs: Array) -> Array:
    """A measure of the loss (value or quality) for every model and target, [model, target]."""
    _, labels = audit.task.targets()
    values = torch.from_numpy(np.ascontiguousarray(outputs))
    return measure(values, labels.expand(len(values), *labels.shape)).numpy()


def _by_split(audit: Audit, measure: Callable[[Rows], Any]) -> Json:
    return {split: measure(rows) for split, rows in audit.splits.items()}


def _means(audit: Audit, values: Array) -> Json:
    return _by_split(audit, lambda rows: _mean(values[..., rows]))


def _summaries(audit: Audit, values: Array) -> Json:
    return _by_split(audit, lambda rows: _summary(values[rows]))


def _summary(values: Array) -> Json:
    enough = len(values) >= FEWEST_ROWS_FOR_P95
    return {"mean": _mean(values), "p95": float(np.percentile(values, 95)) if enough else None}


def _mean(values: Array) -> float | None:
    return float(values.mean()) if values.size else None
