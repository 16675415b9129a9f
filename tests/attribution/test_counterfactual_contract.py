"""What every predictor of `Counterfactual` keeps to, whatever it predicts from."""

from dataclasses import dataclass, replace

import cloudpickle
import numpy as np
import pytest

from attribution import (
    Calibration,
    Combined,
    Counterfactual,
    ForgetSet,
    LinearDatamodel,
    Model,
    StagedNewton,
    Task,
    fit_datamodels,
)
from attribution.cases import KINDS, row_kinds
from attribution.combined import Weights
from attribution.residual import models_like_requests, residual_models
from attribution.trak import fit_trak
from tests.attribution.newton.cases import TASKS, newton_of
from tests.tasks import blobs, write_ensemble

FIRST, BOTH = [3, 20], [3, 8, 20, 33]
FACTORS = dict(zip(KINDS, (0.8, 0.5, 0.3), strict=True))
CALIBRATION = Calibration(0.4, 1.2, FACTORS, FACTORS, FACTORS, 20)
WEIGHTS = {
    kind: Weights(factor, 1 - factor, 1.5, 2.0, growth=factor / 4, most=3.0, shared=0.1)
    for kind, factor in FACTORS.items()
}


@dataclass(frozen=True)
class Case:
    """A predictor and its task; whether factors of its own for each kind of row scale it."""

    task: Task
    predictor: Counterfactual
    by_kind: bool = False


def newton_case(make):
    def build(folder):
        task = make()
        return Case(task, newton_of(task, folder / "features", damping=0.5))

    return build


def calibrated_case(folder):
    task = blobs()
    newton = newton_of(task, folder / "features", calibration=CALIBRATION)
    return Case(task, newton, by_kind=True)


def datamodel_of(task, folder):
    random = np.random.default_rng(0)
    masks = random.random((23, len(task.train_ids))) < 0.5
    outputs = random.normal(size=(23, len(task.target_ids), 2)).astype(np.float32)
    bank = write_ensemble(folder / "half", task, masks, outputs + masks[:, :1, None])
    everything = np.ones((5, len(task.train_ids)), dtype=bool)
    full = write_ensemble(folder / "full", task, everything, outputs[:5])
    return fit_datamodels(bank, anchor=full, to=folder / "datamodel", workers=0)


def datamodel_case(folder):
    task = blobs()
    return Case(task, datamodel_of(task, folder))


def trak_case(folder):
    task = blobs()
    features = newton_of(task, folder / "features", damping=0.5).features
    return Case(task, LinearDatamodel.from_scores(fit_trak(features, folder / "trak", damping=0.5)))


def combined_case(folder):
    task = blobs()
    newton = newton_of(task, folder / "features", damping=0.5)
    combined = Combined(newton, datamodel_of(task, folder), WEIGHTS)
    return Case(task, combined, by_kind=True)


def linear_case(folder):
    task = blobs()
    features = newton_of(task, folder / "features", damping=0.5).features
    scores = LinearDatamodel.from_scores(fit_trak(features, folder / "trak", damping=0.5))
    weights = {kind: one.as_sure_as_the_first() for kind, one in WEIGHTS.items()}
    return Case(task, Combined(datamodel_of(task, folder), scores, weights), by_kind=True)


def nested_case(folder):
    inner = combined_case(folder)
    outer = Combined(inner.predictor, inner.predictor.second, WEIGHTS)
    return Case(inner.task, outer, by_kind=True)


def residual_case(folder):
    task = blobs()
    newton = newton_of(task, folder / "features", damping=0.5)
    random = np.random.default_rng(1)
    masks = random.random((40, len(task.train_ids))) < 0.82  # every row is lacking somewhere
    outputs = random.normal(size=(45, len(task.target_ids), 2)).astype(np.float32)
    everything = np.ones((5, len(task.train_ids)), dtype=bool)
    near = write_ensemble(folder / "near", task, masks, outputs[:40])
    full = write_ensemble(folder / "full", task, everything, outputs[40:])
    chosen = models_like_requests(near, 30)
    left = residual_models(near, newton, folder / "residual", anchor=full, models=chosen)
    lacking = fit_datamodels(left, anchor=full, to=folder / "datamodel")
    return Case(task, Combined(newton, lacking, WEIGHTS), by_kind=True)


def staged_case(folder):
    task = blobs()
    newton = newton_of(task, folder / "features", count=2, damping=0.5)
    return Case(task, StagedNewton(newton, stages=2))


CASES = {f"newton, {name}": newton_case(make) for name, make in TASKS.items()} | {
    "newton, calibrated": calibrated_case,
    "newton, staged": staged_case,
    "datamodel": datamodel_case,
    "trak": trak_case,
    "combined": combined_case,
    "combined, nested": nested_case,
    "linear": linear_case,
    "residual": residual_case,
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("contract"))


@pytest.fixture
def both(case):
    return ForgetSet.at(case.task, BOTH)


@pytest.fixture
def first(case):
    return ForgetSet.at(case.task, FIRST)


def parts(change):
    return {name: getattr(change, name) for name in ("mean", "std", "noise")}


def test_a_change_has_a_number_for_every_output_of_every_target(case, both):
    change = case.predictor.change(both)
    outputs = Model(case.task, case.task.new_model(0).state_dict()).outputs()
    assert not change.absolute
    for name, values in parts(change).items():
        assert (values.shape, values.dtype) == (outputs.shape, np.float32)
        assert np.isfinite(values).all()
        assert name == "mean" or (values >= 0).all()
    assert np.abs(change.mean).max() > 1e-4


@pytest.mark.parametrize("which", ["some", "twice", "test", "forgotten"])
def test_targets_are_rows_of_all_of_them(case, both, which):
    last = len(case.task.target_ids) - 1
    wanted = {
        "some": [last, 3, 0, 20],
        "twice": [5, 5, last, 5],
        "test": range(len(case.task.train_ids), last + 1),
        "forgotten": BOTH,
    }
    places = np.array(wanted[which])
    every, found = (
        parts(case.predictor.change(both, targets=targets)) for targets in (None, places)
    )
    for name, values in every.items():
        scale = np.abs(values).max()
        np.testing.assert_allclose(found[name], values[places], rtol=0, atol=1e-5 * scale)


def test_what_is_gone_already_is_subtracted(case, both, first):
    found = case.predictor.change(both, first).mean
    expected = case.predictor.change(both).mean - case.predictor.change(first).mean
    # Factors by kind are those of the whole forget set.
    targets = np.arange(len(found))
    alike = row_kinds(both, targets) == row_kinds(first, targets)
    kept = alike if case.by_kind else np.ones_like(alike)
    np.testing.assert_allclose(
        found[kept], expected[kept], rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def test_nothing_more_to_forget_changes_nothing(case, both):
    assert not case.predictor.change(both, both).mean.any()


def test_names_and_order_of_a_forget_set_do_not_matter(case, both):
    other = ForgetSet.of(case.task, [f"train-{i}" for i in reversed(BOTH)], "another name")
    for name, values in parts(case.predictor.change(both)).items():
        np.testing.assert_array_equal(parts(case.predictor.change(other))[name], values)


def test_predictions_start_from_what_the_model_has_forgotten(case, both, first):
    task, targets = case.task, ["test-2", "train-8", "train-5"]
    places = np.array([task.positions[target] for target in targets])
    state = task.new_model(7).state_dict()
    rest = ForgetSet.at(task, np.setdiff1d(BOTH, FIRST))
    fresh = case.predictor.predict(Model(task, state), both, targets)
    again = case.predictor.predict(Model(task, state, first), rest, targets)
    for found, already in ((fresh, None), (again, first)):
        change = case.predictor.change(both, already, places)
        np.testing.assert_array_equal(found.mean, found.before + change.mean)
        np.testing.assert_array_equal(found.std, change.std)
        np.testing.assert_array_equal(found.noise, change.noise)
        assert found.targets == tuple(targets)
    assert np.abs(fresh.mean - again.mean).max() > 1e-6


def test_the_model_stays_as_it_is(case, both):
    model = Model(case.task, case.task.new_model(7).state_dict())
    before = model.digest()
    case.predictor.predict(model, both)
    assert model.digest() == before
    assert model.forgotten is None


def test_it_survives_pickling(case, both):
    copy = cloudpickle.loads(cloudpickle.dumps(case.predictor))
    for name, values in parts(case.predictor.change(both)).items():
        np.testing.assert_array_equal(parts(copy.change(both))[name], values)


def test_rows_in_another_order_are_refused(case, both):
    ids = list(case.task.train_ids)
    other = replace(case.task, train_ids=[*ids[:30], *ids[:29:-1]])
    text = f"made from other rows than those of task .*: its row 30 is 'train-30', .* '{ids[-1]}'"
    with pytest.raises(ValueError, match=text):
        case.predictor.predict(Model(other, other.new_model(0).state_dict()), both)
    case.predictor.check_task(case.task)


def test_a_forget_set_of_other_data_is_refused(case):
    count = len(case.task.train_ids)
    other = ForgetSet.at(blobs(rows=count - 1), FIRST)
    with pytest.raises(ValueError, match=f"is drawn from {count - 1} rows, the .* has {count}"):
        case.predictor.change(other)
