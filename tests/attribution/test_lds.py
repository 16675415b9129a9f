import math

import numpy as np
import pytest

from attribution.lds import agreement

SHAPE = (7, 3, 2)


@pytest.fixture
def random():
    return np.random.default_rng(0)


def noise_free(predicted, measured):
    return agreement(predicted, measured, np.zeros_like(predicted), np.zeros_like(predicted))


def test_numbers_equal_plain_sums(random):
    predicted, measured = random.normal(size=(2, *SHAPE))
    std, error = random.uniform(0.1, 1, size=(2, *SHAPE))
    found = agreement(predicted, measured, std, error)
    four = (values.ravel() for values in (predicted, measured, std, error))
    rows = list(zip(*four, strict=True))
    truth = sum(t * t for _, t, _, _ in rows)
    assert found.slope == pytest.approx(
        sum(p * t for p, t, _, _ in rows) / sum(p * p for p, _, _, _ in rows)
    )
    assert found.r2 == pytest.approx(1 - sum((p - t) ** 2 for p, t, _, _ in rows) / truth)
    assert found.ceiling == pytest.approx(1 - sum(e * e for *_, e in rows) / truth)
    assert found.corr == pytest.approx(np.corrcoef(predicted.ravel(), measured.ravel())[0, 1])
    for level, width in (("80", 1.281552), ("95", 1.959964)):
        inside = [abs(p - t) <= width * math.hypot(s, e) for p, t, s, e in rows]
        assert found.coverage[level] == pytest.approx(np.mean(inside))


def test_a_perfect_prediction_is_perfect(random):
    change = random.normal(size=SHAPE)
    found = noise_free(change, change)
    assert (found.slope, found.r2, found.ceiling) == pytest.approx((1, 1, 1))
    assert found.corr == pytest.approx(1)
    assert found.coverage == {"80": 1, "95": 1}


def test_a_prediction_of_half_the_change_has_slope_two(random):
    change = random.normal(size=SHAPE)
    found = noise_free(change / 2, change)
    assert (found.slope, found.r2) == pytest.approx((2, 0.75))


def test_predicting_no_change_explains_nothing(random):
    found = noise_free(np.zeros(SHAPE), random.normal(size=SHAPE))
    assert found.r2 == 0
    assert math.isnan(found.slope)
    assert math.isnan(found.corr)


def test_without_any_change_there_is_nothing_to_explain():
    found = noise_free(np.ones(SHAPE), np.zeros(SHAPE))
    assert math.isnan(found.r2)
    assert math.isnan(found.ceiling)


def test_the_true_mean_change_reaches_the_ceiling_and_is_covered(random):
    # 20,000 draws: the standard error of each share is below 0.003, of r2 below 0.01.
    truth = random.normal(size=20_000)
    error = np.full(20_000, 0.5)
    std = np.full(20_000, 0.3)
    measured = truth + error * random.normal(size=20_000)
    predicted = truth + std * random.normal(size=20_000)
    assert agreement(truth, measured, 0 * std, error).r2 == pytest.approx(0.8, abs=0.02)
    found = agreement(predicted, measured, std, error)
    assert found.ceiling == pytest.approx(0.8, abs=0.02)
    assert found.coverage["80"] == pytest.approx(0.8, abs=0.015)
    assert found.coverage["95"] == pytest.approx(0.95, abs=0.01)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"expected four arrays of one shape, got \[\(2,\), \(3,"):
        agreement(np.zeros(2), np.zeros(3), np.zeros(2), np.zeros(2))
