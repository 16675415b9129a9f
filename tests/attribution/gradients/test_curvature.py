import numpy as np
import pytest
import torch

from attribution.gradients import Features, curvature, featurize
from attribution.gradients.curvature import stored_curvature
from stores import Store
from tests.attribution.gradients.stored import SMALL, TRAIN, checkpoint, gated_task
from tests.tasks import line

TASKS = {"cross-entropy": gated_task, "squared error": line}


@pytest.fixture(params=TASKS.values(), ids=TASKS.keys())
def features(request, tmp_path):
    task = request.param()
    made = [checkpoint(task, seed) for seed in (0, 1)]
    return featurize(task, made, tmp_path / "f", projection=SMALL, block=10, targets="train")


def dense(features, number, temperature=1.0):
    """Sum over the training rows, one by one, in float64."""
    rows, width = np.arange(TRAIN), features.width
    found = np.zeros((width, width))
    outputs = torch.from_numpy(features.outputs(number, rows)).double()
    hessians = features.task.loss.hessian(outputs / temperature).numpy() / temperature
    for j, hessian in zip(features.gather(number, rows).astype(float), hessians, strict=True):
        found += j.T @ hessian @ j
    return found


def test_curvature_is_the_sum_over_the_training_rows(features):
    for number in (1, 0):
        found, expected = features.curvature(number), dense(features, number)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_array_equal(found, found.T)


def test_outputs_may_be_divided_by_a_temperature(features):
    found, expected = features.curvature(0, 2.5), dense(features, 0, 2.5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(
        features.curvature(0), dense(features, 0), rtol=0, atol=1e-5 * np.abs(expected).max() * 2.5
    )


def test_curvature_is_kept(features, monkeypatch):
    first = features.curvature(0)
    monkeypatch.setattr(curvature, "train_curvature", None)
    folder = features.stores[0].path.removesuffix("/checkpoint-0")
    again = Features.open(folder, features.task).curvature(0)
    np.testing.assert_array_equal(again, first)


def test_no_test_row_is_computed_for_it(features):
    features.curvature(0)
    assert features.stores[0].pending() == [4]


def test_pieces_of_any_size_agree(features, monkeypatch):
    expected = features.curvature(0)
    monkeypatch.setattr(curvature, "BLOCK_BYTES", 3 * features.width * 4)
    found = curvature.train_curvature(features.task, features.stores[0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_the_bits_do_not_depend_on_threads(features):
    expected = features.curvature(0)
    torch.set_num_threads(2)
    try:
        found = curvature.train_curvature(features.task, features.stores[0])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    np.testing.assert_array_equal(found, expected)


def test_curvature_of_other_features_is_refused(features, tmp_path):
    features.curvature(0)
    task = features.task
    other = featurize(task, [checkpoint(task, 7)], tmp_path / "g", projection=SMALL, block=10)
    (tmp_path / "f/curvature-0").rename(tmp_path / "g/curvature-0")
    with pytest.raises(ValueError, match=r"features\.weights: stored"):
        other.curvature(0)


def test_a_folder_that_cannot_be_written_is_told(features, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(Store, "write_block", refuse)
    with pytest.raises(ValueError, match=r"cannot write the curvature to .*curvature-0: read-only"):
        stored_curvature(features.task, features.stores[0])
