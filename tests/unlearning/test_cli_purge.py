"""`dmm purge`, and what the other verbs say of a run that was purged, wholly or in part."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from attribution import load_model
from attribution.purging.purge import Purged, purge
from attribution.run import PREDICTORS
from stores import taken_out
from tests.attribution.purging.runs import SPEC, copied, opened, whole_run
from tests.interruptions import Killed, kill_after
from tests.small_runs import contents
from unlearning.cli import main
from unlearning.tables import purge_text

LEFT_OUT = "dmm: warning: 4 rows of task 'small' were purged from {} and are left out\n"
pytestmark = pytest.mark.filterwarnings("always:4 rows of task 'small' were purged")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def purged(whole, tmp_path_factory):
    path = copied(whole, tmp_path_factory.mktemp("purged"))
    purge(path, SPEC)
    return path


@pytest.fixture
def call(capsys):
    """Runs a verb; gives its code and what it printed."""

    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


def test_rows_are_purged_from_the_command_line(whole, call, tmp_path):
    path = copied(whole, tmp_path)
    code, out, err = call("purge", "--run", path, "--forget", SPEC, "--json")
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert set(told) == {
        "rows",
        "already",
        "finished",
        "rewritten",
        "removed",
        "bytes_before",
        "bytes_after",
        "tombstones",
        "weights",
        "kept",
    }
    assert (told["rows"], told["tombstones"]) == (4, 4)
    assert told["bytes_after"] < told["bytes_before"]
    assert "full" in told["rewritten"]
    assert "evaluation.json" in told["removed"]
    code, out, err = call("purge", "--run", path, "--forget", "person-003")
    assert (code, err) == (0, LEFT_OUT.format(path))
    assert out == f"{path}: these 1 rows have been purged before; nothing was left to do\n"


def test_the_text_tells_what_purge_does_not_do(whole, call, tmp_path):
    path = copied(whole, tmp_path)
    code, out, _ = call("purge", "--run", path, "--forget", "rows:3:7")
    assert code == 0
    assert out.startswith(f"{path}: 4 rows purged; ")
    assert out.endswith("to make models forget rows, unlearn before you purge\n")
    words = ("--method", "gradient_ascent", "--out", tmp_path / "a.safetensors")
    code, _, err = call("unlearn", "--run", path, "--forget", "person-003", *words)
    assert (code, "unknown id 'person-003'" in err) == (2, True)


@pytest.mark.parametrize("weights", [False, True])
def test_the_text_speaks_of_weights_where_a_run_holds_them(weights):
    done = Purged(1, 0, False, ("full",), (), 20, 10, tombstones=1, weights=weights)
    assert ("unlearn before you purge" in purge_text("runs/a", done)) is weights


def test_the_text_names_files_that_purge_does_not_know():
    done = Purged(1, 0, False, ("full",), (), 20, 10, 1, weights=False, kept=("a.pdf", "b/c.png"))
    assert "were: a.pdf, b/c.png; look whether they tell of the rows" in purge_text("runs/a", done)
    assert "look whether" not in purge_text("runs/a", replace(done, kept=()))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--forget", "person-999"), "unknown id 'person-999'"),
        (("--forget", "rows:0:37"), "holds all 37 training rows"),
        ((), "name the rows with --forget"),
        (("--forget", "@nowhere.txt"), "cannot read the file of ids"),
    ],
)
def test_bad_input_changes_nothing(whole, call, words, text):
    before = contents(whole)
    code, out, err = call("purge", "--run", whole, *words)
    assert (code, out) == (2, "")
    assert text in err
    assert err.count("\n") == 1
    assert contents(whole) == before


def test_a_folder_without_a_run_is_refused(call, tmp_path):
    code, _, err = call("purge", "--run", tmp_path / "none", "--forget", "a")
    assert (code, "there is no run in" in err) == (2, True)
    assert not (tmp_path / "none").exists()


# -- other verbs on a purged run -------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("predict", "--forget", "person-001", "--predictor", "datamodel"),
        ("predict", "--forget", "random:5:0", "--predictor", "combined"),
        ("explain", "--target", "test-2"),
        ("explain", "--target", "person-012", "--predictor", "trak"),
    ],
)
def test_verbs_go_on_without_the_rows(purged, call, words):
    code, out, err = call(*words, "--run", purged, "--json")
    assert (code, err) == (0, LEFT_OUT.format(purged))
    assert not any(row in out for row in SPEC.split(","))
    assert json.loads(out)


def test_a_projected_request_goes_on_from_the_space_without_the_purged_rows(
    whole, purged, call, tmp_path
):
    first, second = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    words = ("--method", "pgu", "--set", "epochs=2", "--out")
    assert call("unlearn", "--run", whole, "--forget", SPEC, *words, first)[0] == 0
    more = ("--forget", "person-001", "--checkpoint", first)
    assert call("unlearn", "--run", purged, *more, *words, second)[0] == 0
    run = opened(purged)
    left = load_model(run.task, second, purged=run.purged).moments
    inputs, _ = run.task.rows("train", [0, *range(2, len(run.task.train_ids))])
    assert run.task.train_ids[1] == "person-001"
    kept = inputs.double()
    torch.testing.assert_close(left["0"], kept.T @ kept, rtol=1e-6, atol=1e-5)


def test_a_purged_row_is_unknown_to_them(purged, call):
    code, out, err = call("predict", "--run", purged, "--forget", "person-008")
    assert (code, out) == (2, "")
    assert "unknown id 'person-008'" in err


def test_status_counts_the_purged_rows(whole, purged, call):
    code, out, err = call("status", "--run", purged, "--verify")
    assert (code, err) == (0, "")
    assert out.endswith("all checksums hold\n4 rows were purged\n")
    assert json.loads(call("status", "--run", purged, "--json")[1])["purged"] == 4
    assert json.loads(call("status", "--run", whole, "--json")[1])["purged"] == 0


def test_evaluation_and_report_say_that_the_models_saw_the_rows(purged, call, tmp_path):
    path = copied(purged, tmp_path)
    words = ("--forget", "few=rows:3:8", "--methods", "do_nothing", "--n-models", "4")
    code, out, _ = call("evaluate", "--run", path, *words, "--workers", "0")
    assert code == 0
    sentence = "4 rows were purged from the run. Models trained before that"
    assert sentence in out
    assert json.loads((path / "evaluation.json").read_text())["purged"] == 4
    assert call("report", "--run", path)[0] == 0
    assert sentence in (path / "report.html").read_text()


def test_a_model_may_have_forgotten_purged_rows(whole, call, tmp_path):
    path = copied(whole, tmp_path)
    out = tmp_path / "unlearned.safetensors"
    words = ("--method", "gradient_ascent", "--out", out)
    assert call("unlearn", "--run", path, "--forget", f"{SPEC},person-001", *words)[0] == 0
    purge(path, SPEC)
    run = opened(path)
    assert load_model(run.task, out, purged=4).forgotten.ids == ("person-001",)
    with pytest.raises(ValueError, match="has forgotten 5 rows, of which task 'small' knows 1"):
        load_model(run.task, out, purged=3)
    again = ("predict", "--run", path, "--checkpoint", out, "--predictor", "datamodel")
    assert call(*again, "--forget", "person-002")[0] == 0


# -- a purge that was interrupted ------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(whole, tmp_path_factory):
    path = copied(whole, tmp_path_factory.mktemp("half"))
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 100)
        with pytest.raises(Killed):
            purge(path, SPEC)
    return path


@pytest.mark.parametrize(
    "words",
    [
        ("predict", "--forget", "person-001"),
        ("explain", "--target", "test-2"),
        ("unlearn", "--forget", "person-001", "--method", "dmm", "--out", "a.safetensors"),
        ("evaluate", "--forget", "person-001", "--methods", "dmm"),
        ("status",),
        ("report",),
        ("precompute", "small.py:task"),
    ],
)
def test_other_verbs_wait_until_it_is_finished(half, call, words, monkeypatch):
    monkeypatch.chdir(half.parent)
    before = contents(half)
    code, out, err = call(*words, "--run", half)
    assert (code, out) == (2, "")
    finish = f"a purge of {half} was interrupted: finish it with dmm purge --run {half}\n"
    assert err == f"dmm: {finish}"
    assert contents(half) == before


@pytest.mark.parametrize("words", [(), ("--forget", SPEC)], ids=["by itself", "the same words"])
def test_the_next_call_finishes_it(half, call, words, tmp_path):
    path = copied(half, tmp_path)
    code, out, err = call("purge", "--run", path, *words)
    assert (code, err) == (0, "")
    assert out.startswith(f"{path}: 4 rows purged by the purge that was interrupted; ")
    assert opened(path).predictors == PREDICTORS


def test_killed_for_real_it_finishes_on_the_next_call(whole, purged, tmp_path):
    path = copied(whole, tmp_path)
    words = [sys.executable, "-m", "unlearning.cli", "purge", "--run", path, "--forget", SPEC]
    moments = (path / "purge.json").exists, lambda: taken_out(path / "moments")
    for reached in moments:
        process = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": os.getcwd()})
        while not reached() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert purge(path, SPEC).finished
    left, wanted = opened(path), opened(purged)
    for mine, theirs in zip(left.stores(), wanted.stores(), strict=True):
        assert mine.provenance == theirs.provenance
        for name in mine.spec.arrays:
            np.testing.assert_array_equal(mine.numpy(name), theirs.numpy(name))
