import json

import numpy as np
import pytest

from attribution import ForgetSet
from attribution.run import Run, precompute, read_settings

NUMBERS = {"full_models": 3, "subset_models": 10, "design": "half", "seed": 4, "workers": 0}


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    file = tmp_path_factory.mktemp("tasks") / "toy_task.py"
    file.write_text("from tests.tasks import blobs\n\ntask = blobs()\nother = blobs(rows=36)\n")
    return f"{file}:task"


@pytest.fixture(scope="module")
def run(spec, tmp_path_factory):
    return precompute(spec, tmp_path_factory.mktemp("runs") / "run", **NUMBERS)


def test_a_run_holds_models_datamodels_and_moments(run):
    assert [store.spec.kind for store in run.stores()] == [
        "datamodel",
        "ensemble",
        "ensemble",
        "moments",
    ]
    assert all(store.complete for store in run.stores())
    assert (len(run.full), run.full.seed, run.full.keeps_weights) == (3, 5, True)
    assert run.full.masks.all()
    assert run.moments.find_digest(run.full.model(2).digest()) == 2
    assert read_settings(run.path) == run.settings


def test_runs_are_opened_again(run):
    again = Run.open(run.path)
    assert again.settings == run.settings
    forget = ForgetSet.at(again.task, [3, 4])
    found, expected = (each.predictor("datamodel").change(forget) for each in (again, run))
    np.testing.assert_array_equal(found.mean, expected.mean)


def test_finished_runs_are_not_computed_again(run, spec, monkeypatch):
    monkeypatch.setattr("attribution.ensemble.train_many", None)
    precompute(spec, run.path, **NUMBERS)


def test_banks_are_trained_once_and_are_disjoint(run, monkeypatch):
    forget = ForgetSet.at(run.task, [3, 4])
    audit, targets = (run.bank(forget, which, 2, workers=0) for which in (0, 1))
    assert (audit.seed, targets.seed) == (6, 7)
    assert not np.array_equal(audit.outputs, targets.outputs)
    assert audit.without.positions == targets.without.positions == (3, 4)
    monkeypatch.setattr("attribution.ensemble.train_many", None)
    oracle = run.oracle(forget, 2, workers=0)
    np.testing.assert_array_equal(oracle.bank.outputs, targets.outputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_models": 1}, "a run needs at least 2 full models, got 1"),
        ({"subset_models": 9}, "datamodels need at least 10 models, got 9"),
        ({"design": "full"}, "datamodels need models on different subsets: choose another design"),
        ({"design": "third"}, "unknown design 'third'"),
        ({"seed": -1}, "a seed must not be negative, got -1"),
    ],
)
def test_unusable_numbers_are_refused_before_anything_is_written(spec, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        precompute(spec, tmp_path / "run", **(NUMBERS | changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "value"), [("full_models", 4), ("design", "mixed"), ("seed", 5)])
def test_other_settings_in_the_same_folder_are_refused(run, spec, name, value):
    message = f"was made with {name} = .*, this call asks for {value}: use another --run folder"
    with pytest.raises(ValueError, match=message):
        precompute(spec, run.path, **(NUMBERS | {name: value}))


def test_other_data_in_the_same_folder_are_refused(run, spec):
    with pytest.raises(ValueError, match=r"made with other settings|made for other train ids"):
        precompute(spec.replace(":task", ":other"), run.path, **NUMBERS)


def test_unknown_predictors_are_refused(run):
    with pytest.raises(ValueError, match="unknown predictor 'magic': choose from datamodel"):
        run.predictor("magic")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no run in '.*none': make one with dmm precomp"):
        Run.open(tmp_path / "none")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="there is no run in"):
        Run.open(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"schema": 99, "task": "x:y"}))
    with pytest.raises(ValueError, match="has schema 99, this version reads 1"):
        Run.open(tmp_path)


def test_folders_that_cannot_be_written_are_refused(spec, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write the run folder '.*file/run'"):
        precompute(spec, tmp_path / "file" / "run", **NUMBERS)


def test_a_task_in_the_runs_own_folder_is_refused(tmp_path):
    (tmp_path / "toy_task.py").write_text("from tests.tasks import blobs\n\ntask = blobs()\n")
    with pytest.raises(ValueError, match="lies in the run's own folder"):
        precompute(f"{tmp_path / 'toy_task.py'}:task", tmp_path, **NUMBERS)
