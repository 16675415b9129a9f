"""From a task to predictions of what retrained models would output."""

from attribution.counterfactual import Change, Counterfactual, Prediction
from attribution.datamodels import fit_datamodels
from attribution.ensemble import Ensemble, train_models
from attribution.forget import ForgetSet, parse_forget
from attribution.linear_datamodel import LinearDatamodel
from attribution.losses import CrossEntropy, Loss, SquaredError
from attribution.model import Model, load_model
from attribution.moments import Moments, compute_moments
from attribution.oracle import Oracle
from attribution.run import Run, precompute
from attribution.subsets import Subsets, draw_subsets
from attribution.task import Recipe, Task

__all__ = [
    # the task
    "Task",
    "Recipe",
    "Loss",
    "CrossEntropy",
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
    "Oracle",
    # what projected gradients need
    "Moments",
    "compute_moments",
    # everything of a task in one folder
    "Run",
    "precompute",
]
