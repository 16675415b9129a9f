"""From a task to predictions of what retrained models would output."""

from attribution.counterfactual import Change, Counterfactual, Prediction
from attribution.datamodels import LinearDatamodel, fit_datamodels
from attribution.ensemble import Ensemble, train_models
from attribution.forget import ForgetSet, parse_forget
from attribution.losses import CrossEntropy, Loss, SquaredError
from attribution.model import Model, load_model
from attribution.oracle import Oracle
from attribution.subsets import Subsets, draw_subsets
from attribution.task import Recipe, Task
