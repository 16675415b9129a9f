import json
import shutil

import numpy as np
import pytest

from attribution import ForgetSet, Model, load_model
from attribution.precompute import PRINCIPAL
from attribution.run import Run, RunSettings, read_settings
from stores import place
from tests.small_runs import (
    CHECKPOINTS,
    FULL_MODELS,
    TASK,
    TRAIN_ROWS,
    checkpoint_run,
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
    assert settings == RunSettings(
        place, FULL_MODELS, 24, "mixed", 0, CHECKPOINTS, principal=PRINCIPAL
    )
    assert len(run.full) == FULL_MODELS
    assert run.full.masks.all()
    assert run.full.keeps_weights
    assert isinstance(run.full.model(79), Model)
    assert run.predictor("datamodel") is run.datamodel


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


def test_a_bank_with_weights_holds_the_same_models(run, few):
    bank, kept = (run.bank(few, 0, 4, weights=weights, workers=0) for weights in (False, True))
    assert (bank.keeps_weights, kept.keeps_weights) == (False, True)
    assert np.array_equal(bank.outputs, kept.outputs)
    np.testing.assert_allclose(kept.model(1).outputs(), kept.outputs[1], atol=1e-5)


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
    listed = Run(place(copy), run.settings, run.task).stores()
    names = [store.path.removeprefix(f"{copy}/") for store in listed]
    assert {name.split("/")[0] for name in names} - {"oracles"} == {
        "calibration",
        "datamodel-mixed-24",
        "ensemble-mixed-24",
        "features",
        "full",
        "moments",
        "residual-mixed-24",
        f"trak-{CHECKPOINTS}",
    }
    assert len(names) == len(set(names))
    assert [store.pending() for store in listed if store.path.endswith("/full")] == [[1]]


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


class TestPredictors:
    NAMES = ("datamodel", "newton", "combined", "residual", "linear", "trak")

    def test_a_run_with_a_bank_has_all_of_them(self, run, few):
        assert run.predictors == self.NAMES
        changes = {name: run.predictor(name).change(few) for name in self.NAMES}
        assert {change.mean.shape for change in changes.values()} == {(48, 3)}
        assert len({change.mean.tobytes() for change in changes.values()}) == 6
        assert run.newton.calibration == run.calibration.newton
        assert len(run.features) == CHECKPOINTS

    def test_the_best_has_the_smallest_error_on_the_bank(self, run):
        errors = run.calibration.errors
        assert set(errors) == {"datamodel", "newton", "combined", "residual", "linear"}
        assert errors[run.best] == min(errors.values())
        assert run.predictor() is run.predictor(run.best)

    def test_without_a_bank_the_first_there_is_is_best(self, run, tmp_path):
        copy = copied(run.path, tmp_path)
        (copy / "calibration.json").unlink()
        plain = Run.open(copy)
        assert plain.predictors == ("datamodel", "newton", "trak")
        assert plain.best == "datamodel"
        assert plain.calibration is None
        assert plain.newton.calibration is None
        with pytest.raises(
            ValueError, match="has no predictor 'combined', it has datamodel, newton"
        ):
            plain.predictor("combined")
        with pytest.raises(ValueError, match="has no calibration bank: use another predictor"):
            plain.combined  # noqa: B018
        shutil.rmtree(copy / "datamodel-mixed-24")
        shutil.rmtree(copy / "features")
        with pytest.raises(ValueError, match="has no predictions yet: run dmm precompute again"):
            Run.open(copy).predictor()

    def test_a_spoiled_calibration_is_refused(self, run, tmp_path):
        copy = copied(run.path, tmp_path)
        (copy / "calibration.json").write_text("{}")
        with pytest.raises(ValueError, match=r"calibration\.json.*remove it, and dmm precompute"):
            Run.open(copy).predictor("newton")

    def test_an_unknown_one_is_refused(self, run):
        with pytest.raises(ValueError, match=r"^unknown predictor 'nix': choose from datamodel"):
            run.predictor("nix")


class TestCheckpoints:
    """A run of the user's own checkpoints: nothing was trained."""

    @pytest.fixture
    def given(self, tmp_path_factory):
        return Run.open(checkpoint_run(tmp_path_factory.getbasetemp()))

    def test_it_predicts_from_gradients_alone(self, given):
        assert given.predictors == ("newton", "trak")
        assert given.predictor() is given.newton
        assert given.newton.calibration is None
        forget = ForgetSet.at(given.task, [3, 8])
        found = given.predictor().predict(given.model(0), forget, ["train-3"])
        assert np.isfinite([found.mean, found.std, found.noise]).all()

    def test_models_are_the_given_ones(self, given):
        assert given.settings.files == ("model-0.safetensors", "model-1.pt", "model-2.ckpt")
        for index, name in enumerate(given.settings.files):
            expected = load_model(given.task, given.path.parent / name)
            assert given.model(index).digest() == expected.digest()
            assert given.model(index).forgotten is None

    @pytest.mark.parametrize(
        ("part", "what"),
        [
            ("full", "models trained on all rows"),
            ("datamodel", "a datamodel"),
            ("moments", "input moments"),
        ],
    )
    def test_what_needs_training_is_refused_by_name(self, given, part, what):
        text = f"run was made from checkpoints and holds no {what}: precompute another run"
        with pytest.raises(ValueError, match=text):
            getattr(given, part)
        with pytest.raises(ValueError, match=r"has no predictor 'datamodel', it has newton, trak$"):
            given.predictor("datamodel")

    def test_another_task_is_refused(self, given, tmp_path):
        spec = write_task(tmp_path, TASK.replace("blobs(37, 1)", "blobs(37, 5)"))
        shutil.copytree(given.path, tmp_path / "run")
        settings = json.loads(given.path.read("run.json")) | {"task": spec}
        (tmp_path / "run" / "run.json").write_text(json.dumps(settings))
        with pytest.raises(
            ValueError, match=r"(?s)checkpoint-0 was made with .*data.train: stored"
        ):
            Run.open(tmp_path / "run")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(ValueError, match=f"^there is no run in '{path}': make one with dmm"):
            read_settings(path)


def test_settings_that_cannot_be_read_are_no_missing_run(tmp_path):
    for content in ("", "[]", "{}", "\xff", '{"schema": 1, "tusk": 2}'):
        (tmp_path / "run.json").write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=f"^cannot read '{tmp_path}/run.json', the settings"):
            read_settings(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"schema": 2}))
    with pytest.raises(ValueError, match=r"has schema 2, this version reads 1$"):
        Run.open(tmp_path)
