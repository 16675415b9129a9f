"""Weights on a calibration bank: known ones are found, held-out sets stay out, sums may grow."""

import numpy as np
import pytest
from scipy.optimize import nnls

from attribution import ForgetSet
from attribution.cases import KINDS, Case
from attribution.weighing import (
    fit_weights,
    growth_factor,
    growth_helps,
    held_out_error,
    nonnegative_squares,
    weights_without,
)
from tests.references import grown_weights
from tests.tasks import blobs


def test_squares_are_those_of_a_solver_of_their_own():
    random = np.random.default_rng(0)
    for _ in range(40):
        columns, wanted = random.normal(size=(9, 3)), random.normal(size=9)
        found = nonnegative_squares(columns.T @ columns, columns.T @ wanted)
        np.testing.assert_allclose(found, nnls(columns, wanted)[0], atol=1e-10)


def made_cases(sets=5, seed=0):
    """Forget sets of different sizes whose change two predictors know in part."""
    task, random = blobs(), np.random.default_rng(seed)
    shape = (len(task.target_ids), 2)
    cases, one, two = [], [], []
    for number in range(sets):
        forget = ForgetSet.at(task, range(number, 2 * number + 3))
        first, second, noise = random.normal(size=(3, *shape)) * (1 + number)
        kinds = Case(task, forget, 0 * first, first).kind_numbers[:, None]
        factors = np.choose(kinds, [0.5, 1.0, 2.0]), np.choose(kinds, [1.0, -0.3, 0.4])
        change = factors[0] * first + factors[1] * second + 0.5 * noise
        cases.append(Case(task, forget, random.normal(size=shape), change))
        one.append(first)
        two.append(second)
    return cases, one, two


@pytest.mark.parametrize("predictors", [1, 2])
def test_weights_of_a_set_are_fitted_to_the_others(predictors):
    cases, *means = made_cases()
    means = means[:predictors]
    errors = []
    for left, case in enumerate(cases):
        others = [number for number in range(len(cases)) if number != left]
        predicted = np.zeros_like(case.change)
        for kind in range(len(KINDS)):
            columns, wanted = [], []
            for number in others:
                rows = cases[number].kinds[kind]
                root = np.sqrt(cases[number].weight(kind))
                columns.append(root * np.stack([m[number][rows].ravel() for m in means], 1))
                wanted.append(root * cases[number].change[rows].ravel())
            weights = nnls(np.concatenate(columns), np.concatenate(wanted))[0]
            rows = case.kinds[kind]
            predicted[rows] = sum(w * m[left][rows] for w, m in zip(weights, means, strict=True))
        errors.append(case.error(predicted))
    assert held_out_error(cases, *means) == pytest.approx(np.mean(errors), rel=1e-9)


def test_a_predictor_that_knows_nothing_makes_no_weighed_sum_nearer():
    gains = []
    for seed in range(20):
        cases, one, _ = made_cases(seed=seed)
        noise = [np.random.default_rng(seed).normal(size=mean.shape) for mean in one]
        gains.append(held_out_error(cases, one) - held_out_error(cases, one, noise))
    assert np.mean(gains) <= 0


def squares(seed=0, sets=7, growth=0.0, noise=0.0):
    """Columns and a wanted change of some forget sets, and how many of their rows go together."""
    random = np.random.default_rng(seed)
    together = random.uniform(0, 30, sets)
    columns = random.normal(size=(sets, 40, 2))
    wanted = (columns @ [0.7, 0.4]) * (1 + growth * together)[:, None]
    wanted += noise * random.normal(size=wanted.shape)
    gram = np.einsum("sra,srb->sab", columns, columns)
    return gram, np.einsum("sra,sr->sa", columns, wanted), together, columns, wanted


@pytest.mark.parametrize("growth", [0.0, 0.003, 0.04, 0.1])
def test_a_growth_that_made_the_changes_is_found(growth):
    gram, right, together, *_ = squares(growth=growth)
    fit = fit_weights(gram, right, together)
    assert fit.most == together.max()
    assert 1 + fit.growth * fit.most == pytest.approx(1 + growth * fit.most, rel=0.03)
    np.testing.assert_allclose(fit.weights, [0.7, 0.4], rtol=0.03)


@pytest.mark.parametrize("seed", range(6))
def test_the_growth_is_the_best_of_a_fine_search(seed):
    gram, right, together, columns, wanted = squares(seed, growth=0.03 * seed, noise=1.0)
    fit = fit_weights(gram, right, together)
    weights, growth = grown_weights(columns, wanted, together)
    assert fit.growth == pytest.approx(growth, rel=1e-9)
    np.testing.assert_allclose(fit.weights, weights, rtol=1e-6, atol=1e-9)


def test_the_largest_factor_is_five():
    gram, right, together, *_ = squares(growth=50.0)
    fit = fit_weights(gram, right, together)
    assert 1 + fit.growth * fit.most == pytest.approx(5)


def test_changes_that_shrink_with_more_rows_do_not_grow():
    gram, right, together, *_ = squares(growth=-0.02)
    assert fit_weights(gram, right, together).growth == 0


@pytest.mark.parametrize("together", [None, np.zeros(7), np.full(7, 5.0)])
def test_without_a_difference_between_sets_nothing_grows(together):
    gram, right, *_ = squares(growth=0.05, noise=1.0)
    fit = fit_weights(gram, right, together)
    assert fit.growth == 0
    np.testing.assert_allclose(fit.weights, nonnegative_squares(gram.sum(0), right.sum(0)))


def test_growth_that_is_none_is_seldom_taken():
    """Sets that each want another scale, whether their rows change together or not."""
    taken = 0
    for seed in range(40):
        gram, right, together, *_ = squares(seed, sets=20)
        scales = 1 + 0.3 * np.random.default_rng([seed, 1]).normal(size=20)
        taken += growth_helps(gram, right * scales[:, None], together)
    assert 0 < taken <= 8


def test_growth_is_taken_where_sets_left_out_say_so():
    for seed in range(20):
        gram, right, together, *_ = squares(seed, sets=12, growth=0.002 * (seed % 3), noise=2.0)
        plain, grown = (
            sum(
                w @ g @ w - 2 * w @ r
                for w, g, r in zip(weights_without(gram, right, x), gram, right, strict=True)
            )
            for x in (None, together)
        )
        if abs(grown - plain) > 1e-6 * abs(plain):
            assert growth_helps(gram, right, together) == (grown < plain)


@pytest.mark.parametrize(("sets", "helps"), [(9, False), (10, True)])
def test_few_sets_do_not_tell_growth_from_chance(sets, helps):
    gram, right, together, *_ = squares(sets=sets, growth=0.05)
    assert growth_helps(gram, right, together) == helps


def test_growth_that_is_there_is_taken():
    for seed in range(10):
        gram, right, together, *_ = squares(seed, sets=20, growth=0.03, noise=1.0)
        assert growth_helps(gram, right, together)


def test_no_growth_is_told_beyond_the_largest_set():
    assert growth_factor(0.1, 20, 30) == growth_factor(0.1, 20, 20) == 3
    assert growth_factor(0.1, 20, 0) == 1


def test_weights_of_a_set_grow_as_the_others_say():
    gram, right, together, columns, wanted = squares(growth=0.05, noise=1.0)
    found = weights_without(gram, right, together)
    for left in range(len(gram)):
        others = np.arange(len(gram)) != left
        weights, growth = grown_weights(columns[others], wanted[others], together[others])
        factor = 1 + growth * min(together[left], together[others].max())
        np.testing.assert_allclose(found[left], factor * weights, rtol=1e-6)


def test_a_growth_makes_held_out_errors_less_where_there_is_one():
    cases, one, two = made_cases(sets=8)
    together = np.arange(8.0)
    grown = [
        Case(case.task, case.forget, case.before, (1 + 0.3 * rows) * case.change)
        for case, rows in zip(cases, together, strict=True)
    ]
    for added in (None, two):
        means = (one, two) if added is None else (one,)
        errors = [
            held_out_error(grown, *means, added=added, together=each)
            for each in ((None,) * 3, (together, None, None), (together,) * 3)
        ]
        assert errors[0] - 0.02 > errors[1] - 0.01 > errors[2]
