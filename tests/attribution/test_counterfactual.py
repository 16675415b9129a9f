from dataclasses import dataclass

import numpy as np
import pytest

from attribution import Change, Counterfactual, ForgetSet, Model
from attribution.counterfactual import parse_targets, target_positions
from tests.tasks import blobs


@dataclass(frozen=True)
class Additive(Counterfactual):
    """Each removed row adds its effect, [train], to every output; remembers nothing else."""

    effects: np.ndarray
    absolute: bool = False

    def check_task(self, task):
        del task

    def change(self, forget, already=None, targets=None):
        gone = forget.mask & ~already.mask if already else forget.mask
        mean = np.full((len(targets), 2), self.effects[gone].sum(), dtype=np.float32)
        return Change(mean, 0 * mean + 1, 0 * mean + 2, self.absolute)


@pytest.fixture(scope="module")
def task():
    return blobs()


@pytest.fixture(scope="module")
def additive():
    return Additive(2.0 ** np.arange(-18, 19))


def test_predictions_add_the_change_to_the_models_outputs(task, additive):
    model = Model(task, task.new_model(0).state_dict())
    forget = ForgetSet.at(task, [18, 20])
    found = additive.predict(model, forget, ["test-2", "train-5"])
    assert found.targets == ("test-2", "train-5")
    np.testing.assert_array_equal(found.before, model.outputs([39, 5]))
    np.testing.assert_array_equal(found.mean, found.before + 5)
    np.testing.assert_array_equal((found.std, found.noise), np.full((2, 2, 2), [[[1]], [[2]]]))


@pytest.mark.parametrize(
    ("gone", "wanted", "change"),
    [([18], [20], 4), ([18, 20], [20, 22], 16), ([18, 20], [20], 0), (None, [18, 20], 5)],
)
def test_what_is_forgotten_already_is_not_subtracted_again(task, additive, gone, wanted, change):
    forgotten = ForgetSet.at(task, gone) if gone else None
    model = Model(task, task.new_model(0).state_dict(), forgotten)
    found = additive.predict(model, ForgetSet.at(task, wanted))
    assert found.targets == task.target_ids
    np.testing.assert_allclose(found.mean - found.before, change, rtol=0, atol=1e-5)


def test_an_absolute_change_replaces_the_outputs(task):
    model = Model(task, task.new_model(0).state_dict())
    found = Additive(np.ones(37), absolute=True).predict(model, ForgetSet.at(task, [3, 4]))
    np.testing.assert_array_equal(found.mean, np.full((48, 2), 2))


@pytest.mark.parametrize("absolute", [False, True])
def test_changes_apply_to_many_models(absolute):
    mean = np.array([[1.0, 2.0], [3.0, 4.0]])
    outputs = np.arange(12.0).reshape(3, 2, 2)
    expected = np.stack([mean] * 3) if absolute else outputs + mean
    found = Change(mean, mean, mean, absolute).applied(outputs)
    np.testing.assert_array_equal(found, expected)
    found += 1  # a copy: the change stays as it is
    assert mean[0, 0] == 1


@pytest.mark.parametrize(
    ("targets", "positions"),
    [
        (["test-0", "train-3"], [37, 3]),
        ([47, 0], [47, 0]),
        (np.array([2, 2]), [2, 2]),
        (None, list(range(48))),
    ],
)
def test_targets_are_found_by_id_or_position(task, targets, positions):
    np.testing.assert_array_equal(target_positions(task, targets), positions)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["train-3", "nobody"], "unknown target 'nobody' of task 'blobs'"),
        ([], "expected targets among the 48 of task 'blobs'"),
        ([48], "expected targets among the 48"),
        ([-1], "expected targets among the 48"),
    ],
)
def test_unknown_targets_are_refused(task, targets, message):
    with pytest.raises(ValueError, match=message):
        target_positions(task, targets)


@pytest.mark.parametrize(
    ("spec", "positions"),
    [
        ("train", range(37)),
        ("test", range(37, 48)),
        ("forget", [4, 9]),
        ("test-1,train-2", [38, 2]),
    ],
)
def test_specs_name_targets(task, spec, positions):
    found = parse_targets(task, spec, ForgetSet.at(task, [9, 4]))
    np.testing.assert_array_equal(found, list(positions))


def test_specs_name_files_of_targets(task, tmp_path):
    (tmp_path / "ids").write_text("test-1\n\ntrain-2\n")
    found = parse_targets(task, f"@{tmp_path / 'ids'}", ForgetSet.at(task, [4]))
    np.testing.assert_array_equal(found, [38, 2])


@pytest.mark.parametrize(
    ("spec", "message"),
    [("nobody", "unknown target 'nobody'"), ("@nowhere", "cannot read .* 'nowhere'")],
)
def test_unknown_target_specs_are_refused(task, spec, message):
    with pytest.raises(ValueError, match=message):
        parse_targets(task, spec, ForgetSet.at(task, [4]))
