"""KLOM, shift and spread against slow implementations and values worked out by hand."""

import numpy as np
import pytest

from tests.references import divergence_of_normals, klom_of_row
from unlearning import gaussian_kl, klom, shift, spread

METRICS = [klom, gaussian_kl, shift, spread]


@pytest.fixture
def random():
    return np.random.default_rng(5)


def column(values):
    return np.asarray(values, dtype=float)[:, None]


def by_rows(unlearned, oracles):
    return np.array(
        [klom_of_row(list(u), list(o)) for u, o in zip(unlearned.T, oracles.T, strict=True)]
    )


def tied(random, step):
    # Multiples of `step` from 0 to 20 steps: every value lies on an edge between two bins.
    return [random.integers(0, 21, (count, 23)) * step for count in (97, 83)]


CASES = {
    "random": lambda random: [random.normal(0, 2, (97, 23)), random.normal(0.5, 1, (83, 23))],
    "tied": lambda random: tied(random, 0.3),
    "tied at quarters": lambda random: tied(random, 0.25),
    "clipped": lambda random: [random.standard_cauchy((n, 23)) * 60 for n in (97, 83)],
    "few models": lambda random: [random.normal(size=(3, 23)), random.normal(size=(1, 23))],
    "constant": lambda random: [np.full((97, 23), 0.7), np.full((83, 23), 0.7)],
    "two constants": lambda random: [np.full((97, 23), 0.7), np.full((83, 23), 0.8)],
    "constant at the bound": lambda random: [np.full((9, 2), 100.0), np.full((8, 2), 140.0)],
}


@pytest.mark.parametrize("case", CASES)
def test_klom_equals_the_row_by_row_reference(case, random):
    unlearned, oracles = CASES[case](random)
    expected = by_rows(unlearned, oracles)
    np.testing.assert_allclose(klom(unlearned, oracles), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", [0.3, 0.7, 0.05])
def test_a_row_does_not_change_with_the_rows_beside_it(step, random):
    unlearned, oracles = tied(random, step)
    beside = [np.column_stack([m, np.zeros(len(m))]) for m in (unlearned, oracles)]
    assert np.array_equal(klom(*beside)[:-1], klom(unlearned, oracles))
    np.testing.assert_allclose(klom(*beside)[:-1], by_rows(unlearned, oracles), rtol=0, atol=1e-12)


def test_the_check_values_of_the_design():
    u = column(np.sqrt(np.arange(100)))
    np.testing.assert_allclose(klom(u, u + 1), [0.302010], rtol=0, atol=5e-7)
    np.testing.assert_allclose(klom(u + 1, u), [1.037487], rtol=0, atol=5e-7)


def test_the_largest_margin_is_counted():
    u, o = column([0] * 9 + [1]), column([0] * 5 + [1] * 5)
    by_hand = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    np.testing.assert_allclose(klom(u, o), [by_hand], rtol=0, atol=1e-12)


def test_the_divergence_is_of_the_unlearned_from_the_oracles():
    u, o = column([0, 0]), column([0, 1])
    np.testing.assert_allclose(klom(u, o), [np.log(2)], rtol=0, atol=1e-12)
    swapped = 0.5 * np.log(0.5 * (1 + 1e-5)) + 0.5 * np.log(0.5 * (1 + 1e-5) / 1e-5)
    np.testing.assert_allclose(klom(o, u), [swapped], rtol=0, atol=1e-12)


def test_only_bins_with_unlearned_models_are_raised_to_the_floor():
    u, o = column([0, 1]), column([0, 0])
    raised = 1 + 1e-5  # 1 + 19e-5 if empty bins were raised too
    by_hand = 0.5 * np.log(0.5 * raised) + 0.5 * np.log(0.5 * raised / 1e-5)
    np.testing.assert_allclose(klom(u, o), [by_hand], rtol=0, atol=1e-12)


def test_frequencies_above_the_floor_are_not_renormalised_away():
    u, o = column([0] * 3 + [1] * 4), column([0] * 2 + [1] * 5)
    by_hand = 3 / 7 * np.log(3 / 2) + 4 / 7 * np.log(4 / 5)
    np.testing.assert_allclose(klom(u, o), [by_hand], rtol=0, atol=1e-12)


def test_equal_margins_give_zero_and_separate_ones_the_upper_bound(random):
    u = random.normal(size=(97, 5))
    np.testing.assert_allclose(klom(u, u), 0, rtol=0, atol=1e-12)
    np.testing.assert_allclose(klom(column([3] * 9), column([5] * 7)), np.log(1e5 + 1), rtol=1e-12)


def test_klom_lies_between_zero_and_its_upper_bound(random):
    u, o = (random.normal(random.normal(0, 5, 300), 1, (31, 300)) for _ in range(2))
    assert klom(u, o).min() >= 0
    assert klom(u, o).max() <= np.log(1e5) + 2e-4  # 19 bins at most are raised


def test_both_sides_are_clipped():
    inside = column([-100, 0, 50, 100])
    outside = column([-1e9, 0, 50, np.inf])
    others = column([-100, -100, 50, 100])
    assert klom(outside, others) == klom(inside, others)
    assert klom(others, outside) == klom(others, inside)


def test_the_null_of_a_hundred_models(random):
    null = klom(random.normal(size=(100, 3001)), random.normal(size=(100, 3001)))
    assert null.mean() == pytest.approx(0.35, abs=0.05)
    assert np.quantile(null, 0.95) == pytest.approx(0.66, abs=0.05)


@pytest.mark.parametrize(
    ("measure", "of_twenty", "of_hundred"),
    [(klom, 3.0, 0.35), (gaussian_kl, 0.12, 0.02), (shift, 0.27, 0.11), (spread, 1.02, 1.005)],
)
def test_the_nulls_that_are_stated(measure, of_twenty, of_hundred):
    random = np.random.default_rng(0)
    for models, stated in ((20, of_twenty), (100, of_hundred)):
        first, second = random.normal(size=(2, models, 4000))
        assert measure(first, second).mean() == pytest.approx(stated, rel=0.05, abs=0.004)


def test_the_null_falls_with_the_number_of_models(random):
    null = [klom(*(random.normal(size=(n, 501)) for _ in range(2))).mean() for n in (50, 200)]
    np.testing.assert_allclose(null, [0.88, 0.15], rtol=0, atol=0.05)


def test_gaussian_kl_equals_the_integral(random):
    u, o = random.normal(1, 2, (17, 3)), random.normal(0, 1.5, (13, 3))
    sides = [(m.mean(0), m.std(0, ddof=1)) for m in (u, o)]
    expected = [
        divergence_of_normals(*(part[i] for side in sides for part in side)) for i in range(3)
    ]
    np.testing.assert_allclose(gaussian_kl(u, o), expected, rtol=1e-7)


def test_gaussian_kl_tells_too_narrow_from_too_wide():
    o = column([-1, 0, 1])
    np.testing.assert_allclose(gaussian_kl(o / 2, o), [np.log(2) - 3 / 8], rtol=1e-12)
    np.testing.assert_allclose(gaussian_kl(2 * o, o), [3 / 2 - np.log(2)], rtol=1e-12)


def test_shift_is_in_standard_deviations_of_the_oracles():
    o = column([-2, 0, 2])
    for moved in (3, -3):
        np.testing.assert_allclose(shift(10 * o + moved, o), [1.5], rtol=1e-12)


def test_spread_is_relative_to_the_oracles():
    o = column([-2, 0, 2])
    np.testing.assert_allclose(spread(0.25 * o + 7, o), [0.25], rtol=1e-12)


def test_shift_and_spread_of_each_target(random):
    u, o = random.normal(1, 2, (17, 3)), random.normal(0, 1.5, (13, 3))
    deviation = np.array([np.sqrt(((x - x.mean()) ** 2).sum() / 12) for x in o.T])
    moved = np.array([abs(a.sum() / 17 - b.sum() / 13) for a, b in zip(u.T, o.T, strict=True)])
    mine = np.array([np.sqrt(((x - x.mean()) ** 2).sum() / 16) for x in u.T])
    np.testing.assert_allclose(shift(u, o), moved / deviation, rtol=1e-12)
    np.testing.assert_allclose(spread(u, o), mine / deviation, rtol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "shapes", [((4,), (4,)), ((4, 3), (4, 2)), ((4, 3, 2), (4, 3, 2)), ((0, 3), (4, 3))]
)
def test_shapes_that_do_not_fit_are_refused(metric, shapes):
    with pytest.raises(ValueError, match=r"expected margins \[model, target\] of the same targets"):
        metric(*(np.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("place", "name"), [(0, "unlearned"), (1, "oracle")])
def test_margins_that_are_no_number_are_refused(metric, place, name):
    both = [np.arange(6.0).reshape(3, 2), np.arange(6.0).reshape(3, 2)]
    both[place][1, 1] = np.nan
    with pytest.raises(ValueError, match=f"the {name} margins hold values that are not a number"):
        metric(*both)


@pytest.mark.parametrize("measure", [gaussian_kl, shift, spread])
def test_a_spread_needs_two_models(measure):
    with pytest.raises(ValueError, match="at least 2 models, got 1 and 3"):
        measure(np.zeros((1, 2)), np.zeros((3, 2)))


@pytest.mark.parametrize("measure", [gaussian_kl, shift, spread])
def test_oracles_that_agree_exactly_give_no_finite_number_and_no_warning(measure):
    assert not np.isfinite(measure(np.eye(3), np.zeros((3, 3)))).any()
