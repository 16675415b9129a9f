"""What goes on working after a purge, and what is refused."""

import os
import shutil

import numpy as np
import pytest

from attribution.precompute import precompute
from attribution.purging.purge import purge
from attribution.run import Run
from stores import Store
from tests.attribution.purging.runs import (
    LEFT,
    NAMED,
    SIZES,
    SPEC,
    TARGETS_LEFT,
    change,
    copied,
)
from tests.old_stores import forget_scales
from tests.small_runs import contents, write_task

# -- what goes on working --------------------------------------------------------------------------


def test_the_same_precompute_changes_nothing(done, left):
    path, _ = done
    before = contents(path)
    with pytest.warns(UserWarning, match="4 rows of task 'small' were purged"):
        precompute(left.settings.task, path, **SIZES)
    assert contents(path) == before


def test_a_task_that_no_longer_holds_the_rows_opens_without_a_word(done, tmp_path):
    path = shutil.copytree(done[0], tmp_path / "run")
    fewer = NAMED.replace(
        "train_data = blobs(37, 1)",
        f"kept = {LEFT}\ntrain_data = TensorDataset(*(t[kept] for t in blobs(37, 1).tensors))",
    ).replace("for i in range(37)]", "for i in kept]")
    spec = write_task(tmp_path, fewer)
    (path / "run.json").write_text(
        (path / "run.json").read_text().replace(f"{done[0].parent}/small.py:task", spec)
    )
    assert len(Run.open(path).task.train_ids) == 33
    before = contents(path)
    precompute(spec, path, **SIZES)
    assert contents(path) == before


def test_more_checkpoints_join_a_purged_run(done, tmp_path):
    path = copied(done[0], tmp_path)
    with pytest.warns(UserWarning, match="4 rows"):
        run = precompute(f"{tmp_path}/small.py:task", path, **SIZES | {"checkpoints": 4})
    assert len(run.features) == 4
    assert change(run, "newton").mean.shape == (44, 3)


def test_a_run_that_is_not_finished_is_purged_and_then_finished(whole, tmp_path):
    path = copied(whole.path.url, tmp_path)
    for name in ("ensemble-mixed-24", "moments", "datamodel-mixed-24", "trak-3/scores"):
        Store.open(path / name).discard(0)
    for name in ("calibration.json",):
        (path / name).unlink()
    told = purge(path, SPEC)
    gone = {"moments", "datamodel-mixed-24", "trak-3/scores", "trak-3/rows-1"}
    assert gone <= set(told.removed)
    with pytest.warns(UserWarning, match="4 rows"):
        run = precompute(f"{tmp_path}/small.py:task", path, **SIZES)
    assert run.predictors == whole.predictors
    assert all(store.complete for store in run.stores())
    assert change(run, "trak").mean.shape == (44, 3)


@pytest.mark.filterwarnings("ignore:4 rows of task 'small' were purged")
@pytest.mark.parametrize("when", ["before", "after"])
def test_datamodels_of_an_older_version_are_fitted_anew(whole, done, left, tmp_path, when):
    path = shutil.copytree(done[0] if when == "before" else whole.path.url, tmp_path / "run")
    for name in ("datamodel-mixed-24", "residual-mixed-24"):
        forget_scales(path / name)
    if when == "after":
        purge(path, SPEC)
    with pytest.raises(ValueError, match=r"by an older version.* the same command") as refusal:
        precompute(left.settings.task, path, **SIZES)
    told = str(refusal.value).partition(": remove ")[2].partition(", and the same")[0]
    for pattern in told.split(", "):
        for found in path.glob(os.path.relpath(pattern, path)):
            found.unlink() if found.is_file() else shutil.rmtree(found)
    precompute(left.settings.task, path, **SIZES)
    run = Run.open(path)
    assert run.predictors == left.predictors
    assert run.calibration.weights != left.calibration.weights
    assert np.isfinite(change(run, "combined").std).all()


def test_a_second_purge_takes_further_rows(whole, done, tmp_path):
    path = copied(done[0], tmp_path)
    with pytest.warns(UserWarning, match="4 rows"):
        told = purge(path, f"{SPEC},person-020")
    assert (told.rows, told.already, told.tombstones) == (1, 4, 5)
    with pytest.warns(UserWarning, match="5 rows"):
        run = Run.open(path)
    rows = [i for i in TARGETS_LEFT if i != 20]
    before, after = change(whole, "datamodel"), change(run, "datamodel")
    np.testing.assert_array_equal(after.mean, before.mean[rows])
    assert all(store.verify() == [] for store in run.stores())


def test_rows_that_are_purged_already_are_told_of(done):
    path, _ = done
    before = contents(path)
    with pytest.warns(UserWarning, match="4 rows"):
        told = purge(path, "old=person-008,person-030")
    assert (told.rows, told.already, told.rewritten, told.tombstones) == (0, 2, (), 4)
    assert contents(path) == before


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("person-999", "unknown id 'person-999'"),
        ("person-001,test-3", "'test-3' is none of the 37 training rows"),
        ("rows:0:37", "holds all 37 training rows: nothing is left"),
        (None, "no purge of .* was interrupted: name the rows with --forget"),
    ],
)
def test_rows_that_cannot_be_purged_are_refused(whole, spec, text):
    before = contents(whole.path.url)
    with pytest.raises(ValueError, match=text):
        purge(whole.path, spec)
    assert contents(whole.path.url) == before


def test_a_damaged_block_is_refused_before_anything_changes(whole, tmp_path):
    path = copied(whole.path.url, tmp_path)
    chunk = path / "full/outputs/c/0/0/0"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    before = contents(path)
    with pytest.raises(RuntimeError, match=r"damaged: full blocks \[0\]; nothing was purged"):
        purge(path, SPEC)
    assert contents(path) == before


def test_a_store_of_an_unknown_kind_is_refused_before_anything_changes(whole, tmp_path):
    path = copied(whole.path.url, tmp_path)
    root = path / "few.zarr" / "zarr.json"
    text = root.read_text()
    root.write_text(
        text.replace("datamodel-matching.prediction", "datamodel-matching.other").replace(
            '"kind": "prediction"', '"kind": "other"'
        )
    )
    before = contents(path)
    with pytest.raises(ValueError, match=r"few\.zarr is a store of kind 'other', which purge does"):
        purge(path, SPEC)
    assert contents(path) == before
