"""From a task to predictions, compared with exact answers where there are some."""

import numpy as np
import pytest

from attribution import (
    ForgetSet,
    LinearDatamodel,
    Oracle,
    Recipe,
    Subsets,
    draw_subsets,
    fit_datamodels,
    train_models,
)
from tests.references import leave_set_out_ridge
from tests.tasks import line, ridge_task

PENALTY = 2.0


def bank(task, folder, design, models, without=None, **options):
    subsets = draw_subsets(task, models=models, design=design, seed=2, without=without)
    return train_models(task, subsets, folder / f"{design}-{models}", workers=0, **options)


def scattered(task, folder, models, **options):
    """Models that each miss about a seventh of the rows."""
    random = np.random.default_rng(4)
    masks = random.random((models, len(task.train_ids))) > 1 / 7
    subsets = Subsets(masks, "scattered", seed=2, judges=np.ones(models, dtype=bool))
    return train_models(task, subsets, folder / "scattered", workers=0, **options)


def exact_change(task, forget, penalty):
    """Change of all targets' predictions by retraining in closed form, [target]."""
    inputs, labels = (tensor.double().numpy() for tensor in task.rows("train", range(forget.total)))
    queries = task.targets()[0].double().numpy()
    return leave_set_out_ridge(inputs, labels, queries, forget.rows, penalty)


def influential(task, count):
    """The rows whose labels are largest: removing them lowers the line."""
    _, labels = task.rows("train", range(len(task.train_ids)))
    return ForgetSet.at(task, labels.argsort()[-count:].numpy())


def assert_close_changes(found, expected, correlation, slope):
    assert np.corrcoef(found, expected)[0, 1] > correlation
    assert found @ expected / (expected @ expected) == pytest.approx(1, abs=slope)


def test_an_oracle_of_exact_training_gives_the_exact_change(tmp_path):
    task = ridge_task(penalty=PENALTY)
    forget = influential(task, 4)
    full = bank(task, tmp_path, "full", 2, keep="weights")
    oracle = Oracle(full, bank(task, tmp_path, "full", 3, forget))
    found = oracle.predict(full.model(0), forget)
    expected = exact_change(task, forget, PENALTY)
    np.testing.assert_allclose((found.mean - found.before)[:, 0], expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose((found.std, found.noise), 0, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def ridge_road(tmp_path_factory):
    """A task with its own exact training, its full models and its datamodels."""
    task, folder = ridge_task(penalty=PENALTY), tmp_path_factory.mktemp("ridge")
    full = bank(task, folder, "full", 2, keep="weights")
    subsets = scattered(task, folder, 400, models_at_once=100)
    return task, full, fit_datamodels(subsets, anchor=full, to=folder / "datamodel")


@pytest.mark.parametrize("rows", [[5], [3, 11], [0, 8, 17, 29]])
def test_datamodels_predict_exact_retraining_of_few_rows(ridge_road, rows):
    task, full, datamodel = ridge_road
    forget = ForgetSet.at(task, rows)
    found = datamodel.predict(full.model(1), forget)
    # What a linear model of the masks cannot follow, and the noise of 400 models, remain.
    expected = exact_change(task, forget, PENALTY)
    assert_close_changes((found.mean - found.before)[:, 0], expected, 0.9, 0.4)


def test_a_recipe_on_a_regression_goes_the_whole_road(tmp_path):
    # Full batches of a convex problem end at least squares, whose answer is known.
    recipe = Recipe(epochs=300, batch_size=64, peak_rate=0.3, momentum=0.9, weight_decay=0)
    task = line(recipe=recipe)
    full = bank(task, tmp_path, "full", 3, keep="weights")
    subsets = scattered(task, tmp_path, 150)
    fit_datamodels(subsets, anchor=full, to=tmp_path / "datamodel")
    datamodel = LinearDatamodel.open(tmp_path / "datamodel")
    forget = influential(task, 4)
    found = datamodel.predict(full.model(0), forget)
    expected = exact_change(task, forget, 0)
    assert_close_changes((found.mean - found.before)[:, 0], expected, 0.9, 0.4)
    oracle = Oracle(full, bank(task, tmp_path, "full", 2, forget)).change(forget)
    np.testing.assert_allclose(oracle.mean[:, 0], expected, rtol=0, atol=1e-3)
