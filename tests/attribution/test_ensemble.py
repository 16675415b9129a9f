import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from attribution import (
    Ensemble,
    ForgetSet,
    Recipe,
    Task,
    draw_subsets,
    ensemble_training,
    train_models,
)
from attribution.ensemble_training import why_not_many
from attribution.training import train_many
from stores import BlocksFailed, Store
from tests.references import plain_training
from tests.tasks import (
    CPU,
    RECIPE,
    blobs,
    normalised_mlp,
    ridge_task,
    ridge_training,
    write_ensemble,
)

MODELS, BLOCK = 5, 2  # blocks of 2, 2 and 1 models


def bank(task, path, *, design="half", models=MODELS, seed=3, without=None, **options):
    subsets = draw_subsets(task, models=models, design=design, seed=seed, without=without)
    given = {"workers": 0, "models_at_once": BLOCK, "keep": "weights"} | options
    return train_models(task, subsets, path, **given)


def assert_same_bits(one, other):
    assert one.store.spec == other.store.spec
    for name in one.store.spec.arrays:
        np.testing.assert_array_equal(one.store.numpy(name), other.store.numpy(name))


@pytest.fixture(scope="module")
def task():
    return blobs()


@pytest.fixture(scope="module")
def trained(task, tmp_path_factory):
    return bank(task, tmp_path_factory.mktemp("runs") / "half")


def test_models_equal_a_plain_loop(task, trained):
    for index, mask in enumerate(trained.masks):
        expected = plain_training(task, np.flatnonzero(mask), 3, index)
        found = trained.model(index).state
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def test_what_was_drawn_is_kept(task, trained):
    subsets = draw_subsets(task, models=MODELS, design="half", seed=3)
    np.testing.assert_array_equal(trained.masks, subsets.masks)
    np.testing.assert_array_equal(trained.judges, subsets.judges)
    assert (len(trained), trained.seed, trained.without) == (MODELS, 3, None)


def test_outputs_are_those_of_the_models(task, trained):
    assert trained.outputs.shape == (MODELS, 48, 2)
    for index in range(MODELS):
        found = trained.model(index).outputs()
        np.testing.assert_allclose(found, trained.outputs[index], rtol=0, atol=1e-6)


def test_margins_are_those_of_the_outputs(task, trained):
    _, labels = task.targets()
    sign = 2 * labels.numpy() - 1
    expected = sign * (trained.outputs[..., 1] - trained.outputs[..., 0])
    np.testing.assert_allclose(trained.margins, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("models", [None, [4], [3, 0, 3]])
def test_states_come_in_the_order_asked_for(trained, models):
    stacked = trained.states(models)
    for place, index in enumerate(range(MODELS) if models is None else models):
        for name, tensor in trained.model(index).state.items():
            torch.testing.assert_close(stacked[name][place], tensor, rtol=0, atol=0)


def test_models_tell_where_they_come_from(trained):
    assert trained.model(4).provenance == {"ensemble": "half", "index": 4, "seed": 3}
    assert [model.provenance["index"] for model in trained.checkpoints(3)] == [0, 1, 2]


@pytest.mark.parametrize("index", [-1, MODELS])
def test_models_that_are_not_there_are_refused(trained, index):
    with pytest.raises(ValueError, match=f"half has models 0 to 4, not {index}"):
        trained.model(index)


def test_a_model_has_forgotten_the_rows_it_never_saw(task, trained, tmp_path):
    forgotten = trained.model(2).forgotten
    np.testing.assert_array_equal(forgotten.mask, ~trained.masks[2])
    forget = ForgetSet.at(task, [3, 36])
    oracles = bank(task, tmp_path / "oracles", design="full", models=1, without=forget)
    assert oracles.without.positions == (3, 36)
    assert oracles.model(0).forgotten.positions == (3, 36)
    full = bank(task, tmp_path / "full", design="full", models=1)
    assert full.model(0).forgotten is None


def test_weights_are_kept_when_asked_for_only(task, tmp_path, trained):
    lean = bank(task, tmp_path / "lean", keep="outputs")
    np.testing.assert_array_equal(lean.outputs, trained.outputs)
    assert not lean.keeps_weights
    with pytest.raises(ValueError, match=r"lean kept no weights.*keep='weights'"):
        lean.model(0)


def test_a_finished_ensemble_is_opened_not_trained(task, trained, monkeypatch):
    monkeypatch.setattr(ensemble_training, "train_many", None)
    assert_same_bits(bank(task, trained.store.path), trained)
    assert_same_bits(Ensemble.open(trained.store.path, task), trained)


def interrupting(function, calls):
    """The function, which is interrupted once it has been called so often."""
    left = [calls]

    def interrupted(*args, **options):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return function(*args, **options)

    return interrupted


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_interrupted_equals_uninterrupted(task, trained, tmp_path, monkeypatch, calls):
    with monkeypatch.context() as patch:
        patch.setattr(ensemble_training, "train_many", interrupting(train_many, calls))
        with pytest.raises(KeyboardInterrupt):
            bank(task, tmp_path / "half")
    with pytest.raises(ValueError, match=r"half is not finished: blocks? .* of 2 models each p"):
        Ensemble.open(tmp_path / "half", task)
    counted = []
    monkeypatch.setattr(
        ensemble_training,
        "train_many",
        lambda *args, **named: counted.append(args) or train_many(*args, **named),
    )
    assert_same_bits(bank(task, tmp_path / "half"), trained)
    assert len(counted) == 3 - calls


def test_processes_change_no_bit(task, trained, tmp_path):
    assert_same_bits(bank(task, tmp_path / "half", workers=2), trained)


def tanh_mlp():
    """The shapes of the task's own model, and another function."""
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def relabelled(task):
    inputs, labels = (tensor.clone() for tensor in task.train_data.tensors)
    labels[7] = 1 - labels[7]
    return Task("blobs", TensorDataset(inputs, labels), task.test_data, task.model, RECIPE)


@pytest.mark.parametrize(
    ("other", "options", "field"),
    [
        (lambda task: blobs(recipe=Recipe(4, 8, 0.1)), {}, "recipe.epochs: stored 3, wanted 4"),
        (lambda task: blobs(recipe=Recipe(3, 8, 0.2)), {}, "recipe.peak_rate: stored 0.1, wanted"),
        (relabelled, {}, "data.train: stored"),
        (lambda task: blobs(), {"seed": 4}, "seed: stored 3, wanted 4"),
        (lambda task: blobs(), {"design": "full"}, "design: stored 'half', wanted 'full'"),
        (lambda task: blobs(), {"models_at_once": 3}, "block: stored 2, wanted 3"),
        (lambda task: blobs(), {"keep": "outputs"}, "weights_0"),
        (lambda task: blobs(model=tanh_mlp), {}, "\n  model: stored '"),
        (lambda task: blobs(), {"device": "meta"}, "\n  device: stored 'cpu', wanted"),
    ],
)
def test_stores_made_otherwise_are_refused_by_field(task, trained, other, options, field):
    with pytest.raises(ValueError, match=r"half was made with other settings") as caught:
        bank(other(task), trained.store.path, **options)
    assert field in str(caught.value)


def test_another_version_of_own_training_is_refused(tmp_path):
    bank(ridge_task(), tmp_path / "own", models=2)
    with pytest.raises(ValueError, match=r"recipe\.version: stored '1', wanted '2'"):
        bank(ridge_task(version="2"), tmp_path / "own", models=2)


def test_another_objective_of_own_training_is_refused(tmp_path):
    bank(ridge_task(), tmp_path / "own", models=2)
    with pytest.raises(ValueError, match="objective: stored 'mean', wanted 'sum'"):
        bank(ridge_task(objective="sum"), tmp_path / "own", models=2)


def test_models_of_batches_that_were_cut_otherwise_are_refused(task, tmp_path, monkeypatch):
    settings = Recipe.settings

    def of_before(self):
        return {name: value for name, value in settings(self).items() if name != "batches"}

    with monkeypatch.context() as before:
        before.setattr(Recipe, "settings", of_before)
        bank(task, tmp_path / "half")
    with pytest.raises(ValueError, match=r"recipe\.batches: stored nothing, wanted 'even'"):
        bank(task, tmp_path / "half")


def test_another_source_of_own_training_is_only_warned_about(tmp_path):
    task = ridge_task()
    first = bank(task, tmp_path / "own", models=2)

    def train(indices, seed, device):
        return ridge_training(task.train_data, 2.0)(indices, seed, device)

    with pytest.warns(UserWarning, match=r"made under other conditions: sources\.train"):
        again = bank(ridge_task(train=train), tmp_path / "own", models=2)
    assert_same_bits(first, again)


@pytest.mark.parametrize(("width", "at_once"), [(5, 5), (30_000, 2), (200_000, 1)])
def test_fewer_large_models_are_trained_at_once(tmp_path, width, at_once):
    def model():
        return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))

    task = blobs(model=model, recipe=Recipe(1, 37, 0.01))
    found = bank(task, tmp_path / "wide", models_at_once=None, keep="outputs")
    assert found.store.spec.block == at_once


def test_batch_normalisation_is_trained_one_by_one(tmp_path):
    task = blobs(model=normalised_mlp)
    with pytest.warns(UserWarning, match=r"'blobs' are trained one by one: its buffers \(1\.run"):
        found = bank(task, tmp_path / "normalised", models=2, models_at_once=None)
    assert found.store.spec.block == 1
    expected = plain_training(task, np.flatnonzero(found.masks[1]), 3, 1)
    for name, tensor in found.model(1).state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.model(1).outputs(), found.outputs[1], rtol=0, atol=1e-6)


def test_dropout_is_trained_one_by_one(tmp_path):
    def model():
        return nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 2))

    with pytest.warns(UserWarning, match=r"are trained one by one: .*random"):
        first = bank(blobs(model=model), tmp_path / "first", models=2)
    with pytest.warns(UserWarning, match="are trained one by one"):
        again = bank(blobs(model=model), tmp_path / "again", models=2)
    assert_same_bits(first, again)


def test_own_training_is_called_for_each_model(tmp_path):
    task = ridge_task()
    found = bank(task, tmp_path / "own")
    train = ridge_training(task.train_data, 2.0)
    for index, mask in enumerate(found.masks):
        state = train(np.flatnonzero(mask), 0, CPU)
        torch.testing.assert_close(found.model(index).state, state, rtol=0, atol=1e-12)
        expected = task.targets()[0] @ state["weight"][0] + state["bias"]
        np.testing.assert_allclose(found.outputs[index, :, 0], expected, rtol=1e-12)
    assert why_not_many(task) == "the task has its own train function"


NAN = float("nan")


def returning(**values):
    """A user's own training whose state holds these numbers."""

    def train(indices, seed, device):
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    return train


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": [[1, 2, 3, 4]]}, "does not fit task 'ridge': key 'bias' is missing"),
        ({"weight": [[1, 2, 3, 4]], "bias": [1, 2]}, "does not fit task 'ridge': key 'bias' has"),
    ],
)
def test_models_that_own_training_spoils_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=f"model 0, as trained, {message}"):
        bank(ridge_task(train=returning(**values)), tmp_path / "own")


def test_models_that_all_diverge_are_failed_blocks(tmp_path):
    task = blobs(recipe=Recipe(epochs=3, batch_size=8, peak_rate=1e30))
    with pytest.raises(BlocksFailed, match="blocks 0, 1, 2 failed, first with training div"):
        bank(task, tmp_path / "diverged")


@pytest.mark.parametrize("number", [0, 2])
def test_a_model_that_diverges_fails_its_block_alone_and_once(tmp_path, number):
    task = ridge_task()
    spoilt = draw_subsets(task, models=MODELS, design="half", seed=3).masks[3]

    def train(indices, seed, device):
        state = ridge_training(task.train_data, 2.0)(indices, seed, device)
        if np.array_equal(indices, np.flatnonzero(spoilt)):
            with open(tmp_path / "log", "a") as file:
                file.write("x")
            state["weight"][0, 2] = NAN
        return state

    diverging = ridge_task(train=train)
    reason = (
        "training own: block 1 failed, first with training diverged: weights or outputs of model 3"
        " are not finite; change how task 'ridge' trains, say its learning rate"
    )
    with pytest.raises(BlocksFailed, match=reason) as caught:
        bank(diverging, tmp_path / "own", workers=number)
    assert list(caught.value.failed) == [1]
    assert (tmp_path / "log").read_text() == "x"
    assert Store.open(tmp_path / "own").done() == [0, 2]
    with pytest.raises(ValueError, match="own is not finished: block 1 of 2 models each pending"):
        Ensemble.open(tmp_path / "own", diverging)


def test_outputs_that_are_not_finite_fail_their_block(tmp_path):
    # Finite weights of which the products overflow.
    values = {"weight": [[1e308, -1e308, 1e308, 1e308]], "bias": [0]}
    with pytest.raises(BlocksFailed, match="outputs of model 0, 1 are not finite"):
        bank(ridge_task(train=returning(**values)), tmp_path / "own")


def test_own_training_that_fails_keeps_what_is_finished(tmp_path):
    def train(indices, seed, device):
        if not (tmp_path / "allowed").exists() and list((tmp_path / "own/done").glob("c/*")):
            raise OSError("disk full")
        return ridge_training(task.train_data, 2.0)(indices, seed, device)

    task = ridge_task(train=train)
    with pytest.raises(BlocksFailed, match=r"training own: blocks 1, 2 failed, .*disk full"):
        bank(task, tmp_path / "own")
    (tmp_path / "allowed").touch()
    assert len(bank(task, tmp_path / "own")) == MODELS


def test_unusable_arguments_are_refused(task, trained, tmp_path):
    with pytest.raises(ValueError, match="keep must be 'outputs' or 'weights', got 'all'"):
        bank(task, tmp_path / "x", keep="all")
    with pytest.raises(ValueError, match="task 'blobs' has neither a recipe nor a train function"):
        bank(blobs(recipe=None), tmp_path / "x")
    with pytest.raises(ValueError, match="models_at_once must be above 0, got 0"):
        bank(task, tmp_path / "x", models_at_once=0)
    subsets = draw_subsets(task, models=2, design="half")
    with pytest.raises(ValueError, match=r"the subsets are drawn from 37 rows, .*'blobs' has 36"):
        train_models(blobs(rows=36), subsets, tmp_path / "x", workers=0)
    assert not (tmp_path / "x").exists()


def test_other_stores_are_refused(task, trained, tmp_path):
    with pytest.raises(ValueError, match="expected a store at"):
        Ensemble.open(tmp_path / "none", task)
    with pytest.raises(ValueError, match="was made from other rows than those of task 'blobs'"):
        Ensemble.open(trained.store.path, blobs(rows=36))


def test_ensembles_written_by_hand_are_read(task, tmp_path):
    masks = draw_subsets(task, models=7, design="half").masks
    outputs = np.random.default_rng(0).normal(size=(7, 48, 2))
    found = write_ensemble(tmp_path / "hand", task, masks, outputs, without=["train-3"])
    np.testing.assert_array_equal(found.outputs, outputs)
    assert found.without.ids == ("train-3",)
