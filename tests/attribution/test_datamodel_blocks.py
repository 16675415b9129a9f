"""Blocks of datamodels: how wide they are and how little memory they get changes no number."""

import numpy as np
import pytest

from attribution import (
    LinearDatamodel,
    datamodels,
    effects,
    fit_datamodels,
    held_out,
    ridge_datamodels,
)
from tests.attribution.datamodel_cases import OUTPUTS, RIDGE, TARGETS, TRAIN, made, noisy
from tests.tasks import blobs


@pytest.fixture(scope="module")
def task():
    return blobs(rows=TRAIN, test_rows=TARGETS - TRAIN)


@pytest.fixture(scope="module")
def noisy_pair(task, tmp_path_factory):
    judges = np.arange(38) % 3 != 0
    return made(tmp_path_factory.mktemp("noisy"), task, noisy, judges=judges)


@pytest.fixture(scope="module")
def fitted(noisy_pair, tmp_path_factory):
    ensemble, anchor = noisy_pair
    to = tmp_path_factory.mktemp("fitted") / "datamodel"
    return fit_datamodels(ensemble, anchor=anchor, to=to, method=RIDGE, dtype="float64", seed=3)


def test_blocks_change_nothing_and_resume(noisy_pair, fitted, tmp_path, monkeypatch):
    ensemble, anchor = noisy_pair
    options = {"method": RIDGE, "dtype": "float64", "seed": 3, "to": tmp_path / "datamodel"}
    monkeypatch.setattr(datamodels, "score_block", lambda *_: 5)
    monkeypatch.setattr(ridge_datamodels, "COLUMNS", 3 * OUTPUTS)
    solved, solve = [], ridge_datamodels.solve

    def interrupted(*args, free):
        solved.append(args)
        if len(solved) == 4:
            raise KeyboardInterrupt
        return solve(*args, free=free)

    monkeypatch.setattr(ridge_datamodels, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_datamodels(ensemble, anchor=anchor, **options)
    with pytest.raises(ValueError, match="datamodel is not finished: run the command"):
        LinearDatamodel.open(tmp_path / "datamodel")
    found = fit_datamodels(ensemble, anchor=anchor, **options)
    assert found.store.spec.blocks == 4
    assert len(solved) == 4 + 2 + 2 + 1
    for name in found.store.spec.arrays:
        expected = fitted.store.numpy(name)
        np.testing.assert_allclose(found.store.numpy(name), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sizes", [(1, 13), (3, 4), (7, 5)])
def test_little_memory_changes_nothing(noisy_pair, fitted, tmp_path, monkeypatch, sizes):
    """Some targets at a time, their dual coefficients in a file, and rows by storage objects."""
    (ensemble, anchor), (step, rows) = noisy_pair, sizes
    copies = ridge_datamodels.COPIES
    monkeypatch.setattr(datamodels, "STEP_BYTES", step * copies * 39 * OUTPUTS * 8)
    monkeypatch.setattr(datamodels, "KEPT_BYTES", 0)
    monkeypatch.setattr(effects, "OBJECT_BYTES", rows * TARGETS * OUTPUTS * 8)
    monkeypatch.setattr(held_out, "PIECE", 60)  # two of the held-out models at once
    widths, solve = [], ridge_datamodels.solve

    def watched(design, rotated, *rest, free):
        widths.append(rotated.shape[1])
        return solve(design, rotated, *rest, free=free)

    monkeypatch.setattr(ridge_datamodels, "solve", watched)
    options = {"method": RIDGE, "dtype": "float64", "seed": 3, "to": tmp_path / "datamodel"}
    found = fit_datamodels(ensemble, anchor=anchor, **options)
    assert found.store.spec.blocks == 1
    assert widths == [*[step] * (TARGETS // step), *[TARGETS % step] * (TARGETS % step > 0)]
    for name in found.store.spec.arrays:
        expected = fitted.store.numpy(name)
        np.testing.assert_allclose(found.store.numpy(name), expected, rtol=0, atol=1e-10)


def test_a_store_that_was_cut_otherwise_stays_so(noisy_pair, tmp_path, monkeypatch):
    ensemble, anchor = noisy_pair
    options = {"method": RIDGE, "to": tmp_path / "datamodel"}
    with monkeypatch.context() as older:
        older.setattr(datamodels, "score_block", lambda *_: 5)
        first = fit_datamodels(ensemble, anchor=anchor, **options)
    first.store.discard(2)
    found = fit_datamodels(ensemble, anchor=anchor, **options)
    assert found.store.spec.block == 5


def test_resuming_decomposes_nothing_again(noisy_pair, tmp_path, monkeypatch):
    ensemble, anchor = noisy_pair
    options = {"method": RIDGE, "to": tmp_path / "datamodel"}
    first = fit_datamodels(ensemble, anchor=anchor, **options)
    bits = {name: first.store.numpy(name).tobytes() for name in first.store.spec.arrays}
    first.store.discard(0)
    monkeypatch.setattr(ridge_datamodels, "decompose", lambda *_: pytest.fail("it is stored"))
    again = fit_datamodels(ensemble, anchor=anchor, **options).store
    assert {name: again.numpy(name).tobytes() for name in bits} == bits
