from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from attribution import (
    Calibration,
    ForgetSet,
    GroupNewton,
    Model,
    Recipe,
    Subsets,
    featurize,
    train_models,
)
from attribution.gradients.jacobian import Factored
from attribution.losses import SquaredError
from attribution.newton import inverse, linearised
from attribution.newton.group import spread_over_checkpoints
from attribution.task import OBJECTIVES
from tests.attribution.newton.cases import EXACT, SMALL, TASKS, checkpoints, newton_of
from tests.references import group_newton_step, leave_set_out_ridge, penalised_logistic, ridge
from tests.tasks import blobs, diabetes, line, ridge_task

PENALTY = 2.0  # of all rows
# Of a layer with 5 features: few rows by Woodbury's identity, many by a new factor.
FEW, MANY = [3, 7], [0, 3, 7, 11, 12, 13, 20, 29]


def penalty_of(task, share):
    """The penalty where so large a share of the rows is left: against a mean it is one per row."""
    return PENALTY * share if task.objective == "mean" else PENALTY


def ridge_model(task, weights=None):
    inputs, labels = (tensor.numpy() for tensor in task.train_data.tensors)
    penalty = PENALTY if weights is None else penalty_of(task, weights.mean())
    slopes, intercept = ridge(inputs, labels, penalty, weights=weights, free_intercept=False)
    state = {"weight": torch.tensor(slopes[None]), "bias": torch.tensor([intercept])}
    return Model(task, state)


@pytest.fixture(scope="module", params=OBJECTIVES)
def linear(request):
    return replace(ridge_task(), objective=request.param)


class TestRidge:
    """A linear model with squared error: one step is all there is to retraining."""

    @pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
    @pytest.mark.parametrize("steps", [1, 3])
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_the_change_is_that_of_retraining(self, linear, tmp_path, rows, steps, dtype):
        features = featurize(
            linear, [ridge_model(linear)], tmp_path / "f", projection=EXACT, dtype=dtype
        )
        left = penalty_of(linear, 1 - len(rows) / 31)
        newton = GroupNewton(linear, features, damping=left, steps=steps)
        found = newton.change(ForgetSet.at(linear, rows)).mean
        data = (tensor.numpy() for tensor in linear.train_data.tensors)
        queries = linear.targets()[0].numpy()
        given = {"free_intercept": False, "mean": linear.objective == "mean"}
        expected = leave_set_out_ridge(*data, queries, rows, PENALTY, **given)
        tolerance = {"float16": 1e-3, "float32": 1e-5, "float64": 1e-12}[dtype]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found[:, 0], expected, rtol=0, atol=tolerance * scale)

    @pytest.mark.parametrize(("before", "after"), [(1.0, 0.4), (0.7, 0.2), (0.5, 0.0)])
    def test_a_step_lowers_the_weight_of_the_rows(self, linear, tmp_path, before, after):
        ends = []
        for weight in (before, after):
            weights = np.ones(31)
            weights[MANY] = weight
            ends.append(ridge_model(linear, weights))
        features = featurize(linear, ends[:1], tmp_path / "f", projection=EXACT, dtype="float64")
        newton = GroupNewton(linear, features, damping=penalty_of(linear, weights.mean()))
        step = newton.step(0, ForgetSet.at(linear, MANY), before, after)
        moved = features.projector(0).adjoint(step)
        for name, value in moved.items():
            torch.testing.assert_close(ends[0].state[name] + value, ends[1].state[name])

    def test_features_may_be_wider_than_the_models_numbers(self, tmp_path):
        task = line()
        newton = newton_of(task, tmp_path / "f", 1, features={"dtype": "float64"}, damping=1.0)
        narrow = newton_of(task, tmp_path / "g", 1, damping=1.0)
        forget = ForgetSet.at(task, FEW)
        np.testing.assert_allclose(
            newton.change(forget).mean, narrow.change(forget).mean, rtol=1e-4, atol=1e-6
        )


@pytest.fixture(scope="module", params=OBJECTIVES)
def logistic(request):
    """A linear model with softmax, in float64."""
    made = {"objective": request.param, "recipe": None}
    task = blobs(rows=60, model=lambda: nn.Linear(3, 2, dtype=torch.float64), **made)
    data = [
        TensorDataset(part.tensors[0].double(), part.tensors[1])
        for part in (task.train_data, task.test_data)
    ]
    return replace(task, train_data=data[0], test_data=data[1])


def optimum(task, rows):
    inputs, labels = task.rows("train", rows)
    weights = penalised_logistic(inputs, labels, penalty_of(task, len(rows) / 60), 2)
    return Model(task, {"weight": weights[:, :3].clone(), "bias": weights[:, 3].clone()})


@pytest.mark.parametrize("few", [0, 1000], ids=["gradients", "Woodbury"])
@pytest.mark.parametrize("rows", [FEW, range(0, 40, 2)], ids=["few", "one class"])
def test_steps_end_where_retraining_does(logistic, tmp_path, rows, few, monkeypatch):
    monkeypatch.setattr(inverse, "FEW", few)
    before = optimum(logistic, range(60))
    after = optimum(logistic, np.setdiff1d(np.arange(60), rows)).outputs()
    features = featurize(logistic, [before], tmp_path / "f", projection=EXACT)
    assert isinstance(features.jacobian(0, np.array([0])), Factored)

    def off(steps):
        left = penalty_of(logistic, 1 - len(rows) / 60)
        newton = GroupNewton(logistic, features, damping=left, steps=steps)
        found = newton.predict(before, ForgetSet.at(logistic, rows)).mean
        return np.linalg.norm(found - after) / np.linalg.norm(after)

    assert off(8) < 0.1 * off(1)
    monkeypatch.setattr(linearised, "ENOUGH", 1e-6)
    assert off(30) < 1e-5


@pytest.fixture
def few_are_eight(monkeypatch):
    monkeypatch.setattr(inverse, "FEW", 8)


@pytest.mark.usefixtures("few_are_eight")
@pytest.mark.parametrize("projection", [SMALL, EXACT], ids=["projected", "exact"])
@pytest.mark.parametrize("rows", [FEW, range(20)], ids=["few", "many"])
@pytest.mark.parametrize("temperature", [None, 1.6])
@pytest.mark.parametrize("name", TASKS)
def test_one_step_is_that_of_the_dense_reference(name, tmp_path, rows, temperature, projection):
    task = TASKS[name]()
    if temperature and isinstance(task.loss, SquaredError):
        with pytest.raises(ValueError, match="temperature must be 1 for the squared error"):
            newton_of(task, tmp_path / "f", damping=0.7, temperature=temperature)
        return
    given = {"damping": 0.7, "temperature": temperature, "steps": 1}
    newton = newton_of(task, tmp_path / "f", features={"projection": projection}, **given)
    # Many rows of these are taken out by conjugate gradients.
    factored = isinstance(newton.features.jacobian(0, np.array([0])), Factored)
    assert factored == (projection == EXACT and name in ("softmax", "diabetes"))
    count = len(task.train_ids)
    labels = task.rows("train", np.arange(count))[1]
    each = []
    for number in range(3):
        features = newton.features.gather(number, np.arange(len(task.target_ids)))
        outputs = newton.features.outputs(number)
        data = features[:count], outputs[:count], labels
        given = {"loss": task.loss, "damping": 0.7, "temperature": temperature or 1.0}
        step = group_newton_step(*data, rows, **given)
        each.append(features @ step)
        found = newton.step(number, ForgetSet.at(task, rows)).numpy()
        np.testing.assert_allclose(found, step, rtol=0, atol=1e-4 * np.abs(step).max())
    change = newton.change(ForgetSet.at(task, rows))
    scale = np.abs(each).max()
    np.testing.assert_allclose(change.mean, np.mean(each, 0), rtol=0, atol=1e-4 * scale)
    spread = np.std(each, axis=0, ddof=1)
    np.testing.assert_allclose(change.std, spread, rtol=0, atol=1e-4 * scale)


@pytest.fixture(scope="module")
def task():
    return blobs()


@pytest.fixture(scope="module")
def newton(task, tmp_path_factory):
    """Three checkpoints, blocks that do not divide the rows."""
    to = tmp_path_factory.mktemp("newton") / "f"
    return newton_of(task, to, features={"block": 7}, damping=0.5)


@pytest.fixture(scope="module")
def forget(task):
    return ForgetSet.at(task, FEW)


def test_the_change_is_the_mean_over_the_checkpoints(newton, forget):
    places = np.array([40, 3, 7])
    each = newton.changes(forget, places)
    found = newton.change(forget, targets=places)
    np.testing.assert_allclose(found.mean, each.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.std, each.std(0, ddof=1), rtol=1e-5)
    alone = [
        replace(newton, features=replace(newton.features, stores=(store,)))
        for store in newton.features.stores
    ]
    for number, one in enumerate(alone):
        np.testing.assert_array_equal(one.change(forget, targets=places).mean, each[number])


def test_noise_is_the_spread_of_the_checkpoints_outputs(task, newton, forget):
    outputs = np.stack([model.outputs([40, 3]) for model in checkpoints(task, 3)])
    found = newton.change(forget, targets=np.array([40, 3])).noise
    np.testing.assert_allclose(found, outputs.std(0, ddof=1), rtol=1e-5)


def test_one_checkpoint_tells_no_spread(newton, forget):
    found = replace(newton, features=newton.features.first(1)).change(forget)
    assert np.isfinite(found.mean).all()
    assert np.isnan(found.std).all()
    assert np.isnan(found.noise).all()


@pytest.mark.parametrize("values", [np.ones((1, 2, 3)), np.arange(12.0).reshape(4, 3)])
def test_the_spread_over_checkpoints(values):
    found = spread_over_checkpoints(values.astype(np.float32))
    assert found.dtype == np.float32
    expected = values.std(0, ddof=1) if len(values) > 1 else np.full((2, 3), np.nan)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("block", [5, 48])
def test_blocks_of_any_size_agree(task, newton, forget, tmp_path, block):
    other = newton_of(task, tmp_path / "f", features={"block": block}, damping=0.5)
    for steps in (1, 3):
        changes = [replace(one, steps=steps).change(forget) for one in (other, newton)]
        for name in ("mean", "std", "noise"):
            found, expected = (getattr(change, name) for change in changes)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_targets_that_are_pending_are_computed_when_they_are_asked_for(
    task, newton, forget, tmp_path
):
    given = {"block": 7, "targets": "train"}
    late = newton_of(task, tmp_path / "f", features=given, damping=0.5)
    assert late.features.stores[0].pending() == [6]
    some = np.array([36, 45, 2])
    expected = newton.change(forget, targets=some)
    np.testing.assert_array_equal(late.change(forget, targets=some).mean, expected.mean)
    assert late.features.stores[0].pending() == []


def test_a_temperature_divides_the_outputs(task, newton, forget):
    """A loss of outputs / T, times T, has the gradient of the loss at outputs / T."""
    cold, warm = (replace(newton, temperature=t).change(forget).mean for t in (1.0, 2.0))
    np.testing.assert_array_equal(cold, newton.change(forget).mean)
    assert np.abs(warm - cold).max() > 1e-3
    hot = replace(newton, temperature=1e5, steps=1).change(forget).mean
    # Probabilities are all alike then, and nothing is curved.
    labels = task.rows("train", np.arange(37))[1]
    pull = 0.5 - nn.functional.one_hot(labels, 2).numpy()
    pull *= (forget.mask - len(FEW) / 37)[:, None]
    each = []
    for number in range(3):
        j = newton.features.gather(number, np.arange(37))
        step = np.einsum("rok,ro->k", j, pull) / 0.5
        each.append(newton.features.gather(number, np.arange(48)) @ step)
    np.testing.assert_allclose(hot, np.mean(each, 0), rtol=0, atol=5e-3 * np.abs(hot).max())


def test_damping_comes_from_the_recipe_and_the_rows_that_are_kept(task, newton, forget):
    recipe = Recipe(epochs=1, batch_size=8, peak_rate=0.1, weight_decay=0.02)
    decaying = blobs(recipe=recipe)
    plain = GroupNewton(decaying, newton.features)
    known = GroupNewton(decaying, newton.features, damping=(37 - len(FEW)) * 0.02)
    expected = known.change(forget).mean
    np.testing.assert_allclose(plain.change(forget).mean, expected, rtol=1e-6)
    more = ForgetSet.at(task, MANY)
    assert np.abs(plain.change(more).mean - known.change(more).mean).max() > 1e-5
    # And the other way round: nothing of the larger set is remembered.
    np.testing.assert_allclose(plain.change(forget).mean, expected, rtol=1e-6)


@pytest.fixture
def calibration():
    tables = (
        {"forget": 0.9, "retain": 0.5, "test": 0.7},
        {"forget": 2.0, "retain": 3.0, "test": 4.0},
        {"forget": 5.0, "retain": 6.0, "test": 7.0},
    )
    return Calibration(0.5, 1.3, *tables, forget_sets=20)


def test_a_calibration_gives_damping_temperature_and_factors(newton, forget, calibration):
    places = np.array([40, 3, 5])  # a test row, a forget row, another training row
    plain = replace(newton, damping=0.5, temperature=1.3).change(forget, targets=places)
    told = replace(newton, damping=None, calibration=calibration)
    found = told.change(forget, targets=places)
    order = ("test", "forget", "retain")
    for name, table in (("mean", "scale"), ("std", "spread"), ("noise", "noise")):
        factors = np.array([getattr(calibration, table)[kind] for kind in order])
        expected = getattr(plain, name) * factors[:, None]
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-6)


def test_what_is_given_outdoes_the_calibration(newton, forget, calibration):
    given = replace(newton, damping=2.0, temperature=1.0)
    found = replace(given, calibration=calibration).changes(forget, np.arange(48))
    np.testing.assert_array_equal(found, given.changes(forget, np.arange(48)))


def test_diabetes_retrained_by_sgd_is_predicted(tmp_path):
    """Ten measurements, a linear model, the recipe's own weight decay: nothing is tuned."""
    task = diabetes()
    gone = np.argsort(-task.train_data.tensors[1].numpy())[:40]  # those whose labels are largest
    masks = np.ones((6, 340), dtype=bool)
    masks[3:, gone] = False
    subsets = Subsets(masks, "by hand", 7, np.ones(6, dtype=bool))
    bank = train_models(task, subsets, tmp_path / "bank", keep="weights", workers=0)
    features = featurize(task, bank.checkpoints(3), tmp_path / "f", projection=EXACT)
    found = GroupNewton(task, features).change(ForgetSet.at(task, gone)).mean
    truth = bank.outputs[3:].mean(0) - bank.outputs[:3].mean(0)
    left = np.square(truth - found).sum() / np.square(truth).sum()
    assert np.sqrt(np.square(truth).mean()) > 0.2
    assert left < 0.02


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"damping": 0.0}, r"GroupNewton\.damping must be above 0 and finite, got 0\.0"),
        ({"damping": -1.0}, r"GroupNewton\.damping must be above 0 and finite, got -1\.0"),
        ({"damping": np.nan}, r"GroupNewton\.damping must be above 0 and finite, got nan"),
        ({"temperature": np.inf}, r"GroupNewton\.temperature must be above 0 and finite, got inf"),
        ({"temperature": 0.0}, r"GroupNewton\.temperature must be above 0 and finite, got 0\.0"),
        ({"steps": 0}, r"GroupNewton\.steps must be 1 or more, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(newton, settings, text):
    with pytest.raises(ValueError, match=text):
        replace(newton, **settings)


@pytest.mark.parametrize(
    "recipe", [None, Recipe(epochs=1, batch_size=8, peak_rate=0.1, weight_decay=0)]
)
def test_a_task_without_weight_decay_needs_a_damping(newton, calibration, recipe):
    task = blobs(recipe=recipe)
    with pytest.raises(ValueError, match=r"task 'blobs' tells no weight decay: give "):
        GroupNewton(task, newton.features)
    GroupNewton(task, newton.features, damping=1.0)
    GroupNewton(task, newton.features, calibration=calibration)


def test_features_of_another_task_are_refused(newton):
    with pytest.raises(ValueError, match="was made from other rows than those of task 'line'"):
        GroupNewton(line(rows=36), newton.features, damping=1.0)


def test_too_little_damping_is_refused(task, tmp_path):
    bent = newton_of(task, tmp_path / "f", 1, damping=1e-3)
    bent.features._curvatures[0, 1.0] = -np.eye(bent.features.width)
    with pytest.raises(ValueError, match=r"not positive definite at damping 0\.001: raise the dam"):
        bent.change(ForgetSet.at(task, FEW))


def test_damaged_features_are_told(task, forget, tmp_path):
    newton = newton_of(task, tmp_path / "f", 1, features={"block": 7}, damping=1.0)
    for path in (tmp_path / "f/checkpoint-0/features").rglob("*"):
        if path.is_file() and path.name != "zarr.json":
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"\(verify\(\)\) finds damaged blocks"):
        newton.change(forget)


def test_projected_features_are_the_ones_that_are_stepped_in(task, newton, forget):
    """J d for a step d is the slope of the outputs along the adjoint of d."""
    step = newton.step(0, forget)
    assert step.shape == (newton.features.width,)
    direction = newton.features.projector(0).adjoint(step)
    model = checkpoints(task, 1)[0]
    moved = {name: model.state[name] + 1e-3 * direction[name] for name in direction}
    slope = (Model(task, dict(model.state) | moved).outputs() - model.outputs()) / 1e-3
    found = newton.features.product(0, step.numpy())
    np.testing.assert_allclose(found, slope, rtol=0, atol=2e-2 * np.abs(found).max())
    assert newton.features.projector(0).projection == SMALL


def test_calibrated_factors_of_rows_gone_already_are_those_of_their_own_removal(
    newton, calibration
):
    known = replace(newton, calibration=calibration)
    both, gone = (ForgetSet.at(newton.task, rows) for rows in (range(8), range(3)))
    expected = known.change(both).mean - known.change(gone).mean
    np.testing.assert_allclose(known.change(both, gone).mean, expected, atol=1e-6)
