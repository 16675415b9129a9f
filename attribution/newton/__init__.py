"""Group Newton: retraining predicted from projected gradients of a few checkpoints."""

from attribution.newton.calibration import Calibration
from attribution.newton.fitting import calibrate, predicted_changes
from attribution.newton.group import GroupNewton, damping_per_row
from attribution.newton.staged import StagedNewton

__all__ = [
    "GroupNewton",
    "StagedNewton",
    "Calibration",
    "calibrate",
    "damping_per_row",
    "predicted_changes",
]
