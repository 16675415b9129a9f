import numpy as np
import pytest

from attribution import ForgetSet, Model, Oracle
from tests.tasks import blobs, write_ensemble

ROWS, TARGETS = 37, 48


@pytest.fixture(scope="module")
def task():
    return blobs()


@pytest.fixture(scope="module")
def forget(task):
    return ForgetSet.at(task, [3, 20], "pair")


def written(path, task, models, shift, without=None):
    random = np.random.default_rng(models)
    masks = np.ones((models, ROWS), dtype=bool)
    if without is not None:
        masks[:, without.rows] = False
    outputs = shift + random.normal(size=(models, TARGETS, 2))
    ids = without.ids if without is not None else ()
    return write_ensemble(path, task, masks, outputs, without=ids)


@pytest.fixture(scope="module")
def banks(task, forget, tmp_path_factory):
    """Models trained on all rows, and models trained without the forget set."""
    folder = tmp_path_factory.mktemp("banks")
    full = written(folder / "full", task, 7, 0.0)
    return full, written(folder / "oracles", task, 5, 2.0, forget)


def test_the_change_is_the_difference_of_the_means(banks, forget):
    full, bank = banks
    found = Oracle(full, bank).change(forget)
    expected = bank.outputs.mean(0) - full.outputs.mean(0)
    np.testing.assert_allclose(found.mean, expected, rtol=0, atol=1e-12)
    variances = bank.outputs.var(0, ddof=1) / 5 + full.outputs.var(0, ddof=1) / 7
    np.testing.assert_allclose(found.std, np.sqrt(variances), rtol=1e-12)
    np.testing.assert_allclose(found.noise, bank.outputs.std(0, ddof=1), rtol=1e-12)
    assert not found.absolute


def test_the_absolute_target_is_the_mean_of_the_bank(task, banks, forget):
    full, bank = banks
    oracle = Oracle(full, bank, absolute=True)
    found = oracle.change(forget)
    np.testing.assert_allclose(found.mean, bank.outputs.mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.std, bank.outputs.std(0, ddof=1) / 5**0.5, rtol=1e-12)
    predicted = oracle.predict(Model(task, task.new_model(0).state_dict()), forget, [40, 2])
    np.testing.assert_allclose(predicted.mean, bank.outputs.mean(0)[[40, 2]], rtol=1e-6)


def test_predictions_add_the_change_to_the_model(task, banks, forget):
    model = Model(task, task.new_model(0).state_dict())
    oracle = Oracle(*banks)
    found = oracle.predict(model, forget, ["test-1", "train-3"])
    expected = model.outputs([38, 3]) + oracle.change(forget).mean[[38, 3]]
    np.testing.assert_allclose(found.mean, expected, rtol=0, atol=1e-6)


def test_the_name_of_the_forget_set_does_not_matter(task, banks, forget):
    other = ForgetSet.of(task, ["train-20", "train-3"], "another name")
    oracle = Oracle(*banks)
    np.testing.assert_array_equal(oracle.change(other).mean, oracle.change(forget).mean)


@pytest.mark.parametrize("rows", [[3], [3, 21], [3, 20, 21]])
def test_another_forget_set_is_refused(task, banks, rows):
    with pytest.raises(ValueError, match=r"oracles knows one forget set; 'forget' with \d rows is"):
        Oracle(*banks).change(ForgetSet.at(task, rows))


def test_a_model_that_has_forgotten_something_needs_the_absolute_target(task, banks, forget):
    state = task.new_model(0).state_dict()
    model = Model(task, state, ForgetSet.at(task, [3]))
    rest = ForgetSet.at(task, [20])
    with pytest.raises(ValueError, match=r"forgotten 1 rows already: use Oracle\(absolute=True\)"):
        Oracle(*banks).predict(model, rest)
    found = Oracle(*banks, absolute=True).predict(model, rest)
    np.testing.assert_allclose(found.mean, banks[1].outputs.mean(0), rtol=1e-6)


def test_a_task_whose_rows_stand_in_another_order_is_refused(task, banks):
    ids = [*task.train_ids[:30], *task.train_ids[:29:-1]]
    other = blobs(train_ids=ids)
    model = Model(other, other.new_model(0).state_dict())
    message = "full was made from .* its row 30 is 'train-30', the task's is 'train-36'$"
    with pytest.raises(ValueError, match=message):
        Oracle(*banks).predict(model, ForgetSet.of(other, ["train-3", "train-20"]))


def test_a_bank_on_all_rows_is_refused(banks):
    full, _ = banks
    with pytest.raises(ValueError, match="full was trained on all rows: an oracle needs a bank"):
        Oracle(full, full)


def test_single_models_are_refused(task, banks, forget, tmp_path):
    full, bank = banks
    with pytest.raises(ValueError, match="one holds 1 model: the spread of one retraining needs 2"):
        Oracle(full, written(tmp_path / "one", task, 1, 0.0, forget))
    with pytest.raises(ValueError, match="alone holds 1 model"):
        Oracle(written(tmp_path / "alone", task, 1, 0.0), bank)
