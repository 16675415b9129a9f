import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from attribution import Model, Recipe, Task
from attribution.in_run import InRunScores, record_run, recording, run_values, scores
from attribution.training import train_one
from stores import Store, total
from tests.references import in_run_displacements, in_run_shapley, in_run_slope, in_run_values
from tests.tasks import CPU, blob_data, blobs, line, ridge_task

SEED, INDEX = 5, 2
ROWS = np.arange(37)
TARGETS = np.array([40, 3, 38, 44, 36])
MOMENTUM = Recipe(epochs=3, batch_size=8, peak_rate=0.2, momentum=0.9, weight_decay=5e-3)
PLAIN = replace(MOMENTUM, momentum=0.0, weight_decay=0.0)
ROUNDING = {"rtol": 1e-9, "atol": 1e-12}


def in_double(task):
    """The same task computed in float64, so that nothing but rounding errors of 1e-16 differs."""
    parts = (task.train_data.tensors, task.test_data.tensors)
    train, test = (TensorDataset(inputs.double(), labels) for inputs, labels in parts)
    return Task(task.name, train, test, lambda: task.model().double(), task.recipe, loss=task.loss)


def smooth(*, width=5):
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 1)),
        nn.Conv2d(1, 4, (2, 1), padding=(1, 0)),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d((2, 1)),
        nn.Conv2d(4, 3, 1, bias=False),
        nn.Flatten(),
        nn.Linear(6, 2),
    )


def normalised():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


def with_dropout():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 2))


def half_frozen():
    model = smooth()
    model[0].weight.requires_grad_(False)
    return model


class Tied(nn.Module):
    """Two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(inputs)))))


def jittered(inputs, seed, epoch, rows):
    """An augmentation by seed, epoch and row."""
    return inputs + 0.3 * torch.sin(rows.to(inputs.dtype) + epoch + seed % 7)[:, None]


CASES = {
    "plain steps": blobs(recipe=PLAIN),
    "momentum and weight decay": blobs(recipe=MOMENTUM),
    "regression": line(recipe=MOMENTUM),
    "augmented": blobs(recipe=replace(MOMENTUM, augment=jittered)),
    "convolutions": blobs(recipe=MOMENTUM, model=convolutional),
    "batch statistics": blobs(recipe=replace(MOMENTUM, batch_size=10), model=normalised),
    "dropout": blobs(recipe=MOMENTUM, model=with_dropout),
    "frozen parameters": blobs(recipe=MOMENTUM, model=half_frozen),
    "shared parameters": blobs(recipe=MOMENTUM, model=Tied),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return in_double(request.param)


def values_of(task, rows=ROWS, targets=TARGETS, **options):
    fields = {"seed": SEED, "index": INDEX, "device": CPU} | options
    return run_values(task, rows, targets, **fields)


@pytest.mark.parametrize("order", [1, 2])
def test_values_equal_explicit_gradients_of_every_row_and_target(case, order):
    expected = in_run_values(case, ROWS, TARGETS, seed=SEED, index=INDEX, order=order)
    each = values_of(case, order=order, per_target=True)
    np.testing.assert_allclose(each.scores, expected, **ROUNDING)
    mean = values_of(case, order=order)
    np.testing.assert_allclose(mean.scores[:, 0], expected.mean(1), **ROUNDING)
    np.testing.assert_allclose(mean.change, each.change.mean(keepdims=True), **ROUNDING)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_the_model_is_the_one_that_training_makes(make):
    expected = train_one(make, ROWS, SEED, INDEX, CPU)
    state = torch.get_rng_state()
    for order in (1, 2):
        found = values_of(make, order=order, per_target=order == 1).state
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(torch.get_rng_state(), state)


def five_rows(peak_rate, momentum):
    """Five rows in batches of three and of two."""
    recipe = Recipe(
        epochs=2, batch_size=3, peak_rate=peak_rate, momentum=momentum, weight_decay=0.02
    )
    data, test = blob_data(5, 1), blob_data(3, 2)
    return in_double(Task("five", data, test, lambda: smooth(width=3), recipe))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("order", [1, 2])
def test_the_error_against_exact_shapley_values_falls_with_the_rate(order, momentum):
    errors = []
    for rate in (0.04, 0.02, 0.01):
        task, rows, targets = five_rows(rate, momentum), np.arange(5), np.array([5, 6, 7])
        exact = in_run_shapley(task, rows, targets, seed=SEED, index=INDEX)
        found = values_of(task, rows, targets, order=order).scores[:, 0]
        errors.append(np.abs(found - exact).max())
    # O(rate^2) a step for order 1, O(rate^3) for order 2.
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2.0 ** (order + 1), rtol=0.08)


@pytest.mark.parametrize("order", [1, 2])
def test_values_add_up_to_the_effect_of_all_steps(order):
    task = in_double(blobs(recipe=replace(MOMENTUM, weight_decay=0.0)))
    expected = 0
    for model, moved in in_run_displacements(task, ROWS, SEED, INDEX):
        step = moved.sum(0)
        slopes = [in_run_slope(task, model, target, step * (order == 2)) for target in TARGETS]
        expected += torch.stack(slopes) @ step
    found = values_of(task, order=order, per_target=True).scores.sum(0)
    np.testing.assert_allclose(found, expected.numpy(), **ROUNDING)


@pytest.mark.parametrize("order", [1, 2])
def test_values_add_up_to_the_change_of_the_loss_as_the_rate_falls(order):
    gaps = []
    for rate in (0.04, 0.02):
        recipe = replace(PLAIN, peak_rate=rate)
        found = values_of(in_double(blobs(recipe=recipe, model=smooth)), order=order)
        gaps.append(abs(found.scores.sum() - found.change[0]))
    assert gaps[0] / gaps[1] == pytest.approx(2.0 ** (order + 1), rel=0.1)


def test_rows_that_are_never_visited_get_nothing():
    # Padding reads row 36, the last of the data, which is not among the rows.
    task, rows = in_double(blobs(recipe=MOMENTUM)), np.arange(0, 36, 2)
    found = values_of(task, rows, order=2, per_target=True).scores
    expected = in_run_values(task, rows, TARGETS, seed=SEED, index=INDEX, order=2)
    np.testing.assert_allclose(found, expected, **ROUNDING)
    assert not np.delete(found, rows, axis=0).any()
    assert found[rows].all()


def long_run(momentum):
    return in_double(blobs(recipe=replace(MOMENTUM, epochs=12, momentum=momentum)))


def test_momentum_is_followed_until_little_is_left(monkeypatch):
    task = long_run(0.5)  # 60 steps; a gradient is followed for 14
    expected = in_run_values(task, ROWS, TARGETS, seed=SEED, index=INDEX, order=2)
    scale = np.abs(expected).max()
    error = np.abs(values_of(task, order=2, per_target=True).scores - expected).max()
    assert 1e-9 * scale < error < 1e-4 * scale
    monkeypatch.setattr(recording, "LEAST_SHARE", 1e-13)  # 44 of 60 steps
    found = values_of(task, order=2, per_target=True).scores
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * scale)


@pytest.mark.parametrize(("momentum", "most"), [(0.0, 1), (0.5, 17)])
def test_steps_are_let_go(monkeypatch, momentum, most):
    assert recording.held_steps(momentum)[1] == most
    taken, alive = [], []

    def counting(*args, take=recording._taken):
        held = take(*args)
        taken.append(weakref.ref(held))
        alive.append(sum(each() is not None for each in taken))
        return held

    monkeypatch.setattr(recording, "_taken", counting)
    values_of(long_run(momentum))
    assert len(taken) == 60
    assert max(alive) == most


@pytest.mark.parametrize("order", [1, 2])
def test_targets_in_pieces_give_the_same_mean(monkeypatch, order):
    task = in_double(blobs(recipe=MOMENTUM))
    expected = values_of(task, order=order).scores
    monkeypatch.setattr("attribution.in_run.derivatives.ROWS_AT_ONCE", 2)
    np.testing.assert_allclose(values_of(task, order=order).scores, expected, **ROUNDING)


def test_other_seeds_and_indices_give_other_values():
    task = blobs(recipe=MOMENTUM)
    found = [
        values_of(task, seed=seed, index=index).scores for seed, index in ((0, 0), (0, 1), (1, 0))
    ]
    assert not any(np.allclose(found[a], found[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


# stored


@pytest.fixture(scope="module")
def task():
    return blobs(recipe=MOMENTUM)


def record(task, to, **options):
    fields = {"seed": SEED, "index": INDEX, "order": 2, "per_target": True, "targets_at_once": 4}
    return record_run(task, to, **(fields | options))


@pytest.fixture(scope="module")
def recorded(task, tmp_path_factory):
    return record(task, tmp_path_factory.mktemp("runs") / "in-run")


def assert_same_bits(one, other):
    for name in one.store.spec.arrays:
        np.testing.assert_array_equal(one.store.numpy(name), other.store.numpy(name))


def test_stored_values_are_those_of_the_test_rows(task, recorded):
    expected = values_of(task, targets=np.arange(37, 48), order=2, per_target=True)
    np.testing.assert_allclose(recorded.scores, expected.scores, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(recorded.change, expected.change, rtol=1e-5, atol=1e-6)
    assert recorded.scores.dtype == np.float32
    assert recorded.targets == task.test_ids
    assert recorded.order == 2
    assert recorded.store.ids("train") == list(task.train_ids)


def test_it_says_what_it_is(recorded):
    meaning = "value for this run, not a retrained output"
    assert recorded.store.attributes["meaning"] == meaning
    assert recorded.store.provenance.settings["meaning"] == meaning


def test_it_knows_the_model_of_its_run(task, recorded):
    mine, other = (train_one(task, ROWS, SEED, index, CPU) for index in (INDEX, INDEX + 1))
    assert recorded.belongs_to(Model(task, mine))
    assert not recorded.belongs_to(Model(task, other))


def test_values_of_groups_are_summed_from_the_store(recorded):
    rows = np.array([3, 7, 20])
    found = total(recorded.store, "scores", rows)
    np.testing.assert_allclose(found, recorded.scores[rows].sum(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1, 3, 11, None])
def test_the_size_of_a_block_changes_last_digits_only(task, recorded, tmp_path, size):
    found = record(task, tmp_path / "in-run", targets_at_once=size)
    np.testing.assert_allclose(found.scores, recorded.scores, rtol=1e-4, atol=1e-6)


def test_the_mean_is_one_score(task, recorded, tmp_path):
    found = record_run(task, tmp_path / "mean", seed=SEED, index=INDEX, order=2)
    assert found.scores.shape == (37, 1)
    np.testing.assert_allclose(found.scores[:, 0], recorded.scores.mean(1), rtol=1e-4, atol=1e-6)
    assert found.targets == task.test_ids
    assert found.store.ids("target") == ["mean of the targets"]


def test_targets_are_named_by_id_or_position(task, tmp_path):
    named = record(task, tmp_path / "named", targets=["test-3", "train-3"])
    placed = record(task, tmp_path / "placed", targets=np.array([40, 3]))
    assert named.targets == placed.targets == ("test-3", "train-3")
    assert_same_bits(named, placed)


def test_a_finished_run_is_opened_not_trained(task, recorded, monkeypatch):
    monkeypatch.setattr(scores, "run_values", None)
    assert_same_bits(record(task, recorded.store.path), recorded)
    assert_same_bits(InRunScores.open(recorded.store.path), recorded)


@pytest.mark.parametrize("calls", [0, 2])
def test_interrupted_equals_uninterrupted(task, recorded, tmp_path, monkeypatch, calls):
    left = [calls]

    def interrupted(*args, **options):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return run_values(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(scores, "run_values", interrupted)
        with pytest.raises(KeyboardInterrupt):
            record(task, tmp_path / "half")
    with pytest.raises(ValueError, match="half is not finished: run the command that makes it"):
        InRunScores.open(tmp_path / "half")
    assert len(Store.open(tmp_path / "half").pending()) == 3 - calls
    assert_same_bits(record(task, tmp_path / "half"), recorded)


def test_processes_change_no_bit(task, recorded, tmp_path):
    assert_same_bits(record(task, tmp_path / "in-run", workers=2), recorded)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"seed": 6}, "seed: stored 5, wanted 6"),
        ({"index": 3}, "index: stored 2, wanted 3"),
        ({"order": 1}, "order: stored 2, wanted 1"),
        ({"targets": range(37, 47)}, "shape"),
        ({"targets": range(36, 47)}, "targets: stored"),
        ({"targets_at_once": 5}, "block: stored 4, wanted 5"),
    ],
)
def test_a_store_of_other_settings_is_refused(task, recorded, options, field):
    with pytest.raises(ValueError, match=field):
        record(task, recorded.store.path, **options)


class Opaque(torch.autograd.Function):
    """A step whose derivative is known in one direction only."""

    @staticmethod
    def forward(context, inputs):
        return inputs * 2

    @staticmethod
    def backward(context, gradient):
        return gradient * 2


class WithOpaque(nn.Linear):
    def forward(self, inputs):
        return Opaque.apply(super().forward(inputs))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (ridge_task, {}, r"'ridge' has its own train function, .* need Task\(recipe=...\)"),
        (lambda: blobs(recipe=None), {}, "task 'blobs' has no recipe"),
        (blobs, {"order": 3}, "order must be 1 or 2, got 3"),
        (blobs, {"targets_at_once": 0}, "targets_at_once must be above 0, got 0"),
        (blobs, {"targets": ["test-99"]}, "unknown target 'test-99'"),
        (blobs, {"targets": []}, "expected targets among the 48"),
        (lambda: blobs(test_rows=0), {}, "task 'blobs' has no test rows: name targets="),
        (lambda: blobs(model=lambda: WithOpaque(3, 2)), {}, "'blobs' cannot be valued in its run"),
        (lambda: blobs(recipe=replace(PLAIN, peak_rate=1e30)), {}, "finite"),
    ],
)
def test_what_cannot_be_recorded_is_refused(make, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        record_run(make(), tmp_path / "in-run", **options)
