import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from attribution import ForgetSet, load_model
from attribution.run import PREDICTORS, Run, read_settings
from stores import Store
from tests.small_runs import (
    CHECKPOINTS,
    FULL_MODELS,
    SIZES,
    TEST_ROWS,
    TRAIN_ROWS,
    contents,
    copied,
    write_task,
)
from unlearning.cli import main
from unlearning.methods import METHODS

COLUMNS = ("before", "mean", "std", "noise")
FEW = ("--forget", "few=rows:3:8")


def margin_of(values, label):
    others = np.delete(values.astype(np.float64), label)
    return values[label] - np.log(np.exp(others).sum())


class TestPrecompute:
    def test_everything_is_made_in_silence_and_made_once(self, told, dmm, tmp_path):
        spec, run = write_task(tmp_path), tmp_path / "run"
        found = told("precompute", spec, "--run", run, *SIZES)
        assert (found["run"], len(found["shrink"])) == (str(run), 2)
        assert {Path(s).relative_to(run).parts[0] for s in found["stores"]} == {
            "full",
            "ensemble-mixed-24",
            "datamodel-mixed-24",
            "residual-mixed-24",
            f"trak-{CHECKPOINTS}",
            "moments",
            "features",
            "calibration",
        }
        assert found["predictors"] == list(PREDICTORS)
        assert found["best"] in found["predictors"]
        before = contents(run)
        assert dmm("precompute", spec, "--run", run, *SIZES) == (
            f"{run}: 80 full models, 24 models on mixed subsets, datamodels of 48 targets\n"
            f"next: dmm predict --run {run} --forget random:50:0\n"
        )
        assert contents(run) == before

    @pytest.mark.parametrize(("words", "segments"), [((), 0), (("--newton-segments", "2"), 2)])
    def test_gradients_are_of_eight_trained_models_unless_told(
        self, tmp_path, monkeypatch, words, segments
    ):
        def stop(*_, **__):
            raise KeyboardInterrupt

        # The package has a function of the module's name.
        monkeypatch.setattr(sys.modules["attribution.precompute"], "_fill", stop)
        sizes = ["--full-models", "9", "--subset-models", "24", *words]
        spec, run = write_task(tmp_path), tmp_path / "run"
        assert main(["precompute", spec, "--run", str(run), *sizes]) == 130
        found = read_settings(run)
        assert (found.checkpoints, found.segments) == (8, segments)

    def test_a_task_file_that_moved_is_found_where_it_lies_now(self, dmm, run, tmp_path):
        copy = copied(run, tmp_path)
        assert json.loads((copy / "run.json").read_text())["task"] == f"{tmp_path}/small.py:task"
        assert "train-3" in dmm("predict", "--run", copy, *FEW)


def test_progress_shows_on_a_terminal_and_on_stderr_only(tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    words = ["precompute", write_task(tmp_path), "--run", f"{tmp_path}/run", *SIZES, "--json"]
    assert main(words) == 0
    shown = sys.stderr.getvalue()
    assert "training full: 100%" in shown
    assert "training ensemble-mixed-24: 100%" in shown
    assert json.loads(capsys.readouterr().out)["run"] == f"{tmp_path}/run"


class TestPredict:
    def test_the_numbers_are_those_of_the_predictor(self, told, run):
        found = told("predict", "--run", run, *FEW)
        opened = Run.open(run)
        forget = ForgetSet.at(opened.task, range(3, 8))
        expected = opened.predictor().predict(opened.full.model(0), forget, forget.ids)
        assert found["forget"] == found["targets"] == [f"train-{i}" for i in range(3, 8)]
        for name in COLUMNS:
            np.testing.assert_array_equal(found[name], getattr(expected, name))

    @pytest.mark.parametrize(
        ("spec", "targets"),
        [
            ("train", [f"train-{i}" for i in range(TRAIN_ROWS)]),
            ("test", [f"test-{i}" for i in range(TEST_ROWS)]),
            ("forget", [f"train-{i}" for i in range(3, 8)]),
            ("test-3, train-30", ["test-3", "train-30"]),
            ("@", ["train-2", "test-0"]),
            ("rows:9:12", ["train-9", "train-10", "train-11"]),
        ],
    )
    def test_each_form_of_targets(self, told, run, tmp_path, spec, targets):
        (tmp_path / "ids.txt").write_text("train-2\n\n test-0 \n")
        spec = f"@{tmp_path}/ids.txt" if spec == "@" else spec
        found = told("predict", "--run", run, *FEW, "--targets", spec)
        assert found["targets"] == targets
        assert all(np.shape(found[name]) == (len(targets), 3) for name in COLUMNS)

    def test_drawn_targets(self, told, run):
        for spec in ("random:4:1", "cluster:4:1"):
            found = told("predict", "--run", run, *FEW, "--targets", spec)
            assert found["targets"] == told("predict", "--run", run, "--forget", spec)["forget"]

    @pytest.mark.parametrize(
        ("spec", "size"),
        [("random:6:1", 6), ("cluster:4:2", 4), ("rows:-2:", 2), ("train-3,train-1", 2)],
    )
    def test_each_form_of_forget_sets(self, told, run, spec, size):
        assert len(set(told("predict", "--run", run, "--forget", spec)["forget"])) == size

    def test_the_table_shows_margins_most_changed_first(self, dmm, told, run):
        words = ("predict", "--run", run, *FEW, "--targets", "test")
        lines, found = dmm(*words).splitlines(), told(*words)
        assert lines[0].split()[:5] == ["target", "label", "margin", "now", "predicted"]
        changes = []
        for line in lines[2 : 2 + TEST_ROWS]:
            target, label, before, after, change, *_ = line.split()
            place, label = found["targets"].index(target), int(label)
            for shown, name in ((before, "before"), (after, "mean")):
                exact = margin_of(np.array(found[name][place]), label)
                assert float(shown) == pytest.approx(exact, abs=0.0051)
            changes.append(abs(float(change)))
        assert changes == sorted(changes, reverse=True)
        assert lines[-2] == "std and noise: the largest of the target's outputs"
        assert lines[-1] == f"predicted by {found['predictor']}"

    def test_a_long_table_says_what_it_leaves_out(self, dmm, run):
        lines = dmm("predict", "--run", run, *FEW, "--targets", "train").splitlines()
        assert lines[-2] == "17 further targets: --json or --out give all"
        assert len(lines) == 2 + 20 + 3

    def test_a_csv_file_holds_every_number(self, told, run, tmp_path):
        out = tmp_path / "predicted.csv"
        found = told("predict", "--run", run, *FEW, "--out", out)
        rows = list(csv.DictReader(out.read_text().splitlines()))
        assert [(row["target"], int(row["output"])) for row in rows] == [
            (target, output) for target in found["targets"] for output in range(3)
        ]
        for name in COLUMNS:
            assert [float(row[name]) for row in rows] == np.ravel(found[name]).tolist()

    def test_a_zarr_folder_holds_every_number(self, told, run, tmp_path):
        out = tmp_path / "predicted.zarr"
        found = told("predict", "--run", run, *FEW, "--out", out)
        store = Store.open(out, "prediction")
        assert store.ids("target") == found["targets"]
        for name in COLUMNS:
            np.testing.assert_array_equal(store.numpy(name), np.float32(found[name]))
        assert store.verify() == []


class TestUnlearn:
    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_writes_a_model_that_knows_what_it_forgot(
        self, told, run, tmp_path, method
    ):
        out = tmp_path / "model.safetensors"
        words = ("--method", method, "--out", out, "--workers", "0")
        found = told("unlearn", "--run", run, *FEW, *words)
        model = load_model(Run.open(run).task, out)
        assert model.forgotten.ids == tuple(f"train-{i}" for i in range(3, 8))
        assert (found["method"], found["out"], found["forgotten"]) == (method, str(out), 5)
        assert found["ending"]["status"] == found["status"]
        assert found["ending"]["reason"]
        idle = found["status"] in ("unchanged", "too fast")
        assert idle == (found["gradient_evaluations"] == 0)
        assert idle or method != "do_nothing"
        assert found["seconds"] > 0

    def test_settings_and_seed_reach_the_method(self, told, run, tmp_path):
        def unlearned(*words):
            out = tmp_path / "model.safetensors"
            words = ("--method", "gradient_ascent", *words, "--out", out)
            found = told("unlearn", "--run", run, *FEW, *words)
            state = load_model(Run.open(run).task, out).state
            return found["gradient_evaluations"], torch.cat([v.ravel() for v in state.values()])

        short = ("--set", "epochs=1", "--set", "rate=0.1", "--set", "batch_size=2")
        visited, once = unlearned(*short)
        assert visited == 5
        assert unlearned("--set", "epochs=2")[0] == 10
        assert torch.equal(once, unlearned(*short)[1])
        assert not torch.equal(once, unlearned(*short, "--seed", "2")[1])

    def test_the_next_request_starts_from_what_is_forgotten(self, told, dmm, run, tmp_path):
        first, second = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
        text = dmm("unlearn", "--run", run, *FEW, "--method", "dmm", "--out", first)
        assert text.startswith(f"{first}: 5 rows forgotten by dmm (finished) in ")
        opened = Run.open(run)
        more = ("--forget", "rows:8:10", "--checkpoint", first)
        found = told("predict", "--run", run, *more, "--targets", "test")
        model, both = load_model(opened.task, first), ForgetSet.at(opened.task, range(3, 10))
        few = ForgetSet.at(opened.task, range(3, 8))
        change = opened.predictor().change(both, few, np.arange(TRAIN_ROWS, TRAIN_ROWS + TEST_ROWS))
        before = model.outputs(list(range(TRAIN_ROWS, TRAIN_ROWS + TEST_ROWS)))
        np.testing.assert_allclose(found["before"], before, atol=1e-6)
        np.testing.assert_allclose(found["mean"], before + change.mean, atol=1e-5)
        again = told("unlearn", "--run", run, *more, "--method", "dmm", "--out", second)
        assert again["forgotten"] == 7
        assert load_model(opened.task, second).forgotten.ids == both.ids

    def test_the_next_projected_request_starts_from_the_space_that_was_left(
        self, told, run, tmp_path
    ):
        first, second = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
        words = ("--method", "pgu", "--set", "epochs=3", "--set", "reference=none", "--out")
        told("unlearn", "--run", run, *FEW, *words, first)
        more = ("--forget", "rows:8:10", "--checkpoint", first)
        told("unlearn", "--run", run, *more, *words, second)
        opened = Run.open(run)
        left = load_model(opened.task, second).moments
        inputs, _ = opened.task.rows("train", [*range(3), *range(10, TRAIN_ROWS)])
        kept = inputs.flatten(1).double()
        torch.testing.assert_close(left["0"], kept.T @ kept, rtol=1e-6, atol=1e-6)

    def test_a_stopping_rule_is_told_in_words_and_numbers(self, told, dmm, run, tmp_path):
        words = ("--method", "pgu", "--set", "reference=0", "--set", "epochs=3")
        words = ("unlearn", "--run", run, *FEW, *words, "--out", tmp_path / "model.safetensors")
        found = told(*words)
        ending, reached = found["ending"], found["ending"]["reached"]
        assert (ending["steps"], ending["kept"], ending["reference"]) == (3, 3, 0)
        assert (found["status"], ending["measure"]) == (
            "never crossed", "accuracy on the forget rows",
        )  # fmt: skip
        assert dmm(*words).splitlines()[1] == (
            f"never crossed: accuracy on the forget rows was still {reached:.3f} after all 3 steps,"
            " not below 0.000; the last state was kept"
        )

    def test_the_same_rows_are_refused_the_second_time(self, dmm, run, tmp_path, capsys):
        first, second = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
        words = ["unlearn", "--run", str(run), *FEW, "--method", "dmm", "--out"]
        dmm(*words, first)
        before = first.read_bytes()
        assert main([*words, str(second), "--checkpoint", str(first)]) == 2
        refusal = "dmm: the model has forgotten all 5 rows of 'few' already\n"
        assert capsys.readouterr() == ("", refusal)
        assert (first.read_bytes(), second.exists()) == (before, False)


@pytest.fixture
def audited(dmm, run, tmp_path):
    """A copy of the run with a written evaluation."""
    copy = copied(run, tmp_path)
    dmm(
        "evaluate", "--run", copy, *FEW, "near=cluster:5:0", "--methods", "dmm,om", "do_nothing",
        "--n-models", "5", "--workers", "0",
    )  # fmt: skip
    return copy


class TestEvaluate:
    def test_the_table_is_printed_and_the_evaluation_written(self, dmm, run, tmp_path):
        out = tmp_path / "told.json"
        words = ("--methods", "do_nothing", "--n-models", "5", "--workers", "0", "--out", out)
        text = dmm("evaluate", "--run", run, *FEW, *words)
        assert re.search(r"^few \(5 rows\) +Gaussian KL forget", text, flags=re.MULTILINE)
        assert re.search(r"^two oracle banks +[\d.]+ / - ", text, flags=re.MULTILINE)
        assert text.endswith(f"written to {out}\n")
        assert set(json.loads(out.read_text())["forget_sets"]["few"]["methods"]) == {"do_nothing"}

    def test_the_evaluation_before_is_kept_unless_a_place_is_named(self, dmm, audited, tmp_path):
        words = ("evaluate", "--run", audited, "--methods", "do_nothing", "--n-models", "5",
                 "--workers", "0", *FEW)  # fmt: skip
        file, kept = audited / "evaluation.json", audited / "evaluation.previous.json"
        before = file.read_bytes()
        dmm(*words, "--out", tmp_path / "told.json")
        dmm(*words, "--out", file)
        assert not kept.exists()
        file.write_bytes(before)
        assert dmm(*words).endswith(f"written to {file}\nthe evaluation before it is now {kept}\n")
        assert kept.read_bytes() == before != file.read_bytes()

    def test_what_is_printed_is_what_is_written(self, told, run, tmp_path):
        out = tmp_path / "told.json"
        words = ("--methods", "dmm", "--n-models", "5", "--workers", "0", "--out", out)
        found = told("evaluate", "--run", run, *FEW, *words)
        assert json.loads(out.read_text(), parse_constant=pytest.fail) == found

    def test_klom_heads_the_table_where_there_are_models_enough(self, dmm, run, tmp_path):
        words = ("--methods", "do_nothing", "--n-models", FULL_MODELS, "--workers", "0")
        text = dmm("evaluate", "--run", run, *FEW, *words, "--out", tmp_path / "told.json")
        assert re.search(r"^few \(5 rows\) +KLOM forget", text, flags=re.MULTILINE)


class TestReport:
    def test_it_is_one_file_that_loads_nothing(self, dmm, audited):
        assert dmm("report", "--run", audited) == f"written to {audited}/report.html\n"
        page = (audited / "report.html").read_text()
        assert all(name in page for name in ("few", "near"))
        links = re.findall(r'(?:src|href)\s*=\s*"([^"]*)', page)
        assert all(link.startswith(("data:", "#")) for link in links)
        assert not re.search(r"<link|<iframe|@import|url\((?!['\"]?(data:|#))", page)

    def test_the_place_may_be_named(self, told, audited, tmp_path):
        out = tmp_path / "page.html"
        assert told("report", "--run", audited, "--out", out) == {"out": str(out)}
        assert out.read_text().lstrip().lower().startswith("<!doctype html>")

    def test_forgotten_images_show_only_when_asked_for(self, dmm, audited):
        def pictures():
            return (audited / "report.html").read_text().count('src="data:image/png')

        dmm("report", "--run", audited)
        without = pictures()
        dmm("report", "--run", audited, "--thumbnails")
        assert pictures() > without


class TestStatus:
    def test_every_store_is_listed(self, told, dmm, audited):
        found = told("status", "--run", audited)
        kinds = [
            (row["kind"], row["blocks"], row["pending"], row["bad"]) for row in found["stores"]
        ]
        assert kinds.count(("ensemble", 1, 0, [])) == 5
        assert ("ensemble", 2, 0, []) in kinds
        assert {kind for kind, *_ in kinds} == {
            "ensemble",
            "datamodel",
            "moments",
            "features",
            "curvature",
            "calibration-choice",
            "calibration-changes",
            "residual-prior",
            "trak-rows",
            "trak",
        }
        text = dmm("status", "--run", audited, "--verify")
        assert all(row["store"] in text for row in found["stores"])
        assert text.endswith("all checksums hold\n")
        assert "checksums" not in dmm("status", "--run", audited)


def test_the_command_line_as_a_process(run):
    words = ["predict", "--run", str(run), *FEW, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "unlearning.cli", *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["targets"]) == 5
