import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from attribution import ForgetSet, HeldOutReference, Task, UntrainedTeacher
from tests.tasks import RECIPE, blobs, line, write_ensemble

TRAIN, TARGETS = 37, 48
ROWS = [3, 20, 21]


@pytest.fixture(scope="module")
def task():
    return blobs()


@pytest.fixture(scope="module")
def full(task, tmp_path_factory):
    return written(tmp_path_factory.mktemp("full") / "full", task)


def written(path, task):
    outputs = np.random.default_rng(5).normal(size=(4, len(task.target_ids), 2))
    masks = np.ones((4, len(task.train_ids)), dtype=bool)
    return write_ensemble(path, task, masks, outputs.astype(np.float32))


@pytest.mark.parametrize("kind", [HeldOutReference, UntrainedTeacher])
def test_only_forget_rows_change(kind, task, full):
    forget = ForgetSet.at(task, ROWS)
    change = kind(full).change(forget)
    moved = np.flatnonzero(change.mean.any(1))
    np.testing.assert_array_equal(moved, ROWS)
    np.testing.assert_array_equal(np.flatnonzero(change.std.any(1)), ROWS)
    some = np.array([40, 20, 5])
    for name in ("mean", "std", "noise"):
        part = getattr(kind(full).change(forget, targets=some), name)
        np.testing.assert_allclose(part, getattr(change, name)[some], rtol=1e-6)


@pytest.mark.parametrize("kind", [HeldOutReference, UntrainedTeacher])
def test_rows_that_are_gone_already_stay_as_they_are(kind, task, full):
    forget = ForgetSet.at(task, ROWS)
    change = kind(full).change(forget, ForgetSet.at(task, [20]))
    np.testing.assert_array_equal(np.flatnonzero(change.mean.any(1)), [3, 21])
    assert not kind(full).change(forget, forget).mean.any()


def test_the_reference_is_the_mean_of_the_test_rows_of_the_class(task, full):
    change = HeldOutReference(full).change(ForgetSet.at(task, ROWS))
    _, labels = task.targets()
    for row in ROWS:
        alike = [i for i in range(TRAIN, TARGETS) if labels[i] == labels[row]]
        wanted = np.mean([full.outputs[m, i] for m in range(4) for i in alike], axis=0)
        after = full.outputs[:, row].mean(0) + change.mean[row]
        np.testing.assert_allclose(after, wanted, atol=1e-6)


def test_untrained_models_are_told_by_seed_and_number(task, full):
    forget = ForgetSet.at(task, ROWS)
    one = UntrainedTeacher(full).change(forget).mean
    np.testing.assert_array_equal(one, UntrainedTeacher(full).change(forget).mean)
    assert not np.array_equal(one, UntrainedTeacher(full, seed=1).change(forget).mean)
    many = UntrainedTeacher(full, models=300).change(forget)
    assert np.abs(many.std[ROWS]).max() < UntrainedTeacher(full).change(forget).std[ROWS].max()


def test_one_untrained_model_is_refused(full):
    with pytest.raises(ValueError, match="an untrained teacher needs 2 models or more, got 1"):
        UntrainedTeacher(full, models=1)


def test_another_task_is_refused(full):
    with pytest.raises(ValueError, match="rows"):
        HeldOutReference(full).check_task(blobs(rows=36))


def test_a_task_without_classes_is_refused(tmp_path):
    task = line()
    outputs = np.zeros((2, len(task.target_ids), 1), np.float32)
    masks = np.ones((2, len(task.train_ids)), dtype=bool)
    full = write_ensemble(tmp_path / "full", task, masks, outputs)
    with pytest.raises(ValueError, match="has no classes that test rows could stand for"):
        HeldOutReference(full).change(ForgetSet.at(task, [3]))


def test_a_class_without_a_test_row_is_refused(tmp_path):
    rows = TensorDataset(torch.randn(6, 3), torch.arange(6) % 3)
    tests = TensorDataset(torch.randn(2, 3), torch.tensor([0, 1]))
    task = Task("three", rows, tests, lambda: nn.Linear(3, 3), RECIPE)
    outputs = np.zeros((2, 8, 3), np.float32)
    full = write_ensemble(tmp_path / "full", task, np.ones((2, 6), dtype=bool), outputs)
    with pytest.raises(ValueError, match="no test row of task 'three' has the label 2"):
        HeldOutReference(full).change(ForgetSet.at(task, [2]))
