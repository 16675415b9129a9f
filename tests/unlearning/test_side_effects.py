"""Accuracy, outputs and single rows against the oracles, with values worked out by hand."""

import numpy as np
import pytest

from unlearning import klom, logit_distance, most_harmed, shift, tug_of_war


@pytest.fixture
def random():
    return np.random.default_rng(6)


def test_the_tug_of_war_by_hand():
    ours = {"forget": 0.7, "retain": 1.0, "test": 0.8}
    theirs = {"forget": 0.9, "retain": 0.9, "test": 0.8}
    assert tug_of_war(ours, theirs) == pytest.approx(0.8 * 0.9 * 1)
    assert tug_of_war(ours, theirs) == pytest.approx(tug_of_war(theirs, ours))
    assert tug_of_war(ours, ours) == 1


def test_one_side_pulled_all_the_way_loses_the_tug_of_war():
    assert tug_of_war({"forget": 1.0, "test": 0.8}, {"forget": 0.0, "test": 0.8}) == 0


def test_accuracies_of_other_splits_and_no_accuracies_are_refused():
    with pytest.raises(ValueError, match=r"accuracies of the same splits, got .*'forget'.*'test'"):
        tug_of_war({"forget": 1.0}, {"test": 1.0})
    with pytest.raises(ValueError, match="accuracy must lie between 0 and 1, got -2"):
        tug_of_war({"test": -2.0}, {"test": 1.0})


def test_the_logit_distance_row_by_row(random):
    u, o = random.normal(0.5, 2, (7, 5, 3)), random.normal(size=(11, 5, 3))
    found = []
    for row in range(5):
        squares = noise = spread = 0.0
        for output in range(3):
            a, b = u[:, row, output], o[:, row, output]
            own, other = sum((a - a.mean()) ** 2) / 6, sum((b - b.mean()) ** 2) / 10
            squares += (a.mean() - b.mean()) ** 2
            noise += own / 7 + other / 11
            spread += other
        found.append((squares - noise) / spread)
    np.testing.assert_allclose(logit_distance(u, o), found, rtol=1e-12)


@pytest.mark.parametrize("models", [5, 20, 50])
def test_the_logit_distance_of_a_known_shift(models, random):
    u, o = random.normal(size=(2, models, 4000, 10))
    # The variance of the oracles that is divided by is itself an estimate from 10 outputs.
    inverse = 1 / (1 - 2 / (10 * (models - 1)))
    null = (inverse - 1) / models
    # Over other draws of 5 models these means have standard deviations of .004 and .015.
    assert logit_distance(u, o).mean() == pytest.approx(null, abs=0.012)
    assert logit_distance(u + 1.5, o).mean() == pytest.approx(2.25 * inverse + null, abs=0.045)


def test_outputs_that_do_not_fit_are_refused_and_equal_oracles_give_no_number():
    with pytest.raises(ValueError, match=r"of 2 models or more, got \(1, 3, 2\) and \(4, 3, 2\)"):
        logit_distance(np.zeros((1, 3, 2)), np.zeros((4, 3, 2)))
    assert not np.isfinite(logit_distance(np.zeros((2, 3, 2)), np.zeros((4, 3, 2)))).any()


@pytest.mark.parametrize("models", [12, 80])
def test_the_harmed_rows_are_the_farthest_with_their_ids_and_signs(models, random):
    u, o = random.normal(size=(2, models, 40))
    u[:, 7] -= 9
    u[:, 30] += 5
    u[:, 2] -= 99  # is not among the rows to choose from
    ids, rows = [f"row-{i}" for i in range(40)], np.arange(5, 38)
    found = most_harmed(u, o, ids, rows, count=4)
    assert [row.id for row in found[:2]] == ["row-7", "row-30"]
    assert found[0].shift < -6
    assert found[1].shift > 3
    apart = shift(u, o)[rows]
    assert [abs(row.shift) for row in found] == pytest.approx(sorted(apart, reverse=True)[:4])
    whole = klom(u, o)
    expected = [whole[7], whole[30]] if models >= 80 else [None, None]
    assert [row.klom for row in found[:2]] == pytest.approx(expected)


def test_the_farthest_of_many_rows_between_two_banks_is_not_at_zero(random):
    u, o = random.normal(size=(2, 100, 1400))
    found = most_harmed(u, o, [str(i) for i in range(1400)], np.arange(1400))
    assert len(found) == 10
    assert abs(found[0].shift) == pytest.approx(0.5, abs=0.1)


def test_harmed_rows_need_an_id_each_and_rows_without_a_shift_come_last():
    u, o = np.eye(3), np.array([[0.0, 0, -1], [0, 0, 0], [0, 0, 1]])
    with pytest.raises(ValueError, match="an id for each of 3 targets, got 2"):
        most_harmed(u, o, ["a", "b"], np.arange(2))
    assert most_harmed(u[:, :0], o[:, :0], [], np.arange(0)) == []
    o[:, 0] = u[:, 0] = 1.0
    assert [row.id for row in most_harmed(u, o, ["a", "b", "c"], np.arange(3))][-1] == "a"
