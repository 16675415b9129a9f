"""Plain text tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from attribution import Prediction, Task
from attribution.purging.purge import Purged
from attribution.task import Rows
from unlearning.cost import REPEATS
from unlearning.standings import DISTANCES, distance_of, standings
from unlearning.wording import as_models

SHOWN_TARGETS = 20


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    pads = [str.ljust] + [str.rjust] * (len(header) - 1)
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True))
        for line in lines
    )


def _pair(block: Mapping[str, Any] | None) -> str:
    mean, p95 = (block or {}).get("mean"), (block or {}).get("p95")
    return f"{_number(mean)} / {_number(p95)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def tuning_table(tuned: Mapping[str, Any]) -> str:
    """What tuning chose, and how much nearer to retrained models it comes.

    Args:
        tuned: what `tune_methods` returned.

    Returns:
        The table, one line a method.

    Example:
        >>> found = {"score": 0.5, "default_score": 0.7, "settings": {"rate": "0.01"}}
        >>> print(tuning_table({"dmm": found}))
        method  as it is  tuned  settings
        ------  --------  -----  ---------
        dmm         0.70   0.50  rate=0.01
    """
    header = ["method", "as it is", "tuned", "settings"]
    rows = [
        [
            name,
            _number(found["default_score"]),
            _number(found["score"]),
            ", ".join("=".join(pair) for pair in found["settings"].items()) or "as they are",
        ]
        for name, found in tuned.items()
    ]
    return _lines(header, rows)


def evaluation_table(evaluation: Mapping[str, Any]) -> str:
    """What methods and predictors reach: a table a forget set, one of all sets, one of predictions.

    The first hold distance to oracles, shift, spread, U-LiRA (balanced accuracy, forget rows), RMIA
    (AUC), ToW, accuracy and cost of every method; the second sorts the methods by their excess
    distance over all sets; the last holds each predictor's agreement with the oracles on the forget
    rows, sets of one kind also taken together.

    Args:
        evaluation: what `evaluate_methods` returned.

    Returns:
        The tables.

    Example:
        >>> evaluation_table({"n_models": 2, "hardware": "a toaster", "forget_sets": {}})
        '2 models, a toaster'
    """
    parts = [f"{evaluation['n_models']} models, {evaluation['hardware']}"]
    parts += [_set_table(name, block) for name, block in evaluation["forget_sets"].items()]
    parts += _standings_table(evaluation)
    predictions = _prediction_rows(evaluation)
    if predictions:
        header = ["predictions, forget rows", "predictor", "of", "R2", "ceiling", "slope"]
        header += ["inside 80 %", "width", "constant width", "as models"]
        parts.append(_lines(header, predictions))
    if evaluation.get("lds"):
        parts.append(_rankings(evaluation["lds"]))
    return "\n\n".join(parts)


def _standings_table(evaluation: Mapping[str, Any]) -> list[str]:
    distance = distance_of(evaluation)
    found = standings(evaluation, distance)
    if len(found) < 2:
        return []
    sets = len(evaluation["forget_sets"])
    header = [f"{sets} forget sets", f"excess {DISTANCES[distance]} forget", "retain", "test"]
    rows = [
        [
            standing.method,
            f"{_number(standing.forget)} / {_number(standing.forget_p95)}",
            _number(standing.retain),
            _number(standing.test),
            unbiased_text(standing.unbiased),
            _percent(standing.cost),
        ]
        for standing in found
    ]
    return [_lines([*header, "KLOM without bias", "of a retrain"], rows)]


def unbiased_text(found: tuple[float, float, float] | None) -> str:
    """KLOM without bias with its interval.

    Args:
        found: value, lower and upper end; None where there is none.

    Returns:
        The three numbers.

    Example:
        >>> unbiased_text((0.1, -0.05, 0.26))
        '0.10 (-0.05 to 0.26)'
    """
    if found is None:
        return _number(None)
    mean, low, high = (_number(number) for number in found)
    return f"{mean} ({low} to {high})"


def _rankings(told: Mapping[str, Any]) -> str:
    rows = [
        [name, *(_number(found[key]) for key in ("mean", "low", "high")), _number(told["ceiling"])]
        for name, found in told["predictors"].items()
    ]
    title = f"LDS, {told['models']} models, {told['targets']} test rows"
    return _lines([title, "mean", "95 % from", "to", "ceiling"], rows)


def _prediction_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    blocks = list(evaluation["forget_sets"].items())
    blocks += [(pooled_name(group), group) for group in evaluation.get("pooled", [])]
    return [
        [title, predictor, kind, *_agreement(splits["forget"])]
        for title, block in blocks
        for predictor, kinds in block["predictions"].items()
        for kind, splits in kinds.items()
    ]


def _agreement(found: Mapping[str, Any]) -> list[str]:
    numbers = [_number(found[key]) for key in ("r2", "ceiling", "slope")]
    widths = [_number(found[key]["80"]) for key in ("width", "constant_width")]
    number, most = found.get("retrained_models"), found.get("most_models")
    worth = _number(None) if number is None else as_models(number, most)
    return [*numbers, _percent(found["coverage"]["80"]), *widths, worth]


def pooled_name(group: Mapping[str, Any]) -> str:
    """What tables call several forget sets that are judged together.

    Args:
        group: an entry of an evaluation's `pooled`.

    Returns:
        Their number, kind and size.

    Example:
        >>> pooled_name({"sets": ["a", "b"], "kind": "random", "size": 50})
        '2 sets, random, 50 rows each'
    """
    each = "" if group["size"] is None else f", {group['size']} rows each"
    return f"{len(group['sets'])} sets, {group['kind']}{each}"


def _set_table(name: str, block: Mapping[str, Any]) -> str:
    measure = distance_of({"forget_sets": {name: block}})
    title = DISTANCES[measure]
    header = [f"{name} ({block['size']} rows)", f"{title} forget", "retain", "test"]
    header += ["shift", "spread", "U-LiRA", "RMIA", "ToW", "accuracy", "seconds", "of a retrain"]
    null = block["null"]
    rows = [["two oracle banks", *_distances(null, measure), *_attacks(null), "", "", ""]]
    for method, told in block["methods"].items():
        rows.append(
            [
                method,
                *_distances(told, measure),
                *_attacks(told),
                _number(told["accuracy"]["forget"]),
                "-" if told["seconds"] is None else f"{told['seconds']:.3f}",
                _percent(told["cost_over_retrain"]),
            ]
        )
    return "\n".join([_lines(header, rows), *_endings(block["methods"]), *_few_timings(block)])


def _few_timings(block: Mapping[str, Any]) -> list[str]:
    timed = {"retraining": block.get("retrain", {})} | dict(block["methods"])
    repeats = {name: told.get("repeats", REPEATS) for name, told in timed.items()}
    few = [f"{name} {count}" for name, count in repeats.items() if 0 < count < REPEATS]
    return [f"timed fewer than {REPEATS} times, as it takes long: {', '.join(few)}"] if few else []


def _endings(methods: Mapping[str, Any]) -> list[str]:
    """A line for each method that failed or has a stopping rule."""
    lines = [f"{name} failed: {told['error']}" for name, told in methods.items() if "error" in told]
    for method, told in methods.items():
        parts = [
            f"{found['models']} {status} (kept after {found['kept']:.0f} of {found['steps']:.0f}"
            f" steps, {found['reached']:.3f} reached, {found['reference']:.3f} wanted)"
            for status, found in told.get("endings", {}).items()
            if found["reached"] is not None
        ]
        lines += [f"{method} stopped: {', '.join(parts)}"] if parts else []
    return lines


def _distances(told: Mapping[str, Any], measure: str) -> list[str]:
    pairs = [_pair(told[measure][split]) for split in ("forget", "retain", "test")]
    return [*pairs, _number(told["shift"]["forget"]), _number(told["spread"]["forget"])]


def _attacks(told: Mapping[str, Any]) -> list[str]:
    """U-LiRA, RMIA and ToW; dashes where nothing was retrained to compare with."""
    attacks = told.get("attacks")
    if attacks is None:
        return ["-", "-", "-"]
    balanced = attacks["ulira"]["accuracy"]["forget"]["mean"]
    pulled = "-" if told["tow"] is None else f"{told['tow']:.3f}"
    return [_percent(balanced), _number(attacks["rmia"]["auc"]), pulled]


def prediction_table(task: Task, prediction: Prediction, targets: Rows) -> str:
    """Margins of the first targets before and after, most changed first.

    Args:
        task: gives labels and loss.
        prediction: what was predicted.
        targets: positions of its targets.

    Returns:
        The table.
    """
    _, labels = task.targets(targets)
    before, after = (
        task.loss.margin(torch.from_numpy(np.ascontiguousarray(values)), labels).numpy()
        for values in (prediction.before, prediction.mean)
    )
    order = np.argsort(-np.abs(after - before), kind="stable")[:SHOWN_TARGETS]
    rows = [
        [
            prediction.targets[i],
            str(labels[i].item()),
            f"{before[i]:.2f}",
            f"{after[i]:.2f}",
            f"{after[i] - before[i]:+.2f}",
            f"{prediction.std[i].max():.2f}",
            f"{prediction.noise[i].max():.2f}",
        ]
        for i in order
    ]
    header = ["target", "label", "margin now", "predicted", "change", "std", "noise"]
    left = len(prediction.targets) - len(rows)
    more = f"\n{left} further targets: --json or --out give all" if left > 0 else ""
    return _lines(header, rows) + "\nstd and noise: the largest of the target's outputs" + more


def status_table(stores: Sequence[Mapping[str, Any]], *, verified: bool) -> str:
    """What each store of a run holds.

    Args:
        stores: name, kind and block counts of each.
        verified: whether checksums were recomputed.

    Returns:
        The table.
    """
    rows = [
        [s["store"], s["kind"], str(s["blocks"]), str(s["done"]), str(s["pending"])] for s in stores
    ]
    text = _lines(["store", "kind", "blocks", "done", "pending"], rows)
    return text + ("\nall checksums hold" if verified else "")


def purge_notes(evaluation: Mapping[str, Any]) -> list[str]:
    """What an evaluation must say of rows that were purged from its run.

    Args:
        evaluation: what `evaluate_methods` returned.

    Returns:
        A sentence, or none where nothing was purged.

    Example:
        >>> purge_notes({"purged": 0})
        []
    """
    rows = evaluation.get("purged")
    if not rows:
        return []
    return [
        f"{rows} rows were purged from the run. Models trained before that, and so those that every"
        " method starts from, have seen them; models retrained since have not, and the distance"
        " between the two is in part the effect of these rows."
    ]


_WEIGHTS_STAY = (
    "\nthe run's weights that were trained on these rows are as they were, and so are principal"
    " directions where gradients have them; dmm unlearn no longer knows the rows: to make models"
    " forget rows, unlearn before you purge"
)


_OTHERS_STAY = (
    "\nfiles that purge does not know, in which it found no id of these rows, are as they were: {};"
    " look whether they tell of the rows all the same"
)


def purge_text(run: str, done: Purged) -> str:
    """What a purge did, and what it leaves to other steps.

    Args:
        run: name of the run.
        done: what `purge` returned.

    Returns:
        A few lines.

    Example:
        >>> print(purge_text("runs/a", Purged(0, 2, False, (), (), 10, 10, 2, weights=True)))
        runs/a: these 2 rows have been purged before; nothing was left to do
    """
    if not done.rows:
        return f"{run}: these {done.already} rows have been purged before; nothing was left to do"
    before, after = done.bytes_before / 1e6, done.bytes_after / 1e6
    return (
        f"{run}: {done.rows} rows purged"
        + (" by the purge that was interrupted" if done.finished else "")
        + (f" ({done.already} others had been before)" if done.already else "")
        + f"; {len(done.rewritten)} stores written anew, {len(done.removed)} stores and files"
        f" removed, {before:.1f} MB before and {after:.1f} MB now"
        + (_OTHERS_STAY.format(", ".join(done.kept)) if done.kept else "")
        + (_WEIGHTS_STAY if done.weights else "")
    )
