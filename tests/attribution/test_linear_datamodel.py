"""Linear datamodels made of TRAK scores; fitted ones are in test_datamodels."""

from itertools import combinations

import numpy as np
import pytest

from attribution import ForgetSet, LinearDatamodel, Model
from attribution.trak import fit_trak
from tests.attribution.trak.cases import checkpoints, dense_scores, make_features, scores_by_model
from tests.tasks import blobs, line, ridge_task

DAMPING = 0.3


@pytest.fixture(scope="module")
def task():
    return blobs()


@pytest.fixture(scope="module")
def scores(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear")
    return fit_trak(make_features(task, folder / "features"), folder / "trak", damping=DAMPING)


@pytest.fixture(scope="module")
def datamodel(scores):
    return LinearDatamodel.from_scores(scores)


@pytest.fixture(scope="module")
def each(task):
    """Effects by checkpoint, [checkpoint, train, target, output]."""
    return np.stack([found for found, _ in scores_by_model(task, checkpoints(task, 3), DAMPING)])


@pytest.mark.parametrize("targets", [None, np.array([4, 47, 2])])
def test_removing_rows_subtracts_their_scores_and_leaves_the_others_more_weight(
    task, datamodel, each, targets
):
    rows, scores = [2, 4, 30], each.mean(0)
    found = datamodel.change(ForgetSet.at(task, rows), targets=targets)
    expected = 3 * scores.mean(0) - scores[rows].sum(0)
    expected = expected if targets is None else expected[targets]
    np.testing.assert_allclose(found.mean, expected, rtol=0, atol=1e-5)
    assert found.mean.dtype == found.std.dtype == found.noise.dtype == np.float32
    assert not found.absolute


def test_where_a_sum_is_minimised_the_others_keep_their_weight(tmp_path):
    task = ridge_task(objective="sum")
    scores = fit_trak(make_features(task, tmp_path / "features"), tmp_path / "trak", damping=2.0)
    found = LinearDatamodel.from_scores(scores).change(ForgetSet.at(task, [2, 4, 30])).mean
    effects, _ = dense_scores(task, checkpoints(task, 3), 2.0)
    np.testing.assert_allclose(found, -effects[[2, 4, 30]].sum(0), rtol=0, atol=1e-5)


def test_what_is_gone_already_drops_out(task, datamodel):
    both, first = ForgetSet.at(task, [2, 4, 30]), ForgetSet.at(task, [4])
    rest = datamodel.change(ForgetSet.at(task, [2, 30]))
    np.testing.assert_array_equal(datamodel.change(both, first).mean, rest.mean)
    nothing = datamodel.change(first, first)
    assert not nothing.mean.any()
    assert not nothing.std.any()


def test_effects_of_a_target_are_minus_the_changes_of_single_rows(task, datamodel):
    for target in (5, 40):
        changes = [datamodel.change(ForgetSet.at(task, [i])).mean[target] for i in range(37)]
        np.testing.assert_allclose(datamodel.effects(target), -np.stack(changes), atol=1e-6)


def test_the_spread_of_a_single_row_is_that_of_its_scores(task, datamodel, each):
    found = datamodel.change(ForgetSet.at(task, [7])).std
    # Exact for the own row; for others it is that of a random row.
    np.testing.assert_allclose(found[7], each[:, 7, 7].std(0, ddof=1), rtol=1e-3, atol=1e-6)
    random = np.sqrt(each[:, :, 40].var(0, ddof=1).mean(0))
    np.testing.assert_allclose(found[40], random, rtol=1e-3)


def test_the_spread_is_that_of_random_forget_sets(task, datamodel, each):
    pairs = [list(pair) for pair in combinations(range(37), 2)]
    truth = np.mean([each[:, pair][:, :, 40:].sum(1).var(0, ddof=1) for pair in pairs], axis=0)
    found = datamodel.change(ForgetSet.at(task, [3, 9]), targets=np.arange(40, 48)).std
    np.testing.assert_allclose(found, np.sqrt(truth), rtol=1e-3)


def test_noise_is_the_spread_of_the_checkpoints(task, datamodel):
    outputs = np.stack([model.outputs(None) for model in checkpoints(task, 3)])
    found = datamodel.change(ForgetSet.at(task, [3]), targets=np.array([40, 1])).noise
    np.testing.assert_allclose(found, outputs.std(0, ddof=1)[[40, 1]], rtol=1e-5)


def test_one_checkpoint_tells_no_spread(task, tmp_path):
    features = make_features(task, tmp_path / "features", 1)
    one = LinearDatamodel.from_scores(fit_trak(features, tmp_path / "trak"))
    found = one.change(ForgetSet.at(task, [3]))
    assert np.isfinite(found.mean).all()
    assert np.isnan(found.std).all()
    assert np.isnan(found.noise).all()


def test_it_predicts_like_every_counterfactual(task, datamodel):
    model = Model(task, task.new_model(9).state_dict())
    found = datamodel.predict(model, ForgetSet.at(task, [1, 2]), ["test-3", "train-1"])
    change = datamodel.change(ForgetSet.at(task, [1, 2]), targets=np.array([40, 1]))
    assert found.targets == ("test-3", "train-1")
    np.testing.assert_array_equal(found.mean, model.outputs([40, 1]) + change.mean)


def test_other_data_is_refused(task, datamodel):
    with pytest.raises(ValueError, match="drawn from 36 rows, the datamodel has 37"):
        datamodel.change(ForgetSet.at(blobs(rows=36), [1]))
    with pytest.raises(ValueError, match="was made from other rows"):
        datamodel.check_task(line(rows=36))


def test_only_fitted_datamodels_are_opened_as_such(scores):
    with pytest.raises(ValueError, match="expected a store of kind 'datamodel'"):
        LinearDatamodel.open(scores.store.path)
