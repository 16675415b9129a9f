"""How large the effects of rows are expected to be, and rows whose effects nothing tells."""

import numpy as np
import pytest
import torch

from attribution import ForgetSet, Ridge, fit_datamodels, regression
from attribution.regression import Problem, problem
from tests.attribution.datamodel_cases import (
    ANCHORS,
    LAMBDAS,
    TARGETS,
    TRAIN,
    half_masks,
    made,
    noisy,
    write_pair,
)
from tests.tasks import binary, blobs, line, write_ensemble


@pytest.fixture(scope="module")
def task():
    return blobs(rows=TRAIN, test_rows=TARGETS - TRAIN)


@pytest.fixture(scope="module")
def noisy_pair(task, tmp_path_factory):
    return made(tmp_path_factory.mktemp("noisy"), task, noisy)


def test_rows_that_do_not_pull_are_expected_to_be_alike(noisy_pair, tmp_path, monkeypatch):
    ensemble, anchor = noisy_pair

    def effects(name, method):
        found = fit_datamodels(ensemble, anchor=anchor, to=tmp_path / name, method=method)
        return found.store.numpy("effects")

    plain = effects("plain", Ridge(LAMBDAS, alike=1.0, free=False))
    pulled = Ridge(LAMBDAS, free=False)
    assert np.abs(effects("pulled", pulled) - plain).max() > 0.01
    monkeypatch.setattr(Problem, "pulls", lambda self: torch.zeros(TRAIN, dtype=torch.float64))
    np.testing.assert_array_equal(effects("at-rest", pulled), plain)


@pytest.mark.parametrize("kind", [blobs, binary, line])
def test_pulls_are_lengths_of_the_losses_derivatives(kind, tmp_path, monkeypatch):
    task = kind(rows=TRAIN, test_rows=TARGETS - TRAIN)
    shape = TARGETS, 3 if kind is blobs else 1
    outputs = np.random.default_rng(2).normal(size=(ANCHORS, *shape))
    anchor = write_ensemble(tmp_path / "full", task, np.ones((ANCHORS, TRAIN), bool), outputs)
    halves = half_masks(4, np.random.default_rng(3))
    ensemble = write_ensemble(tmp_path / "subsets", task, halves, np.zeros((4, *shape)))
    models = problem(ensemble, anchor, 0, torch.float32)
    labels, expected = task.targets(np.arange(TRAIN))[1], []
    for given in torch.from_numpy(outputs[:, :TRAIN]):
        leaf = given.clone().requires_grad_()
        task.loss.value(leaf, labels).sum().backward()
        expected.append(leaf.grad.square().sum(1).sqrt())
    found = models.pulls()
    np.testing.assert_allclose(found, torch.stack(expected).mean(0), rtol=1e-6)
    monkeypatch.setattr(regression, "TOGETHER", 5 * ANCHORS * shape[1])
    np.testing.assert_allclose(models.pulls(), found, rtol=1e-14)


@pytest.mark.parametrize("alike", [0.0, -0.5, 1.5, float("nan")])
def test_shares_that_are_none_are_refused(alike):
    with pytest.raises(ValueError, match=rf"alike must be above 0 and at most 1, got {alike}"):
        Ridge(alike=alike)


def test_a_freedom_that_is_none_is_refused():
    with pytest.raises(ValueError, match="free must be None, False or True, got 'yes'"):
        Ridge(free="yes")


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("models", [11, 38])
def test_nothing_tells_the_effect_of_a_row_that_all_models_saw(task, tmp_path, models, free):
    random = np.random.default_rng(6)
    masks = np.concatenate([half_masks(models, random), np.ones((ANCHORS, TRAIN), dtype=bool)])
    masks[:, 4] = True
    ensemble, anchor = write_pair(tmp_path, task, masks, noisy(masks, random))
    method = Ridge(LAMBDAS, free=free)
    found = fit_datamodels(ensemble, anchor=anchor, to=tmp_path / "x", method=method)
    assert not found.store.numpy("effects")[4].any()
    assert np.abs(found.store.numpy("effects")).max() < 10
    std = found.change(ForgetSet.at(task, [4])).std
    assert np.isinf(std[4]).all() == free
    assert np.isfinite(np.delete(std, 4, 0)).all()
    assert std.min() > 0
