"""Runs whose group Newton takes mean weights along training."""

import shutil

import numpy as np
import pytest

from attribution import ForgetSet, TrakScores, precompute
from attribution.newton import damping_per_row
from attribution.purging.purge import purge
from attribution.run import PREDICTORS, Run, read_settings
from attribution.segments import segment_times
from attribution.trak import margin_effects
from stores import Store
from tests.small_runs import TASK, contents, copied, write_task

SIZES = {"full_models": 6, "subset_models": 24, "checkpoints": 2, "workers": 0}
SEGMENTED = SIZES | {"segments": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmented")
    return precompute(write_task(folder), folder / "run", **SEGMENTED)


@pytest.fixture(scope="module")
def few(run):
    return ForgetSet.at(run.task, np.array([3, 8, 13]))


def test_its_features_are_those_of_means_along_training(run):
    assert read_settings(run.path).segments == 2
    assert (len(run.features), run.features.trainings) == (4, 2)
    assert run.features.times == segment_times(run.task.recipe, 37, 2)
    for number, model in enumerate(run.full.along(2)):
        assert run.features.model(number).digest() == model.digest()


def test_all_predictors_are_there(run, few):
    assert set(run.predictors) == set(PREDICTORS)
    changes = [run.predictor(name).change(few).mean for name in run.predictors]
    assert all(np.isfinite(change).all() for change in changes)
    assert len({change.tobytes() for change in changes}) == len(PREDICTORS)


def test_the_calibration_takes_the_recipes_lambda(run):
    found = run.newton.calibration
    expected = 37 * damping_per_row(run.task, run.features.times)
    assert (found.damping, found.temperature) == (pytest.approx(expected), 1.0)
    assert not any("choice" in store.path for store in run.stores())


def test_trak_takes_the_ends(run, few):
    expected = 37 * run.task.recipe.weight_decay
    assert run.trak_damping is None  # as without segments
    assert run.trak_path.exists("scores/zarr.json")
    told = Store.open(run.trak_path / "scores").provenance.settings
    assert told["damping"] == pytest.approx(expected)
    assert [one["segment"]["number"] for one in told["features"]] == [1, 1]
    effects = margin_effects(run.features.ends(), 40, damping=expected)
    margins = TrakScores.open(run.trak_path).margins(40)
    np.testing.assert_allclose(margins, effects, rtol=1e-3, atol=1e-6)


def test_the_same_call_computes_nothing_again_whether_it_tells_the_segments_or_not(run, tmp_path):
    path = copied(run.path, tmp_path)
    before = contents(path)
    for sizes in (SEGMENTED, SIZES):
        precompute(f"{tmp_path}/small.py:task", path, **sizes)
        assert contents(path) == before


def test_an_interrupted_run_ends_with_the_same_bits(run, tmp_path):
    path = copied(run.path, tmp_path)
    before = contents(path)
    Store.open(path / "full").discard(0)
    for name in ("features", "calibration.json", "calibration/newton-2", "trak-2"):
        whole = path / name
        whole.unlink() if whole.is_file() else shutil.rmtree(whole)
    precompute(f"{tmp_path}/small.py:task", path, **SEGMENTED)
    after = contents(path)
    assert after.keys() == before.keys()
    # Its root tells that a block was once discarded.
    assert {name for name in before if after[name] != before[name]} == {f"{path}/full/zarr.json"}


@pytest.mark.parametrize("segments", [0, 3])
def test_another_number_of_segments_is_refused(run, tmp_path, segments):
    path = copied(run.path, tmp_path)
    with pytest.raises(ValueError, match=rf"with segments = 2, this call asks for {segments}"):
        precompute(f"{tmp_path}/small.py:task", path, **SIZES | {"segments": segments})


def test_a_run_of_before_has_none(tmp_path):
    precompute(write_task(tmp_path), tmp_path / "run", **SIZES | {"checkpoints": 0})
    settings = tmp_path / "run/run.json"
    settings.write_text(settings.read_text().replace(',\n  "segments": 0', ""))
    assert "segments" not in settings.read_text()
    assert Run.open(tmp_path / "run").settings.segments == 0


def test_more_trainings_are_added_to_a_run(run, tmp_path, few):
    path = copied(run.path, tmp_path)
    more = precompute(f"{tmp_path}/small.py:task", path, **SEGMENTED | {"checkpoints": 3})
    assert (len(more.features), more.features.trainings) == (6, 3)
    assert more.features.first(2).stores[3].provenance == run.features.stores[3].provenance
    assert more.newton.change(few).mean.shape == (48, 3)


def test_a_purged_run_goes_on(run, tmp_path, few):
    path = copied(run.path, tmp_path)
    before = run.newton.change(few).mean
    purge(path, "train-30,train-36")
    with pytest.warns(UserWarning, match="2 rows of task 'small' were purged"):
        left = precompute(f"{tmp_path}/small.py:task", path, **SEGMENTED | {"checkpoints": 3})
    assert left.features.times == run.features.times
    found = left.newton.change(ForgetSet.of(left.task, few.ids)).mean
    assert found.shape == (46, 3)
    assert np.corrcoef(found[-11:].ravel(), before[-11:].ravel())[0, 1] > 0.5


def test_a_task_that_trains_by_itself_has_no_segments(tmp_path):
    spec = write_task(tmp_path, TASK.replace("mlp, recipe)", "mlp, train=lambda *_: {})"))
    with pytest.raises(ValueError, match="trains without one: give segments=0"):
        precompute(spec, tmp_path / "run", **SEGMENTED)
    assert not (tmp_path / "run/run.json").exists()


def test_more_segments_than_steps_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="of 10 steps has 1 to 10 segments, not 11"):
        precompute(write_task(tmp_path), tmp_path / "run", **SIZES | {"segments": 11})
    assert not (tmp_path / "run/run.json").exists()


def test_the_time_of_training_is_enough_without_weight_decay(tmp_path):
    spec = write_task(tmp_path, TASK.replace("weight_decay=0.05", "weight_decay=0.0"))
    made = precompute(spec, tmp_path / "run", **SEGMENTED | {"checkpoints": 1})
    assert made.predictors == ("datamodel", "newton", "trak")
    assert made.trak_damping == pytest.approx(37 / made.features.times[-1])
    for name in ("newton", "trak"):
        assert np.isfinite(made.predictor(name).change(ForgetSet.at(made.task, [3])).mean).all()


def test_a_negative_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="segments must be 0 or more, got -1"):
        precompute(write_task(tmp_path), tmp_path / "run", **SIZES | {"segments": -1})
