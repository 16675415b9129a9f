import json

import numpy as np
import pytest

from attribution import ForgetSet, Model
from attribution.run import Run, RunSettings, precompute, read_settings
from attribution.subsets import DESIGNS
from tests.small_runs import (
    FULL_MODELS,
    MODELS,
    TASK,
    TRAIN_ROWS,
    contents,
    copied,
    finished_run,
    write_task,
)


@pytest.fixture
def run(tmp_path_factory):
    return Run.open(finished_run(tmp_path_factory.getbasetemp()))


@pytest.fixture
def few(run):
    return ForgetSet.at(run.task, [3, 8, 13])


def test_a_run_opens_to_what_was_asked_for(run):
    settings = read_settings(run.path)
    assert settings == run.settings
    place = f"{run.path.parent}/small.py:task"
    assert settings == RunSettings(place, FULL_MODELS, 24, "mixed", 0)
    assert len(run.full) == FULL_MODELS
    assert run.full.masks.all()
    assert run.full.keeps_weights
    assert isinstance(run.full.model(79), Model)
    assert run.predictor("datamodel") is run.datamodel


def test_the_place_of_the_task_is_recorded_as_absolute(tmp_path, monkeypatch):
    write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    precompute("small.py:task", "run", **MODELS)
    assert read_settings(tmp_path / "run").task == f"{tmp_path}/small.py:task"
    monkeypatch.chdir("/")
    assert Run.open(tmp_path / "run").task.name == "small"


def test_every_part_has_its_own_seed(run, few):
    banks = [run.bank(few, which, 4, workers=0) for which in (0, 1)]
    ensemble = next(s for s in run.stores() if s.path.endswith("ensemble-mixed-24"))
    seeds = [ensemble.attributes["seed"], run.full.seed, *(bank.seed for bank in banks)]
    assert seeds == [0, 1, 2, 3]
    outputs = [run.full.outputs[:4], *(bank.outputs for bank in banks)]
    assert len(np.unique(np.concatenate(outputs).reshape(12, -1), axis=0)) == 12


def test_a_bank_is_trained_once_and_without_the_forget_set(run, few):
    bank = run.bank(few, 0, 4, workers=0)
    assert bank.without.positions == few.positions
    assert (bank.masks == ~few.mask).all()
    before = contents(bank.store.path)
    again = run.bank(ForgetSet.of(run.task, few.ids, "other"), 0, 4, workers=0)
    assert again.store.path == bank.store.path
    assert contents(bank.store.path) == before
    asked = [(few, 0, 5), (few, 1, 4), (ForgetSet.at(run.task, [3, 8, 14]), 0, 4)]
    others = {run.bank(*words, workers=0).store.path for words in asked}
    assert len(others | {bank.store.path}) == 4


def test_the_oracle_uses_the_bank_that_does_not_judge(run, few):
    oracle = run.oracle(few, 4, workers=0)
    assert oracle.bank.store.path == run.bank(few, 1, 4).store.path
    expected = oracle.bank.outputs.mean(0) - run.full.outputs.mean(0)
    np.testing.assert_allclose(oracle.change(few).mean, expected, atol=1e-6)


def test_stores_are_listed_finished_or_not(run, tmp_path):
    copy = copied(run.path, tmp_path)
    (copy / "full" / "done" / "c" / "1").unlink()
    (copy / "moments.0123.tmp").mkdir()
    (copy / "moments.0123.tmp" / "zarr.json").write_text("{}")
    listed = Run(copy, run.settings, run.task).stores()
    names = [store.path.removeprefix(f"{copy}/") for store in listed]
    assert [name for name in names if not name.startswith("oracles")] == [
        "datamodel-mixed-24",
        "ensemble-mixed-24",
        "full",
        "moments",
    ]
    assert [store.pending() for store in listed if store.path.endswith("/full")] == [[1]]


def test_the_same_call_computes_nothing_again(run, tmp_path):
    copy = copied(run.path, tmp_path)
    before = contents(copy)
    precompute(f"{tmp_path}/small.py:task", copy, **MODELS)
    assert contents(copy) == before


def test_a_moved_task_file_is_recorded_only_if_it_is_the_same_task(run, tmp_path):
    copy = copied(run.path, tmp_path)
    assert read_settings(copy).task == f"{tmp_path}/small.py:task"
    other = write_task(tmp_path, TASK.replace("peak_rate=0.2", "peak_rate=0.25"), "other.py")
    with pytest.raises(ValueError, match=r"recipe.peak_rate: stored 0.2, wanted 0.25"):
        precompute(other, copy, **MODELS)
    assert read_settings(copy).task == f"{tmp_path}/small.py:task"


@pytest.mark.parametrize("design", [name for name in DESIGNS if name != "full"])
def test_every_design_serves_a_run(tmp_path, design):
    sizes = {"full_models": 2, "subset_models": 12, "workers": 0}
    made = precompute(write_task(tmp_path), tmp_path / "run", design=design, seed=4, **sizes)
    assert read_settings(made.path).design == design
    one = ForgetSet.at(made.task, [0])
    assert (made.full.seed, made.datamodel.change(one).mean.shape) == (5, (48, 3))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"full_models": 1}, "a run needs at least 2 full models, got 1"),
        ({"subset_models": 9}, "datamodels need at least 10 models, got 9"),
        ({"design": "full"}, "datamodels need models on different subsets: choose another design"),
        ({"design": "nix"}, "unknown design 'nix': choose one of full, half, bernoulli, clusters,"),
        ({"seed": -1}, "a seed must not be negative, got -1"),
    ],
)
def test_settings_that_no_run_can_have_are_refused_before_a_folder_is_made(tmp_path, changes, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        precompute(write_task(tmp_path), tmp_path / "run", **(MODELS | changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"full_models": 81}, "full_models = 80, this call asks for 81"),
        ({"subset_models": 25}, "subset_models = 24, this call asks for 25"),
        ({"design": "half"}, "design = mixed, this call asks for half"),
        ({"seed": 1}, "seed = 0, this call asks for 1"),
    ],
)
def test_a_run_made_with_other_settings_is_refused(run, changes, text):
    before = contents(run.path)
    with pytest.raises(ValueError, match=f"was made with {text}: use another --run folder, or"):
        precompute(run.settings.task, run.path, **(MODELS | changes))
    assert contents(run.path) == before


@pytest.mark.parametrize("field", ["labels", "inputs", "ids"])
def test_a_run_made_from_other_data_does_not_open(run, tmp_path, field):
    copy = copied(run.path, tmp_path)
    changed = {
        "labels": "train_data.tensors[1][4] += 1",
        "inputs": "train_data.tensors[0][4, 2] += 1e-3",
        "ids": "",
    }[field]
    given = ", train_ids=[f'row-{i}' for i in range(37)])" if field == "ids" else ")"
    text = TASK.replace("recipe = ", f"{changed}\nrecipe = ").replace("recipe)", "recipe" + given)
    write_task(tmp_path, text)
    with pytest.raises(
        ValueError, match=r"(?s)/full was made with other settings:\n  data.train: "
    ):
        Run.open(copy)
    write_task(tmp_path)
    assert len(Run.open(copy).task.train_ids) == TRAIN_ROWS


def test_an_unknown_predictor_is_refused(run):
    with pytest.raises(ValueError, match=r"^unknown predictor 'nix': choose from datamodel"):
        run.predictor("nix")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for content in (None, "", "[]", "{}", "\xff", '{"schema": 1, "tusk": 2}'):
        if content is not None:
            (tmp_path / "run.json").write_text(content, encoding="latin-1")
        with pytest.raises(
            ValueError, match=f"^there is no run in '{tmp_path}': make one with dmm"
        ):
            read_settings(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"schema": 2}))
    with pytest.raises(ValueError, match=r"has schema 2, this version reads 1$"):
        Run.open(tmp_path)
