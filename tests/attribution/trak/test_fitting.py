import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from attribution import ForgetSet, LinearDatamodel, Model, SquaredError, Task
from attribution.gradients import Features, featurize
from attribution.strongest import strongest
from attribution.trak import TrakScores, fit_trak, fitting, margin_effects
from attribution.trak.curvature import natural_damping, warn_if_ill_conditioned
from attribution.trak.pulls import output_pulls
from stores import Store
from tests.attribution.trak.cases import checkpoints, dense_scores, make_features
from tests.tasks import RECIPE, blobs, line, line_data, ridge_task


@pytest.fixture(scope="module")
def task():
    return blobs()


@pytest.fixture(scope="module")
def features(task, tmp_path_factory):
    return make_features(task, tmp_path_factory.mktemp("features") / "features")


@pytest.fixture(scope="module")
def scores(features, tmp_path_factory):
    return fit_trak(features, tmp_path_factory.mktemp("scores") / "trak", damping=0.3, top=4)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 5 targets and of 4 rows, which divide neither the 48 nor the 37."""
    monkeypatch.setattr(fitting, "score_block", lambda *_: 5)
    monkeypatch.setattr(fitting, "ROWS_BYTES", 4 * 2 * 32 * 4)


def whole(scores, name="effects"):
    return scores.store.numpy(name)


def all_margins(scores):
    return np.stack([scores.margins(t) for t in range(scores.store.spec.length)], 1)


class TestScores:
    def test_they_are_those_of_the_dense_formula(self, task, scores):
        effects, margins = dense_scores(task, checkpoints(task, 3), 0.3)
        np.testing.assert_allclose(whole(scores), effects, rtol=0, atol=1e-5)
        np.testing.assert_allclose(all_margins(scores), margins, rtol=0, atol=1e-5)

    def test_double_precision_is_exact(self, tmp_path):
        task = ridge_task()
        features = make_features(task, tmp_path / "features", dtype="float64")
        found = fit_trak(features, tmp_path / "trak", damping=2.0, dtype="float64")
        effects, margins = dense_scores(task, checkpoints(task, 3), 2.0)
        np.testing.assert_allclose(whole(found), effects, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(all_margins(found), margins, rtol=1e-10, atol=1e-12)

    def test_without_weighting_the_gram_matrix_is_the_margins(self, task, features, tmp_path):
        found = fit_trak(features, tmp_path / "trak", damping=0.1, weighting=False)
        effects, margins = dense_scores(task, checkpoints(task, 3), 0.1, weighting=False)
        np.testing.assert_allclose(whole(found), effects, rtol=0, atol=2e-5)
        np.testing.assert_allclose(all_margins(found), margins, rtol=0, atol=2e-5)

    def test_damping_follows_from_the_recipe(self, task, features, tmp_path):
        found = fit_trak(features, tmp_path / "trak")
        assert found.damping == natural_damping(task) == 37 * 5e-4
        assert found.checkpoints == 3

    @pytest.mark.parametrize("rows", [[3], [5, 9, 20]])
    def test_removing_rows_changes_outputs_as_retraining_does(self, tmp_path, rows):
        task = ridge_task(rows=301)
        full = Model(task, task.train(np.arange(301), 0, "cpu"))
        features = featurize(task, [full], tmp_path / "features")
        datamodel = LinearDatamodel.from_scores(fit_trak(features, tmp_path / "trak", damping=2.0))
        forget = ForgetSet.at(task, rows)
        without = Model(task, task.train(forget.retained, 0, "cpu"))
        truth = (without.outputs(None) - full.outputs(None))[:, 0]
        told = datamodel.change(forget).mean[:, 0]
        assert np.corrcoef(truth, told)[0, 1] > 0.99
        assert 0.9 < truth @ told / (told @ told) < 1.1

    def test_one_checkpoint_pulls_by_its_own_gradients(self, task, features):
        rows = np.arange(37)
        outputs = torch.from_numpy(features.outputs(0, rows)).double()
        own = task.loss.gradient(outputs, task.targets(rows)[1])
        assert torch.allclose(output_pulls(features.first(1), 0, rows), own)
        assert not torch.allclose(output_pulls(features, 0, rows), own, atol=0.01)

    def test_several_numbers_a_row_are_averaged_with_the_rest(self, tmp_path):
        inputs = line_data(37, 1).tensors[0]
        data = TensorDataset(inputs, inputs[:, :2] + 1)
        task = Task("pairs", data, data, lambda: nn.Linear(4, 2), RECIPE, loss=SquaredError())
        found = fit_trak(make_features(task, tmp_path / "f", 2), tmp_path / "t")
        each = [
            fit_trak(make_features(task, tmp_path / f"f{c}", 1, first=c), tmp_path / f"t{c}")
            for c in range(2)
        ]
        mean = (whole(each[0]) + whole(each[1])) / 2
        np.testing.assert_allclose(whole(found), mean, rtol=0, atol=1e-5)


class TestReading:
    def test_one_target_reads_one_column(self, task, scores):
        for target in (0, 36, 47):
            np.testing.assert_array_equal(scores.effects(target), whole(scores)[:, target])

    def test_the_strongest_rows_stand_beside_the_scores(self, scores):
        for target in (2, 40):
            column = scores.margins(target)
            rows, values = scores.strongest(target)
            order = np.argsort(column, kind="stable")
            np.testing.assert_array_equal(rows[1], order[:4])
            assert set(rows[0]) == set(order[-4:])
            np.testing.assert_array_equal(values, column[rows])
            assert (np.diff(values[0]) <= 0).all()

    def test_other_blocks_may_be_lost(self, scores, features, tmp_path, small_blocks):
        fit_trak(features, tmp_path / "trak", damping=0.3, top=4)
        opened = TrakScores.open(tmp_path / "trak")
        for block in range(1, opened.store.spec.blocks):
            opened.store.discard(block)
        np.testing.assert_allclose(opened.margins(3), scores.margins(3), rtol=0, atol=1e-6)
        opened.strongest(3)
        with pytest.raises(ValueError, match="pending"):
            opened.margins(30)
        with pytest.raises(ValueError, match="not finished: run the command"):
            TrakScores.open(tmp_path / "trak")

    def test_one_target_straight_from_the_features(self, features, scores):
        for target in (7, 45):
            found = margin_effects(features, target, damping=0.3)
            np.testing.assert_allclose(found, scores.margins(target), rtol=0, atol=1e-5)


class TestBlocks:
    def test_they_do_not_change_the_scores(self, features, scores, tmp_path, small_blocks):
        found = fit_trak(features, tmp_path / "trak", damping=0.3, top=4)
        assert found.store.spec.blocks == 10
        assert Store.open(tmp_path / "trak" / "rows-2").spec.blocks > 5
        for name in found.store.spec.arrays:
            if name != "top_rows":
                np.testing.assert_allclose(whole(found, name), whole(scores, name), atol=1e-5)

    def test_an_interrupted_fit_ends_with_the_same_bits(self, features, tmp_path, small_blocks):
        first = fit_trak(features, tmp_path / "trak", damping=0.3)
        bits = {name: whole(first, name).tobytes() for name in first.store.spec.arrays}
        rows = Store.open(tmp_path / "trak" / "rows-1")
        for store, block in ((first.store, 0), (first.store, 7), (rows, 2)):
            store.discard(block)
        again = fit_trak(features, tmp_path / "trak", damping=0.3)
        assert {name: whole(again, name).tobytes() for name in bits} == bits

    def test_workers_end_with_the_same_bits(self, features, tmp_path, small_blocks):
        alone = fit_trak(features, tmp_path / "alone", damping=0.3)
        many = fit_trak(features, tmp_path / "many", damping=0.3, workers=2)
        for name in alone.store.spec.arrays:
            np.testing.assert_array_equal(whole(alone, name), whole(many, name))

    def test_a_finished_fit_needs_no_features(self, task, features, tmp_path, monkeypatch):
        fit_trak(features, tmp_path / "trak", damping=0.3)
        monkeypatch.setattr(Features, "gather", None)
        monkeypatch.setattr(Features, "curvature", None)
        assert fit_trak(features, tmp_path / "trak", damping=0.3).store.complete


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"dtype": "int8"}, "dtype must be 'float16', 'float32', 'float64', got 'int8'"),
            ({"damping": 0.0}, "damping must be above 0 and finite, got 0.0"),
            ({"damping": np.inf}, "damping must be above 0 and finite"),
            ({"top": 0}, "top must be 1 or more, got 0"),
            ({"weighting": False}, "without weighting lambda has no natural size"),
        ],
    )
    def test_unusable_settings(self, features, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            fit_trak(features, tmp_path / "trak", **settings)

    def test_a_task_that_tells_no_weight_decay(self, tmp_path):
        features = make_features(ridge_task(), tmp_path / "features", 1)
        with pytest.raises(ValueError, match="'ridge' tells no weight decay: give a damping"):
            fit_trak(features, tmp_path / "trak")

    def test_scores_made_with_another_damping(self, features, tmp_path):
        fit_trak(features, tmp_path / "trak", damping=0.3)
        with pytest.raises(ValueError, match="damping"):
            fit_trak(features, tmp_path / "trak", damping=0.4)

    def test_a_folder_without_scores(self, tmp_path):
        with pytest.raises(ValueError, match="expected a store at"):
            TrakScores.open(tmp_path)


class TestConditioning:
    def test_bad_conditioning_is_told(self, features, tmp_path):
        with pytest.warns(UserWarning, match=r"condition number .* at damping 1e-05.*float64"):
            fit_trak(features, tmp_path / "trak", damping=1e-5)

    def test_double_precision_bears_more(self, features, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit_trak(features, tmp_path / "trak", damping=1e-5, dtype="float64")

    def test_nothing_better_than_double_precision_is_proposed(self):
        with pytest.warns(UserWarning, match="give a larger damping$"):
            warn_if_ill_conditioned(1e14, 0.1, "float64", 0)

    def test_a_matrix_that_rounding_made_indefinite_is_refused(self, features, tmp_path):
        with pytest.raises(ValueError, match=r"raise the damping"):
            fit_trak(features, tmp_path / "trak", damping=1e-12)


def test_ties_are_settled_by_the_order_of_the_rows():
    rows, values = strongest(np.array([[1.0], [0.0], [1.0], [0.0]]), 2)
    assert rows.tolist() == [[[0, 2], [1, 3]]]
    assert values.tolist() == [[[1.0, 1.0], [0.0, 0.0]]]


def test_a_regression_task(tmp_path):
    task = line()
    found = fit_trak(make_features(task, tmp_path / "f", 2), tmp_path / "t")
    effects, margins = dense_scores(task, checkpoints(task, 2), 37 * 5e-4)
    np.testing.assert_allclose(whole(found), effects, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(all_margins(found), margins, rtol=1e-3, atol=1e-4)
