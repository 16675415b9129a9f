from dataclasses import replace

import numpy as np
import pytest

from attribution import ForgetSet, Task
from attribution.cases import KINDS, Case, cases_of, row_kinds
from attribution.outputs import target_margins
from tests.tasks import RECIPE, binary, blobs, line, write_ensemble

ALL = 48


@pytest.fixture(scope="module")
def task():
    return blobs()


def case_of(task, rows=(3, 20), seed=0):
    random = np.random.default_rng(seed)
    shape = len(task.target_ids), 2 if task.name == "blobs" else 1
    before, change = random.normal(size=(2, *shape)).astype(np.float32)
    return Case(task, ForgetSet.at(task, rows), before, change)


def test_rows_are_of_three_kinds(task):
    forget = ForgetSet.at(task, [3, 20])
    found = row_kinds(forget, np.array([47, 20, 0, 36, 37, 3, 3]))
    assert [KINDS[kind] for kind in found] == [
        "test",
        "forget",
        "retain",
        "retain",
        "test",
        "forget",
        "forget",
    ]
    case = case_of(task)
    assert [int(rows.sum()) for rows in case.kinds] == [2, 35, 11]
    np.testing.assert_array_equal(np.sum(case.kinds, axis=0), np.ones(ALL))
    np.testing.assert_array_equal(case.targets, np.arange(ALL))


def test_a_kind_of_row_weighs_one_over_its_squared_change(task):
    case = case_of(task)
    assert case.weight(0) == pytest.approx(1 / np.square(case.change[[3, 20]]).sum())
    assert case.weight(2) == pytest.approx(1 / np.square(case.change[37:]).sum())
    for variance, total in ((0.25, 0.25 * case.change[37:].size), (case.change**2, None)):
        unsure = replace(case, change_variance=variance)
        squares = np.square(case.change[37:]).sum()
        expected = squares + (squares if total is None else total)
        assert unsure.weight(2) == pytest.approx(1 / expected)
    still = Case(task, case.forget, case.before, 0 * case.change)
    assert np.isfinite(still.weight(1))


@pytest.mark.parametrize("make", [blobs, binary, line])
def test_views_are_the_outputs_and_the_margins(make):
    case = case_of(make())
    outputs, margins = case.views(case.change)
    np.testing.assert_array_equal(outputs, case.change)
    before, after = (
        target_margins(case.task, values) for values in (case.before, case.before + case.change)
    )
    np.testing.assert_allclose(margins[:, 0], after - before, atol=1e-6)


class TestError:
    @pytest.mark.parametrize("make", [blobs, binary, line])
    def test_no_change_has_one_and_the_change_none(self, make):
        case = case_of(make())
        assert case.error(0 * case.change) == pytest.approx(1)
        assert case.error(case.change) == 0

    def test_margins_that_do_not_change_are_no_error(self):
        case = case_of(blobs())
        shifted = Case(case.task, case.forget, 0 * case.before, np.ones_like(case.change))
        assert shifted.error(0 * case.change) == pytest.approx(0.5)
        assert shifted.error(shifted.change) == 0

    @pytest.mark.parametrize("make", [binary, line])
    def test_half_the_change_has_a_quarter(self, make):
        case = case_of(make())
        assert case.error(case.change / 2) == pytest.approx(0.25, rel=1e-4)

    @pytest.mark.parametrize("kind", [0, 1, 2])
    def test_each_kind_of_row_counts_a_third(self, kind):
        case = case_of(line())
        wrong = case.change.copy()
        wrong[case.kinds[kind]] = 0
        assert case.error(wrong) == pytest.approx(1 / 3, rel=1e-4)

    def test_kinds_without_rows_do_not_count(self):
        task = Task("alone", line().train_data, [], line().model, RECIPE, loss=line().loss)
        case = case_of(task)
        wrong = case.change.copy()
        wrong[case.kinds[0]] = 0
        assert case.error(wrong) == pytest.approx(0.5, rel=1e-4)

    def test_two_predictions_tell_the_error_of_their_mean(self):
        case, random = case_of(line()), np.random.default_rng(1)
        near = case.change + 0.5 * random.normal(size=case.change.shape)
        drawn = near + 3 * random.normal(size=(2, 4000, *near.shape))
        errors = [case.error(one, other) for one, other in zip(*drawn, strict=True)]
        assert np.mean(errors) == pytest.approx(
            case.error(near), abs=4 * np.std(errors) / 4000**0.5
        )
        assert np.mean([case.error(one) for one in drawn[0][:50]]) > 5 * case.error(near)


def test_cases_are_the_forget_sets_of_a_bank(task, tmp_path):
    masks = np.ones((3, 37), dtype=bool)
    for mask, rows in zip(masks, ([1, 5], [36], [2, 3, 4]), strict=True):
        mask[rows] = False
    outputs = np.random.default_rng(0).normal(size=(3, ALL, 2)).astype(np.float32)
    bank = write_ensemble(tmp_path / "bank", task, masks, outputs)
    before = np.stack([outputs[0] / 2, outputs[1]])
    cases = cases_of(bank, before)
    assert [case.forget.positions for case in cases] == [(1, 5), (36,), (2, 3, 4)]
    for case, after in zip(cases, outputs, strict=True):
        np.testing.assert_array_equal(case.before, before.mean(0))
        np.testing.assert_array_equal(case.change, after - before.mean(0))


def test_models_without_the_same_set_make_one_case(task, tmp_path):
    masks = np.ones((5, 37), dtype=bool)
    for mask, row in zip(masks, (1, 1, 1, 4, 4), strict=True):
        mask[row] = False
    random = np.random.default_rng(0)
    outputs = random.normal(size=(5, ALL, 2)).astype(np.float32)
    cases = cases_of(write_ensemble(tmp_path / "bank", task, masks, outputs), outputs[:1])
    assert [case.forget.positions for case in cases] == [(1,), (4,)]
    for case, models in zip(cases, (slice(0, 3), slice(3, 5)), strict=True):
        change = outputs[models] - outputs[0]
        np.testing.assert_allclose(case.change, change.mean(0), atol=1e-6)


def bank_of_sets(task, folder, rows, counts, scatter):
    """A bank of changes by chance alone; scatter(kinds) is the deviation of each output."""
    random, masks, outputs = np.random.default_rng(0), [], []
    for some, count in zip(rows, counts, strict=True):
        kinds = row_kinds(ForgetSet.at(task, some), np.arange(ALL))
        mask = np.ones(37, dtype=bool)
        mask[some] = False
        masks += [mask] * count
        outputs += list(scatter(kinds) * random.normal(size=(count, ALL, 2)))
    return write_ensemble(folder, task, np.array(masks), np.array(outputs, dtype=np.float32))


class TestNoise:
    ROWS, COUNTS = ([1, 5], [36], [2, 3, 4]), (4, 1, 3)

    @pytest.mark.parametrize("full", [1, 5])
    def test_it_is_pooled_over_sets_and_scaled_by_kind_of_row(self, task, tmp_path, full):
        bank = bank_of_sets(task, tmp_path / "bank", self.ROWS, self.COUNTS, lambda kinds: 1)
        before = np.random.default_rng(1).normal(size=(full, ALL, 2)).astype(np.float32)
        groups = [before, bank.outputs[:4], bank.outputs[4:5], bank.outputs[5:]]
        pooled = np.zeros((ALL, 2))
        for place in np.ndindex(ALL, 2):
            squares = sum(((g[:, *place] - g[:, *place].mean()) ** 2).sum() for g in groups)
            pooled[place] = squares / sum(len(g) - 1 for g in groups)
        kinds = [row_kinds(ForgetSet.at(task, rows), np.arange(ALL)) for rows in self.ROWS]
        factors = []
        for kind in range(len(KINDS)):
            known = [(kinds[n] == kind, groups[n + 1]) for n in (0, 2)]
            own = [group[:, rows].var(0, ddof=1).mean() for rows, group in known]
            factors.append(sum(own) / sum(pooled[rows].mean() for rows, _ in known))
        for number, case in enumerate(cases_of(bank, before)):
            expected = np.array(factors)[kinds[number]][:, None] * pooled
            np.testing.assert_allclose(case.noise_variance, expected, rtol=1e-4)
            variance = expected / self.COUNTS[number] + pooled / full
            np.testing.assert_allclose(case.change_variance, variance, rtol=1e-4)

    def test_it_is_found_again(self, tmp_path):
        task, random = blobs(), np.random.default_rng(0)
        each, kinds_of = random.uniform(0.5, 2, size=(ALL, 2)), np.array([1.5, 1.0, 0.8])
        rows = [random.permutation(37)[:6] for _ in range(60)]
        bank = bank_of_sets(
            task, tmp_path / "bank", rows, [4] * 60, lambda kinds: each * kinds_of[kinds][:, None]
        )
        before = each * random.normal(size=(50, ALL, 2))
        for case in cases_of(bank, before.astype(np.float32)):
            for kind, wanted in enumerate(kinds_of):
                found = np.sqrt(
                    np.mean(case.noise_variance[case.kinds[kind]] / each[case.kinds[kind]] ** 2)
                )
                assert found == pytest.approx(wanted, rel=0.1)
            variance = (case.noise_variance / 4 + each**2 / 50).mean()
            assert case.change_variance.mean() == pytest.approx(variance, rel=0.05)

    def test_where_nothing_tells_it_there_is_none(self, task, tmp_path):
        bank = bank_of_sets(task, tmp_path / "bank", self.ROWS, (1, 1, 1), lambda kinds: 1)
        for case in cases_of(bank, np.zeros((1, ALL, 2), np.float32)):
            assert not np.any(case.noise_variance)
            assert not np.any(case.change_variance)


def test_a_bank_with_a_model_of_all_rows_is_refused(task, tmp_path):
    masks = np.ones((2, 37), dtype=bool)
    masks[0, 3] = False
    bank = write_ensemble(tmp_path / "bank", task, masks, np.zeros((2, ALL, 2), np.float32))
    with pytest.raises(ValueError, match="bank holds a model trained on all rows: it is no bank"):
        cases_of(bank, np.zeros((1, ALL, 2)))


def test_means_are_no_outputs_of_models(task, tmp_path):
    bank = write_ensemble(
        tmp_path / "bank", task, np.eye(37, dtype=bool)[:2] ^ True, np.zeros((2, ALL, 2), "f4")
    )
    for shape in ((ALL, 2), (0, ALL, 2), (3, ALL, 1), (3, 1, 2)):
        told = rf"axes are \[48, 2\], got the shape \[{', '.join(map(str, shape))}\]"
        with pytest.raises(ValueError, match=told):
            cases_of(bank, np.zeros(shape))


def test_a_bank_whose_sets_were_all_purged_is_refused(task, tmp_path, monkeypatch):
    masks = np.ones((2, 37), dtype=bool)
    bank = write_ensemble(tmp_path / "bank", task, masks, np.zeros((2, ALL, 2), np.float32))
    monkeypatch.setattr("attribution.cases.taken_out", lambda _: [3])
    with pytest.raises(ValueError, match=r"sets of .*bank were purged: remove it, and the same"):
        cases_of(bank, np.zeros((1, ALL, 2)))
