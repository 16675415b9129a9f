import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from attribution import Calibration, ForgetSet, GroupNewton, Model, calibrate, featurize
from attribution.cases import KINDS, cases_of, common_share, row_kinds
from attribution.newton import choosing, fitting, predicted_changes
from attribution.newton.fitting import outputs_before
from stores import Store
from tests.attribution.newton.cases import EXACT, newton_of
from tests.tasks import binary, blobs, write_ensemble

ROWS, ALL, SETS = 37, 48, 12
BLOCKS = -(-SETS // choosing.CASES_TOGETHER)
ONE = {"temperatures": (1.0,), "dampings": (1.0,)}
CANDIDATES = {"temperatures": (1.0, 2.0), "dampings": (0.7, 7.0)}
TWO = {"temperatures": (1.0, 1.5), "dampings": (1.0,)}
UNIT = ROWS * 5e-4  # number of rows x weight decay of the recipe


@pytest.fixture(scope="module")
def newton(tmp_path_factory):
    made = {"features": {"block": 20}, "steps": 3}
    return newton_of(blobs(), tmp_path_factory.mktemp("newton") / "f", **made)


def drawn_masks(sets=SETS):
    random, masks = np.random.default_rng(5), np.ones((sets, ROWS), dtype=bool)
    for mask in masks:
        mask[random.permutation(ROWS)[: random.integers(2, 8)]] = False
    return masks


def made_bank(newton, path, makes, *, sets=SETS, each=1, scatter=None):
    """A bank whose models' outputs are made from what group Newton predicts of their sets."""
    task, masks = newton.task, drawn_masks(sets)
    before, outputs = outputs_before(newton.features, None).mean(0), []
    for number, mask in enumerate(masks):
        forget = ForgetSet.at(task, np.flatnonzero(~mask))
        kinds = row_kinds(forget, np.arange(ALL))[:, None]
        random, change = np.random.default_rng([number, 1]), newton.change(forget)
        made = before + makes(change, kinds, random)
        chance = scatter(change, kinds) if scatter else np.zeros_like(made)
        outputs += list(made + chance * random.normal(size=(each, *made.shape)))
    masks = masks.repeat(each, axis=0)
    return write_ensemble(path, task, masks, np.array(outputs, dtype=np.float32), block=4)


def all_alike(newton, path):
    """Full models that no chance parts; their mean is that of the checkpoints."""
    outputs = np.stack([outputs_before(newton.features, None).mean(0)] * 2)
    return write_ensemble(path, newton.task, np.ones((2, ROWS), dtype=bool), outputs)


@pytest.fixture(scope="module")
def doubled(newton, tmp_path_factory):
    """A bank of twice the predicted changes, and some noise."""

    def makes(change, kinds, random):
        del kinds
        return 2 * change.mean + 0.02 * random.normal(size=change.mean.shape)

    known = replace(newton, damping=UNIT)
    return made_bank(known, tmp_path_factory.mktemp("doubled") / "bank", makes)


class TestFactors:
    """One candidate only: what is left to fit are the factors."""

    def test_the_scale_of_each_kind_of_row_is_found(self, newton, tmp_path):
        scales = np.array([2.0, 0.5, 1.2])

        def makes(change, kinds, random):
            return scales[kinds] * change.mean + 0.01 * random.normal(size=change.mean.shape)

        known = replace(newton, damping=UNIT)
        found = calibrate(newton, made_bank(known, tmp_path / "b", makes), tmp_path / "c", **ONE)
        assert (found.damping, found.temperature, found.forget_sets) == (UNIT, 1.0, SETS)
        for kind, scale in zip(KINDS, scales, strict=True):
            assert found.scale[kind] == pytest.approx(scale, rel=0.05)

    def test_the_factor_of_the_spread_is_found(self, newton, tmp_path):
        factors = np.array([1.5, 0.6, 0.9])

        def makes(change, kinds, random):
            return change.mean + factors[kinds] * change.std * random.normal(size=change.std.shape)

        known, full = replace(newton, damping=UNIT), all_alike(newton, tmp_path / "full")
        bank = made_bank(known, tmp_path / "b", makes, sets=24)
        found = calibrate(newton, bank, tmp_path / "c", full=full, **ONE)
        for kind, factor in zip(KINDS, factors, strict=True):
            assert found.spread[kind] == pytest.approx(factor, rel=0.25)
            assert found.noise[kind] == 1.0

    @pytest.mark.parametrize("full", [None, 60])
    def test_the_factors_of_spread_and_noise_are_told_apart(self, newton, tmp_path, full):
        noises, spreads = np.array([1.5, 0.6, 0.9]), np.array([3.0, 1.5, 2.0])

        def makes(change, kinds, random):
            return change.mean + spreads[kinds] * change.std * random.normal(size=change.std.shape)

        def scatter(change, kinds):
            return noises[kinds] * change.noise

        known = replace(newton, damping=UNIT)
        bank = made_bank(known, tmp_path / "b", makes, sets=24, each=16, scatter=scatter)
        if full is not None:
            before = outputs_before(newton.features, None)
            drawn = np.random.default_rng(0).normal(size=(full, *before[0].shape))
            outputs = before.mean(0) + before.std(0, ddof=1) * (drawn - drawn.mean(0))
            masks = np.ones((full, ROWS), dtype=bool)
            full = write_ensemble(tmp_path / "f", newton.task, masks, outputs.astype(np.float32))
        found = calibrate(newton, bank, tmp_path / "c", full=full, **ONE)
        for kind, noise, spread in zip(KINDS, noises, spreads, strict=True):
            assert found.noise[kind] == pytest.approx(noise, rel=0.1)
            assert found.spread[kind] == pytest.approx(spread, rel=0.25), kind

    def test_what_the_forget_rows_have_in_common_is_found(self, newton, tmp_path):
        def makes(change, kinds, random):
            common = common_share(change.mean[kinds.ravel() == 0])
            return change.mean + common**0.5 * change.noise * random.normal(size=change.mean.shape)

        known, full = replace(newton, damping=UNIT), all_alike(newton, tmp_path / "full")
        bank = made_bank(known, tmp_path / "b", makes, sets=24)
        found = calibrate(newton, bank, tmp_path / "c", full=full, **ONE)
        for kind in ("retain", "test"):
            assert found.shared[kind] == pytest.approx(1.0, rel=0.25)

    def test_a_change_that_goes_the_other_way_has_scale_zero(self, newton, tmp_path):
        known = replace(newton, damping=UNIT)
        bank = made_bank(known, tmp_path / "b", lambda change, *_: -change.mean)
        assert calibrate(newton, bank, tmp_path / "c", **ONE).scale == dict.fromkeys(KINDS, 0.0)

    def test_changes_are_taken_from_the_mean_of_the_full_models(self, newton, doubled, tmp_path):
        outputs = np.stack([newton.features.outputs(c) for c in range(3)])
        np.testing.assert_array_equal(outputs_before(newton.features, None), outputs)
        shifted = np.random.default_rng(0).normal(size=(5, ALL, 2)).astype(np.float32)
        masks = np.ones((5, ROWS), dtype=bool)
        full = write_ensemble(tmp_path / "full", newton.task, masks, shifted)
        np.testing.assert_array_equal(outputs_before(newton.features, full), shifted)
        found = calibrate(newton, doubled, tmp_path / "c", full=full, **ONE)
        powers, products = [], []
        weights = {c.forget.mask.tobytes(): c.weight(2) for c in cases_of(doubled, shifted)}
        for mask, after in zip(doubled.masks, doubled.outputs, strict=True):
            forget = ForgetSet.at(newton.task, np.flatnonzero(~mask))
            predicted = replace(newton, damping=UNIT).change(forget).mean[ROWS:]
            change, weight = (after - shifted.mean(0))[ROWS:], weights[forget.mask.tobytes()]
            powers.append(weight * np.square(predicted).sum())
            products.append(weight * (predicted * change).sum())
        assert found.scale["test"] == pytest.approx(sum(products) / sum(powers), rel=1e-3)


def twins_of(task, folder):
    """Group Newton from two checkpoints that are the same: no chance is in its errors."""
    twins = [Model(task, task.new_model(0).state_dict())] * 2
    return GroupNewton(task, featurize(task, twins, folder, projection=EXACT), steps=3)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    return twins_of(blobs(), tmp_path_factory.mktemp("twins") / "f")


class TestChoice:
    @pytest.mark.parametrize("make", [blobs, binary])
    def test_the_candidate_that_made_the_bank_is_chosen(self, make, tmp_path):
        newton = twins_of(make(), tmp_path / "f")
        maker = replace(newton, temperature=2.0, damping=0.7 * 4 * UNIT, steps=2)
        bank = made_bank(maker, tmp_path / "bank", lambda change, *_: change.mean)
        found = calibrate(newton, bank, tmp_path / "c", **CANDIDATES)
        assert (found.temperature, found.damping) == (2.0, pytest.approx(0.7 * 4 * UNIT))

    @pytest.mark.parametrize("times", [0.7 / 4, 7 * 4, 7 * 16])
    def test_dampings_beyond_the_candidates_are_found(self, twins, tmp_path, times):
        maker = replace(twins, temperature=2.0, damping=times * 4 * UNIT, steps=2)
        bank = made_bank(maker, tmp_path / "bank", lambda change, *_: change.mean)
        found = calibrate(twins, bank, tmp_path / "c", **CANDIDATES)
        assert (found.temperature, found.damping) == (2.0, pytest.approx(times * 4 * UNIT))

    def test_a_damping_that_is_too_little_is_not_chosen(self, newton, doubled, tmp_path):
        candidates = {"temperatures": (1.0,), "dampings": (1e-30, 1e-29, 1.0)}
        assert calibrate(newton, doubled, tmp_path / "c", **candidates).damping == UNIT

    def test_where_all_are_too_little_larger_ones_are_tried(self, newton, doubled, tmp_path):
        candidates = {"temperatures": (1.0,), "dampings": (1e-6, 2e-6)}
        with pytest.raises(ValueError, match="raise the damping"):
            replace(newton, damping=2e-6 * UNIT).change(
                cases_of(doubled, np.zeros((1, ALL, 2)))[0].forget
            )
        assert calibrate(newton, doubled, tmp_path / "c", **candidates).damping > 2e-6 * UNIT

    @pytest.mark.parametrize("steps", [1, 3])
    def test_the_fewest_steps_that_do_are_chosen(self, twins, tmp_path, steps):
        free, damping = replace(twins, steps=None), 0.02 * UNIT
        maker = replace(twins, damping=damping, steps=steps)
        bank = made_bank(maker, tmp_path / "bank", lambda change, *_: change.mean)
        candidates = {"temperatures": (1.0,), "dampings": (0.02,)}
        found = calibrate(free, bank, tmp_path / "c", **candidates)
        assert found.steps == steps
        forget, wanted = ForgetSet.at(twins.task, [1, 5, 9]), replace(twins, steps=steps)
        told = replace(free, calibration=found).changes(forget, np.arange(ALL))
        expected = replace(wanted, damping=damping, temperature=1.0).changes(forget, np.arange(ALL))
        np.testing.assert_array_equal(told, expected)

    @pytest.mark.parametrize(("near", "steps"), [(0.0, 3), (0.01, 2)])
    def test_a_step_that_gains_less_than_one_percent_is_not_taken(
        self, twins, tmp_path, monkeypatch, near, steps
    ):
        def makes(change, kinds, random):
            del kinds
            noise = random.normal(size=change.mean.shape)
            return change.mean + 1.5 * change.mean.std() * noise

        maker = replace(twins, damping=4 * UNIT)
        bank = made_bank(maker, tmp_path / "bank", makes)
        assert choosing.NEAR == 0.01
        monkeypatch.setattr(choosing, "NEAR", near)
        candidates = {"temperatures": (1.0,), "dampings": (4.0,)}
        free = replace(twins, steps=None)
        assert calibrate(free, bank, tmp_path / "c", **candidates).steps == steps

    @pytest.mark.parametrize(
        ("errors", "steps"),
        [
            ([0.9, 0.8, 0.797], 3),  # 1.5 % of what the third step explains
            ([0.9, 0.8, 0.799], 2),
            ([1.2, 1.1, 1.1], 2),
            ([0.5, 0.6, 0.7], 1),
        ],
    )
    def test_what_a_step_gains_is_held_against_what_the_best_explains(self, errors, steps):
        search = SimpleNamespace(
            candidate=lambda pair, number: number, errors=lambda name, tried: np.array(errors)
        )
        assert choosing._fewest_steps(search, (1.0, 1.0)) == steps

    @pytest.mark.parametrize(
        "told",  # the better of two candidates; their errors on all sets but one, and on that one
        [
            (2.0, (0.65, 0.5), (0.9, 4.0)),  # arithmetic means say 1.0
            (1.0, (0.5, 0.55), (0.5, -3.0)),  # arithmetic means say 2.0
        ],
    )
    def test_one_set_does_not_decide_alone(self, newton, doubled, tmp_path, monkeypatch, told):
        best, *errors = told
        sets = [set(np.flatnonzero(~mask)) for mask in doubled.masks]

        def errors_of(tried, cases):
            known = [errors[set(case.forget.rows) == sets[-1]] for case in cases]
            return np.array([[one[round(t.damping / UNIT) - 1] for t in tried] for one in known])

        monkeypatch.setattr(choosing, "_errors", errors_of)
        monkeypatch.setattr(choosing, "MOST_BEYOND", 0)
        pair = {"temperatures": (1.0,), "dampings": (1.0, 2.0)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the best is the largest that was tried
            found = calibrate(newton, doubled, tmp_path / "c", **pair)
        assert found.damping == pytest.approx(best * UNIT)

    @pytest.mark.parametrize(("times", "warns"), [(300.0, True), (0.01, False)])
    def test_a_search_that_ends_at_its_largest_damping_warns(
        self, twins, tmp_path, monkeypatch, times, warns
    ):
        monkeypatch.setattr(choosing, "MOST_BEYOND", 0)
        maker = replace(twins, damping=times * UNIT)
        bank = made_bank(maker, tmp_path / "bank", lambda change, *_: change.mean)
        candidates = {"temperatures": (1.0,), "dampings": (7.0, 70.0)}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            calibrate(twins, bank, tmp_path / "c", **candidates)
        told = f"the best damping on the calibration bank, {70 * UNIT:g}, is the largest"
        assert [told in str(one.message) for one in caught] == [True] * warns

    def test_a_number_of_steps_that_is_given_is_kept(self, newton, doubled, tmp_path):
        two = replace(newton, steps=2)
        assert calibrate(two, doubled, tmp_path / "c", **ONE).steps == 2

    def test_how_it_is_calibrated_now_does_not_matter(self, newton, doubled, tmp_path):
        tables = [dict.fromkeys(KINDS, 9.0)] * 3
        other = replace(newton, calibration=Calibration(9.0, 9.0, *tables, 20))
        found = [
            calibrate(one, doubled, tmp_path / str(number), **ONE)
            for number, one in enumerate((newton, other))
        ]
        assert found[0] == found[1]

    def test_without_weight_decay_lambda_is_in_units_of_the_curvature(self, newton, tmp_path):
        task = blobs(recipe=None)
        free = GroupNewton(task, newton.features, damping=1.0)
        bank = made_bank(free, tmp_path / "bank", lambda change, *_: change.mean)
        found = calibrate(free, bank, tmp_path / "c", temperatures=(1.0,), dampings=(0.3,))
        unit = np.diag(newton.features.curvature(0)).mean()
        assert found.damping == pytest.approx(0.3 * unit)


class TestChanges:
    def test_they_are_those_of_the_predictor_and_are_kept(self, newton, doubled, tmp_path):
        cases = cases_of(doubled, outputs_before(newton.features, None))
        first = predicted_changes(newton, cases, doubled, tmp_path / "c")
        for case, change in zip(cases, first, strict=True):
            expected = newton.change(case.forget)
            np.testing.assert_array_equal(change.mean, expected.mean)
            np.testing.assert_array_equal(change.std, expected.std)
            np.testing.assert_array_equal(change.noise, expected.noise)

    @pytest.mark.parametrize("change", ["damping", "steps", "calibration"])
    def test_those_of_another_predictor_are_refused(self, newton, doubled, tmp_path, change):
        cases = cases_of(doubled, outputs_before(newton.features, None))[:2]
        predicted_changes(newton, cases, doubled, tmp_path / "c")
        tables = [dict.fromkeys(KINDS, 9.0)] * 3
        settings = {"damping": 3.0, "steps": 7, "calibration": Calibration(1.0, 1.0, *tables, 20)}
        other = replace(newton, **{change: settings[change]})
        with pytest.raises(ValueError, match=f"was made with other settings:\n  {change}: stored"):
            predicted_changes(other, cases, doubled, tmp_path / "c")


class TestResuming:
    @pytest.mark.parametrize("after", [0, BLOCKS + 1, 2 * BLOCKS + SETS // 2])
    def test_an_interrupted_call_goes_on_where_it_stopped(self, newton, doubled, tmp_path, after):
        newton, write, written = replace(newton, steps=None), Store.write_block, []

        def stop(store, block, arrays):
            if "curvature" not in arrays:
                if len(written) == after:
                    raise KeyboardInterrupt
                written.append((store.path, block))
            write(store, block, arrays)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "write_block", stop)
            with pytest.raises(KeyboardInterrupt):
                calibrate(newton, doubled, tmp_path / "c", **TWO)
            after = -1
            again = calibrate(newton, doubled, tmp_path / "c", **TWO)
            assert len(written) == len(set(written))
            assert {"choices-round-0", "choices-steps"} <= {
                Path(where).name for where, _ in written
            }
            count = len(written)
            assert calibrate(newton, doubled, tmp_path / "c", **TWO) == again
            assert len(written) == count >= 2 * BLOCKS + SETS
        assert again == calibrate(newton, doubled, tmp_path / "whole", **TWO)

    def test_workers_change_nothing(self, newton, doubled, tmp_path):
        # Features of its own: the curvatures, too, are computed by the workers.
        newton = replace(newton, steps=None)
        other = newton_of(blobs(), tmp_path / "f", features={"block": 20})
        found = calibrate(other, doubled, tmp_path / "c", workers=2, **TWO)
        assert found == calibrate(newton, doubled, tmp_path / "d", **TWO)


def test_one_checkpoint_is_refused(newton, doubled, tmp_path):
    alone = replace(newton, features=newton.features.first(1))
    with pytest.raises(ValueError, match="needs the features of 2 trainings or more, got 1"):
        calibrate(alone, doubled, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_bank_of_another_task_is_refused(newton, tmp_path):
    other = blobs(train_ids=[f"row-{i}" for i in range(ROWS)])
    outputs = np.zeros((SETS, ALL, 2), dtype=np.float32)
    bank = write_ensemble(tmp_path / "bank", other, drawn_masks(), outputs)
    with pytest.raises(ValueError, match="made from other rows than those of task 'blobs'"):
        calibrate(newton, bank, tmp_path / "c")


def test_another_bank_is_refused_in_the_same_folder(newton, doubled, tmp_path):
    calibrate(newton, doubled, tmp_path / "c", **ONE)
    store = doubled.store.path
    other = made_bank(replace(newton, damping=UNIT), tmp_path / "b", lambda c, *_: c.mean, sets=5)
    assert other.store.path != store
    with pytest.raises(ValueError, match="was made with other settings"):
        calibrate(newton, other, tmp_path / "c", **ONE)


def test_the_candidates_are_within_reason():
    assert all(1 <= t <= 4 for t in fitting.TEMPERATURES)
    assert all(0.1 <= d <= 10 for d in fitting.DAMPINGS)
