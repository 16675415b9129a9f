"""What came out of the suite, in sentences and tables."""

from collections.abc import Sequence

import numpy as np

from examples.convex.suite import EARLY, GRADIENT, GROUP, SPLITS, Result

Table = list[list[str]]


def findings(results: Sequence[Result]) -> list[str]:
    """What the numbers show, in sentences.

    Args:
        results: of the suite.

    Returns:
        The sentences.
    """
    seeds, last = len(results[0].noise), int(results[0].marks[-1])
    return [
        f"{len(results)} cases (spectrum, penalty, forget set), {seeds}"
        f" {'seed' if seeds == 1 else 'seeds'} each, {last} steps.",
        _exactness(results),
        _floors(results),
        *_winners(results),
        _noise(results),
        _ascent(results),
        _optimizer(results),
    ]


def _exactness(results: Sequence[Result]) -> str:
    limits = max(float(result.floors["group"].max()) for result in results)
    there = [result for result in results if result.arrival(GROUP)]
    rest = [result for result in results if not result.arrival(GROUP)]
    slow = (
        f" In the others matching itself is ill-conditioned"
        f" ({_conditions(rest, GROUP)}) and is still on its way." if rest else ""
    )  # fmt: skip
    return (
        f"Group targets are exact: matching them leads to the retrained weights but for"
        f" {limits:.0e} of the start's distance in the worst case, and gradient descent on them"
        f" comes within 1e-6 in {len(there)} of {len(results)} cases within the budget.{slow}"
    )


def _floors(results: Sequence[Result]) -> str:
    parts = []
    for kind in ("first-order", "leverage"):
        found = np.concatenate([result.floors[kind] for result in results])
        parts.append(
            f"{kind} targets leave {np.median(found):.2f} of the error"
            f" ({found.min():.2f} to {found.max():.2f})"
        )
    return f"However many steps are taken, {' and '.join(parts)}."


def _winners(results: Sequence[Result]) -> list[str]:
    sentences = []
    for name, other, title in (
        (GROUP, GRADIENT, "Matching group targets"),
        (GRADIENT, GROUP, "Plain gradient descent on the retain rows"),
    ):
        won = [result for result in results if result.winner == name]
        if won:
            sentences.append(
                f"{title} wins {len(won)} of {len(results)} cases, being within 1e-6 first:"
                f" {_named(won)}. Its condition number there is {_conditions(won, name)}, the"
                f" other's {_conditions(won, other)}."
            )
    drawn = [result for result in results if result.winner == "both"]
    if drawn:
        sentences.append(f"They arrive about together in {len(drawn)}: {_named(drawn)}.")
    far = [result for result in results if result.winner == "none"]
    if far:
        ends = [" to ".join(_ends(far, name)) for name in (GRADIENT, GROUP)]
        sentences.append(
            f"None arrives in {len(far)}: {_named(far)}, where gradient descent ends {ends[0]} away"
            f" (condition number {_conditions(far, GRADIENT)}) and matching {ends[1]}"
            f" ({_conditions(far, GROUP)})."
        )
    return sentences


def _ends(results: Sequence[Result], name: str) -> dict[str, None]:
    found = [float(result.median(name)[-1]) for result in results]
    return dict.fromkeys(_error(value) for value in (min(found), max(found)))


def _named(results: Sequence[Result]) -> str:
    kinds: dict[tuple[str, float], list[str]] = {}
    for result in results:
        kinds.setdefault((result.shape, result.penalty), []).append(result.forget)
    return "; ".join(
        f"{shape} at penalty {penalty:g}" + (f" ({found[0]})" if len(found) == 1 else "")
        for (shape, penalty), found in kinds.items()
    )


def _conditions(results: Sequence[Result], name: str) -> str:
    found = [float(np.median(result.conditions[name])) for result in results]
    ends = dict.fromkeys(condition(value) for value in (min(found), max(found)))
    return " to ".join(ends)


def condition(value: float) -> str:
    """A condition number with two digits."""
    return f"{float(f'{value:.2g}'):,g}"


def _error(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def _noise(results: Sequence[Result]) -> str:
    ends, ratios = [], []
    for result in results:
        found = result.errors["noisy descent"].weights[:, -1]
        plain = result.errors[GRADIENT].weights[:, -1]
        ends.append(found)
        ratios.append(found / np.hypot(plain, result.noise))
    end, ratio = np.median(ends), np.median(ratios)
    return (
        f"Noisy descent ends {end:.2f} away in the median, {ratio:.2f} times as far as theory says:"
        f" what descent has left and the noise itself, never below {np.min(ends):.0e}."
    )


def _ascent(results: Sequence[Result]) -> str:
    slow = [result for result in results if not result.arrival(GRADIENT)]
    if not slow:
        return "Ascent first was not needed anywhere: gradient descent arrives everywhere."
    ratios = [result.median("ascent-descent")[-1] / result.median(GRADIENT)[-1] for result in slow]
    return (
        f"Ascent first, at its best setting, leaves {min(ratios):.2f} to {max(ratios):.2f} of the"
        f" error of gradient descent in the {len(slow)} cases where that does not arrive."
    )


def _optimizer(results: Sequence[Result]) -> str:
    name = "matching, group, Adam"
    there = [result for result in results if result.arrival(name)]
    rest = [result for result in results if not result.arrival(name)]
    if not rest:
        return "Adam, the optimiser that matching ships with, arrives everywhere."
    outputs = {
        split: float(np.median([np.median(r.errors[name].outputs[split][:, -1]) for r in rest]))
        for split in SPLITS
    }
    return (
        f"With Adam, the optimiser that matching ships with, group targets lead to the retrained"
        f" solution in {len(there)} of {len(results)} cases. In the others Adam leaves the span of"
        f" the rows, to which gradient descent keeps: on the forget rows, which it matches, the"
        f" error of the outputs is {outputs['forget']:.1e} of the start's, on test rows, which it"
        f" does not, {outputs['test']:.2g} (medians)."
    )


def overview(results: Sequence[Result]) -> Table:
    """One row a case: condition numbers, and how far every method ends from the retrained weights.

    Args:
        results: of the suite.

    Returns:
        The header, then the rows; a cell holds the median and the range over seeds.
    """
    names = list(results[0].errors)
    header = ["case", "condition of descent", "of matching", *names]
    return [header, *(_overview_row(result, names) for result in results)]


def _overview_row(result: Result, names: Sequence[str]) -> list[str]:
    conditions = [condition(np.median(result.conditions[name])) for name in (GRADIENT, GROUP)]
    return [result.name, *conditions, *(_spread(result.errors[n].weights[:, -1]) for n in names)]


def _spread(values: np.ndarray) -> str:
    low, middle, high = (_error(float(np.quantile(values, share))) for share in (0, 0.5, 1))
    return middle if low == high else f"{middle} ({low} to {high})"


def details(results: Sequence[Result]) -> Table:
    """One row a case and method: median errors early and at the end, of weights and outputs.

    Args:
        results: of the suite.

    Returns:
        The header, then the rows.
    """
    last = int(results[0].marks[-1])
    header = ["case", "method", f"weights @{EARLY}", f"@{last}", "steps to 1e-6", "floor"]
    header += [f"{split} outputs @{last}" for split in SPLITS]
    return [header, *(_details_row(result, name) for result in results for name in result.errors)]


def _details_row(result: Result, name: str) -> list[str]:
    errors, early = result.errors[name], int(np.flatnonzero(result.marks == EARLY)[0])
    arrival, floor = result.arrival(name), result.floors.get(name.removeprefix("matching, "))
    return [
        result.name,
        name,
        *(_error(result.median(name)[at]) for at in (early, -1)),
        "-" if arrival is None else f"{arrival}",
        "" if floor is None else _error(float(np.median(floor))),
        *(_error(float(np.median(errors.outputs[split][:, -1]))) for split in SPLITS),
    ]


def aligned(table: Table) -> str:
    """A table for a terminal."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )
