"""Lasso with an unpenalised own row, certified by its optimality conditions."""

import sys

import numpy as np
import pytest

from attribution.lasso import centred, lasso_effects, own_effect, regress_out, without_row

TRAIN = 13
EXACT = {"tolerance": 1e-14, "iterations": 100_000}


def problem(models, seed=0):
    """Masks [model, train] whose last one is full and weighs 7, weights and outputs [model]."""
    random = np.random.default_rng(seed)
    masks = np.concatenate([random.random((models, TRAIN)) < 0.5, np.ones((1, TRAIN))]).astype(
        float
    )
    weights = np.append(np.ones(models), 7.0)
    outputs = 3 + masks[:, [1, 4]] @ [2.0, -1.5] + random.normal(size=models + 1)
    return masks, weights, outputs


def fitted(masks, weights, outputs, row, lambdas):
    """Effects with the own row's in its place, [lambda, train]."""
    models = centred(masks, weights)
    around, _ = models.outputs(outputs)
    left = regress_out(models, row, around)
    effects = lasso_effects(models, without_row(models, row), left, lambdas, **EXACT)
    if row is not None:
        effects[:, row] = 0
        effects[:, row] = own_effect(models, row, around, effects)
    return effects


def gradients(masks, weights, outputs, effects):
    """Of half the weighted squares, with the best intercept, [train]."""
    misfit = outputs - masks @ effects
    misfit -= np.average(misfit, 0, weights)
    return masks.T @ (weights * misfit)


@pytest.mark.parametrize("row", [None, 4, 7])
@pytest.mark.parametrize("models", [40, 9])
def test_the_optimality_conditions_hold(models, row):
    masks, weights, outputs = problem(models)
    lambdas, zeros = np.array([3.0, 1.0, 0.2]), []
    found = fitted(masks, weights, outputs, row, lambdas)
    for penalty, effects in zip(lambdas, found, strict=True):
        gradient = gradients(masks, weights, outputs, effects)
        if row is not None:
            assert abs(gradient[row]) < 1e-6
        others = np.arange(TRAIN) != (TRAIN if row is None else row)
        active, zero = others & (effects != 0), others & (effects == 0)
        np.testing.assert_allclose(gradient[active], penalty * np.sign(effects[active]), atol=1e-5)
        assert (np.abs(gradient[zero]) <= penalty + 1e-5).all()
        assert active.any()
        zeros.append(zero.sum())
    assert zeros[0] > zeros[-1]


def test_a_row_that_all_models_saw_is_not_regressed_on():
    masks, weights, outputs = problem(20)
    masks[:, 4] = 1
    effects = fitted(masks, weights, outputs, 4, np.array([0.5]))
    assert effects[0, 4] == 0
    assert np.isfinite(effects).all()


def test_without_scikit_learn_the_cure_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"pip install 'datamodel-matching\[lasso\]'"):
        fitted(*problem(9), None, np.array([1.0]))
