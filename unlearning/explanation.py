"""Which training rows pushed a target's margin up and down most: as data, text and a page."""

import pathlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray

from attribution.gradients import output_cotangents
from attribution.outputs import Array
from attribution.run import Run
from attribution.strongest import strongest
from attribution.task import Rows, Task
from attribution.trak import TrakScores, margin_effects
from stores import Store
from unlearning.figures import thumbnail

PREDICTORS = ("datamodel", "trak")
EXPLAINED_ROWS = 5  # of either direction in a report

Direction = Literal["pushed up", "pushed down"]


@dataclass(frozen=True)
class MarginEffects:
    """Effects of including training rows on margins, by one predictor.

    Args:
        predictor: its name.
        of: gives the effects of all rows, [train], on the margin of the target at a position.
        kept: gives the rows that were kept as the strongest, and their effects, each [2, count]:
            the highest, then the lowest; None where none were kept.
    """

    predictor: str
    of: Callable[[int], Array] = field(repr=False)
    kept: Callable[[int], tuple[Rows, Array]] | None = field(default=None, repr=False)

    def strongest(self, target: int, top: int) -> tuple[Rows, Array]:
        """The rows that raise and that lower a target's margin most.

        Those that were kept are read in a millisecond; where more are asked for than were kept,
        all effects on the target are read.

        Args:
            target: position of the target.
            top: rows of either sign, or as many as there are.

        Returns:
            Rows and their effects, each [2, count]: the highest, then the lowest.
        """
        if self.kept is not None:
            rows, values = self.kept(target)
            if rows.shape[1] >= top:
                return rows[:, :top], values[:, :top]
        effects = self.of(target)
        found, values = strongest(effects[:, None], min(top, len(effects)))
        return found[0], values[0]


@dataclass(frozen=True)
class ExplainedRow:
    """A training row and what including it did to the target's margin.

    Args:
        id: of the row.
        value: effect on the margin, in its unit; the margin falls by this without the row.
        direction: its sign in words.
        label: of the row.
    """

    id: str
    value: float
    direction: Direction
    label: str


@dataclass(frozen=True)
class Explanation:
    """The rows that pushed one target's margin up and down most.

    Args:
        task: name of the task.
        target: id of the target.
        label: of the target.
        predictor: name of the predictor whose effects these are.
        rows: those that pushed it up, then those that pushed it down, the strongest first.
    """

    task: str
    target: str
    label: str
    predictor: str
    rows: tuple[ExplainedRow, ...]

    def pushed(self, direction: Direction) -> tuple[ExplainedRow, ...]:
        """The rows of one direction."""
        return tuple(row for row in self.rows if row.direction == direction)


def run_scores(run: Run, predictor: str | None = None) -> MarginEffects:
    """Effects on margins as a run can tell them.

    The margin's derivative is taken at the full models' mean outputs for a datamodel, at each
    checkpoint for TRAK, whose scores are computed from the run's features where none are stored.

    Args:
        run: the run.
        predictor: "datamodel" or "trak"; None: the first of them that the run has.

    Returns:
        The effects.

    Raises:
        ValueError: an unknown predictor, or one that the run has not.
    """
    known: dict[str, Callable[[Run], MarginEffects | None]]
    known = {"datamodel": _datamodel_effects, "trak": _trak_effects}
    if predictor is not None and predictor not in known:
        raise ValueError(f"unknown predictor {predictor!r}: choose from {', '.join(known)}")
    for name in [predictor] if predictor else known:
        effects = known[name](run)
        if effects is not None:
            return effects
    raise ValueError(
        f"{run.path} has no {predictor or 'effects of rows'}: run dmm precompute, which makes them"
    )


def _datamodel_effects(run: Run) -> MarginEffects | None:
    if not (run.path / f"datamodel-{run.settings.subsets}").taken():
        return None
    datamodel, outputs = run.datamodel, run.full.store.array("outputs")

    def of(target: int) -> Array:
        mean = torch.from_numpy(np.asarray(outputs[:, target]).mean(0, keepdims=True))
        label = run.task.targets([target])[1]
        slope = output_cotangents(run.task.loss, mean, label, "margin")[0, 0]
        return np.asarray(datamodel.effects(target) @ slope.numpy())

    # Datamodels fitted by older versions kept no rows.
    kept = "top_rows" in datamodel.store.spec.arrays
    return MarginEffects("datamodel", of, datamodel.strongest if kept else None)


def _trak_effects(run: Run) -> MarginEffects | None:
    if not (run.path / "features/checkpoint-0").taken():
        return None
    stored = run.trak_path / "scores"
    if stored.taken() and Store.open(stored).complete:
        scores = TrakScores.open(run.trak_path)
        return MarginEffects("trak", scores.margins, scores.strongest)
    ends = run.features.ends()
    return MarginEffects(
        "trak", lambda target: margin_effects(ends, target, damping=run.trak_damping)
    )


def explain(scores: MarginEffects, task: Task, target_id: str, top: int = 20) -> Explanation:
    """The training rows that pushed a target's margin up and down most.

    Args:
        scores: effects of including rows on margins.
        task: gives ids and labels.
        target_id: id of a training or test row.
        top: rows of either direction at most; rows without an effect are left out.

    Returns:
        The explanation.

    Raises:
        ValueError: an unknown target, or fewer than one row asked for.

    Example:
        >>> from examples.digits import task
        >>> effects = np.zeros(1437)
        >>> effects[[17, 403]] = 0.5, -0.25
        >>> explain(MarginEffects("by hand", lambda target: effects), task, "test-0").rows
        (ExplainedRow(id='train-17', value=0.5, direction='pushed up', label='8'),
        ExplainedRow(id='train-403', value=-0.25, direction='pushed down', label='3'))
    """
    if target_id not in task.positions:
        raise ValueError(f"unknown target {target_id!r} of task {task.name!r}")
    if top < 1:
        raise ValueError(f"expected at least 1 row, got top={top}")
    target = task.positions[target_id]
    places, values = scores.strongest(target, top)
    told = (values * [[1], [-1]]) > 0
    pairs = zip(places[told], values[told], strict=True)
    rows = [_row(task, int(place), float(value)) for place, value in pairs]
    label = _label(task, target)
    return Explanation(task.name, target_id, label, scores.predictor, tuple(rows))


def explained_rows(run: Run, blocks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The test row that each forget set moves most, and the training rows that moved its margin.

    Args:
        run: with effects of single rows; others give an empty list.
        blocks: forget sets of an evaluation by name, with their most affected rows.

    Returns:
        Explanations as plain values, with the name of the forget set.
    """
    if not set(PREDICTORS) & set(run.predictors):
        return []
    scores, found = run_scores(run), []
    for name, block in blocks.items():
        tested = [row["id"] for row in block["affected"] if row["split"] == "test"]
        for target in tested[:1]:
            told = asdict(explain(scores, run.task, target, EXPLAINED_ROWS))
            found.append({"forget_set": name, **told})
    return found


def _row(task: Task, place: int, value: float) -> ExplainedRow:
    direction: Direction = "pushed up" if value > 0 else "pushed down"
    return ExplainedRow(task.train_ids[place], value, direction, _label(task, place))


def _label(task: Task, place: int) -> str:
    label = task.targets([place])[1][0]
    return str(label.item()) if label.numel() == 1 else str(label.tolist())


def explanation_table(explanation: Explanation) -> str:
    """An explanation as plain text for a terminal.

    Args:
        explanation: the rows.

    Returns:
        The text.

    Example:
        >>> row = ExplainedRow("train-3", 0.5, "pushed up", "7")
        >>> print(explanation_table(Explanation("digits", "test-0", "7", "trak", (row,))))
        test-0 (label 7): rows that moved its margin most, by trak
        <BLANKLINE>
        pushed up     label     effect
        train-3           7    +0.5000
        <BLANKLINE>
        pushed down: none
    """
    told = explanation
    lines = [f"{told.target} (label {told.label}): rows that moved its margin most, by"
             f" {told.predictor}"]  # fmt: skip
    directions: tuple[Direction, Direction] = ("pushed up", "pushed down")
    width = max(len(text) for text in (*directions, *(row.id for row in told.rows)))
    for direction in directions:
        rows = told.pushed(direction)
        if not rows:
            lines += ["", f"{direction}: none"]
            continue
        lines += ["", f"{direction:{width}}  {'label':>6}  {'effect':>9}"]
        lines += [f"{row.id:{width}}  {row.label:>6}  {row.value:>+9.4f}" for row in rows]
    return "\n".join(lines)


def render_explanation(
    explanation: Explanation, *, thumbnails: Mapping[str, NDArray[Any]] | None = None
) -> str:
    """Writes an explanation as one self-contained HTML page.

    Args:
        explanation: the rows.
        thumbnails: images by row id, [height, width] or [height, width, 3]; None shows none.

    Returns:
        The page; equal arguments give equal text.

    Example:
        >>> page = render_explanation(Explanation("digits", "test-0", "7", "trak", ()))
        >>> page.startswith("<!doctype html>")
        True
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("explanation.html.j2").render(
        explanation=explanation,
        largest=max((abs(row.value) for row in explanation.rows), default=1.0),
        images={row: thumbnail(image) for row, image in (thumbnails or {}).items()},
    )
