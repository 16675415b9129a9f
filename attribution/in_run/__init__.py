"""In-Run Data Shapley: what each row did to the targets' loss during one training run."""

from attribution.in_run.recording import RunValues, run_values
from attribution.in_run.scores import InRunScores, record_run

__all__ = [
    # recorded and stored
    "record_run",
    "InRunScores",
    # the values alone
    "run_values",
    "RunValues",
]
