import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from attribution import ForgetSet, Task, draw_subsets
from attribution.subsets import DESIGNS, SHARE_LEFT_OUT
from tests.tasks import RECIPE, blob_data, blobs, small_mlp

ROWS = 401


@pytest.fixture(scope="module")
def task():
    return blobs(rows=ROWS)


@pytest.mark.parametrize("design", DESIGNS)
def test_designs_are_seeded(task, design):
    first, again = (draw_subsets(task, models=8, design=design, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.masks, again.masks)
    assert (first.design, first.seed, first.without, len(first)) == (design, 3, (), 8)
    if design != "full":
        other = draw_subsets(task, models=8, design=design, seed=4)
        assert not np.array_equal(first.masks, other.masks)


@pytest.mark.parametrize("design", DESIGNS)
def test_models_are_ordered_by_size(task, design):
    sizes = draw_subsets(task, models=13, design=design).masks.sum(1)
    assert (np.diff(sizes) >= 0).all()


def test_full_sees_everything(task):
    assert draw_subsets(task, models=3, design="full").masks.all()


def test_half_sees_exactly_half(task):
    masks = draw_subsets(task, models=300, design="half").masks
    np.testing.assert_array_equal(masks.sum(1), ROWS // 2)
    # Each row is in about half of the models: six standard deviations around it.
    assert np.abs(masks.mean(0) - 200 / ROWS).max() < 6 * 0.5 / 300**0.5


def test_bernoulli_takes_each_row_with_probability_one_half(task):
    masks = draw_subsets(task, models=300, design="bernoulli").masks
    assert np.abs(masks.mean(0) - 0.5).max() < 6 * 0.5 / 300**0.5
    assert masks.sum(1).std() == pytest.approx(ROWS**0.5 / 2, rel=0.2)


def left_out_neighbours(task, masks):
    """Share of the rows left out whose nearest row of the same class is left out too."""
    inputs, labels = task.rows("train", range(ROWS))
    distances = torch.cdist(inputs, inputs)
    distances[labels[:, None] != labels] = torch.inf
    nearest = distances.fill_diagonal_(torch.inf).argmin(1).numpy()
    return np.mean([(~mask[nearest])[~mask].mean() for mask in masks])


def test_clusters_leave_out_whole_neighbourhoods(task):
    masks = draw_subsets(task, models=40, design="clusters").masks
    left_out = 1 - masks.mean(1)
    assert left_out.min() >= SHARE_LEFT_OUT
    assert left_out.max() < SHARE_LEFT_OUT + 100 / ROWS
    assert left_out_neighbours(task, masks) > 0.6
    scattered = np.random.default_rng(0).random(masks.shape) > left_out.mean()
    assert left_out_neighbours(task, scattered) < 0.4


def test_mixed_is_half_halves_a_quarter_clusters_and_a_quarter_scattered(task):
    subsets = draw_subsets(task, models=23, design="mixed")
    halves = subsets.masks.sum(1) == ROWS // 2
    scattered = subsets.judges
    assert (halves.sum(), scattered.sum()) == (12, 5)
    assert not (halves & scattered).any()
    left_out = 1 - subsets.masks[scattered].mean(1)
    assert np.abs(left_out - SHARE_LEFT_OUT).max() < 6 * (0.12 * 0.88 / ROWS) ** 0.5
    assert left_out_neighbours(task, subsets.masks[scattered]) < 0.4


@pytest.mark.parametrize("design", ["full", "half", "bernoulli", "clusters"])
def test_every_model_of_other_designs_may_judge(task, design):
    assert draw_subsets(task, models=5, design=design).judges.all()


def test_few_mixed_models_all_judge(task):
    assert draw_subsets(task, models=3, design="mixed").judges.all()


@pytest.mark.parametrize("design", DESIGNS)
def test_no_model_sees_the_rows_left_out(task, design):
    forget = ForgetSet.at(task, [7, 400, 31])
    subsets = draw_subsets(task, models=6, design=design, without=forget)
    assert subsets.without == ("train-7", "train-31", "train-400")
    assert not subsets.masks[:, forget.rows].any()
    assert subsets.masks[:, forget.retained].any(0).any()


def test_without_changes_nothing_else(task):
    forget = ForgetSet.at(task, [7, 400, 31])
    masks = draw_subsets(task, models=6, design="full", without=forget).masks
    np.testing.assert_array_equal(masks, np.tile(~forget.mask, (6, 1)))


def test_unusable_designs_are_refused(task):
    with pytest.raises(ValueError, match="unknown design 'third': choose one of full, half, "):
        draw_subsets(task, models=3, design="third")
    with pytest.raises(ValueError, match="an ensemble needs at least 1 model, got 0"):
        draw_subsets(task, models=0, design="half")


def test_a_forget_set_of_other_data_is_refused(task):
    forget = ForgetSet.at(blobs(rows=9), [3])
    with pytest.raises(ValueError, match="drawn from 9 rows, task 'blobs' has 401"):
        draw_subsets(task, models=3, design="half", without=forget)


def test_a_model_without_rows_is_refused():
    with pytest.raises(ValueError, match="design 'half' leaves a model without rows"):
        draw_subsets(blobs(rows=1), models=2, design="half")


def test_clusters_of_inputs_with_several_axes_can_be_drawn():
    inputs, labels = blob_data(60, 1).tensors
    images = TensorDataset(inputs[:, None, :], labels)
    task = Task("images", images, images, model=small_mlp, recipe=RECIPE)
    assert not draw_subsets(task, models=2, design="clusters").masks.all()


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="a seed must not be negative, got -1"):
        draw_subsets(blobs(), models=2, design="half", seed=-1)
