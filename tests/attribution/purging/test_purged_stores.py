"""Every store of a purged run lacks the rows, and nothing else."""

from pathlib import Path

import numpy as np
import torch

from attribution import Ensemble
from attribution.gradients.jacobian import Factored
from stores import Store
from tests.attribution.purging.runs import (
    CLEARED,
    LEFT,
    TARGETS_LEFT,
)


def test_every_store_is_one_of_the_smaller_task(whole, left):
    assert left.task.train_ids == tuple(whole.task.train_ids[i] for i in LEFT)
    for store in left.stores():
        assert store.complete
        assert store.verify() == []
        for axis in ("train", "target"):
            lengths = {
                length
                for array in store.spec.arrays.values()
                for name, length in zip(array.axes, array.shape, strict=True)
                if name == axis
            }
            few = {"in-run": 2, "few.zarr": 2}.get(store.place.name)
            assert lengths <= {few or {"train": 33, "target": 44}[axis], 33}


def test_ensembles_lose_columns_of_outputs_and_masks(whole, left):
    for name in ("full", "ensemble-mixed-24", "calibration/bank"):
        before = Ensemble.open(whole.path / name, whole.task)
        after = Ensemble.open(left.path / name, left.task)
        np.testing.assert_array_equal(after.outputs, before.outputs[:, TARGETS_LEFT])
        np.testing.assert_array_equal(after.masks, before.masks[:, LEFT])
    assert after.keeps_weights is False
    states = whole.full.states(), left.full.states()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_features_lose_rows_and_nothing_else(whole, left):
    for c in range(3):
        before = whole.features.gather(c, np.array(TARGETS_LEFT))
        np.testing.assert_array_equal(left.features.gather(c, np.arange(44)), before)
        factors = [run.features.jacobian(c, rows) for run, rows in
                   ((whole, np.array(TARGETS_LEFT)), (left, np.arange(44)))]  # fmt: skip
        assert all(isinstance(j, Factored) for j in factors)
        assert torch.equal(factors[0].dense(), factors[1].dense())
        dealt = [run.features.stores[c].constant("dealt") for run in (whole, left)]
        np.testing.assert_array_equal(*dealt)


def test_values_recorded_in_a_run_lose_rows_and_targets(whole, left):
    before, after = (Store.open(run.path / "in-run") for run in (whole, left))
    assert after.ids("target") == ["person-001", "person-004"]
    assert after.attributes["targets"] == after.ids("target")
    np.testing.assert_array_equal(after.constant("positions"), [1, 3])
    np.testing.assert_array_equal(after.numpy("scores"), before.numpy("scores")[LEFT][:, [0, 2]])


def test_the_plan_and_the_answer_agree_with_what_is_there(whole, done, left):
    path, told = done
    banks = {bank.name for bank in Path(whole.path.url, "oracles").iterdir()}
    (bank,) = (path / "oracles").iterdir()
    gone = {f"oracles/{name}" for name in banks - {bank.name}}
    assert set(told.removed) == CLEARED | gone
    assert set(told.rewritten) == {s.path.removeprefix(f"{path}/") for s in left.stores()}
    assert (told.rows, told.already, told.finished, told.tombstones) == (4, 0, False, 4)
    assert told.bytes_after == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert told.kept == ("pages/other.html",)
    assert (path / "pages" / "other.html").exists()
    kept = Ensemble.open(bank / "audit", left.task)
    assert kept.without.ids == ("person-001", "person-005")
