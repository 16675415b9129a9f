import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.small_runs import (
    SIZES,
    TASK,
    arrays,
    contents,
    write_task,
)
from unlearning.cli import main

FEW = ("--forget", "rows:3:8")
PREDICT = ("predict", "--run", "RUN")
UNLEARN = ("unlearn", "--run", "RUN", *FEW, "--out", "OUT/model.safetensors")
DMM = (*UNLEARN, "--method", "dmm")
EVALUATE = ("evaluate", "--run", "RUN", *FEW, "--workers", "0")
TUNE = ("tune", "--run", "RUN", "--methods", "dmm", "--workers", "0", "--n-models", "2")
FIVE = ("--methods", "dmm", "--n-models", "5")
PRECOMPUTE = ("precompute", "OUT/small.py:task", "--run", "OUT/run", *SIZES)


@pytest.fixture
def kept(run):
    """Shows at the end of a test that it left the finished run as it was."""
    before = contents(run)
    yield
    assert contents(run) == before


def filled(words, run, out):
    return [word.replace("RUN", str(run)).replace("OUT", str(out)) for word in words]


FORGET_SETS = {
    "train-99": "unknown id 'train-99' (1 of 1 ids are no training rows of task 'small'); did you"
    " mean 'train-9'?",
    "train-1,ab,cd": "unknown id 'ab' (2 of 3 ids are no training rows of task 'small')",
    "": "forget set '' is empty: name at least one training row",
    "a=rows:4:4": "forget set 'a' is empty: name at least one training row",
    "train-1,train-1": "forget set 'train-1,train-1' names 'train-1' more than once",
    "a=rows::": "forget set 'a' holds all 37 training rows: nothing is left",
    "a=test-0": "forget set 'a': 'test-0' is none of the 37 training rows",
    "random:37:0": "'random:37:0' asks for 37 of 37 training rows: take 1 to 36",
    "random:-3:0": "expected random:SIZE:SEED or cluster:SIZE:SEED, got 'random:-3:0'",
    "rows:a:b": "expected rows:START:STOP, a Python slice, got 'rows:a:b'",
    "rows:-": "expected rows:START:STOP, a Python slice, got 'rows:-'",
    "@OUT/ids": "cannot read the file of ids 'OUT/ids': No such file or directory",
}


@pytest.mark.usefixtures("kept")
class TestForgetSets:
    @pytest.mark.parametrize("spec", FORGET_SETS)
    @pytest.mark.parametrize("verb", [PREDICT, (*UNLEARN[:3], *UNLEARN[5:], "--method", "dmm")])
    def test_what_cannot_be_forgotten_is_refused(self, refused, run, tmp_path, verb, spec):
        words = filled([*verb, "--forget", spec], run, tmp_path)
        assert refused(*words) == FORGET_SETS[spec].replace("OUT", str(tmp_path))
        assert list(tmp_path.iterdir()) == []

    def test_an_empty_or_repeating_file_of_ids_is_refused(self, refused, run, tmp_path):
        file = tmp_path / "ids"
        words = (*filled(PREDICT, run, tmp_path), "--forget", f"gone=@{file}")
        file.write_text("\n \n")
        assert refused(*words) == "forget set 'gone' is empty: name at least one training row"
        file.write_text("train-4\ntrain-4\n")
        assert refused(*words) == "forget set 'gone' names 'train-4' more than once"


WORDS = [
    ((*PREDICT, *FEW, "--targets", "train-1,nix"), "unknown target 'nix' of task 'small'"),
    ((*PREDICT, *FEW, "--targets", ""), "targets '' are empty: name at least one row"),
    ((*PREDICT, *FEW, "--targets", " , "), "targets ' , ' are empty: name at least one row"),
    ((*PREDICT, *FEW, "--targets", "@OUT/a"), "cannot read the file of ids 'OUT/a': No such file"),
    ((*PREDICT, *FEW, "--out", "OUT/a.xlsx"), "predictions are written to .zarr or .csv, got 'OUT"),
    ((*PREDICT, *FEW, "--out", "/proc/a.csv"), "cannot write '/proc/a.csv': No such file or"),
    ((*PREDICT, *FEW, "--out", "/proc/a.zarr"), "cannot write '/proc/a.zarr': No such file or"),
    ((*PREDICT, *FEW, "--out", "RUN/run.json/a.csv"), "cannot write 'RUN/run.json/a.csv': Not a d"),
    ((*PREDICT, *FEW, "--out", "OUT/is.csv"), "cannot write 'OUT/is.csv': a folder has that name"),
    ((*PREDICT, *FEW, "--out", "OUT/is.zarr"), "'OUT/is.zarr' exists already: name another folder"),
    ((*PREDICT, *FEW, "--checkpoint", "OUT/a"), "cannot read the checkpoint 'OUT/a': No such file"),
    ((*PREDICT, *FEW, "--checkpoint", "RUN/run.json"), "cannot read the checkpoint 'RUN/run.json'"),
    ((*PREDICT, *FEW, "--seed", "-1"), "a seed must not be negative, got -1"),
    ((*PREDICT, *FEW, "--workers", "-1"), "expected 0 or more workers, got -1"),
    ((*PREDICT, *FEW, "--device", "toaster"), "cannot compute on device 'toaster': Expected one o"),
    (("predict", "--run", "OUT", *FEW), "there is no run in 'OUT': make one with dmm precompute T"),
    ((*UNLEARN, "--method", "nix"), "unknown method 'nix': choose from do_nothing, dmm, "),
    ((*DMM, "--set", "rates=1"), "method 'dmm' has no setting 'rates'; it has: passes, rate, "),
    ((*DMM, "--set", "rate=fast"), "setting 'rate' of method 'dmm' takes float values, got 'fast'"),
    ((*DMM, "--set", "batch_size=2.5"), "setting 'batch_size' of method 'dmm' takes int values, g"),
    ((*DMM, "--set", "rate"), "--set takes field=value, got 'rate'"),
    ((*TUNE, "--hold", "dmm.rate"), "--hold takes method.field=value, got 'dmm.rate'"),
    ((*TUNE, "--hold", "rate=1"), "--hold takes method.field=value, got 'rate=1'"),
    ((*TUNE, "--hold", "pgu.rate=1"), "settings of 'pgu' are held, but it is not tuned: name it"),
    ((*DMM, "--set", "rate=1", "--set", "rate=2"), "--set gives 'rate' twice: give each field o"),
    ((*DMM, "--set", "rate=-1"), "Matching.rate must be above 0 and finite, got -1.0"),
    ((*DMM, "--set", "rate=nan"), "Matching.rate must be above 0 and finite, got nan"),
    ((*DMM, "--set", "rate=1e30"), "unlearning diverged: non-finite weights in "),
    ((*DMM, "--set", "batchnorm=nix"), "batchnorm must be "),
    ((*DMM, "--out", "OUT/model.pt"), "models are written as .safetensors, got 'OUT/model.pt'"),
    ((*DMM, "--out", "/proc/a.safetensors"), "cannot write '/proc/a.safetensors': No such file or"),
    ((*EVALUATE, "--methods", "dmm,nix"), "unknown method 'nix': choose from "),
    ((*EVALUATE, "--methods", "dmm,om", "dmm"), "method 'dmm' is named twice"),
    ((*EVALUATE, "--methods", ","), "name at least one method: do_nothing, dmm, "),
    ((*EVALUATE, *FIVE, "--n-models", "81"), "the run has 80 full models: n_models must lie betwe"),
    ((*EVALUATE, *FIVE, "--n-models", "-5"), "the run has 80 full models: n_models must lie betwe"),
    ((*EVALUATE, *FIVE, "--n-models", "1"), "the run has 80 full models: n_models must lie betwee"),
    ((*EVALUATE, *FIVE, "--forget", "a=rows:0:2", "a=rows:2:4"), "two forget sets are called 'a':"),
    ((*EVALUATE, *FIVE, "--forget", "rows:0:2", "train-99"), "unknown id 'train-99' (1 of 1 ids a"),
    ((*EVALUATE, *FIVE, "--out", "/proc/a.json"), "cannot write '/proc/a.json': No such file or"),
    ((*EVALUATE, *FIVE, "--scheduler", "tcp://a:1"), "give --workers or --scheduler, not both"),
    (("evaluate", "--run", "OUT", *FEW, *FIVE), "there is no run in 'OUT': make one with dmm prec"),
    (("report", "--run", "RUN"), "cannot read 'RUN/evaluation.json': run dmm evaluate --run RUN"),
    (("status", "--run", "OUT/nowhere"), "there is no run in 'OUT/nowhere': make one with dmm"),
    ((*PRECOMPUTE[:3], "OUT/small.py/run", *SIZES), "cannot write the run folder 'OUT/small.py/ru"),
    ((*PRECOMPUTE[:3], "/proc/run", *SIZES), "cannot write the run folder '/proc/run'"),
    ((*PRECOMPUTE[:3], "OUT"), "the task file OUT/small.py lies in the run's own folder: code is"),
    ((*PRECOMPUTE, "--full-models", "-1"), "a run needs at least 2 full models, got -1"),
    ((*PRECOMPUTE, "--subset-models", "-9"), "datamodels need at least 10 models, got -9"),
    ((*PRECOMPUTE, "--seed", "-1"), "a seed must not be negative, got -1"),
    ((*PRECOMPUTE, "--workers", "-2"), "expected 0 or more workers, got -2"),
    ((*PRECOMPUTE, "--device", "cuda:99"), "cannot compute on device 'cuda:99': "),
    ((*PRECOMPUTE[:3], "RUN", "--full-models", "9"), "the run in 'RUN' was made with full_models"),
    ((*PRECOMPUTE[:3], "RUN", *SIZES, "--seed", "3"), "the run in 'RUN' was made with seed = 0, t"),
]  # fmt: skip


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(("words", "line"), WORDS, ids=[" ".join(words) for words, _ in WORDS])
def test_bad_words_are_refused_before_anything_is_written(refused, run, tmp_path, words, line):
    write_task(tmp_path)
    for name in ("is.csv", "is.zarr"):
        (tmp_path / name).mkdir()
    told = refused(*filled(words, run, tmp_path))
    assert told.startswith(filled([line], run, tmp_path)[0])
    assert {path.name for path in tmp_path.iterdir()} <= {
        "is.csv",
        "is.zarr",
        "small.py",
        "__pycache__",
    }


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("precomputed",), "argument VERB: invalid choice: 'precomputed'"),
        ((), "the following arguments are required: VERB"),
        ((*PREDICT, *FEW, "--predictor", "nix"), "argument --predictor: invalid choice: 'nix'"),
        ((*PRECOMPUTE, "--design", "full"), "argument --design: invalid choice: 'full'"),
        ((*EVALUATE, "--n-models", "many"), "argument --n-models: invalid int value: 'many'"),
        (PREDICT, "the following arguments are required: --forget"),
        (UNLEARN, "the following arguments are required: --method"),
    ],
)
def test_words_that_are_no_choice_are_refused_in_one_line(capsys, words, text):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(list(words))
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("dmm")
    assert text in line


FILES = {
    "x = (": "cannot load a task from FILE: SyntaxError: '(' was never closed",
    "import nowhere_at_all": "cannot load a task from FILE: ModuleNotFoundError: No module named",
    "raise KeyError('mine')": "cannot load a task from FILE: KeyError: 'mine'",
    "import sys; sys.exit(3)": "cannot load a task from FILE: SystemExit: 3",
    "tusk = 1": "FILE has nothing called 'task'",
    "task = 1": "'FILE:task' is a int, not a Task: make one with attribution.Task(...)",
    TASK.replace(
        "nn.Linear(4, 6)", "nn.Linear(7, 6)"
    ): "task 'small': the model does not take inputs",
    TASK.replace("mlp, recipe)", "mlp)"): "task 'small' has neither a recipe nor a train function",
}


@pytest.mark.parametrize("text", FILES, ids=FILES.values())
def test_a_file_without_a_good_task_is_refused(refused, tmp_path, text):
    spec = write_task(tmp_path, text, "other.py")
    line = FILES[text].replace("FILE", f"{tmp_path}/other.py")
    assert refused("precompute", spec, "--run", tmp_path / "run", *SIZES).startswith(line)


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("nowhere.py:task", "there is no file 'nowhere.py' to load a task from"),
        ("nowhere_at_all:task", "there is no module 'nowhere_at_all' to load a task from"),
        ("small.py", "expected a task as file.py:name or module:name, got 'small.py'"),
        ("small.py:", "expected a task as file.py:name or module:name, got 'small.py:'"),
    ],
)
def test_a_task_that_is_not_there_is_refused(refused, tmp_path, spec, line):
    assert refused("precompute", spec, "--run", tmp_path / "run", *SIZES) == line
    assert list(tmp_path.iterdir()) == []


LABEL = "train_data = blobs(37, 1)", "train_data = blobs(37, 1)\ntrain_data.tensors[1][4] += 1"
ROWS = "train_data = blobs(37, 1)", "train_data = blobs(36, 1)"
EPOCHS = "epochs=2", "epochs=12"
CHANGES = [
    (LABEL, "data.train: stored '"),
    (EPOCHS, "recipe.epochs: stored 2, wanted 12"),
    (("blobs(11, 2)", "blobs(11, 22)"), "data.test: stored '"),
    (('"small"', '"smaller"'), "task: stored 'small', wanted 'smaller'"),
]


@pytest.mark.parametrize(("change", "field"), CHANGES, ids=[field for _, field in CHANGES])
def test_another_task_than_the_runs_is_refused_by_every_verb(
    refused, copy, tmp_path, change, field
):
    before = contents(copy)
    spec = write_task(tmp_path, TASK.replace(*change))
    where = f"{copy}/full was made with other settings: "
    for words in (PREDICT + FEW, DMM, EVALUATE + FIVE):
        told = refused(*filled(words, copy, tmp_path))
        assert told.startswith(where + field)
        assert told.endswith("; give another folder, or the same settings")
    assert refused("precompute", spec, "--run", copy, *SIZES).startswith(where)
    assert contents(copy) == before
    write_task(tmp_path)
    assert main(filled((*PREDICT, *FEW), copy, tmp_path)) == 0


def test_rows_that_came_or_went_are_refused(refused, copy, tmp_path):
    write_task(tmp_path, TASK.replace(*ROWS))
    told = refused(*filled((*PREDICT, *FEW), copy, tmp_path))
    assert "data.train: stored '" in told


def test_a_task_file_that_went_away_is_refused(refused, copy, tmp_path):
    (tmp_path / "small.py").unlink()
    told = refused(*filled((*PREDICT, *FEW), copy, tmp_path))
    assert told == f"there is no file '{tmp_path}/small.py' to load a task from"


def test_a_task_is_never_loaded_from_the_runs_own_folder(refused, copy, tmp_path):
    inside = copy / "small.py"
    inside.write_text("raise AssertionError('loaded')")
    settings = json.loads((copy / "run.json").read_text()) | {"task": f"{inside}:task"}
    (copy / "run.json").write_text(json.dumps(settings))
    told = refused(*filled((*PREDICT, *FEW), copy, tmp_path))
    assert told == f"the task file {inside} lies in the run's own folder: code is not loaded there"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            "",
            "cannot read 'RUN/run.json', the settings of a run (Expecting value: line 1 column 1"
            " (char 0)): restore it from a copy, or remove it and give dmm precompute with the"
            " settings of before, which keeps what is computed",
        ),
        ("{}", "cannot read 'RUN/run.json', the settings of a run ('schema'): restore it from a c"),
        ('{"schema": 99}', "the run in 'RUN' has schema 99, this version reads 1"),
    ],
)
def test_a_spoiled_run_file_is_refused(refused, tmp_path, content, line):
    (tmp_path / "run.json").write_text(content)
    assert refused("status", "--run", tmp_path).startswith(line.replace("RUN", str(tmp_path)))


def test_a_spoiled_run_file_is_cured_by_what_its_refusal_says(refused, dmm, copy, tmp_path):
    sound, spec = arrays(copy), f"{tmp_path}/small.py:task"
    (copy / "run.json").write_text('{"schema": 1, "task')
    told = refused("precompute", spec, "--run", copy, *SIZES)
    assert told.startswith(f"cannot read '{copy}/run.json', the settings of a run (Unterminated")
    (copy / "run.json").unlink()
    assert refused("status", "--run", copy).startswith(f"there is no run in '{copy}': make one")
    dmm("precompute", spec, "--run", copy, *SIZES)
    assert arrays(copy) == sound


def test_a_run_that_is_not_finished_is_refused(refused, copy, tmp_path):
    (copy / "full" / "done" / "c" / "1").unlink()
    told = refused(*filled(EVALUATE + FIVE, copy, tmp_path))
    assert told == (
        f"{copy}/full is not finished: block 1 of 50 models each pending; run the command that"
        " makes it again, it resumes"
    )
    shutil.rmtree(copy / "datamodel-mixed-24")
    (copy / "full" / "done" / "c" / "1").touch()
    told = refused(*filled((*PREDICT, *FEW), copy, tmp_path))
    assert told.startswith(f"expected a store at {copy}/datamodel-mixed-24, found none; ")


@pytest.fixture
def unlearned(run, tmp_path, capsys):
    """The file of a model that has forgotten some rows."""
    assert main(filled(DMM, run, tmp_path)) == 0
    capsys.readouterr()
    return tmp_path / "model.safetensors"


def spoiled(state, change):
    key = sorted(state)[0]
    if change == "infinite":
        state[key][0] = torch.inf
    elif change == "missing":
        del state[key]
    elif change == "more":
        state["more"] = torch.zeros(2)
    elif change == "shape":
        state[key] = torch.zeros(7)
    return state


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("infinite", "FILE has non-finite weights in key '0.bias'"),
        ("missing", "FILE does not fit task 'small': key '0.bias' is missing"),
        ("more", "FILE does not fit task 'small': unexpected key 'more'"),
        (
            "shape",
            "FILE does not fit task 'small': key '0.bias' has shape (7,), the model's is (6,)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_key(refused, run, unlearned, change, line):
    file = unlearned.with_name("spoiled.safetensors")
    save_file(spoiled(load_file(unlearned), change), file)
    for words in (PREDICT + FEW, DMM):
        told = refused(*filled((*words, "--checkpoint", str(file)), run, file.parent))
        assert told == line.replace("FILE", str(file))


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_a_report_of_something_else_is_refused(refused, copy, content):
    (copy / "evaluation.json").write_text(content)
    told = refused("report", "--run", copy)
    assert re.match("'.*evaluation.json' holds no evaluation|cannot read '.*evaluation.json'", told)
    assert not (copy / "report.html").exists()


def test_after_all_refusals_the_run_is_whole_and_works(run, capsys):
    assert main(["status", "--run", str(run), "--verify"]) == 0
    assert capsys.readouterr().out.endswith("all checksums hold\n")
    assert main(filled((*PREDICT, *FEW), run, run)) == 0
