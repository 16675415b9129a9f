"""Factors of deviations on a calibration bank: known ones are found again."""

import numpy as np
import pytest

from attribution import ForgetSet
from attribution.cases import Case
from attribution.deviations import (
    deviation_factors,
    joined,
    variance_factors,
)
from tests.tasks import blobs


@pytest.mark.parametrize("models", [1, 2, 5])
def test_factors_of_deviations_are_found_again(models):
    task, random = blobs(rows=300), np.random.default_rng(models)
    shape = (len(task.target_ids), 2)
    predicted, spreads, noises = [], [], []
    for number in range(60):
        forget = ForgetSet.at(task, range(number, number + 4))
        spread, noise = random.uniform(0.5, 2, size=(2, *shape))
        missed = 1.5 * spread * random.normal(size=shape)
        drawn = missed + 0.8 * noise * random.normal(size=(models, *shape))
        variance = (0.8 * noise) ** 2
        case = Case(task, forget, np.zeros(shape), drawn.mean(0), variance, variance / models)
        rows = case.kinds[1]
        predicted.append((case, rows, np.zeros(shape)[rows]))
        spreads.append(np.square(spread)[rows])
        noises.append(noise[rows])
    found = deviation_factors(predicted, spreads, noise=noises)
    assert found == pytest.approx((1.5, 0.8), rel=0.03)


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_a_variance_of_the_change_that_few_models_tell_does_not_widen_the_bars(spread):
    """Weighed by itself, value by value, it would leave more the smaller it is by chance."""
    task, random = blobs(rows=300), np.random.default_rng(0)
    shape = (len(task.target_ids), 2)
    predicted, spreads, noises = [], [], []
    for number in range(20):
        missed, chance = spread * random.normal(size=shape), random.normal(size=shape)
        told = random.chisquare(7, size=shape) / 7
        forget = ForgetSet.at(task, range(number, number + 4))
        case = Case(task, forget, np.zeros(shape), missed + chance, told, told)
        rows = case.kinds[1]
        predicted.append((case, rows, np.zeros(shape)[rows]))
        spreads.append(np.ones(shape)[rows])
        noises.append(np.ones(shape)[rows])
    found, noise = deviation_factors(predicted, spreads, noise=noises)
    assert found**2 == pytest.approx(spread**2, abs=0.05)
    assert noise == pytest.approx(1, rel=0.05)


def test_noise_that_few_checkpoints_tell_gets_an_unbiased_factor():
    task, random = blobs(rows=300), np.random.default_rng(0)
    shape = (len(task.target_ids), 2)
    predicted, spreads, noises = [], [], []
    for number in range(20):
        true = random.uniform(0.5, 2, size=shape)
        told = true * np.sqrt(random.chisquare(7, size=shape) / 7)
        missed, chance = 0.5 * random.normal(size=shape), true / 2 * random.normal(size=shape)
        forget = ForgetSet.at(task, range(number, number + 4))
        case = Case(task, forget, np.zeros(shape), missed + chance, true**2, true**2 / 4)
        rows = case.kinds[1]
        predicted.append((case, rows, np.zeros(shape)[rows]))
        spreads.append(np.ones(shape)[rows])
        noises.append(told[rows])
    assert deviation_factors(predicted, spreads, noise=noises) == pytest.approx((0.5, 1), rel=0.05)


class TestVarianceFactors:
    @pytest.fixture
    def variances(self):
        random = np.random.default_rng(0)
        return random.gamma(2, size=3000), random.gamma(2, size=3000)

    @pytest.mark.parametrize("factors", [(2.0, 3.0), (0.0, 1.5), (0.7, 0.0), (0.0, 0.0)])
    def test_known_factors_are_found(self, variances, factors):
        left = factors[0] ** 2 * variances[0] + factors[1] ** 2 * variances[1]
        assert variance_factors(left, *variances) == pytest.approx(factors, abs=1e-6)

    def test_factors_of_normal_deviations_are_found(self, variances):
        drawn = np.random.default_rng(1).normal(size=(2, 3000))
        left = (2 * np.sqrt(variances[0]) * drawn[0] + np.sqrt(variances[1]) * drawn[1]) ** 2
        assert variance_factors(left, *variances) == pytest.approx((2, 1), rel=0.15)

    def test_a_variance_that_would_be_negative_is_none(self, variances):
        first, second = variances
        found = variance_factors(np.maximum(3 * second - first, 0), first, second)
        assert found[0] == 0
        assert 0 < found[1] < 3**0.5
        assert variance_factors(np.maximum(3 * first - second, 0), first, second)[1] == 0

    def test_values_without_variance_tell_nothing(self, variances):
        left = 4 * variances[0] + 9 * variances[1]
        more = [np.append(values, np.zeros(5)) for values in variances]
        found = variance_factors(np.append(left, np.ones(5)), *more)
        assert found == pytest.approx((2, 3), abs=1e-6)
        assert variance_factors(np.ones(3), np.zeros(3), np.zeros(3)) == (0, 0)

    @pytest.mark.parametrize("factors", [(2.0, 0.5, 3.0), (0.0, 1.5, 0.0), (1.0, 0.0, 0.2)])
    def test_three_known_factors_are_found(self, variances, factors):
        third = variances[0][::-1] * np.linspace(0, 1, len(variances[0]))
        every = (*variances, third)
        left = sum(a**2 * v for a, v in zip(factors, every, strict=True))
        assert variance_factors(left, *every) == pytest.approx(factors, abs=1e-6)

    def test_what_was_taken_off_counts_in_what_is_expected(self, variances):
        own = np.append(variances[0], 0.01 * variances[0])
        beside = np.repeat([50.0, 0.0], len(variances[0]))
        drawn = np.random.default_rng(1).normal(size=(100, len(own)))
        left = (4 * own + beside) * drawn**2 - beside
        both, apart = (
            np.std([variance_factors(one, own, beside=b)[0] for one in left]) for b in (beside, 0.0)
        )
        assert both < 0.5 * apart

    def test_values_weigh_what_they_are_given(self, variances):
        left = np.concatenate([4 * variances[0], 9 * variances[0]])
        twice, n = np.tile(variances[0], 2), len(variances[0])
        for weight, expected in ((np.repeat([1.0, 0.0], n), 2), (np.repeat([0.0, 1.0], n), 3)):
            found = variance_factors(left, twice, weight=weight)
            assert found == pytest.approx((expected,))

    @pytest.mark.parametrize("unknown", [np.nan, np.inf])
    @pytest.mark.parametrize("where", ["left", "beside"])
    def test_values_that_are_no_numbers_are_left_out(self, variances, unknown, where):
        parts = {"left": 4 * variances[0], "beside": np.ones(len(variances[0]))}
        parts[where][7] = unknown
        found = variance_factors(parts["left"], variances[0], beside=parts["beside"])
        assert found == pytest.approx((2,))

    @pytest.mark.parametrize("unknown", [np.nan, np.inf])
    def test_values_of_unknown_variance_are_left_out(self, variances, unknown):
        left = 4 * variances[0] + 9 * variances[1]
        left[7], variances[1][7] = 1e6, unknown
        assert variance_factors(left, *variances) == pytest.approx((2, 3))
        variances[1][:] = unknown
        assert np.isnan(variance_factors(left, *variances)).all()


def test_parts_are_joined_in_order():
    found = joined([np.array([[1, 2], [3, 4]], dtype=np.float32), np.zeros((0, 2)), np.array([5])])
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, [1, 2, 3, 4, 5])
