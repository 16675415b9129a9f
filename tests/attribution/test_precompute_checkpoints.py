"""Runs made of checkpoints that are there already: nothing is trained."""

import shutil

import numpy as np
import pytest
import torch

from attribution import ForgetSet, GroupNewton, Model, precompute_checkpoints
from attribution.precompute import PRINCIPAL
from attribution.run import Run, RunSettings, read_settings
from tests.small_runs import (
    NORMALISED,
    TASK,
    checkpoint_run,
    contents,
    finished_run,
    write_checkpoints,
    write_task,
)

UNDECAYED = TASK.replace("weight_decay=0.05", "weight_decay=0")
OWN = TASK.replace("mlp, recipe)", "mlp)")


@pytest.fixture
def given(tmp_path_factory):
    return checkpoint_run(tmp_path_factory.getbasetemp())


@pytest.fixture
def run(tmp_path_factory):
    return Run.open(finished_run(tmp_path_factory.getbasetemp()))


@pytest.fixture
def spec(tmp_path):
    return write_task(tmp_path)


def test_features_are_made_and_nothing_else(given):
    assert read_settings(given) == RunSettings(
        f"{given.parent}/small.py:task",
        0,
        0,
        "none",
        checkpoints=3,
        files=("model-0.safetensors", "model-1.pt", "model-2.ckpt"),
        principal=PRINCIPAL,
    )
    made = {path.name for path in given.iterdir()}
    assert {"run.json", "features"} <= made <= {"run.json", "features", "trak"}


def test_predictions_are_those_of_group_newton_on_the_checkpoints(given):
    run = Run.open(given)
    forget = ForgetSet.at(run.task, [3, 8])
    damping = 35 * run.task.recipe.weight_decay
    expected = GroupNewton(run.task, run.features, damping=damping).change(forget)
    np.testing.assert_array_equal(run.predictor("newton").change(forget).mean, expected.mean)


def test_the_same_call_computes_nothing_again(tmp_path, spec):
    files = write_checkpoints(tmp_path, spec, 2)
    run = precompute_checkpoints(spec, tmp_path / "run", files, workers=0)
    before = contents(run.path)
    precompute_checkpoints(spec, tmp_path / "run", files, workers=0)
    assert contents(run.path) == before


def test_files_of_one_name_may_lie_in_different_folders(tmp_path, spec):
    files = write_checkpoints(tmp_path, spec, 2)
    for index, file in enumerate(files):
        (tmp_path / str(index)).mkdir()
        files[index] = file.rename(tmp_path / str(index) / f"best{file.suffix}")
    run = precompute_checkpoints(spec, tmp_path / "run", files, workers=0)
    assert run.settings.files == ("best.safetensors", "best.pt")
    assert run.model(0).digest() != run.model(1).digest()


def test_one_checkpoint_tells_no_spread(tmp_path, spec):
    files = write_checkpoints(tmp_path, spec, 1)
    run = precompute_checkpoints(spec, tmp_path / "run", files, workers=0)
    found = run.predictor().change(ForgetSet.at(run.task, [3]))
    assert np.isfinite(found.mean).all()
    assert np.isnan(found.std).all()


def test_projections_depend_on_the_seed(tmp_path, spec):
    files = write_checkpoints(tmp_path, spec, 1)
    run = precompute_checkpoints(spec, tmp_path / "run", files, seed=5, workers=0)
    assert run.features.projector(0).projection.seed == 5
    with pytest.raises(ValueError, match="seed = 5, this call asks for 6"):
        precompute_checkpoints(spec, tmp_path / "run", files, seed=6, workers=0)


def refused(tmp_path, spec, files, text):
    with pytest.raises(ValueError, match=text):
        precompute_checkpoints(spec, tmp_path / "run", files, workers=0)
    assert not (tmp_path / "run").exists()


def test_no_checkpoint_at_all_is_refused(tmp_path, spec):
    refused(tmp_path, spec, [], "expected at least one checkpoint, got none")


def test_a_file_that_is_not_there_is_refused(tmp_path, spec):
    refused(tmp_path, spec, [tmp_path / "a.pt"], r"cannot read the checkpoint '.*/a\.pt'")


def test_a_model_that_does_not_fit_is_refused(tmp_path, spec):
    narrow = TASK.replace("Linear(4, 6)", "Linear(4, 5)").replace("Linear(6", "Linear(5")
    other = write_task(tmp_path, narrow, "other.py")
    files = write_checkpoints(tmp_path, other, 1)
    refused(tmp_path, spec, files, r"key '0\.weight' has shape \(5, 4\), the model's is")


def test_the_same_weights_twice_are_refused(tmp_path, spec):
    first, second = write_checkpoints(tmp_path, spec, 2)
    same = shutil.copy(second, tmp_path / "same.pt")
    text = r"checkpoints 1 \('model-1.pt'\) and 2 \('same.pt'\) hold the same weights: give"
    refused(tmp_path, spec, [first, second, same], text)


def test_a_model_that_has_forgotten_rows_is_refused(given, tmp_path, spec):
    run = Run.open(given)
    gone = ForgetSet.at(run.task, [3, 8])
    Model(run.task, run.model(0).state, gone).save(tmp_path / "gone.safetensors")
    text = "'gone.safetensors' has forgotten 2 rows: precompute from models trained on all rows"
    refused(tmp_path, spec, [tmp_path / "gone.safetensors"], text)


@pytest.mark.parametrize("text", [UNDECAYED, OWN], ids=["no weight decay", "no recipe"])
def test_a_task_that_tells_no_weight_decay_is_refused(tmp_path, text):
    spec = write_task(tmp_path, text)
    files = write_checkpoints(tmp_path, spec, 1)
    refused(tmp_path, spec, files, "'small' tells no weight decay, which group Newton")


def test_a_model_without_gradients_of_rows_is_refused(tmp_path):
    spec = write_task(tmp_path, NORMALISED)
    files = write_checkpoints(tmp_path, spec, 1)
    refused(tmp_path, spec, files, "group Newton cannot take the model of task 'small'")


def test_a_negative_seed_is_refused(tmp_path, spec):
    files = write_checkpoints(tmp_path, spec, 1)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        precompute_checkpoints(spec, tmp_path / "run", files, seed=-1)
    assert not (tmp_path / "run").exists()


def test_another_model_under_the_same_name_is_refused(given, tmp_path):
    copy = shutil.copytree(given, tmp_path / "run")
    files = write_checkpoints(tmp_path, read_settings(given).task)
    state = torch.load(files[1], weights_only=True)
    torch.save({name: value + 1 for name, value in state.items()}, files[1])
    with pytest.raises(ValueError, match=r"(?s)checkpoint-1 was made with .*weights: stored"):
        precompute_checkpoints(read_settings(given).task, copy, files, workers=0)


def test_a_run_of_trained_models_is_not_written_over(run, tmp_path):
    files = write_checkpoints(tmp_path, run.settings.task, 1)
    before = contents(run.path)
    with pytest.raises(ValueError, match="was made with full_models = 80, this call asks for 0"):
        precompute_checkpoints(run.settings.task, run.path, files, workers=0)
    assert contents(run.path) == before
