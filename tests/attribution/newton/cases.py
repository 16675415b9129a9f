"""Tasks of every loss and group Newton on a few checkpoints of them, drawn at random."""

from torch import nn

from attribution import GroupNewton, Model, Projection, featurize
from tests.tasks import binary, blobs, diabetes, line

TASKS = {
    "softmax": blobs,
    "one logit": binary,
    "regression": line,
    "diabetes": lambda: diabetes(
        model=lambda: nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 1))
    ),
}
EXACT = Projection(inputs=64, outputs=64, features=4096)  # larger than any layer: no projection
SMALL = Projection(inputs=3, outputs=2, features=5, seed=5)


def checkpoints(task, count):
    return [Model(task, task.new_model(seed).state_dict()) for seed in range(count)]


def newton_of(task, folder, count=3, *, features=None, **settings):
    """Group Newton from untrained checkpoints; `features` are settings of featurize."""
    given = {"projection": SMALL} | (features or {})
    made = featurize(task, checkpoints(task, count), folder, **given)
    return GroupNewton(task, made, **settings)
