import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from attribution import ForgetSet, Recipe, Task
from attribution.retained import retained_task
from attribution.training import train_one
from tests.tasks import CPU, RECIPE, blob_data, blobs, ridge_task, small_mlp

GONE = (0, 4, 5, 36)
LEFT = np.setdiff1d(np.arange(37), GONE)


def shifted(inputs, seed, epoch, rows):
    """An augmentation that depends on positions in the data; padding is -1."""
    del seed, epoch
    return inputs + 0.01 * rows.clamp_min(0)[..., None].to(inputs)


def shifted_left(inputs, seed, epoch, rows):
    del seed, epoch
    places = torch.from_numpy(LEFT)[rows.clamp_min(0)]
    return inputs + 0.01 * places[..., None].to(inputs)


def without(task, gone=GONE):
    return retained_task(task, ForgetSet.at(task, gone))


def small(recipe=RECIPE):
    """The same task, made by hand of the rows that are left."""
    data = TensorDataset(*(tensor[LEFT] for tensor in blob_data(37, 1).tensors))
    ids = [f"train-{i}" for i in LEFT]
    return Task("blobs", data, blob_data(11, 2), small_mlp, recipe, train_ids=ids)


@pytest.mark.parametrize("kind", [TensorDataset, Subset])
def test_it_is_the_task_made_by_hand_of_the_rows_that_are_left(kind):
    task = blobs()
    if kind is Subset:
        task = replace(task, train_data=Subset(task.train_data, range(37)))
    left, expected = without(task), small()
    assert type(left.train_data) is kind
    assert left.settings() == expected.settings()
    assert left.target_ids == expected.target_ids
    for mine, theirs in zip(left.targets(), expected.targets(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_rows_can_go_in_two_steps():
    once = without(blobs(), (3, 10, 20))
    twice = without(without(blobs(), (10,)), (3, 19))
    assert twice.digests == once.digests


def test_a_users_own_training_sees_positions_of_its_data():
    task = ridge_task(rows=37)
    rows = np.array([1, 2, 8])
    expected = task.train(LEFT[rows], 0, CPU)
    sent = pickle.loads(pickle.dumps(without(blobs(recipe=None, train=recorded))))
    found = sent.train(rows, 0, CPU)
    assert found["rows"].tolist() == LEFT[rows].tolist()
    torch.testing.assert_close(without(task).train(rows, 0, CPU), expected)
    assert without(task).sources() == task.sources()
    assert without(task).settings()["recipe"] == task.settings()["recipe"]


def recorded(indices, seed, device):
    del seed, device
    return {"rows": torch.from_numpy(indices)}


def test_an_augmentation_sees_positions_of_its_data():
    recipe = Recipe(epochs=2, batch_size=8, peak_rate=0.1, augment=shifted)
    left, expected = without(blobs(recipe=recipe)), small(replace(recipe, augment=shifted_left))
    rows = np.arange(30)
    states = [train_one(task, rows, 0, 0, CPU) for task in (left, expected)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    padded = left.recipe.augment(torch.zeros(2, 3), 0, 0, torch.tensor([-1, 1]))
    assert padded[:, 0].tolist() == [0, pytest.approx(0.01 * LEFT[1])]


def test_a_forget_set_of_other_data_is_refused():
    other = ForgetSet.at(blobs(rows=20), (1,))
    with pytest.raises(ValueError, match="drawn from 20 rows, task 'blobs' has 37"):
        retained_task(blobs(), other)
