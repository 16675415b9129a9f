import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from attribution import ForgetSet, calibration_bank
from attribution.calibration_bank import (
    Case,
    cases_of,
    joined,
    row_kinds,
    variance_factors,
)
from attribution.outputs import target_margins
from tests.tasks import binary, blobs, line, small_mlp, write_ensemble

TRAIN, ALL = 37, 48


@pytest.fixture(scope="module")
def task():
    return blobs()


@pytest.fixture(scope="module")
def bank(task, tmp_path_factory):
    to = tmp_path_factory.mktemp("bank") / "bank"
    return calibration_bank(task, to, forget_sets=7, seed=3, workers=0)


def case_of(task, rows=(3, 20), seed=0):
    random = np.random.default_rng(seed)
    width = 2 if task.name == "blobs" else 1
    before, change = random.normal(size=(2, ALL, width)).astype(np.float32)
    return Case(task, ForgetSet.at(task, rows), before, change)


class TestBank:
    def test_each_model_misses_a_forget_set_of_its_own(self, bank):
        assert bank.outputs.shape == (7, ALL, 2)
        sizes = (~bank.masks).sum(1)
        # From 1 to 10 % of the rows; a set of less than one row is one row.
        assert sizes.min() >= 1
        assert sizes.max() <= 4
        assert len({mask.tobytes() for mask in bank.masks}) == 7
        for outputs in (bank.outputs[i] for i in range(6)):
            assert not np.array_equal(outputs, bank.outputs[6])

    def test_random_and_coherent_sets_take_turns(self, tmp_path):
        task = blobs(rows=300)
        bank = calibration_bank(task, tmp_path / "bank", forget_sets=8, workers=0)
        labels = task.rows("train", np.arange(300))[1].numpy()
        sets = [np.flatnonzero(~mask) for mask in bank.masks]
        for rows in sets[1::2]:
            assert len(set(labels[rows])) == 1
        assert any(len(set(labels[rows])) == 2 for rows in sets[::2])
        assert all(3 <= len(rows) <= 30 for rows in sets)

    def test_the_sets_and_the_models_depend_on_the_seed_alone(self, task, bank, tmp_path):
        again = calibration_bank(task, tmp_path / "again", forget_sets=7, seed=3, workers=0)
        np.testing.assert_array_equal(again.masks, bank.masks)
        np.testing.assert_array_equal(again.outputs, bank.outputs)
        other = calibration_bank(task, tmp_path / "other", forget_sets=7, seed=4, workers=0)
        assert not np.array_equal(other.masks, bank.masks)
        more = calibration_bank(task, tmp_path / "more", forget_sets=9, seed=3, workers=0)
        np.testing.assert_array_equal(more.masks[:7], bank.masks)

    def test_a_small_class_gives_all_it_can_spare(self, tmp_path):
        inputs = torch.randn(200, 3)
        labels = torch.arange(200) // 2 % 2  # every second pair of rows
        labels = torch.where(torch.arange(200) < 197, 0, labels.clamp_min(1))
        data = TensorDataset(inputs, labels)
        task = blobs(rows=200)
        task = type(task)("small class", data, data, small_mlp, task.recipe, test_ids=_ids(200))
        seeds = range(40)
        bank = [
            calibration_bank(task, tmp_path / str(seed), forget_sets=4, seed=seed, workers=0)
            for seed in seeds[:1]
        ]
        assert all((~one.masks).any(1).all() for one in bank)

    def test_too_few_sets_are_refused(self, task, tmp_path):
        with pytest.raises(ValueError, match="a calibration needs 4 forget sets or more, got 3"):
            calibration_bank(task, tmp_path / "bank", forget_sets=3)
        assert not (tmp_path / "bank").exists()

    def test_a_task_that_cannot_be_trained_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="has neither a recipe nor a train function"):
            calibration_bank(blobs(recipe=None), tmp_path / "bank", workers=0)


def _ids(count):
    return [f"other-{i}" for i in range(count)]
