"""Attacks against loops over models and rows, and against what normal samples must give."""

from statistics import NormalDist

import numpy as np
import pytest

from tests.audit_references import area_and_rate, epsilon_of_row, rmia_scores, ulira_of_row
from unlearning import forgetting_epsilon, loss_attack, rmia, ulira
from unlearning.epsilon import DELTA

SIZES = [20, 50, 100, 200]


@pytest.fixture
def random():
    return np.random.default_rng(4)


def ulira_by_rows(unlearned, oracles):
    return np.array([ulira_of_row(u, o) for u, o in zip(unlearned.T, oracles.T, strict=True)]).T


@pytest.mark.parametrize(("models", "oracles"), [(7, 7), (11, 4), (4, 9), (3, 3), (3, 5)])
def test_ulira_equals_fitting_anew_for_every_pair(models, oracles, random):
    u, o = random.normal(0.8, 1.4, (models, 13)), 50 + random.normal(size=(oracles, 13))
    u += 50
    found = ulira(u, o)
    np.testing.assert_allclose([found.accuracy, found.auc], ulira_by_rows(u, o), rtol=0, atol=1e-12)


@pytest.mark.parametrize("models", SIZES)
def test_ulira_cannot_tell_equal_samples_apart(models, random):
    found = ulira(*random.normal(size=(2, models, 3000)))
    assert found.accuracy.mean() == pytest.approx(0.5, abs=0.01)
    assert found.auc.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("models", SIZES)
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_ulira_of_a_known_shift(models, shift, random):
    u, o = random.normal(size=(2, models, 2000))
    normal = NormalDist()
    for moved in (shift, -shift):
        found = ulira(u + moved, o)
        assert found.accuracy.mean() == pytest.approx(normal.cdf(shift / 2), abs=0.02)
        assert found.auc.mean() == pytest.approx(normal.cdf(shift / 2**0.5), abs=0.02)


def test_ulira_counts_errors_of_both_kinds(random):
    """True positives alone would give .88 here: what is narrow lies where the wide is too."""
    u, o = random.normal(size=(100, 2000)), 3 * random.normal(size=(100, 2000))
    ends = NormalDist().cdf(np.sqrt(9 / 4 * np.log(3)))
    alarms = NormalDist().cdf(np.sqrt(9 / 4 * np.log(3)) / 3)
    assert ulira(u, o).accuracy.mean() == pytest.approx((1 + 2 * (ends - alarms)) / 2, abs=0.01)


def test_margins_that_are_all_equal_give_no_number_and_no_warning(random):
    u, o = random.normal(size=(9, 3)), random.normal(size=(8, 3))
    u[:, 1] = o[:, 1] = 0.7
    found = ulira(u, o)
    assert np.isnan(found.accuracy).tolist() == [False, True, False]
    assert np.isnan(found.auc).tolist() == [False, True, False]


def test_ulira_needs_three_models_of_either_kind():
    text = "U-LiRA needs at least 3 models of either kind, got 3 and 2"
    with pytest.raises(ValueError, match=text):
        ulira(np.zeros((3, 1)), np.zeros((2, 1)))


def tied_losses(random, models, rows):
    return np.round(random.exponential(size=(models, rows)), 1)


@pytest.mark.parametrize("others", [11, 99, 100, 250])
def test_the_loss_attack_equals_a_loop(others, random):
    m, o = tied_losses(random, 5, 17) / 2, tied_losses(random, 5, others)
    found = loss_attack(m, o)
    expected = [area_and_rate(list(-a), list(-b)) for a, b in zip(m, o, strict=True)]
    np.testing.assert_allclose(np.transpose([found.auc, found.rate]), expected, atol=1e-12)


def test_the_loss_attack_finds_small_losses():
    members, others = np.zeros((1, 4)), np.ones((1, 300))
    found = loss_attack(members, others)
    assert (found.auc, found.rate) == (1, 1)
    turned = loss_attack(others, members)
    assert (turned.auc, turned.rate) == (0, 0)
    same = loss_attack(others, others)
    assert (same.auc, same.rate) == (0.5, 0)


def test_one_false_alarm_in_a_hundred_is_allowed():
    others = np.concatenate([np.full(2, 0.1), np.ones(198)])[None]
    members = np.array([[0.05, 0.2, 0.2, 2.0]])
    assert loss_attack(members, others).rate == 0.75
    assert loss_attack(members, np.concatenate([others[:, :1], others], 1)).rate == 0.25


@pytest.mark.parametrize("offline", [0, 0.3, 1])
def test_rmia_has_the_curve_of_the_share_of_a_population(offline, random):
    members, others = random.exponential(size=(3, 13)), random.exponential(size=(3, 29))
    references = [random.exponential(size=(5, rows)) for rows in (13, 29)]
    found = rmia(members, others, *references, offline=offline)
    for model, (m, o) in enumerate(zip(members, others, strict=True)):
        population = list(zip(o, references[1].T, strict=True))
        scores = rmia_scores(m, o, *references, population=population, offline=offline)
        np.testing.assert_allclose((found.auc[model], found.rate[model]), area_and_rate(*scores))


def test_rmia_finds_rows_that_are_hard_for_oracles_and_easy_for_the_model(random):
    hard, usual = random.uniform(2, 4, (20, 30)), random.uniform(0, 1, (20, 200))
    seen = rmia(hard[:10] - 1.5, usual[:10], hard[10:], usual[10:], offline=1)
    assert seen.auc.min() > 0.9
    assert loss_attack(hard[:10] - 1.5, usual[:10]).auc.max() < 0.2
    null = rmia(hard[:10], usual[:10], hard[10:], usual[10:], offline=1)
    assert 0.3 < null.auc.mean() < 0.7


def test_losses_that_underflow_are_no_members(random):
    losses = random.exponential(size=(2, 9))
    members = losses.copy()
    members[:, 0] = 1e5
    found = rmia(members, losses, losses, losses)
    assert np.isfinite(found.auc).all()


def test_losses_that_do_not_fit_are_refused(random):
    one, other = random.exponential(size=(3, 4)), random.exponential(size=(3, 5))
    with pytest.raises(ValueError, match=r"expected losses \[model, row\] of the same models, got"):
        loss_attack(one, other[:2])
    with pytest.raises(ValueError, match=r"got \(3, 0\) and \(3, 5\)"):
        loss_attack(one[:, :0], other)
    with pytest.raises(ValueError, match="losses hold values that are not a number"):
        loss_attack(np.full((3, 4), np.nan), other)
    with pytest.raises(ValueError, match="references' losses on the same rows, got 4 and 5 rows"):
        rmia(one, other, one, one)
    with pytest.raises(ValueError, match=r"offline must lie between 0 and 1, got 1\.5"):
        rmia(one, other, one, other, offline=1.5)


def epsilon_by_rows(unlearned, oracles):
    return [epsilon_of_row(u, o) for u, o in zip(unlearned.T, oracles.T, strict=True)]


@pytest.mark.parametrize(("models", "oracles"), [(13, 13), (9, 17), (1, 5)])
def test_epsilon_equals_a_loop_over_thresholds(models, oracles, random):
    u, o = random.normal(0.7, 1.5, (models, 11)), random.normal(size=(oracles, 11))
    u[:, :4], o[:, :4] = np.round(u[:, :4]), np.round(o[:, :4])
    u[:, 4] += 100
    np.testing.assert_allclose(forgetting_epsilon(u, o).epsilon, epsilon_by_rows(u, o), rtol=1e-9)


def test_epsilon_finds_a_shift_either_way_and_a_spread_either_way(random):
    u, o = random.normal(size=(2, 200, 300))
    null = np.median(forgetting_epsilon(u, o).epsilon)
    assert null == pytest.approx(np.log(5), abs=0.01)
    for changed in (u + 1, u - 1, u / 2, 2 * u):
        found = forgetting_epsilon(changed, o)
        assert np.median(found.epsilon) > null + 1
        assert found.quality < 0.05


def test_epsilon_never_exceeds_what_so_many_models_can_show(random):
    u, o = random.normal(size=(2, 60, 500))
    found = forgetting_epsilon(u + 2, o)
    assert found.largest == pytest.approx(np.log(60 * (1 - DELTA) - 1))
    finite = found.epsilon[np.isfinite(found.epsilon)]
    assert 3 < finite.max() <= found.largest + 1e-12


def test_quality_halves_with_every_half_of_epsilon():
    same = np.repeat(np.arange(4.0), 10)[:, None]
    assert forgetting_epsilon(same, same).quality == 1
    assert forgetting_epsilon(same + 9, same).quality == 0
    both = [np.concatenate([side, same], 1) for side in (same + 9, same)]
    assert forgetting_epsilon(*both).quality == 0.5
    u, o = np.repeat([0.0, 1.0], [10, 30])[:, None], np.repeat([0.0, 1.0], [30, 10])[:, None]
    found = forgetting_epsilon(u, o)
    np.testing.assert_allclose(found.epsilon, np.log((0.75 - DELTA) / 0.25))
    assert found.quality == 0.25  # ln 3 = 1.1 lies in the third half
