from dataclasses import dataclass, replace

import numpy as np
import pytest

from attribution import Change, Combined, Counterfactual, ForgetSet, Task
from attribution.cases import KINDS, Case, row_kinds, rows_together
from attribution.combined import Weights, forget_rows_together, weigh, weighed_sum
from tests.tasks import blobs, line

ALL = 48


@dataclass(frozen=True)
class Told(Counterfactual):
    """Says what it was told; refuses one task by name."""

    change_told: Change
    refuses: str = ""

    def check_task(self, task):
        if task.name == self.refuses:
            raise ValueError(f"no {task.name}, please")

    def change(self, forget, already=None, targets=None):
        places = np.arange(ALL) if targets is None else targets
        told = self.change_told
        return Change(told.mean[places], told.std[places], told.noise[places])


def drawn(seed, scale=1.0):
    random = np.random.default_rng(seed)
    mean = scale * random.normal(size=(ALL, 2))
    return Change(*(part.astype(np.float32) for part in (mean, np.abs(mean) + 0.1, mean**2 + 0.2)))


WEIGHTS = {
    "forget": Weights(0.9, 0.2, 1.5, 3.0),
    "retain": Weights(0.5, 0.0, 1.0, 2.0, 7.0),
    "test": Weights(0.0, 0.7, 2.0, 0.5, 1.2),
}


@pytest.fixture
def task():
    return blobs()


@pytest.mark.parametrize("targets", [None, np.array([40, 3, 0, 20])])
def test_changes_are_weighed_by_kind_of_row(task, targets):
    one, two, forget = drawn(1), drawn(2), ForgetSet.at(task, [3, 20])
    found = Combined(Told(one), Told(two), WEIGHTS).change(forget, targets=targets)
    places = np.arange(ALL) if targets is None else targets
    for row, place in enumerate(places):
        kind = "forget" if place in (3, 20) else "retain" if place < 37 else "test"
        w = WEIGHTS[kind]
        mean = w.first * one.mean[place] + w.second * two.mean[place]
        other = w.spread if w.second_spread is None else w.second_spread
        std = np.hypot(w.spread * w.first * one.std[place], other * w.second * two.std[place])
        np.testing.assert_allclose(found.mean[row], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.std[row], std, rtol=1e-5)
        np.testing.assert_allclose(found.noise[row], w.noise * one.noise[place], rtol=1e-5)
    assert found.mean.dtype == found.std.dtype == found.noise.dtype == np.float32


def test_a_predictor_that_has_no_weight_has_no_say(task):
    one, two = drawn(1), drawn(2)
    two.std[:37] = np.inf  # what the datamodel says of a row that all its models saw
    one.std[37:] = np.nan
    forget = ForgetSet.at(task, [3, 20])
    alone = WEIGHTS | {"forget": Weights(1.0, 0.0, 1.0, 1.0)}
    found = Combined(Told(one), Told(two), alone).change(forget)
    assert np.isfinite(found.mean).all()
    assert np.isfinite(found.std).all()


@pytest.mark.parametrize("refusing", [0, 1])
def test_a_task_that_one_of_them_refuses_is_refused(task, refusing):
    pair = [Told(drawn(1)), Told(drawn(2))]
    pair[refusing] = Told(drawn(1), refuses="blobs")
    with pytest.raises(ValueError, match="no blobs, please"):
        Combined(*pair, WEIGHTS).check_task(task)
    Combined(*pair, WEIGHTS).check_task(line())


def cases_and_pairs(task, count, makes, noise=0.0):
    """Cases whose change is `makes(one, two, kinds)` of two predictions drawn at random."""
    found = []
    for number in range(count):
        one, two = drawn(2 * number, 1 + number), drawn(2 * number + 1, 1 + number)
        forget = ForgetSet.at(task, [number, number + 10, number + 20])
        case = Case(task, forget, np.zeros((ALL, 2), np.float32), np.zeros((ALL, 2)))
        random = np.random.default_rng([number, 7])
        error = noise * one.noise * random.normal(size=one.mean.shape)
        change = makes(one, two, case.kind_numbers[:, None]) + error
        variance = np.square(noise * one.noise)
        found.append((Case(task, forget, case.before, change, variance, variance), (one, two)))
    return [case for case, _ in found], [pair for _, pair in found]


def test_weights_that_made_the_changes_are_found(task):
    a, b = np.array([0.9, 0.4, 0.7]), np.array([0.1, 0.8, 0.3])
    cases, pairs = cases_and_pairs(
        task, 5, lambda one, two, kinds: a[kinds] * one.mean + b[kinds] * two.mean
    )
    found = weigh(cases, pairs)
    assert list(found) == list(KINDS)
    for number, kind in enumerate(KINDS):
        assert found[kind].first == pytest.approx(a[number], abs=1e-5)
        assert found[kind].second == pytest.approx(b[number], abs=1e-5)
        assert found[kind].spread == pytest.approx(0, abs=1e-3)
        assert found[kind].noise == 1.0


def test_the_noise_of_one_retraining_is_found(task):
    cases, pairs = cases_and_pairs(
        task, 16, lambda one, two, _: 0.6 * one.mean + 0.4 * two.mean, noise=0.05
    )
    found = weigh(cases, pairs)["retain"]
    assert (found.first, found.second) == pytest.approx((0.6, 0.4), abs=0.1)
    assert found.noise == pytest.approx(0.05)
    assert found.spread < 0.02


def test_each_one_has_a_factor_on_its_own_deviation(task):
    random = np.random.default_rng(0)

    def makes(one, two, _):
        first, second = random.normal(size=(2, *one.mean.shape))
        missed = 0.6 * 0.3 * one.std * first + 0.4 * 0.8 * two.std * second
        return 0.6 * one.mean + 0.4 * two.mean + missed

    cases, pairs = cases_and_pairs(task, 16, makes)
    found = weigh(cases, pairs)["retain"]
    assert (found.first, found.second) == pytest.approx((0.6, 0.4), abs=0.1)
    assert (found.spread, found.second_spread) == pytest.approx((0.3, 0.8), rel=0.25)


def test_deviations_are_those_of_sets_that_the_weights_were_not_fitted_to(task):
    """Two sets that want opposite weights: neither is told by the other."""
    cases, pairs = cases_and_pairs(task, 2, lambda one, two, _: one.mean)
    unlike = [
        Case(task, case.forget, case.before, sign * one.mean)
        for case, (one, _), sign in zip(cases, pairs, (0.5, 1.5), strict=True)
    ]
    nothing = [Change(0 * two.mean, two.std, two.noise) for _, two in pairs]
    told = [
        (Change(one.mean, np.abs(one.mean), one.noise), none)
        for (one, _), none in zip(pairs, nothing, strict=True)
    ]
    found = weigh(unlike, told)["retain"]
    # Each is off by 1.0 of the mean, with the weight of both by less.
    assert found.first * found.spread == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("useless", [0, 1])
def test_a_predictor_that_does_harm_gets_no_weight(task, useless):
    cases, pairs = cases_and_pairs(
        task, 5, lambda one, two, _: (two if useless == 0 else one).mean * 0.8
    )
    turned = [
        tuple(
            Change(part.mean - 0.5 * case.change, part.std, part.noise) if i == useless else part
            for i, part in enumerate(pair)
        )
        for case, pair in zip(cases, pairs, strict=True)
    ]
    spoiled = [
        Case(task, case.forget, case.before, case.change - 0.3 * pair[useless].mean)
        for case, pair in zip(cases, turned, strict=True)
    ]
    for weights in weigh(spoiled, turned).values():
        pair = weights.first, weights.second
        assert pair[useless] == 0
        assert pair[1 - useless] > 0.5


def test_predictors_that_know_nothing_get_no_weight(task):
    cases, pairs = cases_and_pairs(task, 5, lambda one, two, _: -one.mean - two.mean)
    for weights in weigh(cases, pairs).values():
        assert (weights.first, weights.second) == (0, 0)


def test_a_predictor_that_predicts_nothing_leaves_the_other_alone(task):
    cases, pairs = cases_and_pairs(task, 5, lambda one, _, __: 0.5 * one.mean)
    silent = [(one, Change(0 * two.mean, two.std, two.noise)) for one, two in pairs]
    for weights in weigh(cases, silent).values():
        assert (weights.first, weights.second) == pytest.approx((0.5, 0), abs=1e-5)


def test_every_forget_set_weighs_the_same(task):
    """One set of changes a hundred times larger than the others' does not decide."""
    cases, pairs = cases_and_pairs(task, 2, lambda one, two, _: one.mean)
    scales = (1.0, 0.0), (0.0, 100.0)
    changed = [
        Case(task, c.forget, c.before, a * one.mean + b * two.mean)
        for c, (one, two), (a, b) in zip(cases, pairs, scales, strict=True)
    ]
    told = [
        (Change(k * one.mean, one.std, one.noise), Change(k * two.mean, two.std, two.noise))
        for (one, two), k in zip(pairs, (1.0, 100.0), strict=True)
    ]
    found = weigh(changed, told)["retain"]
    assert (found.first, found.second) == pytest.approx((0.5, 0.5), abs=0.25)


def test_kinds_without_rows_get_the_first_predictor_as_it_is():
    blob = blobs()
    alone = Task("alone", blob.train_data, [], blob.model, blob.recipe)
    one, two = (
        Change(*(getattr(drawn(seed), name)[:37] for name in ("mean", "std", "noise")))
        for seed in (1, 2)
    )
    forget = ForgetSet.at(alone, [3])
    case = Case(alone, forget, np.zeros((37, 2), np.float32), one.mean)
    found = weigh([case], [(one, two)])
    assert found["test"] == Weights(1.0, 0.0, 1.0, 1.0)
    assert found["retain"].first == pytest.approx(1, abs=1e-5)


def test_a_second_deviation_that_is_not_trusted_is_left_out(task):
    random = np.random.default_rng(4)
    one, two = drawn(1), drawn(2)
    two.std[:] = np.inf
    forget = ForgetSet.at(task, [3, 20])
    change = one.mean + 0.5 * two.mean + 0.1 * random.normal(size=one.mean.shape)
    weights = weigh([Case(task, forget, 0 * change, change)], [(one, two)], trusted=False)
    assert weights["retain"].second == pytest.approx(0.5, abs=0.1)
    assert {w.second_spread for w in weights.values()} == {0.0}
    found = Combined(Told(one), Told(two), weights).change(forget)
    assert np.isfinite(found.std).all()


GROWING = {
    "forget": Weights(0.9, 0.2, 1.5, 3.0, growth=0.4, most=1.5),
    "retain": Weights(0.5, 0.0, 1.0, 2.0, 7.0, growth=0.1, most=9.0, shared=0.3),
    "test": Weights(0.0, 0.7, 2.0, 0.5, 1.2, shared=0.8),
}
PLAIN = {kind: replace(one, growth=0.0, shared=0.0) for kind, one in GROWING.items()}
ASKED = [None, np.array([40, 3, 0, 20]), np.array([39, 1, 39]), np.array([], dtype=np.int64)]


@pytest.mark.parametrize("targets", ASKED)
def test_the_sum_grows_with_forget_rows_that_change_together(task, targets):
    one, two, forget = drawn(1), drawn(2), ForgetSet.at(task, [3, 20, 21])
    one.mean[[3, 20, 21]] = [[1.0, 0.5], [1.0, 0.5], [1.0, 0.2]]
    together = rows_together(one.mean[[3, 20, 21]])
    assert 2.9 < together < 3
    found = Combined(Told(one), Told(two), GROWING).change(forget, targets=targets)
    expected = Combined(Told(one), Told(two), PLAIN).change(forget, targets=targets)
    kinds = row_kinds(forget, np.arange(ALL) if targets is None else targets)
    factors = np.array([1 + 0.4 * 1.5, 1 + 0.1 * together, 1.0])[kinds, None]
    mean = factors * expected.mean
    shared = np.array([0.0, 0.3, 0.8])[kinds, None] * np.sqrt(together / 3) * mean
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
    std = np.sqrt(np.square(factors * expected.std) + np.square(shared))
    np.testing.assert_allclose(found.std, std, rtol=1e-6)
    np.testing.assert_array_equal(found.noise, expected.noise)
    for part in (found.mean, found.std, found.noise):
        assert part.dtype == np.float32


@dataclass(frozen=True)
class Additive(Told):
    """Says the sum of what each row that is still there does, and how sure it is of it."""

    def change(self, forget, already=None, targets=None):
        told = super().change(forget, None, targets)
        count = len(forget) - (len(already) if already else 0)
        return Change(*(np.float32(count) * part for part in (told.mean, told.std, told.noise)))


def test_rows_that_are_gone_already_grew_by_themselves(task):
    one, two = drawn(1), drawn(2)
    one.mean[[3, 20, 21]] = [1.0, 0.5]
    combined, parts = Combined(Additive(one), Additive(two), GROWING), (one, two)
    forget, gone = ForgetSet.at(task, [3, 20, 21]), ForgetSet.at(task, [3])
    found = combined.change(forget, gone)
    whole, before = combined.change(forget), combined.change(gone)
    np.testing.assert_allclose(found.mean, whole.mean - before.mean, rtol=1e-6, atol=1e-6)
    # Three rows change together in the end, of which two are still there.
    left = (Change(*(2 * part for part in (c.mean, c.std, c.noise))) for c in parts)
    kinds = row_kinds(forget, np.arange(ALL))
    expected = weighed_sum(GROWING, *left, kinds, one.mean[forget.rows])
    np.testing.assert_allclose(found.std, expected.std, rtol=1e-6)
    np.testing.assert_allclose(found.noise, expected.noise, rtol=1e-6)


def test_a_growth_is_found_for_each_kind_of_row(task):
    cases, pairs = [], []
    for number in (*range(6), *range(6)):  # the largest twice, as none is told beyond others
        one, two = drawn(2 * number), drawn(2 * number + 1)
        rows = np.arange(number, 3 * number + 3)
        one.mean[rows[: number + 1]] = [2.0, -1.0]
        forget = ForgetSet.at(task, rows)
        growth = np.array([0.2, 0.05, 0.0])[row_kinds(forget, np.arange(ALL)), None]
        factor = 1 + growth * rows_together(one.mean[rows])
        change = factor * (0.6 * one.mean + 0.3 * two.mean)
        cases.append(Case(task, forget, np.zeros((ALL, 2), np.float32), change))
        pairs.append((one, two))
    found, plain = weigh(cases, pairs, grows=True), weigh(cases, pairs)
    most = max(forget_rows_together(cases, [one for one, _ in pairs]))
    for kind, growth in zip(KINDS, (0.2, 0.05, 0.0), strict=True):
        assert found[kind].most == (most if growth else 0)
        assert 1 + found[kind].growth * most == pytest.approx(1 + growth * most, rel=0.03)
        assert (found[kind].first, found[kind].second) == pytest.approx((0.6, 0.3), rel=0.05)
        assert plain[kind].growth == 0
    # The deviations are those of what is left then, which is little.
    assert found["forget"].spread < 0.1 * plain["forget"].spread


def test_what_forget_rows_are_off_by_together_is_found(task):
    """Coherent sets are off by a part of the sum, those without anything in common are not."""
    random = np.random.default_rng(3)
    cases, pairs = [], []
    for number in range(24):
        one, two = drawn(2 * number), drawn(2 * number + 1)
        one.std[:], two.std[:] = 0.02, 0.02
        rows = np.arange(number, number + 6)
        one.mean[rows] = [2.0, -1.0] if number % 2 else [[2.0, -1.0], [-2.0, 1.0]] * 3
        mean = 0.6 * one.mean + 0.3 * two.mean
        off = 0.4 * random.normal(size=mean.shape) if number % 2 else 0.0
        forget = ForgetSet.at(task, rows)
        cases.append(Case(task, forget, np.zeros((ALL, 2), np.float32), mean * (1 + off)))
        pairs.append((one, two))
    for weights in weigh(cases, pairs).values():
        assert weights.shared == pytest.approx(0.4, rel=0.25)


@pytest.mark.parametrize("first", [0.8, 0.0])
def test_deviations_of_the_first_grow_as_the_means_do(task, first):
    one, two, forget = drawn(1), drawn(2), ForgetSet.at(task, [3, 20, 21])
    weights = Weights(first, 0.5, 9.0, 9.0, 9.0, growth=0.2, most=2.0, shared=0.7)
    sure = dict.fromkeys(KINDS, weights.as_sure_as_the_first())
    found = Combined(Told(one), Told(two), sure).change(forget)
    factor = 1 + 0.2 * min(2, rows_together(one.mean[[3, 20, 21]]))
    expected = one.std if first else 0.5 * two.std
    np.testing.assert_allclose(found.std, factor * expected, rtol=1e-6)
    np.testing.assert_array_equal(found.noise, one.noise)
