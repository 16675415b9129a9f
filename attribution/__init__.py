"""From a task to predictions of what retrained models would output."""

from attribution.calibration_bank import calibration_bank
from attribution.combined import Combined
from attribution.counterfactual import Change, Counterfactual, Prediction
from attribution.datamodels import fit_datamodels
from attribution.ensemble import Ensemble
from attribution.ensemble_training import train_models
from attribution.forget import ForgetSet, parse_forget
from attribution.gradients import Features, Projection, featurize
from attribution.in_run import InRunScores, record_run
from attribution.lasso_datamodels import Lasso
from attribution.lds import lds_bank, linear_datamodeling_score
from attribution.linear_datamodel import LinearDatamodel
from attribution.losses import BinaryCrossEntropy, CrossEntropy, Loss, SquaredError
from attribution.model import Model, load_model
from attribution.moments import Moments, compute_moments
from attribution.newton import Calibration, GroupNewton, StagedNewton, calibrate
from attribution.oracle import Oracle
from attribution.precompute import precompute, precompute_checkpoints
from attribution.purging.purge import Purged, purge
from attribution.ridge_datamodels import Ridge
from attribution.run import Run
from attribution.subsets import Subsets, draw_subsets
from attribution.task import Recipe, Task
from attribution.teachers import HeldOutReference, UntrainedTeacher
from attribution.trak import TrakScores, fit_trak

__all__ = [
    # the task
    "Task",
    "Recipe",
    "Loss",
    "CrossEntropy",
    "BinaryCrossEntropy",
    "SquaredError",
    # models
    "Subsets",
    "draw_subsets",
    "Ensemble",
    "train_models",
    "Model",
    "load_model",
    # forget sets
    "ForgetSet",
    "parse_forget",
    # predictions
    "Counterfactual",
    "Change",
    "Prediction",
    "LinearDatamodel",
    "fit_datamodels",
    "Ridge",
    "Lasso",
    "GroupNewton",
    "StagedNewton",
    "Calibration",
    "calibrate",
    "calibration_bank",
    "Combined",
    "fit_trak",
    "TrakScores",
    "Oracle",
    "HeldOutReference",
    "UntrainedTeacher",
    "lds_bank",
    "linear_datamodeling_score",
    # projected gradients
    "Projection",
    "featurize",
    "Features",
    # the value of rows for one training run
    "record_run",
    "InRunScores",
    # what projected gradients need
    "Moments",
    "compute_moments",
    # everything of a task in one folder
    "Run",
    "precompute",
    "purge",
    "Purged",
    "precompute_checkpoints",
]
