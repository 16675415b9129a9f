"""The corrected KLOM against a jackknife model by model, and against known divergences."""

import numpy as np
import pytest

from tests.audit_references import jackknifed_kl
from unlearning import corrected_klom, corrected_mean, klom

SIZES = [20, 50, 100, 200]


@pytest.fixture
def random():
    return np.random.default_rng(9)


def samples(random, models, rows, shift=0.0, scale=1.0):
    return scale * random.normal(size=(models, rows)) + shift, random.normal(size=(models, rows))


@pytest.mark.parametrize(
    ("models", "oracles", "bins"), [(23, 31, 4), (97, 83, 16), (131, 107, 20), (7, 5, 2)]
)
def test_it_equals_leaving_out_every_model_in_turn(models, oracles, bins, random):
    u, o = random.normal(0.7, 1.3, (models, 7)), random.normal(size=(oracles, 7))
    o[:, 0] = np.round(o[:, 0])
    expected = [jackknifed_kl(a, b, bins) for a, b in zip(u.T, o.T, strict=True)]
    np.testing.assert_allclose(corrected_klom(u, o), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("models", SIZES)
def test_equal_samples_read_zero(models, random):
    found = corrected_klom(*samples(random, models, 2000))
    assert found.mean() == pytest.approx(0, abs=0.03)
    assert klom(*samples(random, models, 200)).mean() > 4 * abs(found.mean())


@pytest.mark.parametrize("models", SIZES)
def test_a_shift_by_one_standard_deviation_reads_a_half(models, random):
    u, o = samples(random, models, 2000, shift=1)
    assert corrected_klom(u, o).mean() == pytest.approx(0.5, abs=0.06)
    assert klom(u, o).mean() > 0.8


def test_too_narrow_reads_its_own_divergence(random):
    narrow = corrected_klom(*samples(random, 100, 2000, scale=0.5)).mean()
    assert narrow == pytest.approx(np.log(2) - 3 / 8, abs=0.03)


@pytest.mark.parametrize(("scale", "read"), [(2, 0.41), (4, 1.26)])
def test_too_wide_reads_too_low_by_as_much_as_is_said(scale, read, random):
    # Half of what is wide lies where 100 oracles have nothing: the estimate cannot follow it.
    wide = corrected_klom(*samples(random, 100, 2000, scale=scale)).mean()
    assert wide == pytest.approx(read, abs=0.04)
    assert wide < (scale**2 - 1) / 2 - np.log(scale)


def test_a_large_distance_stays_large_though_too_low(random):
    means = [corrected_klom(*samples(random, 100, 300, shift=d)).mean() for d in (0, 1, 2, 4)]
    assert means == sorted(means)
    assert 3 < means[-1] < 8


def test_the_interval_holds_the_mean_of_many_draws_of_models(random):
    inside = 0
    for turn in range(40):
        # Rows of one model move together, so that more rows do not make the mean certain.
        u, o = (side + random.normal(size=(50, 1)) for side in samples(random, 50, 9))
        found = corrected_mean(u + 1, o, seed=turn, resamples=100)
        inside += found.low < 0.25 < found.high  # shift 1 at variance 2
    assert inside >= 34


def test_whole_models_are_drawn(random):
    u, o = samples(random, 60, 1, shift=1)
    one = corrected_mean(u, o)
    copies = corrected_mean(np.tile(u, 30), np.tile(o, 30))
    assert (copies.mean, copies.low) == (pytest.approx(one.mean), pytest.approx(one.low))
    independent = corrected_mean(*samples(random, 60, 30, shift=1))
    assert independent.high - independent.low < (one.high - one.low) / 2


def test_the_mean_is_that_of_the_targets_and_the_seed_repeats_the_interval(random):
    u, o = samples(random, 30, 11)
    first, again, other = (corrected_mean(u, o, resamples=50, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.low != other.low
    assert first.mean == pytest.approx(corrected_klom(u, o).mean())


def test_no_target_has_no_mean():
    assert np.isnan(corrected_mean(np.zeros((4, 0)), np.zeros((4, 0))).mean)


def test_one_model_and_no_resample_are_refused():
    with pytest.raises(ValueError, match="a jackknife needs at least 2 models, got 1 and 5"):
        corrected_klom(np.zeros((1, 2)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="expected at least 1 resample, got 0"):
        corrected_mean(np.zeros((5, 2)), np.zeros((5, 2)), resamples=0)
