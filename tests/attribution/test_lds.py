import math

import numpy as np
import pytest

from attribution.lds import agreement

LEVELS = {"80": 1.2815515655446004, "95": 1.959963984540054}


def cases():
    """Predictions and noisy measurements of one shape each."""
    for seed, shape in enumerate([(7,), (13, 3), (4, 5, 2)]):
        random = np.random.default_rng(seed)
        truth = random.normal(size=shape)
        parts = (0.6 * truth + random.normal(0.1, 0.3, shape), truth)
        yield *parts, random.uniform(0.1, 0.5, shape), random.uniform(0.05, 0.2, shape)


@pytest.mark.parametrize(("predicted", "measured", "std", "error"), list(cases()))
def test_every_number_equals_its_formula(predicted, measured, std, error):
    found = agreement(predicted, measured, std, error)
    pairs = list(zip(predicted.ravel(), measured.ravel(), strict=True))
    truth = sum(t**2 for _, t in pairs)
    assert found.slope == pytest.approx(sum(p * t for p, t in pairs) / sum(p**2 for p, _ in pairs))
    assert found.r2 == pytest.approx(1 - sum((p - t) ** 2 for p, t in pairs) / truth)
    centred = predicted - predicted.mean(), measured - measured.mean()
    scale = math.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    assert found.corr == pytest.approx((centred[0] * centred[1]).sum() / scale)
    assert found.ceiling == pytest.approx(1 - (error**2).sum() / truth)
    for level, width in LEVELS.items():
        inside = np.abs(predicted - measured) <= width * np.sqrt(std**2 + error**2)
        assert found.coverage[level] == inside.mean()


def test_the_slope_is_the_least_squares_fit():
    predicted, measured, std, error = next(cases())
    fitted = np.linalg.lstsq(predicted[:, None], measured, rcond=None)[0][0]
    assert agreement(predicted, measured, std, error).slope == pytest.approx(fitted)


def test_a_calibrated_simulation_is_covered_as_often_as_it_says():
    random = np.random.default_rng(0)
    n = 40_000
    std, error = random.uniform(0.1, 2, n), random.uniform(0.1, 2, n)
    predicted = random.normal(0, 3, n)
    measured = predicted + random.normal(0, std) + random.normal(0, error)
    found = agreement(predicted, measured, std, error)
    # Four standard errors of a share of n.
    assert found.coverage["80"] == pytest.approx(0.80, abs=0.008)
    assert found.coverage["95"] == pytest.approx(0.95, abs=0.0044)
    # The ceiling is what the true change would reach.
    perfect = random.normal(0, 3, n)
    noisy = perfect + random.normal(0, error)
    told = agreement(perfect, noisy, std, error)
    assert told.r2 == pytest.approx(told.ceiling, abs=0.01)


def test_error_bars_that_are_too_small_show():
    random = np.random.default_rng(1)
    predicted = random.normal(0, 3, 10_000)
    found = agreement(
        predicted, predicted + random.normal(0, 2, 10_000), np.ones(10_000), np.zeros(10_000)
    )
    assert found.coverage["80"] == pytest.approx(0.478, abs=0.02)
    assert found.coverage["95"] == pytest.approx(0.673, abs=0.02)


def test_a_perfect_prediction():
    change = np.array([1.0, -2.0, 0.5])
    found = agreement(change, change, np.zeros(3), np.zeros(3))
    assert (found.slope, found.r2, found.ceiling) == (1, 1, 1)
    assert found.corr == pytest.approx(1)
    assert found.coverage == {"80": 1, "95": 1}


def test_predicting_no_change_is_an_r2_of_zero():
    change, nothing = np.array([1.0, -2.0, 0.5]), np.zeros(3)
    found = agreement(nothing, change, np.ones(3), nothing)
    assert (found.r2, found.ceiling) == (0, 1)
    assert math.isnan(found.slope)
    assert math.isnan(found.corr)


def test_where_nothing_changed_there_is_nothing_to_explain():
    nothing = np.zeros(3)
    found = agreement(np.ones(3), nothing, np.ones(3), nothing)
    assert found.slope == 0
    assert all(math.isnan(value) for value in (found.r2, found.corr, found.ceiling))


def test_a_single_row_has_no_correlation():
    one = np.ones(1)
    found = agreement(one, 2 * one, one, one)
    assert (found.slope, found.r2) == (2, 0.75)
    assert math.isnan(found.corr)


def test_float32_is_summed_in_double_precision():
    values = np.full(1_000_000, 0.1, dtype=np.float32)
    found = agreement(values, values * np.float32(1.5), values, values)
    exact = float(np.float32(0.1) * np.float32(1.5)) / float(np.float32(0.1))
    assert found.slope == pytest.approx(exact, rel=1e-10)
    assert found.ceiling == pytest.approx(1 - 1 / exact**2, rel=1e-6)


def test_arrays_of_different_shapes_are_refused():
    with pytest.raises(
        ValueError, match=r"^expected four arrays of one shape, got \[\(2,\), \(2, 1\)\]$"
    ):
        agreement(np.ones(2), np.ones((2, 1)), np.ones(2), np.ones(2))
