from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from attribution import (
    ForgetSet,
    GroupNewton,
    Recipe,
    StagedNewton,
    Subsets,
    calibrate,
    featurize,
    train_models,
)
from attribution.newton import damping_per_row
from tests.attribution.newton.cases import EXACT, SMALL, TASKS, checkpoints, newton_of
from tests.references import group_newton_step
from tests.tasks import blobs, line, write_ensemble

TIMES = (3.0, 0.5)
FEW, MANY = [3, 7], [0, 3, 7, 11, 12, 13, 20, 29]


def along(task, folder, trainings=2, *, times=TIMES, features=None, **settings):
    """Group Newton whose checkpoints, drawn at random, stand for means over segments."""
    more = {"times": times, "block": 7} | (features or {})
    return newton_of(task, folder, trainings * len(times), features=more, **settings)


def reference(newton, training, rows):
    """The step at the end of a training, segment by segment, in float64; one Newton step each."""
    task, features, step = newton.task, newton.features, 0
    count, decay = len(task.train_ids), task.recipe.weight_decay
    kept = count - len(rows)
    labels = task.rows("train", np.arange(count))[1]
    unit = kept
    if newton.damping is not None:
        unit = newton.damping / (decay + 1 / sum(features.times))
    for checkpoint, time in zip(features.path(training), features.times, strict=True):
        j = features.gather(checkpoint, np.arange(count))
        step = group_newton_step(
            j,
            features.outputs(checkpoint)[:count],
            labels,
            rows,
            loss=task.loss,
            damping=unit * (decay + 1 / time),
            temperature=1.0,
            held=unit / time * step,
        )
    return step


@pytest.fixture(scope="module")
def task():
    return blobs()


@pytest.fixture(scope="module")
def newton(task, tmp_path_factory):
    return along(task, tmp_path_factory.mktemp("path") / "f", 3)


class TestFeatures:
    def test_they_tell_their_trainings_and_segments(self, newton):
        features = newton.features
        assert (len(features), features.trainings, features.times) == (6, 3, TIMES)
        assert [list(features.path(training)) for training in range(3)] == [[0, 1], [2, 3], [4, 5]]

    def test_the_first_trainings_and_the_ends_are_features_too(self, newton):
        features = newton.features
        two, ends = features.first(2), features.ends()
        assert (two.stores, two.trainings, two.times) == (features.stores[:4], 2, TIMES)
        assert (ends.stores, ends.trainings, ends.times) == (features.stores[1::2], 3, ())
        assert ends.first(1).stores == features.stores[1:2]
        assert ends.ends().stores == ends.stores

    def test_segments_of_a_training_share_their_projection(self, newton):
        digests = [newton.features.projector(c).plan.digest() for c in range(6)]
        assert digests[::2] == digests[1::2]
        assert len(set(digests)) == 3

    def test_the_projection_is_that_of_the_training_alone(self, task, newton, tmp_path):
        plain = newton_of(task, tmp_path / "f").features
        for training in range(3):
            expected = plain.projector(training).plan.digest()
            assert newton.features.projector(2 * training).plan.digest() == expected

    def test_others_are_refused_in_the_same_folder(self, task, newton):
        folder, models = newton.features.stores[0].path, checkpoints(task, 6)
        folder = folder.removesuffix("/checkpoint-0")
        for times in ((), (3.0, 0.6)):
            with pytest.raises(ValueError, match="checkpoint-0 was made with other settings"):
                featurize(task, models, folder, projection=SMALL, times=times, block=7)

    def test_a_training_without_all_its_segments_is_refused(self, task, tmp_path):
        text = "expected checkpoints of all 2 segments of each training, got 3"
        with pytest.raises(ValueError, match=text):
            featurize(task, checkpoints(task, 3), tmp_path / "f", times=TIMES)

    def test_models_of_an_ensemble_must_be_what_the_times_say(self, task, tmp_path):
        subsets = Subsets(np.ones((2, 37), bool), "by hand", 7, np.ones(2, bool))
        how = {"keep": "weights", "segments": 2, "workers": 0}
        bank = train_models(task, subsets, tmp_path / "bank", **how)
        wrong = {
            "0 is the mean of segment 0 where a trained model": (bank.along(2), ()),
            "0 is a trained model where the mean of segment 0": (bank.checkpoints(2), TIMES),
            "0 is the mean of segment 1 where the mean of segment 0": (bank.along(2)[::-1], TIMES),
        }
        for text, (models, times) in wrong.items():
            with pytest.raises(ValueError, match=f"checkpoint {text} is expected: give Ensemble"):
                featurize(task, models, tmp_path / "f", times=times)

    @pytest.mark.parametrize("time", [0.0, -1.0, np.nan, np.inf])
    def test_times_out_of_range_are_refused(self, task, tmp_path, time):
        with pytest.raises(ValueError, match="times must be above 0 and finite"):
            featurize(task, checkpoints(task, 2), tmp_path / "f", times=(1.0, time))


@pytest.mark.parametrize("projection", [SMALL, EXACT], ids=["projected", "exact"])
@pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("damping", [None, 0.7])
@pytest.mark.parametrize("name", TASKS)
def test_one_step_a_segment_is_that_of_the_dense_reference(
    name, damping, rows, projection, tmp_path
):
    task = TASKS[name]()
    given = {"features": {"projection": projection}, "steps": 1, "damping": damping}
    newton = along(task, tmp_path / "f", **given)
    forget, each = ForgetSet.at(task, np.array(rows)), []
    for training, end in enumerate((1, 3)):
        step = reference(newton, training, rows)
        found = newton.path_step(training, forget).numpy()
        np.testing.assert_allclose(found, step, rtol=0, atol=1e-4 * np.abs(step).max())
        each.append(newton.features.gather(end, np.arange(len(task.target_ids))) @ step)
    change, scale = newton.change(forget), np.abs(each).max()
    np.testing.assert_allclose(change.mean, np.mean(each, 0), rtol=0, atol=1e-4 * scale)
    spread = np.std(each, axis=0, ddof=1)
    np.testing.assert_allclose(change.std, spread, rtol=0, atol=1e-4 * scale)
    ends = np.stack([newton.features.outputs(end) for end in (1, 3)])
    np.testing.assert_allclose(change.noise, ends.std(0, ddof=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
def test_more_steps_solve_the_problem_that_is_held_at_its_start(task, tmp_path, rows):
    """At the solution the gradient of the second segment's problem is 0, to what is enough."""
    newton = along(task, tmp_path / "f", 1, steps=8)
    forget, kept = ForgetSet.at(task, np.array(rows)), len(task.train_ids) - len(rows)
    start = newton.step(0, forget)
    found = newton.step(1, forget, start=start)
    removal, hold = newton.removal(1, forget), kept / TIMES[1]
    damping = kept * task.recipe.weight_decay + hold
    left = removal.problem.residual(removal.weights, damping, found)[0] - hold * start
    assert left.norm() < 0.02 * (removal.pull + hold * start).norm()


def test_without_a_start_a_segment_starts_at_0(newton, task):
    forget = ForgetSet.at(task, np.array(FEW))
    zero = newton.step(1, forget, start=0 * newton.step(0, forget))
    np.testing.assert_allclose(newton.step(1, forget), zero, rtol=0, atol=1e-7)


def test_rows_that_are_gone_already_are_left_out_of_the_change(newton, task):
    both, gone = (ForgetSet.at(task, np.arange(count)) for count in (8, 3))
    expected = newton.change(both).mean - newton.change(gone).mean
    np.testing.assert_allclose(newton.change(both, gone).mean, expected, atol=1e-6)


def test_the_recipe_tells_lambda_without_weight_decay_too(newton):
    recipe = Recipe(epochs=1, batch_size=8, peak_rate=0.1, weight_decay=0)
    found = GroupNewton(blobs(recipe=recipe), newton.features)
    assert damping_per_row(found.task, TIMES) == pytest.approx(1 / 3.5)
    assert np.isfinite(found.change(ForgetSet.at(found.task, np.array(FEW))).mean).all()


def test_stages_need_trained_models(newton):
    with pytest.raises(ValueError, match=r"StagedNewton moves trained models on .* segments=0"):
        StagedNewton(newton)


class TestCalibration:
    @pytest.fixture
    def full(self, newton, tmp_path):
        """Trained models, whose outputs are others than those of mean weights."""
        outputs = np.random.default_rng(0).normal(size=(3, 48, 2)).astype(np.float32)
        return write_ensemble(tmp_path / "full", newton.task, np.ones((3, 37), bool), outputs)

    @pytest.fixture
    def bank(self, newton, full, tmp_path):
        """Outputs of models that changed twice as much as is predicted."""
        task, sets = newton.task, [[0, 5], [7, 8, 9], [11, 20], [30]]
        masks = np.ones((4, 37), dtype=bool)
        for mask, rows in zip(masks, sets, strict=True):
            mask[rows] = False
        before = full.outputs.mean(0)
        changes = [newton.change(ForgetSet.at(task, np.array(rows))).mean for rows in sets]
        outputs = np.stack([before + 2 * change for change in changes]).astype(np.float32)
        return write_ensemble(tmp_path / "bank", task, masks, outputs)

    def test_the_recipe_tells_all_but_the_factors(self, newton, bank, full, tmp_path):
        found = calibrate(newton, bank, tmp_path / "c", full=full)
        expected = 37 * damping_per_row(newton.task, TIMES)
        assert (found.damping, found.temperature, found.steps) == (expected, 1.0, 3)
        assert found.scale["test"] == pytest.approx(2, rel=0.1)
        fewer = calibrate(replace(newton, steps=2), bank, tmp_path / "d", full=full)
        assert fewer.steps == 2

    def test_it_is_used(self, newton, bank, full, tmp_path, task):
        found = calibrate(newton, bank, tmp_path / "c", full=full)
        forget = ForgetSet.at(task, np.array(FEW))
        plain = replace(newton, damping=found.damping).change(forget).mean
        known = replace(newton, calibration=found).change(forget).mean
        np.testing.assert_allclose(known[40:], found.scale["test"] * plain[40:], rtol=1e-5)

    @pytest.mark.parametrize("given", [{"temperatures": (1.0,)}, {"dampings": (1.0,)}])
    def test_candidates_are_refused(self, newton, bank, full, tmp_path, given):
        with pytest.raises(ValueError, match="nothing is chosen from temperatures and dampings"):
            calibrate(newton, bank, tmp_path / "c", full=full, **given)

    def test_mean_weights_do_not_stand_in_for_trained_models(self, newton, bank, tmp_path):
        with pytest.raises(ValueError, match="give the models trained on all rows as full"):
            calibrate(newton, bank, tmp_path / "c")

    def test_one_training_is_not_enough(self, newton, bank, full, tmp_path):
        alone = replace(newton, features=newton.features.first(1))
        with pytest.raises(ValueError, match="needs the features of 2 trainings or more, got 1"):
            calibrate(alone, bank, tmp_path / "c", full=full)


def zeros():
    """A linear model that starts at 0, so that trainings differ by their rows alone."""
    model = nn.Linear(4, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def test_many_segments_follow_a_training_that_ends_early(tmp_path):
    """Of a linear model with squared error they become the difference of two gradient flows."""
    whole = Recipe(epochs=120, batch_size=64, peak_rate=0.02, momentum=0.0, weight_decay=1e-2)
    task = line(model=zeros, recipe=whole)
    gone = np.array([3, 7, 8, 12, 20])
    masks = np.ones((2, 37), dtype=bool)
    masks[1, gone] = False
    subsets = Subsets(masks, "by hand", 7, np.ones(2, dtype=bool))
    errors = {}
    for segments in (0, 1, 4, 40):
        to = tmp_path / f"bank-{segments}"
        bank = train_models(task, subsets, to, keep="weights", segments=segments, workers=0)
        models = bank.along(1) if segments else bank.checkpoints(1)
        times, truth = bank.times(0), bank.outputs[1] - bank.outputs[0]
        made = featurize(task, models, f"{to}/features", projection=EXACT, times=times)
        found = GroupNewton(task, made).change(ForgetSet.at(task, gone)).mean
        errors[segments] = np.square(truth - found).sum() / np.square(truth).sum()
    assert errors[40] < 0.01
    assert errors[40] < errors[4] < errors[1] < errors[0]
