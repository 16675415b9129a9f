import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from attribution import Task, calibration_bank
from tests.tasks import RECIPE, blob_data, blobs

ALL = 48


@pytest.fixture(scope="module")
def task():
    return blobs()


def forgotten(bank):
    return [np.flatnonzero(~mask) for mask in bank.masks]


def bank_of(task, folder, sets, seed=0, models_each=1):
    return calibration_bank(
        task, folder, forget_sets=sets, models_each=models_each, seed=seed, workers=0
    )


class TestBank:
    def test_each_model_misses_its_forget_set(self, task, tmp_path):
        bank = bank_of(task, tmp_path / "bank", 7, seed=3, models_each=3)
        assert bank.outputs.shape == (21, ALL, 2)
        # A tenth of 37 rows is fewer than a quarter of them, the least there may be.
        assert {len(rows) for rows in forgotten(bank)} == {9}
        np.testing.assert_array_equal(bank.masks[::3], bank.masks[2::3])
        assert len(np.unique(bank.masks, axis=0)) == 7
        assert len(np.unique(bank.outputs.reshape(21, -1), axis=0)) == 21
        again = bank_of(task, tmp_path / "again", 7, seed=3, models_each=3)
        np.testing.assert_array_equal(again.masks, bank.masks)
        np.testing.assert_array_equal(again.outputs, bank.outputs)

    def test_random_and_coherent_sets_take_turns(self, tmp_path):
        task = blobs(rows=300)
        bank = bank_of(task, tmp_path / "bank", 8)
        labels = task.rows("train", np.arange(300))[1].numpy()
        sets = forgotten(bank)
        assert all(3 <= len(rows) <= 30 for rows in sets)
        assert all(len(set(labels[rows])) == 1 for rows in sets[1::2])
        assert any(len(set(labels[rows])) == 2 for rows in sets[::2])

    def test_the_sets_depend_on_the_seed_and_their_number_alone(self, task, tmp_path):
        masks = {
            (sets, seed): bank_of(task, tmp_path / f"{sets}-{seed}", sets, seed).masks
            for sets, seed in ((4, 3), (6, 3), (4, 5))
        }
        np.testing.assert_array_equal(masks[6, 3][:4], masks[4, 3])
        assert not np.array_equal(masks[4, 5], masks[4, 3])

    def test_a_class_that_is_too_small_gives_all_it_can_spare(self, tmp_path):
        data = TensorDataset(torch.randn(200, 3), torch.arange(200) // 2)
        task = Task("pairs", data, blob_data(3, 2), lambda: nn.Linear(3, 100), RECIPE)
        bank = bank_of(task, tmp_path / "bank", 10)
        sets = forgotten(bank)
        assert {len(rows) for rows in sets[1::2]} == {2}
        assert max(len(rows) for rows in sets[::2]) > 2
        assert all(rows[0] // 2 == rows[1] // 2 for rows in sets[1::2])

    def test_too_few_sets_are_refused(self, task, tmp_path):
        with pytest.raises(ValueError, match="a calibration needs 4 forget sets or more, got 3"):
            bank_of(task, tmp_path / "bank", 3)
        assert not (tmp_path / "bank").exists()

    def test_a_set_without_a_model_is_refused(self, task, tmp_path):
        with pytest.raises(ValueError, match="needs 1 model of each set or more, got 0"):
            bank_of(task, tmp_path / "bank", 4, models_each=0)

    def test_a_task_that_cannot_be_trained_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="has neither a recipe nor a train function"):
            calibration_bank(blobs(recipe=None), tmp_path / "bank", workers=0)
