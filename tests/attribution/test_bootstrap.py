import math

import numpy as np
import pytest

from attribution.bootstrap import bootstrap, paired_difference


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        found = bootstrap(random.gamma(2, 0.5, size=50), resamples=300, seed=seed)
        held += found.interval[0] <= 1 <= found.interval[1]
    # A percentile interval of 50 skewed values holds a little less than 95 %.
    assert 0.89 <= held / 300 <= 0.98


def test_the_interval_is_as_wide_as_theory_says():
    values = np.random.default_rng(1).normal(3, 2, size=400)
    found = bootstrap(values, resamples=4000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.interval == pytest.approx((found.mean - half, found.mean + half), abs=0.03)


def test_the_seed_decides():
    values = np.random.default_rng(2).normal(size=30)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)


def test_outputs_of_a_target_stay_together():
    values = np.random.default_rng(3).normal(size=30)
    alone, repeated = bootstrap(values), bootstrap(np.repeat(values[:, None], 10, axis=1))
    assert repeated.mean == pytest.approx(alone.mean)
    assert repeated.interval == pytest.approx(alone.interval)


def test_targets_without_a_value_are_left_out():
    values = np.random.default_rng(4).normal(size=20)
    holes = np.insert(values, [3, 11], np.nan)
    assert bootstrap(holes) == bootstrap(values)
    both = np.stack([holes, np.zeros(22)], axis=1)
    assert bootstrap(both) == bootstrap(np.stack([values, np.zeros(20)], axis=1))


@pytest.mark.parametrize("values", [[], [1.0], [1.0, np.nan], [np.nan, np.nan]])
def test_one_target_says_nothing_about_others(values):
    found = bootstrap(np.array(values))
    assert all(math.isnan(value) for value in (found.mean, *found.interval))


def test_a_paired_difference_forgets_what_both_scorers_find_hard():
    random = np.random.default_rng(5)
    hard = random.normal(0, 1, size=200)
    first, second = (hard + shift + random.normal(0, 0.05, size=200) for shift in (0.02, 0))
    found = paired_difference(first, second)
    assert found.mean == pytest.approx((first - second).mean())
    assert found.interval[1] - found.interval[0] < 0.03
    alone = bootstrap(first).interval
    assert alone[1] - alone[0] > 0.2
    turned = paired_difference(second, first)
    assert turned.interval == pytest.approx((-found.interval[1], -found.interval[0]))


def test_a_scorer_does_not_differ_from_itself():
    values = np.random.default_rng(6).normal(size=20)
    assert paired_difference(values, values).interval == (0, 0)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"^expected at least 1 resample, got 0$"):
        bootstrap(np.ones(3), resamples=0)
    text = r"^expected two scorers' values on the same targets, got shapes \(3,\) and \(4,\)$"
    with pytest.raises(ValueError, match=text):
        paired_difference(np.ones(3), np.ones(4))
