"""Runs whose gradients are projected along principal or random directions."""

import json
import shutil
import sys

import numpy as np
import pytest

from attribution import ForgetSet, Projection, precompute, precompute_checkpoints
from attribution.purging.purge import purge
from attribution.run import Run, read_settings
from tests.small_runs import TASK, contents, copied, write_checkpoints, write_task

SIZES = {"full_models": 6, "subset_models": 24, "checkpoints": 2, "workers": 0}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A run of so few principal features that most are dropped."""
    folder = tmp_path_factory.mktemp("principal")
    return precompute(write_task(folder), folder / "run", principal=8, **SIZES)


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    return precompute(write_task(folder), folder / "run", principal=0, **SIZES)


def test_features_are_along_as_many_directions_as_asked_for(few, random):
    assert few.settings.projection == Projection(principal=8)
    assert few.features.width == 16
    assert random.settings.projection == Projection()
    assert random.features.width == 51  # all parameters of this small model
    assert "principal" not in random.features.stores[0].provenance.settings["projection"]


def test_both_predict_alike(few, random):
    forget = ForgetSet.at(few.task, np.array([3, 8, 13]))
    changes = [run.newton.change(forget).mean.ravel() for run in (few, random)]
    assert np.corrcoef(*changes)[0, 1] > 0.9


def test_the_same_call_computes_nothing_again_whether_it_tells_the_features_or_not(few, tmp_path):
    path = copied(few.path, tmp_path)
    before = contents(path)
    for told in ({"principal": 8}, {}):
        precompute(f"{tmp_path}/small.py:task", path, **SIZES | told)
        assert contents(path) == before


@pytest.mark.parametrize("lost", [None, "checkpoint-0"])
def test_another_number_is_refused(few, tmp_path, lost):
    path = copied(few.path, tmp_path)
    if lost:  # workers do not create them in order
        shutil.rmtree(path / "features" / lost)
    with pytest.raises(ValueError, match="with principal = 8, this call asks for 0"):
        precompute(f"{tmp_path}/small.py:task", path, principal=0, **SIZES)


def test_it_may_change_while_no_gradients_are_stored(tmp_path):
    spec, run = write_task(tmp_path), tmp_path / "run"
    precompute(spec, run, principal=0, **SIZES | {"checkpoints": 0})
    made = precompute(spec, run, principal=8, **SIZES)
    assert (made.settings.principal, read_settings(run).principal) == (8, 8)
    assert made.features.width == 16


def test_a_run_that_stopped_before_its_gradients_knows_what_it_was_asked_for(tmp_path, monkeypatch):
    spec, run = write_task(tmp_path), tmp_path / "run"
    precompute(spec, run, principal=0, **SIZES | {"checkpoints": 0})

    def stopped(*_, **__):
        raise KeyboardInterrupt

    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules["attribution.precompute"], "featurize", stopped)
    with pytest.raises(KeyboardInterrupt):
        precompute(spec, run, principal=8, **SIZES)
    settings = read_settings(run)
    assert (settings.principal, settings.checkpoints) == (8, 0)


def test_a_run_of_before_stays_random(random, tmp_path):
    path = copied(random.path, tmp_path)
    settings = json.loads((path / "run.json").read_text())
    del settings["principal"]
    (path / "run.json").write_text(json.dumps(settings))
    again = precompute(f"{tmp_path}/small.py:task", path, **SIZES)
    assert again.settings.principal == 0
    assert again.features.stores[0].provenance == random.features.stores[0].provenance


def test_more_checkpoints_are_added_to_a_run(few, tmp_path):
    path = copied(few.path, tmp_path)
    more = precompute(f"{tmp_path}/small.py:task", path, **SIZES | {"checkpoints": 3})
    assert (len(more.features), more.features.width) == (3, 16)
    assert more.features.stores[1].provenance == few.features.stores[1].provenance


def test_a_purged_run_keeps_its_directions(few, tmp_path):
    path = copied(few.path, tmp_path)
    purge(path, "train-30,train-36")
    with pytest.warns(UserWarning, match="2 rows of task 'small' were purged"):
        left = Run.open(path)
    rows = np.arange(30)
    np.testing.assert_array_equal(left.features.gather(1, rows), few.features.gather(1, rows))
    before, after = (run.features.projector(1).plan.digest() for run in (few, left))
    assert before == after
    with pytest.warns(UserWarning, match="2 rows of task 'small' were purged"):
        more = precompute(f"{tmp_path}/small.py:task", path, **SIZES | {"checkpoints": 3})
    assert (len(more.features), more.features.width) == (3, 16)


def test_checkpoints_have_principal_features_too(tmp_path):
    spec = write_task(tmp_path)
    files = write_checkpoints(tmp_path, spec, 2)
    made = precompute_checkpoints(spec, tmp_path / "run", files, principal=8)
    assert made.features.width == 16
    assert read_settings(made.path).principal == 8
    with pytest.raises(ValueError, match="with principal = 8, this call asks for 5"):
        precompute_checkpoints(spec, tmp_path / "run", files, principal=5)


def test_a_model_without_layers_of_two_sides_has_none(tmp_path):
    layers = "nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)"
    normed = "nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))"
    assert layers in TASK
    spec = write_task(tmp_path, TASK.replace(layers, normed))
    files = write_checkpoints(tmp_path, spec, 1)
    made = precompute_checkpoints(spec, tmp_path / "run", files)
    assert made.features.width == 3 + 3 + 12  # bias, lengths and directions of the weight


def test_a_negative_number_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"projection\.principal must be 0 or more, got -1"):
        precompute(write_task(tmp_path), tmp_path / "run", principal=-1, **SIZES)
    assert not (tmp_path / "run/run.json").exists()
