"""A small run with names that tell, with everything in it that a run can hold."""

import functools
import shutil
from pathlib import Path

from attribution import ForgetSet, record_run
from attribution.forget import parse_forget
from attribution.precompute import precompute
from attribution.prediction_files import write_prediction
from attribution.run import Run
from tests.small_runs import TASK, write_task

# With the recipe's own weight decay the search for a damping takes several rounds.
NAMED = TASK.replace(
    "mlp, recipe)", "mlp, recipe, train_ids=[f'person-{i:03d}' for i in range(37)])"
).replace("weight_decay=0.05", "weight_decay=5e-4")
SIZES = {"full_models": 6, "subset_models": 24, "checkpoints": 3, "workers": 0}
PLAIN = SIZES | {"checkpoints": 0}
TRAIN, TEST = 37, 11
GONE = (3, 8, 30, 36)
SPEC = ",".join(f"person-{i:03d}" for i in GONE)
LEFT = [i for i in range(TRAIN) if i not in GONE]
FEW = ["person-001", "person-012", "person-029"]
TARGETS_LEFT = [i for i in range(TRAIN + TEST) if i not in GONE]
CLEARED = {
    "evaluation.json",
    "pages/why.html",
    "predicted.csv",
    "tests.csv",
    "tuned.json",
    "kept.json.partial",
    "full.0a.tmp",
    "gone.zarr",
    "typed.zarr",
    "calibration/residual/prior",
}


@functools.cache
def whole_run(base):
    """Made once for all tests; whoever changes it makes a copy."""
    folder = base / "named_run"
    folder.mkdir()
    path = folder / "run"
    run = precompute(write_task(folder, NAMED), path, **SIZES)
    run.predictor("trak")
    for positions in [(1, 5), (5, 8)]:
        run.bank(ForgetSet.at(run.task, positions), 0, 4, workers=0)
    ids = [run.task.train_ids[i] for i in (1, 3, 4)]
    record_run(run.task, path / "in-run", targets=ids, per_target=True)
    predicted = run.datamodel.predict(run.model(0), ForgetSet.of(run.task, ids), ids)
    write_prediction(predicted, str(path / "few.zarr"), ForgetSet.of(run.task, ids))
    one = run.datamodel.predict(run.model(0), ForgetSet.of(run.task, ids), ids[1:2])
    write_prediction(one, str(path / "gone.zarr"), ForgetSet.of(run.task, ids))
    typed = parse_forget(run.task, "person-008,person-001")
    write_prediction(predicted, str(path / "typed.zarr"), typed)
    write_prediction(predicted, str(path / "predicted.csv"), ForgetSet.of(run.task, ids))
    tests = run.datamodel.predict(run.model(0), ForgetSet.of(run.task, ids), run.task.test_ids)
    write_prediction(tests, str(path / "tests.csv"), ForgetSet.of(run.task, ids))
    (path / "tuned.json").write_text("{}")
    (path / "pages").mkdir()
    (path / "evaluation.json").write_text("{}")
    (path / "pages" / "why.html").write_text("<td>person-030</td>")
    (path / "pages" / "other.html").write_text("<td>person-031</td> person-0301")
    (path / "kept.json.partial").write_text("person-001")
    shutil.copytree(path / "full" / "mask", path / "full.0a.tmp" / "mask")
    return path


@functools.cache
def plain_named_run(base):
    """One without gradients and calibration, where it does not matter which stores there are."""
    folder = base / "plain_named_run"
    folder.mkdir()
    precompute(write_task(folder, NAMED), folder / "run", **PLAIN)
    return folder / "run"


def copied(path, folder, text=NAMED):
    """A copy of the run, with a task file of its own beside it."""
    path = Path(path)
    spec = write_task(folder, text)
    shutil.copytree(path, folder / "run")
    found = (folder / "run" / "run.json").read_text()
    old = f"{path.parent}/small.py:task"
    assert old in found
    (folder / "run" / "run.json").write_text(found.replace(old, spec))
    return folder / "run"


def opened(path):
    """The run after a purge, whose warning is expected."""
    import pytest

    with pytest.warns(UserWarning, match="4 rows of task 'small' were purged"):
        return Run.open(path)


def change(run, name, ids=FEW):
    return run.predictor(name).change(ForgetSet.of(run.task, ids))
