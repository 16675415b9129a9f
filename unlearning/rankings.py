"""Linear datamodeling scores of a run's predictors: how they rank random subsets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attribution.lds import LDS, lds_bank, linear_datamodeling_score
from attribution.run import Run
from attribution.task import Rows
from unlearning.explanation import PREDICTORS, MarginEffects, run_scores

REPEATS = 2
MOST_TARGETS = 500


@dataclass(frozen=True)
class Rankings:
    """Linear datamodeling scores on test margins.

    Args:
        models: trained for it, `REPEATS` on each subset.
        targets: test rows that were scored.
        scores: by predictor.
    """

    models: int
    targets: int
    scores: Mapping[str, LDS]

    def told(self) -> dict[str, Any]:
        """As plain values: mean, its 95 % interval over targets, and the mean ceiling."""
        by_predictor = {
            name: {"mean": found.mean, "low": found.interval[0], "high": found.interval[1]}
            for name, found in self.scores.items()
        }
        ceilings = [float(np.nanmean(found.ceiling)) for found in self.scores.values()]
        told = {"models": self.models, "repeats": REPEATS, "targets": self.targets}
        return told | {"ceiling": min(ceilings, default=None), "predictors": by_predictor}


def rank_subsets(
    run: Run,
    models: int,
    *,
    device: str = "cpu",
    workers: int | None = None,
    scheduler: str | None = None,
) -> Rankings:
    """Scores the predictors of a run that tell an effect for each row, on subsets of half the rows.

    Newton's predictions are no sum over rows: they have no linear datamodeling score.

    Args:
        run: a finished run.
        models: models trained for the ground truth, 2 on each subset; kept in the run.
        device: where to compute.
        workers: processes; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The scores on the first 500 test rows.

    Raises:
        ValueError: an odd number of models or fewer than 4, no test rows, no such predictor.
    """
    if models < 2 * REPEATS or models % REPEATS:
        raise ValueError(
            f"expected an even number of models from {2 * REPEATS} on for linear datamodeling"
            f" scores, got {models}"
        )
    names = [name for name in PREDICTORS if name in run.predictors]
    train, count = len(run.task.train_ids), min(MOST_TARGETS, len(run.task.test_ids))
    if not names or not count:
        raise ValueError(
            f"{run.path} has {'no test rows' if names else 'no effects of single rows'}: there is"
            " no linear datamodeling score of it"
        )
    bank = lds_bank(
        run.task,
        run.path / f"subsets-{models}",
        models=models,
        repeats=REPEATS,
        seed=run.settings.seed,
        device=device,
        workers=workers,
        scheduler=scheduler,
    )
    targets = np.arange(train, train + count)
    scores = {
        name: linear_datamodeling_score(
            _columns(run_scores(run, name), targets), bank, targets=targets
        )
        for name in names
    }
    return Rankings(models, count, scores)


def _columns(effects: MarginEffects, targets: Rows) -> np.ndarray[Any, Any]:
    return np.stack([effects.of(int(target)) for target in targets], axis=1)
