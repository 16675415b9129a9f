import re
from dataclasses import replace

import numpy as np
import pytest

from attribution import Calibration, ForgetSet, fit_datamodels
from attribution.cases import KINDS
from attribution.residual import models_like_requests, residual_models
from stores import Store
from tests.attribution.newton.cases import newton_of
from tests.tasks import blobs, write_ensemble

MODELS, FULL, TARGETS = 23, 4, 48
TRUST = {"forget": 0.5, "retain": 1.5, "test": 0.75}


@pytest.fixture(scope="module")
def task():
    return blobs()


@pytest.fixture(scope="module")
def newton(task, tmp_path_factory):
    return newton_of(task, tmp_path_factory.mktemp("newton"), damping=0.5, temperature=1.3, steps=2)


@pytest.fixture(scope="module")
def masks(task):
    """Two halves, a model that saw everything, and models that lack few rows."""
    random = np.random.default_rng(3)
    rows = len(task.train_ids)
    near = random.random((MODELS, rows)) < 0.9
    near[:2] = np.arange(rows) % 2 == 0
    near[2] = True
    return near


def kinds_of(mask, task):
    train = np.where(mask, "retain", "forget")
    return np.append(train, ["test"] * (TARGETS - len(task.train_ids)))


def prior_of(newton, task, mask):
    """What one plain step of the first two checkpoints says, times the trust in each kind."""
    rows = np.flatnonzero(~mask)
    if not len(rows):
        return np.zeros((TARGETS, 2), dtype=np.float32)
    each = [newton.step(c, ForgetSet.at(task, rows)).numpy() for c in range(2)]
    mean = np.mean([newton.features.product(c, d) for c, d in enumerate(each)], axis=0)
    return np.array([TRUST[kind] for kind in kinds_of(mask, task)])[:, None] * mean


@pytest.fixture(scope="module")
def one_step(newton):
    return replace(newton, steps=1)


@pytest.fixture(scope="module")
def pair(task, one_step, masks, tmp_path_factory):
    """Models that do what the prior says, to the letter; the noise of the full ones is even."""
    folder = tmp_path_factory.mktemp("pair")
    told = np.stack([prior_of(one_step, task, mask) for mask in masks])
    spread = np.array([-1.0, 1.0, -2.0, 2.0], dtype=np.float32)[:, None, None]
    everything = np.ones((FULL, len(task.train_ids)), dtype=bool)
    return (
        write_ensemble(folder / "subsets", task, masks, (3 + told).astype(np.float32)),
        write_ensemble(folder / "full", task, everything, np.tile(3 + spread, (1, TARGETS, 2))),
    )


def test_models_that_lack_few_rows_are_chosen(pair):
    ensemble, _ = pair
    every = models_like_requests(ensemble, 100)
    lacking = (~ensemble.masks).mean(1)
    assert set(every) == set(np.flatnonzero((lacking > 0) & (lacking <= 0.25)))
    assert not set(every) & {0, 1, 2}
    few = models_like_requests(ensemble, 7, seed=1)
    assert (len(few), set(few) <= set(every)) == (7, True)
    assert (few == np.sort(few)).all()
    assert (few == models_like_requests(ensemble, 7, seed=1)).all()
    assert (few != models_like_requests(ensemble, 7, seed=2)).any()


def test_what_the_prior_tells_is_taken_out_with_a_factor_for_each_kind(pair, newton, tmp_path):
    ensemble, full = pair
    chosen = models_like_requests(ensemble, 15)
    left = residual_models(ensemble, newton, tmp_path / "left", anchor=full, models=chosen)
    np.testing.assert_allclose(left.outputs, 3, atol=1e-4)
    np.testing.assert_array_equal(left.masks, ensemble.masks[chosen])
    np.testing.assert_array_equal(left.judges, ensemble.judges[chosen])
    assert np.abs(ensemble.outputs[chosen] - 3).max() > 0.1


def test_a_datamodel_of_what_is_left_adds_what_newton_lacks(pair, newton, one_step, task, tmp_path):
    ensemble, full = pair
    chosen = models_like_requests(ensemble, 30)
    random = np.random.default_rng(0)
    effects = 0.03 * random.normal(size=(len(task.train_ids), TARGETS, 2))
    lacking = np.tensordot(ensemble.masks[chosen] - 1.0, effects, 1)
    moved = (ensemble.outputs[chosen] + lacking).astype(np.float32)
    more = write_ensemble(tmp_path / "more", task, ensemble.masks[chosen], moved)
    left = residual_models(
        more, newton, tmp_path / "left", anchor=full, models=np.arange(len(chosen))
    )
    plain = fit_datamodels(more, anchor=full, to=tmp_path / "plain")
    found = fit_datamodels(left, anchor=full, to=tmp_path / "found")
    mask = ensemble.masks[chosen[3]]
    wanted = ForgetSet.at(task, np.flatnonzero(~mask))
    truth, known = moved[3] - 3, prior_of(one_step, task, mask)

    def error(told):
        return np.square(told - truth).sum() / np.square(truth).sum()

    both = error(known + found.change(wanted).mean)
    assert both < 0.7 * error(known)
    assert both < 0.7 * error(plain.change(wanted).mean)


def test_settings_of_a_calibration_are_taken_and_its_factors_are_not(pair, newton, tmp_path):
    ensemble, full = pair
    chosen = models_like_requests(ensemble, 4)
    factors = dict.fromkeys(KINDS, 9.0)
    told = Calibration(newton.damping, newton.temperature, factors, factors, factors, 20)
    calibrated = type(newton)(newton.task, newton.features, calibration=told)
    outputs = [
        residual_models(ensemble, one, tmp_path / name, anchor=full, models=chosen).outputs
        for name, one in (("plain", newton), ("calibrated", calibrated))
    ]
    np.testing.assert_array_equal(*outputs)


def test_an_interrupted_call_ends_with_the_same_bits(pair, newton, tmp_path, monkeypatch):
    ensemble, full = pair
    chosen = models_like_requests(ensemble, 12)
    whole = residual_models(ensemble, newton, tmp_path / "whole", anchor=full, models=chosen)
    write = Store.write_block

    def stop(store, block, arrays):
        if block == 2:
            raise KeyboardInterrupt
        write(store, block, arrays)

    monkeypatch.setattr(Store, "write_block", stop)
    with pytest.raises(KeyboardInterrupt):
        residual_models(ensemble, newton, tmp_path / "cut", anchor=full, models=chosen)
    monkeypatch.undo()
    again = residual_models(ensemble, newton, tmp_path / "cut", anchor=full, models=chosen)
    np.testing.assert_array_equal(again.outputs, whole.outputs)
    other = np.append(chosen[1:], 0)
    with pytest.raises(ValueError, match=r"was made with other settings:\n  models: "):
        residual_models(ensemble, newton, tmp_path / "cut", anchor=full, models=other)


@pytest.mark.parametrize("models", [[], [3, 2]], ids=["none", "one that saw everything"])
def test_models_that_lack_nothing_are_refused(pair, newton, tmp_path, models):
    text = re.escape("needs models that each lack some rows: choose them with models_like_requests")
    with pytest.raises(ValueError, match=text):
        residual_models(
            pair[0], newton, tmp_path / "left", anchor=pair[1], models=np.array(models, dtype=int)
        )
