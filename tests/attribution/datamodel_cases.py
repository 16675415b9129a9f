"""Small ensembles whose outputs are linear in their masks, or nearly so, shared by the tests."""

import numpy as np

from attribution import Ridge
from tests.tasks import write_ensemble

TRAIN, TARGETS, OUTPUTS = 13, 17, 2
LAMBDAS = (0.01, 0.3, 5.0)
RIDGE = Ridge(LAMBDAS)
ANCHORS = 3


def half_masks(models, random):
    return random.random((models, TRAIN)).argsort(1).argsort(1) < TRAIN // 2


def linear(masks, random):
    """Effects [train, target, output], and outputs that are exactly linear in the masks."""
    effects = random.normal(size=(TRAIN, TARGETS, OUTPUTS))
    return effects, 0.3 + np.tensordot(masks, effects, 1)


def noisy(masks, random):
    """Outputs that noise and a product of two rows add to."""
    _, outputs = linear(masks, random)
    together = (masks[:, 2] & masks[:, 9]).astype(float)
    return outputs + together[:, None, None] + random.normal(size=outputs.shape)


def write_pair(folder, task, masks, outputs, judges=None):
    """Models on subsets, and the full ones: the last rows of masks and outputs."""
    parts = [slice(0, -ANCHORS), slice(-ANCHORS, None)]
    names, judging = ["subsets", "full"], [judges, None]
    return [
        write_ensemble(folder / name, task, masks[part], outputs[part], judges=judge)
        for name, part, judge in zip(names, parts, judging, strict=True)
    ]


def made(folder, task, outputs_of, models=38, judges=None):
    random = np.random.default_rng(5)
    masks = np.concatenate([half_masks(models, random), np.ones((ANCHORS, TRAIN), dtype=bool)])
    return write_pair(folder, task, masks, outputs_of(masks, random), judges)
