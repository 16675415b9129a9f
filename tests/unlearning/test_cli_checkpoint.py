"""The road of someone with trained checkpoints and no way to retrain."""

import json
import shutil

import numpy as np
import pytest

from attribution import ForgetSet, GroupNewton, load_model
from attribution.precompute import PRINCIPAL
from attribution.run import Run
from stores import Store
from tests.small_runs import (
    SIZES,
    TASK,
    TRAIN_ROWS,
    checkpoint_run,
    contents,
    write_checkpoints,
    write_task,
)
from unlearning.cli import main

COLUMNS = ("before", "mean", "std", "noise")
FEW = ("--forget", "few=rows:3:8")


@pytest.fixture
def run(tmp_path_factory):
    return checkpoint_run(tmp_path_factory.getbasetemp())


@pytest.fixture
def files(run):
    """The checkpoints that the run was made of."""
    return [run.parent / name for name in Run.open(run).settings.files]


class TestPrecompute:
    @pytest.mark.parametrize("kind", ["safetensors", "pt", "ckpt"])
    def test_any_kind_of_file_will_do(self, told, tmp_path, kind):
        spec, run = write_task(tmp_path), tmp_path / "run"
        file = next(f for f in write_checkpoints(tmp_path, spec) if f.suffix == f".{kind}")
        found = told("precompute", spec, "--run", run, "--checkpoint", file, "--workers", "0")
        assert found["run"] == str(run)
        assert found["stores"] == [f"{run}/features/checkpoint-0"]
        assert (found["predictors"], found["best"]) == (["newton", "trak"], "newton")
        opened = Run.open(run)
        assert opened.model(0).digest() == load_model(opened.task, file).digest()

    def test_it_says_what_was_made_and_that_it_is_uncalibrated(self, dmm, run, files):
        before = contents(run)
        text = dmm(
            "precompute", f"{run.parent}/small.py:task", "--run", run, "--checkpoint", *files,
            "--workers", "0",
        )  # fmt: skip
        assert text.startswith(f"{run}: gradients of 3 checkpoints, 51 features; group Newton")
        assert "uncalibrated, because nothing was retrained" in text
        assert text.endswith(f"next: dmm predict --run {run} --forget random:50:0\n")
        assert contents(run) == before

    def test_features_are_kept_as_factors_unless_told(self, told, tmp_path):
        spec = write_task(tmp_path)
        file = write_checkpoints(tmp_path, spec, 1)[0]
        for run, words in (("with", ()), ("without", ("--no-factors",))):
            where = ("--run", tmp_path / run, "--checkpoint", file, "--workers", "0")
            told("precompute", spec, *where, *words)
            arrays = Store.open(tmp_path / run / "features/checkpoint-0").spec.arrays
            assert ("factors" in arrays) is (run == "with")

    @pytest.mark.parametrize(
        ("words", "principal", "width"),
        [((), PRINCIPAL, 51), (("--newton-principal", "8"), 8, 16)],
        ids=str,
    )
    def test_as_many_principal_features_as_told(self, told, tmp_path, words, principal, width):
        spec, run = write_task(tmp_path), tmp_path / "run"
        file = write_checkpoints(tmp_path, spec, 1)[0]
        told("precompute", spec, "--run", run, "--checkpoint", file, "--workers", "0", *words)
        opened = Run.open(run)
        assert (opened.settings.principal, opened.features.width) == (principal, width)


class TestPredict:
    def test_the_numbers_are_those_of_group_newton(self, told, run):
        opened = Run.open(run)
        forget = ForgetSet.at(opened.task, range(3, 8))
        expected = GroupNewton(opened.task, opened.features).predict(
            opened.model(0), forget, forget.ids
        )
        for words in ((), ("--predictor", "newton")):
            found = told("predict", "--run", run, *FEW, *words)
            assert found["targets"] == [f"train-{i}" for i in range(3, 8)]
            for name in COLUMNS:
                np.testing.assert_array_equal(found[name], getattr(expected, name))

    def test_unknown_spreads_are_null(self, told, files, tmp_path):
        spec, run = write_task(tmp_path), tmp_path / "run"
        told("precompute", spec, "--run", run, "--checkpoint", files[1], "--workers", "0")
        found = told("predict", "--run", run, *FEW, "--out", tmp_path / "predicted.csv")
        assert found["std"] == found["noise"] == [[None] * 3] * 5
        assert np.isfinite(found["mean"]).all()

    def test_any_checkpoint_can_be_the_starting_point(self, told, run, files):
        task = Run.open(run).task
        changes = []
        for file in files:
            found = told("predict", "--run", run, *FEW, "--checkpoint", file)
            before = load_model(task, file).outputs(range(3, 8))
            np.testing.assert_allclose(found["before"], before, atol=1e-6)
            changes.append(np.subtract(found["mean"], found["before"]))
        # The change is the mean over all of them, whatever it is added to.
        np.testing.assert_allclose(changes[1], changes[0], atol=1e-5)
        np.testing.assert_allclose(changes[2], changes[0], atol=1e-5)


class TestUnlearn:
    @pytest.mark.parametrize("words", [(), ("--predictor", "newton")], ids=["best", "by name"])
    def test_matching_follows_group_newton(self, told, run, tmp_path, words):
        out = tmp_path / "model.safetensors"
        words = ("--method", "dmm", "--set", "passes=60", "--set", "rate=0.02", *words)
        found = told("unlearn", "--run", run, *FEW, *words, "--out", out)
        assert (found["status"], found["forgotten"]) == ("finished", 5)
        opened = Run.open(run)
        forget = ForgetSet.at(opened.task, range(3, 8))
        wanted = opened.newton.predict(opened.model(0), forget, forget.ids)
        after = load_model(opened.task, out).outputs(forget.rows)
        far, near = (np.square(values - wanted.mean).mean() for values in (wanted.before, after))
        assert near < far / 2

    def test_the_next_request_starts_from_what_is_forgotten(self, told, dmm, run, tmp_path):
        first, second = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
        dmm("unlearn", "--run", run, *FEW, "--method", "dmm_newton", "--out", first)
        more = ("--forget", "rows:8:10", "--checkpoint", first)
        found = told("predict", "--run", run, *more, "--targets", "test")
        opened = Run.open(run)
        both, few = (ForgetSet.at(opened.task, range(3, end)) for end in (10, 8))
        effects = [opened.newton.change(forget).mean[TRAIN_ROWS:] for forget in (both, few)]
        added = np.subtract(found["mean"], found["before"])
        np.testing.assert_allclose(added, effects[0] - effects[1], atol=1e-4)
        assert (
            told("unlearn", "--run", run, *more, "--method", "dmm", "--out", second)["forgotten"]
            == 7
        )

    @pytest.mark.parametrize("method", ["do_nothing", "gradient_ascent", "fine_tune"])
    def test_methods_that_need_no_evidence_work(self, told, run, tmp_path, method):
        out = tmp_path / "model.safetensors"
        told("unlearn", "--run", run, *FEW, "--method", method, "--out", out)
        assert out.exists()

    @pytest.mark.parametrize(
        ("words", "line"),
        [
            (("om",), "RUN was made from checkpoints and holds no models trained on all rows: pre"),
            (("pgu",), "RUN was made from checkpoints and holds no input moments: precompute anot"),
            (("dmm_pgu",), "RUN was made from checkpoints and holds no input moments: precompute "),
            (("dmm_datamodel",), "RUN has no predictor 'datamodel', it has newton, trak"),
            (("dmm", "--predictor", "combined"), "RUN has no predictor 'combined', it has newton"),
        ],
    )
    def test_methods_that_need_more_are_refused(self, refused, run, tmp_path, words, line):
        out = tmp_path / "model.safetensors"
        found = refused("unlearn", "--run", run, *FEW, "--method", *words, "--out", out)
        assert found.startswith(line.replace("RUN", str(run)))
        assert not out.exists()


class TestTheRest:
    @pytest.fixture
    def copy(self, run, tmp_path):
        """A copy that may be spoiled; its task file lies beside it."""
        spec = write_task(tmp_path)
        shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("trak"))
        told = json.loads((tmp_path / "run/run.json").read_text()) | {"task": spec}
        (tmp_path / "run/run.json").write_text(json.dumps(told))
        return tmp_path / "run"

    def test_rows_are_explained(self, told, copy):
        found = told("explain", "--run", copy, "--target", "test-3", "--top", "2")
        assert (found["target"], len(found["rows"])) == ("test-3", 4)

    def test_an_evaluation_says_what_is_missing(self, told, dmm, copy):
        words = ("--run", copy, *FEW, "--methods", "do_nothing,dmm", "--workers", "0")
        found = told("evaluate", *words)
        assert set(found["forget_sets"]["few"]["methods"]) == {"do_nothing", "dmm"}
        assert found["missing"]
        assert found["missing"][0] in dmm("evaluate", *words)
        assert dmm("report", "--run", copy) == f"written to {copy}/report.html\n"
        assert "few" in (copy / "report.html").read_text()

    def test_methods_that_need_retrained_models_are_not_evaluated(self, refused, copy):
        line = refused("evaluate", "--run", copy, *FEW, "--methods", "dmm,om")
        assert line.startswith(f"{copy} holds checkpoints and no retrained models, so that")
        assert "om" in line
        assert not (copy / "evaluation.json").exists()

    @pytest.mark.parametrize("option", ["--tuned", "--budgets", "--relearning", "--lds-models=3"])
    def test_options_that_need_retrained_models_are_refused(self, refused, copy, option):
        line = refused("evaluate", "--run", copy, *FEW, "--methods", "dmm", option)
        assert line.startswith(f"{copy} holds checkpoints and no retrained models: leave --")
        assert option.split("=")[0] in line

    def test_a_report_without_an_evaluation_is_refused(self, refused, copy):
        assert refused("report", "--run", copy).startswith(
            f"cannot read '{copy}/evaluation.json': run dmm evaluate --run {copy} first"
        )

    def test_every_store_is_listed(self, dmm, copy):
        text = dmm("status", "--run", copy, "--verify")
        assert all(f"features/checkpoint-{number}" in text for number in range(3))
        assert text.endswith("all checksums hold\n")

    def test_damage_is_found_and_mended_by_the_same_command(self, dmm, copy, files, capsys):
        broken = next((copy / "features/checkpoint-1/features").rglob("c/*/*/*"))
        whole = broken.read_bytes()
        broken.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert main(["status", "--run", str(copy), "--verify"]) == 1
        assert "features/checkpoint-1 blocks [0]" in capsys.readouterr().err
        dmm("status", "--run", copy, "--discard")
        assert main(["predict", "--run", str(copy), *FEW]) == 2
        assert "features/checkpoint-1 is not finished: 1 blocks" in capsys.readouterr().err
        dmm(
            "precompute", f"{copy.parent}/small.py:task", "--run", copy, "--checkpoint", *files,
            "--workers", "0",
        )  # fmt: skip
        assert broken.read_bytes() == whole

    def test_another_task_is_refused_by_every_verb(self, refused, copy, tmp_path):
        write_task(tmp_path, TASK.replace("blobs(37, 1)", "blobs(37, 5)"))
        out = ("--method", "dmm", "--out", tmp_path / "model.safetensors")
        for words in (("predict",), ("unlearn", *out), ("evaluate", "--methods", "dmm")):
            line = refused(words[0], "--run", copy, *FEW, *words[1:])
            assert line.startswith(f"{copy}/features/checkpoint-0 was made with other settings: ")
            assert "data.train: stored" in line


class TestRefusals:
    @pytest.fixture
    def spec(self, tmp_path):
        return write_task(tmp_path)

    @pytest.fixture
    def gone(self, run, tmp_path, capsys):
        """A model that has forgotten rows."""
        words = [
            "unlearn",
            "--run",
            run,
            *FEW,
            "--method",
            "dmm",
            "--out",
            tmp_path / "gone.safete",
        ]
        assert main([f"{word}" for word in words[:-1]] + [f"{tmp_path}/gone.safetensors"]) == 0
        capsys.readouterr()
        return tmp_path / "gone.safetensors"

    def made(self, refused, spec, tmp_path, *files):
        words = ("--run", tmp_path / "run", "--checkpoint", *files, "--workers", "0")
        line = refused("precompute", spec, *words)
        assert not (tmp_path / "run").exists()
        return line

    def test_a_checkpoint_that_has_forgotten_rows(self, refused, spec, tmp_path, gone):
        line = self.made(refused, spec, tmp_path, gone)
        assert line.startswith("'gone.safetensors' has forgotten 5 rows: precompute from models tr")

    def test_segments_of_a_training_that_is_not_known(self, refused, spec, tmp_path, files):
        line = self.made(refused, spec, tmp_path, files[0], "--newton-segments", "2")
        assert line.startswith("--newton-segments does not go with --checkpoint: the path that led")

    def test_a_checkpoint_given_twice(self, refused, spec, tmp_path, files):
        line = self.made(refused, spec, tmp_path, files[0], files[0])
        assert line.endswith("hold the same weights: give each model once")

    def test_files_that_are_no_checkpoints(self, refused, spec, tmp_path):
        for name, content in (("a.pt", b"nothing"), ("a.safetensors", b"nothing")):
            (tmp_path / name).write_bytes(content)
            line = self.made(refused, spec, tmp_path, tmp_path / name)
            assert line.startswith(f"cannot read the checkpoint '{tmp_path}/{name}': ")
        line = self.made(refused, spec, tmp_path, tmp_path / "nowhere.pt")
        assert line.startswith(f"cannot read the checkpoint '{tmp_path}/nowhere.pt': ")

    def test_a_task_without_weight_decay(self, refused, tmp_path, files):
        spec = write_task(tmp_path, TASK.replace("mlp, recipe)", "mlp)"))
        line = self.made(refused, spec, tmp_path, files[0])
        assert line.startswith("task 'small' tells no weight decay, which group Newton takes its")

    def test_other_checkpoints_than_the_runs(self, refused, run, files):
        before = contents(run)
        spec = f"{run.parent}/small.py:task"
        line = refused("precompute", spec, "--run", run, "--checkpoint", *files[:2])
        assert line.startswith(f"the run in '{run}' was made with checkpoints = 3, this call asks")
        line = refused("precompute", spec, "--run", run, "--checkpoint", *files[::-1])
        assert line.startswith(f"the run in '{run}' was made with files = ('model-0.safetensors', ")
        line = refused("precompute", spec, "--run", run, *SIZES)
        assert line.startswith(f"the run in '{run}' was made with full_models = 0, this call asks")
        assert contents(run) == before
