import numpy as np
import pytest
import torch

from attribution import ridge
from attribution.ridge import decompose, own_masks, solve
from tests.references import datamodel_objective, dense_datamodel

TRAIN, TARGETS, OUTPUTS = 13, 17, 3
DESIGNS = {
    "more models than rows": (29, "bernoulli"),
    "fewer models than rows": (9, "bernoulli"),
    "subsets of one size": (29, "half"),
}


def problem(models, design):
    """Masks [model, train] whose last one is full and weighs 7, outputs, weights, penalties.

    And the scales of the rows.
    """
    random = np.random.default_rng(models)
    ranks = random.random((models, TRAIN)).argsort(1).argsort(1)
    masks = ranks < TRAIN // 2 if design == "half" else random.random((models, TRAIN)) < 0.5
    masks = np.concatenate([masks, np.ones((1, TRAIN))]).astype(float)
    outputs = random.normal(size=(models + 1, TARGETS, OUTPUTS)) + 3
    weights = np.append(np.ones(models), 7.0)
    penalties, scales = random.uniform(0.1, 5, TARGETS), random.uniform(0.3, 3, TRAIN)
    return masks, outputs, weights, penalties, scales


@pytest.fixture(params=[False, True], ids=["penalised", "free"])
def free(request):
    """Whether own rows are free."""
    return request.param


@pytest.fixture(params=DESIGNS.values(), ids=DESIGNS.keys())
def solved(request, free):
    """A problem, its design and the fit in float64."""
    masks, outputs, weights, penalty, scales = problem(*request.param)
    design = decompose(*map(torch.from_numpy, (masks, weights, scales)))
    rotated, _ = design.centred(torch.from_numpy(outputs))
    outside = design.outside(torch.from_numpy(outputs), rotated)
    own = own_masks(design, torch.arange(TARGETS))
    fit = solve(design, rotated, torch.from_numpy(penalty), own, outside, free=free)
    return (masks, outputs, weights, penalty, scales), design, fit


def effects_of(design, fit):
    """Effects [train, target, output], the own rows' put in their places."""
    effects = torch.tensordot((design.masks * design.scales).T, fit.dual, 1)
    rows = torch.arange(TRAIN)
    effects[rows, rows] = design.scales[:, None] * fit.own[:TRAIN]
    return effects.numpy()


def own_row(target, free):
    return target if free and target < TRAIN else None


def each_regression(of, free):
    """Target, output and what the dense regression of it takes."""
    masks, outputs, weights, penalty, scales = of
    for target in range(TARGETS):
        for output in range(OUTPUTS):
            y, own = outputs[:, target, output], own_row(target, free)
            yield target, output, (masks, y, weights, penalty[target], scales, own)


def test_effects_equal_the_dense_regression(solved, free):
    of, design, fit = solved
    found = effects_of(design, fit)
    for target, output, taken in each_regression(of, free):
        _, expected = dense_datamodel(*taken)
        np.testing.assert_allclose(found[:, target, output], expected, rtol=0, atol=1e-8)


def test_the_variance_is_the_smallest_objective_by_degree_of_freedom(solved, free):
    of, _, fit = solved
    for target, output, taken in each_regression(of, free):
        expected = datamodel_objective(*taken) / (len(of[0]) - 1)
        assert float(fit.variance[target, output]) == pytest.approx(expected, abs=1e-8)


def test_the_gradient_of_the_objective_vanishes(solved, free):
    (masks, outputs, weights, penalty, scales), design, fit = solved
    effects = effects_of(design, fit)
    centre = weights / weights.sum()
    misfit = outputs - np.tensordot(masks, effects, 1)
    misfit -= np.tensordot(centre, misfit, 1)  # what the best intercept leaves
    shrinking = penalty[:, None] * effects / np.square(scales)[:, None, None]
    if free:
        rows = np.arange(TRAIN)
        shrinking[rows, rows] = 0
    gradient = shrinking - np.tensordot((weights[:, None] * masks).T, misfit, 1)
    np.testing.assert_allclose(gradient, 0, rtol=0, atol=1e-8)


def test_own_effects_of_test_targets_are_zero(solved):
    _, _, fit = solved
    assert not fit.own[TRAIN:].any()
    assert fit.own[:TRAIN].all()


def test_the_basis_diagonalises_the_gram_matrix(solved):
    (masks, _, weights, _, scales), design, _ = solved
    scaled = np.sqrt(weights)[:, None] * (masks - weights @ masks / weights.sum()) * scales
    expected = design.basis.numpy().T @ scaled @ scaled.T @ design.basis.numpy()
    np.testing.assert_allclose(np.diag(design.eigenvalues), expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(design.masks, design.basis.numpy().T @ scaled, rtol=0, atol=1e-10)
    assert len(design.eigenvalues) == np.linalg.matrix_rank(scaled)


def test_weights_count_like_repeated_models():
    masks, outputs, weights, penalty, scales = problem(11, "bernoulli")
    repeated = np.repeat(np.arange(12), weights.astype(int))
    fits = []
    for rows, each in ((np.arange(12), weights), (repeated, np.ones(len(repeated)))):
        design = decompose(*map(torch.from_numpy, (masks[rows], each, scales)))
        rotated, _ = design.centred(torch.from_numpy(outputs[rows]))
        own = own_masks(design, torch.arange(TARGETS))
        fit = solve(design, rotated, torch.from_numpy(penalty), own, free=True)
        fits.append(effects_of(design, fit))
    np.testing.assert_allclose(*fits, rtol=0, atol=1e-10)


def test_centred_outputs_have_weighted_mean_zero():
    masks, outputs, weights, _, scales = problem(11, "bernoulli")
    design = decompose(*map(torch.from_numpy, (masks, weights, scales)))
    _, centre = design.centred(torch.from_numpy(outputs))
    np.testing.assert_allclose(centre, np.average(outputs, 0, weights), rtol=0, atol=1e-12)


def noise_free(masks):
    effects = np.random.default_rng(1).normal(size=(TRAIN, TARGETS, OUTPUTS))
    return effects, 0.3 + np.tensordot(masks, effects, 1)


def test_subsets_of_one_size_leave_a_shift_undetermined():
    masks = problem(60, "half")[0]
    effects, outputs = noise_free(masks)
    errors = []
    for used in (slice(0, 60), slice(0, 61)):  # without and with the full model as an anchor
        weights = torch.ones(len(masks[used]))
        design = decompose(torch.from_numpy(masks[used]), weights, torch.ones(TRAIN))
        rotated, _ = design.centred(torch.from_numpy(outputs[used]))
        penalty = torch.full((TARGETS,), 1e-9, dtype=torch.float64)
        own = own_masks(design, torch.arange(TARGETS))
        fit = solve(design, rotated, penalty, own, free=True)
        errors.append(effects_of(design, fit) - effects)
    shifted, exact = errors
    constant = shifted.mean(0)
    np.testing.assert_allclose(shifted, np.tile(constant, (TRAIN, 1, 1)), rtol=0, atol=1e-6)
    assert np.abs(constant).min() > 1e-3
    np.testing.assert_allclose(exact, 0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("models", [9, 40])
def test_fewer_rows_have_the_eigenbasis_of_their_own_masks(models, monkeypatch):
    monkeypatch.setattr(ridge, "PIECE", 7)
    masks = (torch.rand(models, 23, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    kept = [row for row in range(23) if row not in (0, 5, 22)]
    scales = torch.linspace(0.5, 2, 23)
    design = ridge.decompose(masks, torch.ones(models), scales)
    values, rotated = ridge.fewer_rows(design.masks[:, kept])
    never = ridge.decompose(masks[:, kept], torch.ones(models), scales[kept])
    torch.testing.assert_close(values, never.eigenvalues)
    torch.testing.assert_close(rotated.T @ rotated, never.masks.T @ never.masks)
    torch.testing.assert_close(rotated @ rotated.T, torch.diag(values))
