"""Predicted changes against really retrained models: by forget set, by kind, row by row."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from attribution import Change, ForgetSet
from attribution.agreement import Comparison, pooled_agreement, set_averages
from attribution.outputs import target_margins
from unlearning.audit import Array, Audit

SCATTERED_ROWS = 400
AFFECTED_ROWS = 12

Json = dict[str, Any]
# By kind of output (margins, logits) and split.
Comparisons = dict[str, dict[str, Comparison]]


@dataclass(frozen=True)
class Judged:
    """One predictor's change of one forget set beside the measured one.

    Args:
        audit: what was measured.
        change: what was predicted, for all targets.
    """

    audit: Audit
    change: Change

    @cached_property
    def margins(self) -> Array:
        """Mean margins as predicted, [target]."""
        outputs = self.change.applied(self.audit.before)
        return np.asarray(target_margins(self.audit.task, outputs).mean(0))

    @cached_property
    def margin_std(self) -> Array:
        """Uncertainty of the margins, to first order, outputs independent, [target]."""
        _, labels = self.audit.task.targets()
        values = torch.from_numpy(self.audit.before.mean(0) + self.change.mean).requires_grad_()
        self.audit.task.loss.margin(values, labels).sum().backward()
        assert values.grad is not None
        return np.asarray(np.sqrt(np.square(values.grad.numpy() * self.change.std).sum(-1)))

    @cached_property
    def comparisons(self) -> Comparisons:
        """Predicted and measured changes of every split that has rows."""
        audit = self.audit
        before, oracles = audit.before, audit.oracles.outputs
        margins_before, margins = audit.margins_before, audit.oracles.margins
        parts = {
            "margins": (
                self.margins - margins_before.mean(0),
                margins.mean(0) - margins_before.mean(0),
                self.margin_std,
                _error(margins_before, margins),
                margins.std(0, ddof=1),
            ),
            "logits": (
                self.change.mean,
                oracles.mean(0) - before.mean(0),
                self.change.std,
                _error(before, oracles),
                oracles.std(0, ddof=1),
            ),
        }
        return {
            kind: {
                split: Comparison(*(values[rows] for values in arrays))
                for split, rows in audit.splits.items()
                if len(rows)
            }
            for kind, arrays in parts.items()
        }


def told_agreement(comparisons: Comparisons) -> Json:
    """Agreement of one predictor on one forget set as plain values.

    Args:
        comparisons: by kind of output and split.

    Returns:
        The fields of `Agreement` by kind of output and split.

    Example:
        >>> one = Comparison(np.ones(2), np.ones(2), np.ones(2), np.ones(2))
        >>> told_agreement({"margins": {"test": one}})["margins"]["test"]["r2"]
        1.0
    """
    return {
        kind: {split: asdict(pooled_agreement([one])) for split, one in splits.items()}
        for kind, splits in comparisons.items()
    }


def pooled_predictions(
    compared: Sequence[tuple[ForgetSet, Mapping[str, Comparisons]]],
) -> list[Json]:
    """Agreement over all forget sets of one kind and size, and of one kind whatever the size.

    Args:
        compared: each forget set with the comparisons of every predictor by its name.

    Returns:
        One entry a group of two or more: kind, size (None: several), names of the sets, and
        predictions, in which `over_sets` holds averages that count each set once.

    Example:
        >>> pooled_predictions([])
        []
    """
    return [
        {
            "kind": kind,
            "size": size,
            "sets": [forget.name for forget, _ in members],
            "predictions": {
                name: _pooled([comparisons[name] for _, comparisons in members])
                for name in members[0][1]
            },
        }
        for (kind, size), members in _groups(compared).items()
        if len(members) > 1
    ]


def scattered_rows(judged: Judged) -> Json:
    """Mean margins of the forget rows, some other rows and test rows, for a scatter plot.

    Args:
        judged: one predictor on one forget set.

    Returns:
        Columns id, split, before, predicted, std and retrained.
    """
    audit = judged.audit
    places = np.concatenate([rows[:SCATTERED_ROWS] for rows in audit.splits.values()])
    columns = {
        "before": audit.margins_before.mean(0),
        "predicted": judged.margins,
        "std": judged.margin_std,
        "retrained": audit.oracles.margins.mean(0),
    }
    told: Json = {
        "id": [audit.task.target_ids[i] for i in places],
        "split": [s for s, rows in audit.splits.items() for _ in rows[:SCATTERED_ROWS]],
    }
    return told | {
        name: [round(float(value), 4) for value in values[places]]
        for name, values in columns.items()
    }


def affected_rows(judged: Judged) -> list[Json]:
    """The rows whose margin retraining moves most.

    Args:
        judged: one predictor on one forget set.

    Returns:
        Id, split, label and mean margins of each row, most moved first.
    """
    audit = judged.audit
    before, retrained = audit.margins_before.mean(0), audit.oracles.margins.mean(0)
    top = np.argsort(-np.abs(retrained - before), kind="stable")[:AFFECTED_ROWS]
    _, labels = audit.task.targets(top)
    where = {int(i): split for split, rows in audit.splits.items() for i in rows}
    return [
        {
            "id": audit.task.target_ids[i],
            "split": where[int(i)],
            "label": str(label.item()),
            "before": float(before[i]),
            "predicted": float(judged.margins[i]),
            "retrained": float(retrained[i]),
        }
        for i, label in zip(top, labels, strict=True)
    ]


def _error(before: Array, after: Array) -> Array:
    """Standard error of a difference of mean outputs."""
    parts = [values.var(0, ddof=1) / len(values) for values in (before, after)]
    return np.asarray(np.sqrt(parts[0] + parts[1]))


_Compared = tuple[ForgetSet, Mapping[str, Comparisons]]


def _groups(compared: Sequence[_Compared]) -> dict[tuple[str, int | None], list[_Compared]]:
    groups: dict[tuple[str, int | None], list[_Compared]] = {}
    for forget, comparisons in compared:
        groups.setdefault((forget.kind, len(forget)), []).append((forget, comparisons))
    for kind in dict.fromkeys(forget.kind for forget, _ in compared):
        members = [one for one in compared if one[0].kind == kind]
        if len({len(forget) for forget, _ in members}) > 1:
            groups[kind, None] = members
    return groups


def _pooled(sets: Sequence[Comparisons]) -> Json:
    return {
        kind: {split: _pooled_split([one[kind][split] for one in sets]) for split in sets[0][kind]}
        for kind in sets[0]
    }


def _pooled_split(sets: Sequence[Comparison]) -> Json:
    each = [pooled_agreement([one]) for one in sets]
    return asdict(pooled_agreement(sets)) | {"over_sets": asdict(set_averages(each))}
