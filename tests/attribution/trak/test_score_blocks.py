"""Scores as they lie on disk: margins where they are needed, half precision, bounded memory."""

import numpy as np
import pytest
from torch import nn

from attribution import ForgetSet, LinearDatamodel, effects
from attribution.trak import fit_trak, fitting, score_blocks
from stores import total
from tests.attribution.trak.cases import checkpoints, dense_scores, make_features
from tests.tasks import binary, blobs, line


@pytest.fixture(scope="module")
def task():
    """Three outputs, so that the margin's derivative depends on them."""
    return blobs(model=lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))


@pytest.fixture(scope="module")
def features(task, tmp_path_factory):
    return make_features(task, tmp_path_factory.mktemp("features") / "features")


@pytest.fixture
def small(monkeypatch):
    """Blocks of 5 targets whose storage objects hold 6 rows; neither divides what there is."""
    monkeypatch.setattr(fitting, "score_block", lambda *_: 5)
    monkeypatch.setattr(effects, "OBJECT_BYTES", 6 * 5 * 3 * 4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_slabs_give_the_dense_scores(task, features, tmp_path, small, dtype):
    found = fit_trak(features, tmp_path / "trak", damping=0.3, top=4, dtype=dtype)
    assert found.store.spec.blocks == 10
    assert "margins" in found.store.spec.arrays
    dense, margins = dense_scores(task, checkpoints(task, 3), 0.3)
    off = {"float32": 1e-5, "float16": 1e-3}[dtype]
    for target in range(48):
        np.testing.assert_allclose(found.effects(target), dense[:, target], rtol=off, atol=1e-5)
        np.testing.assert_allclose(found.margins(target), margins[:, target], rtol=off, atol=1e-5)
        rows, values = found.strongest(target)
        order = np.argsort(margins[:, target], kind="stable")
        np.testing.assert_array_equal(rows, [order[::-1][:4], order[:4]])
        np.testing.assert_allclose(values, margins[rows, target], rtol=1e-4, atol=1e-5)
    everything = total(found.store, "effects", np.arange(37))
    np.testing.assert_allclose(everything, dense.sum(0), rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_effects_of_any_size(features, tmp_path):
    plain = fit_trak(features, tmp_path / "plain", damping=1e7)
    halved = fit_trak(features, tmp_path / "halved", damping=1e7, dtype="float16")
    assert np.abs(plain.effects(3)).max() < 1e-6  # less than float16 tells from 0 in full
    np.testing.assert_allclose(halved.effects(3), plain.effects(3), rtol=1e-3, atol=1e-13)
    forget = ForgetSet.at(features.task, [2, 9, 30])
    changes = [LinearDatamodel.from_scores(each).change(forget) for each in (plain, halved)]
    np.testing.assert_allclose(changes[1].mean, changes[0].mean, rtol=1e-2, atol=1e-10)
    np.testing.assert_allclose(changes[1].std, changes[0].std, rtol=1e-6)


@pytest.mark.parametrize("kept", [1, 3 * 3 * 3 * 31 * 4 * 7])
@pytest.mark.parametrize("rows", [6, 37])
def test_little_memory_changes_nothing(features, tmp_path, monkeypatch, kept, rows):
    """Features of one target at a time, or of seven, from a file."""
    plain = fit_trak(features, tmp_path / "plain", damping=0.3).store
    monkeypatch.setattr(fitting, "BLOCK_BYTES", kept)
    monkeypatch.setattr(effects, "OBJECT_BYTES", rows * 48 * 3 * 4)
    found = fit_trak(features, tmp_path / "trak", damping=0.3).store
    assert found.spec.blocks == plain.spec.blocks == 1
    for name in plain.spec.arrays:
        expected = plain.numpy(name)
        np.testing.assert_allclose(found.numpy(name), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [line, binary, blobs])
def test_margins_that_follow_from_the_outputs_are_not_stored(tmp_path, make):
    task = make()
    found = fit_trak(make_features(task, tmp_path / "features"), tmp_path / "trak", damping=0.3)
    assert "margins" not in found.store.spec.arrays
    _, margins = dense_scores(task, checkpoints(task, 3), 0.3)
    for target in (0, 36, 47):
        np.testing.assert_allclose(found.margins(target), margins[:, target], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rows", [37, 137])
def test_no_product_is_larger_than_a_storage_object(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(effects, "OBJECT_BYTES", 2**12)
    sizes, product = [], score_blocks.product

    def watched(solved, columns):
        sizes.append(len(solved) * columns.shape[1] * 4)
        return product(solved, columns)

    monkeypatch.setattr(score_blocks, "product", watched)
    features = make_features(blobs(rows=rows), tmp_path / "features", 2)
    found = fit_trak(features, tmp_path / "trak", damping=0.3, top=4)
    assert found.store.spec.array("effects").nbytes > 3 * 2**12
    assert max(sizes) <= 2**12
