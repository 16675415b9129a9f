"""Small tasks and checkpoints of them, for features on disk."""

import numpy as np
import torch
from torch import nn

from attribution import ForgetSet, Model
from attribution.gradients import Projection
from tests.tasks import blobs

SMALL = Projection(inputs=3, outputs=2, features=4, seed=5)
TRAIN, ALL = 37, 48


class Gated(nn.Module):
    """A hidden layer, normalised, and a raw parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)
        self.gate = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.last(torch.relu_(self.norm(self.first(x))) * self.gate)


def gated_task(**changes):
    return blobs(**({"model": Gated} | changes))


def checkpoint(task, seed=0, without=()):
    """A model with weights and buffers drawn at random."""
    random = torch.Generator().manual_seed(seed)
    state = {
        name: tensor + torch.rand(tensor.shape, generator=random).to(tensor.dtype)
        for name, tensor in task.new_model(seed).state_dict().items()
    }
    forgotten = ForgetSet.of(task, without) if without else None
    return Model(task, state, forgotten, {"index": seed})


def bits(features):
    """The bits of every array of every checkpoint."""
    return {
        (number, name): store.numpy(name).tobytes()
        for number, store in enumerate(features.stores)
        for name in store.spec.arrays
    }


def folder_of(features):
    """Where the checkpoints' stores lie."""
    return features.stores[0].path.removesuffix("/checkpoint-0")


def close(found, expected, tolerance=1e-5):
    """Within a share of the largest number expected."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
