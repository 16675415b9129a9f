import math

import numpy as np
import pytest

from attribution.agreement import Comparison, pooled_agreement, set_averages

LEVELS = {"80": 1.2815515655446004, "95": 1.959963984540054}


def agreement(predicted, measured, std, error):
    return pooled_agreement([Comparison(predicted, measured, std, error)])


def interval_score(lower, upper, measured, alpha):
    """Gneiting and Raftery 2007, equation 43, one value at a time."""
    scores = []
    for a, b, x in zip(lower.ravel(), upper.ravel(), measured.ravel(), strict=True):
        score = b - a
        if x < a:
            score += 2 / alpha * (a - x)
        if x > b:
            score += 2 / alpha * (x - b)
        scores.append(score)
    return np.array(scores)


def constant_width(sets, level, scales):
    """The smallest multiple of the sets' scales that holds as many, among all that matter."""
    inside = [np.abs(p - t) <= LEVELS[level] * np.sqrt(s**2 + e**2) for p, t, s, e in sets]
    wanted = sum(each.sum() for each in inside)
    factors = [abs(p - t) / m for (ps, ts, *_), m in zip(sets, scales, strict=True)
               for p, t in zip(ps.ravel(), ts.ravel(), strict=True)]  # fmt: skip
    for factor in sorted([0.0, *factors]):
        held = sum(
            (np.abs(p - t) / m <= factor).sum() for (p, t, *_), m in zip(sets, scales, strict=True)
        )
        if held >= wanted:
            sizes = [m for (p, *_), m in zip(sets, scales, strict=True) for _ in p.ravel()]
            return 2 * factor * np.mean(sizes)
    return None


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
        ends = [predicted + side * width * np.sqrt(std**2 + error**2) for side in (-1, 1)]
        assert found.width[level] == pytest.approx((ends[1] - ends[0]).mean())
        expected = interval_score(*ends, measured, alpha=1 - int(level) / 100).mean()
        assert found.interval_score[level] == pytest.approx(expected)


class TestRetrainedModels:
    def test_so_many_have_a_mean_that_is_as_near(self):
        random, truth = np.random.default_rng(0), np.zeros((500, 40))
        noise = random.uniform(0.5, 2, size=truth.shape)
        mean = (noise * random.normal(size=(7, *truth.shape))).mean(0)
        error = noise / 10
        measured = truth + error * random.normal(size=truth.shape)
        found = pooled_agreement([Comparison(mean, measured, error, error, noise)])
        assert found.retrained_models == pytest.approx(7, rel=0.05)

    def test_rows_of_several_sets_count_alike(self):
        one, none = np.ones(2), np.zeros(2)
        near, far = (Comparison(off * one, none, one, none, 3 * one) for off in (1.0, 2.0))
        assert pooled_agreement([near]).retrained_models == 9
        assert pooled_agreement([near, far]).retrained_models == pytest.approx(36 / 10)

    @pytest.mark.parametrize("off", [0.0, 0.1, 0.14])
    def test_no_more_are_told_than_the_measurement_is_worth(self, off):
        one = np.ones(2)
        told = Comparison(one, (1 + off) * one, one, 0.1 * one, one)
        found = pooled_agreement([told])
        assert found.retrained_models == found.most_models == pytest.approx(100)

    def test_where_nothing_is_off_and_no_measurement_errs_there_is_no_end(self):
        one, none = np.ones(2), np.zeros(2)
        told = Comparison(one, one, one, none, one)
        assert pooled_agreement([told]).retrained_models == math.inf

    def test_a_prediction_that_is_no_number_is_as_near_as_no_number(self):
        one, nothing = np.ones(2), np.full(2, np.nan)
        found = pooled_agreement([Comparison(nothing, one, one, one, one)])
        assert math.isnan(found.retrained_models)

    def test_without_the_noise_of_every_set_it_is_not_known(self):
        one, none = np.ones(2), np.zeros(2)
        sets = [Comparison(one, none, one, none, one), Comparison(one, none, one, none)]
        found = pooled_agreement(sets)
        assert found.retrained_models is found.most_models is None


def test_the_interval_score_by_hand():
    zeros = np.zeros(2)
    found = agreement(zeros, np.array([0.0, -3.0]), np.ones(2), zeros)
    # Both bars are 2 x 1.28155 wide; the second is missed by 3 - 1.28155, ten times that counts.
    assert found.interval_score["80"] == pytest.approx(2 * 1.28155 + 10 * (3 - 1.28155) / 2, 1e-5)
    assert found.interval_score["95"] == pytest.approx(2 * 1.95996 + 40 * (3 - 1.95996) / 2, 1e-5)
    assert found.width == pytest.approx({"80": 2 * 1.28155, "95": 2 * 1.95996}, 1e-5)


def test_the_interval_score_is_best_where_the_error_bars_are_right():
    random = np.random.default_rng(0)
    std, zeros = random.uniform(0.2, 2, 20_000), np.zeros(20_000)
    measured = random.normal(0, std)
    scores = [
        agreement(zeros, measured, factor * std, zeros).interval_score["80"]
        for factor in (0.5, 0.8, 1, 1.25, 2)
    ]
    assert min(scores) == scores[2]


@pytest.mark.parametrize("level", ["80", "95"])
def test_the_constant_width_holds_as_many(level):
    sets = list(cases())
    for one in sets:
        expected = constant_width([one], level, [1.0])
        assert agreement(*one).constant_width[level] == pytest.approx(expected)
    scales = [np.abs(predicted).mean() for predicted, *_ in sets]
    found = pooled_agreement([Comparison(*one) for one in sets])
    assert found.constant_width[level] == pytest.approx(constant_width(sets, level, scales))


def test_error_bars_that_know_more_than_the_size_are_narrower_than_a_constant():
    random = np.random.default_rng(2)
    n, zeros = 20_000, np.zeros(20_000)
    std = np.where(random.random(n) < 0.5, 0.1, 2.0)
    predicted = random.normal(0, 3, n)
    measured = predicted + random.normal(0, std)
    known = agreement(predicted, measured, std, zeros)
    assert known.width["80"] < 0.9 * known.constant_width["80"]
    shuffled = agreement(predicted, measured, random.permutation(std), zeros)
    assert shuffled.width["80"] > shuffled.constant_width["80"]


def test_a_constant_in_proportion_to_the_mean_change_fits_sets_of_unlike_size():
    random = np.random.default_rng(3)
    sets = []
    for size in (0.1, 5.0):
        predicted = random.normal(0, size, 10_000)
        std = np.full(10_000, 0.3 * size)
        measured = predicted + random.normal(0, std)
        sets.append(Comparison(predicted, measured, std, np.zeros(10_000)))
    found = pooled_agreement(sets)
    assert found.constant_width["80"] == pytest.approx(found.width["80"], rel=0.02)


def test_pooling_is_comparing_all_rows_at_once():
    sets = [Comparison(*one) for one in cases()]
    whole = agreement(*(np.concatenate([part.ravel() for part in parts])
                        for parts in zip(*cases(), strict=True)))  # fmt: skip
    found = pooled_agreement(sets)
    for name in ("slope", "r2", "corr", "ceiling", "coverage", "width", "interval_score"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name)), name
    assert pooled_agreement(sets[:1]) == agreement(*next(cases()))


def test_where_no_change_is_predicted_no_multiple_of_it_is_wide_enough():
    change, nothing, one = np.array([1.0, -2.0]), np.zeros(2), np.ones(2)
    idle = Comparison(nothing, change, 9 * one, nothing)
    assert pooled_agreement([idle]).constant_width == {"80": 4, "95": 4}
    both = pooled_agreement([idle, Comparison(change, change, one, nothing)])
    assert both.constant_width == {"80": math.inf, "95": math.inf}
    assert math.isnan(pooled_agreement([idle, idle]).constant_width["80"])
    still = Comparison(nothing, nothing, one, nothing)
    assert pooled_agreement([still, still]).constant_width == {"80": 0, "95": 0}


def test_bars_without_end_hold_everything():
    change, endless = np.array([1.0, -2.0]), np.array([np.inf, 1.0])
    found = agreement(change, 1.5 * change, endless, np.zeros(2))
    assert found.coverage == {"80": 1, "95": 1}
    assert found.width == found.interval_score == {"80": math.inf, "95": math.inf}
    assert found.constant_width == {"80": 2, "95": 2}


def test_bars_that_hold_nothing_need_no_width():
    change, nothing = np.array([1.0, -2.0]), np.zeros(2)
    found = agreement(change, 2 * change, nothing, nothing)
    assert found.coverage == found.constant_width == {"80": 0, "95": 0}


def test_averages_count_each_forget_set_once():
    random, found = np.random.default_rng(4), []
    for rows, factor in ((5, 0.5), (500, 1.0), (50, 2.0)):
        truth = random.normal(size=rows)
        error = np.full(rows, 0.1)
        found.append(agreement(factor * truth, truth, error, error))
    told = set_averages(found)
    assert told.slope == pytest.approx((2 + 1 + 0.5) / 3)
    assert told.r2 == pytest.approx((0.75 + 1 + 0) / 3)
    shares = [one.r2 / one.ceiling for one in found]
    assert told.share_of_ceiling == pytest.approx(sum(shares) / 3)
    assert told.lowest_share_of_ceiling == min(shares) == found[2].share_of_ceiling


def test_noise_that_explains_everything_leaves_no_ceiling_to_share():
    change = np.array([1.0, -2.0])
    found = agreement(change, change, np.ones(2), 10 * np.ones(2))
    assert found.ceiling < 0
    assert math.isnan(found.share_of_ceiling)
    assert math.isnan(set_averages([found]).lowest_share_of_ceiling)


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
        ValueError, match=r"^expected arrays of one shape, got \[\(2,\), \(2, 1\)\]$"
    ):
        agreement(np.ones(2), np.ones((2, 1)), np.ones(2), np.ones(2))


def test_nothing_to_compare_is_refused():
    nothing = np.ones((0, 3))
    with pytest.raises(ValueError, match=r"^expected at least one change to compare, got none$"):
        agreement(nothing, nothing, nothing, nothing)
    with pytest.raises(
        ValueError, match=r"^expected at least one forget set to compare, got none$"
    ):
        pooled_agreement([])
    with pytest.raises(
        ValueError, match=r"^expected at least one forget set to average, got none$"
    ):
        set_averages([])
