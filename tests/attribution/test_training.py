import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from attribution import Recipe, Task
from attribution.seeds import derive_seed
from attribution.training import (
    epoch_order,
    row_weights,
    seeded,
    take,
    threads,
    train_many,
    train_one,
    training_order,
)
from stores.advance import BlockCancelled, listening
from tests.references import plain_training
from tests.tasks import CPU, binary, blobs, line, normalised_mlp, ridge_task

# Ten epochs of five even steps, of three where 19 rows are left: at most 50 steps of 6 to 8 rows.
RECIPE = Recipe(epochs=10, batch_size=8, peak_rate=0.2, momentum=0.9, weight_decay=5e-3)
SUBSETS = [np.arange(37), np.arange(2, 37), np.arange(33), np.arange(0, 37, 2), np.arange(4, 37)]
INDICES = [0, 3, 4, 8, 11]
SEED = 5
ROUNDING = 3e-6  # of 50 steps in float32 on weights around 1


def half_squared_error(outputs, labels):
    return (outputs - labels[:, None]).square().sum(1).mean() / 2


def one_logit_entropy(outputs, labels):
    return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], labels)


def jittered(inputs, seed, epoch, rows):
    """An augmentation by seed, epoch and row, however the rows are batched."""
    shift = torch.sin(rows.to(inputs.dtype) + epoch + seed % 7)
    return inputs + 0.3 * shift[:, None]


TASKS = {
    "classes": (blobs(recipe=RECIPE), nn.functional.cross_entropy),
    "one logit": (binary(recipe=RECIPE), one_logit_entropy),
    "regression": (line(recipe=RECIPE), half_squared_error),
    "augmented": (
        blobs(recipe=Recipe(epochs=10, batch_size=8, peak_rate=0.2, augment=jittered)),
        nn.functional.cross_entropy,
    ),
}


@pytest.fixture(params=TASKS.values(), ids=TASKS.keys(), scope="module")
def case(request):
    """A task, and its models as the reference trains them."""
    task, row_loss = request.param
    pairs = zip(SUBSETS, INDICES, strict=True)
    return task, [plain_training(task, rows, SEED, index, row_loss) for rows, index in pairs]


def assert_equal_states(found, expected, tolerance):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


def test_one_by_one_equals_a_plain_loop(case):
    task, expected = case
    found = train_many(task, SUBSETS, SEED, INDICES, CPU, many=False)
    assert_equal_states(found, expected, ROUNDING)


def test_many_at_once_equal_a_plain_loop(case):
    # Three subset sizes take five steps an epoch together; the fourth takes three on its own.
    task, expected = case
    assert_equal_states(train_many(task, SUBSETS, SEED, INDICES, CPU), expected, 1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_the_size_of_a_group_changes_last_digits_only(case, size):
    task, _ = case
    together = train_many(task, SUBSETS, SEED, INDICES, CPU)
    parts = [
        train_many(task, SUBSETS[i : i + size], SEED, INDICES[i : i + size], CPU)
        for i in range(0, 5, size)
    ]
    assert_equal_states([state for part in parts for state in part], together, 1e-5)


def test_the_same_group_gives_the_same_bits(case):
    task, _ = case
    recordings = {}
    first, second, third = (
        train_many(task, SUBSETS, SEED, INDICES, CPU, recordings=known)
        for known in ({}, recordings, recordings)
    )
    assert_equal_states(first, second, 0)
    assert_equal_states(first, third, 0)


def test_the_order_of_a_group_is_kept(case):
    task, expected = case
    found = train_many(task, SUBSETS[::-1], SEED, INDICES[::-1], CPU)
    assert_equal_states(found[::-1], expected, 1e-5)


def test_train_one_takes_the_recipe(case):
    task, expected = case
    found = [train_one(task, SUBSETS[1], SEED, INDICES[1], CPU)]
    assert_equal_states(found, expected[1:2], ROUNDING)


def test_batch_statistics_see_the_real_rows_of_a_batch_alone():
    task = blobs(model=normalised_mlp, recipe=RECIPE)
    rows = np.arange(20)  # without row 36, which padding takes; batches of 7, 7 and 6 rows
    found = train_many(task, [rows], SEED, [2], CPU, many=False)
    assert_equal_states(found, [plain_training(task, rows, SEED, 2)], ROUNDING)


def test_other_seeds_and_indices_give_other_models():
    task, rows = blobs(recipe=RECIPE), np.arange(37)
    states = [train_one(task, rows, seed, index, CPU) for seed, index in ((0, 0), (0, 1), (1, 0))]
    weights = [state["0.weight"] for state in states]
    assert not any(torch.equal(weights[a], weights[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


class Recording:
    """An augmentation that changes nothing and remembers what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, inputs, seed, epoch, rows):
        assert len(inputs) == len(rows) == 8
        self.calls.append((seed, epoch, rows.tolist()))
        return inputs


@pytest.mark.parametrize("many", [True, False])
def test_augmentation_gets_seed_epoch_and_rows(many):
    augment, rows = Recording(), np.arange(2, 37)
    task = blobs(recipe=Recipe(epochs=3, batch_size=8, peak_rate=0.1, augment=augment))
    train_many(task, [rows, rows], SEED, [4, 6], CPU, many=many)
    for index in (4, 6):
        seed = derive_seed(SEED, "augment", index)
        mine = [(epoch, seen) for called, epoch, seen in augment.calls if called == seed]
        order = training_order(rows, 3, 8, SEED, index)
        assert mine == [(step // 5, seen.tolist()) for step, seen in enumerate(order)]
    assert len(augment.calls) == 30


@pytest.mark.parametrize("count", [1, 7, 8, 9, 37, 40, 41])
def test_an_epoch_visits_every_row_once_in_even_batches(count):
    order = epoch_order(np.arange(3, 3 + count), 8, np.random.default_rng(0))
    assert order.shape == (-(-count // 8), 8)
    real = order >= 0
    assert sorted(order[real]) == list(range(3, 3 + count))
    assert np.ptp(real.sum(1)) <= 1
    assert (np.diff(real.astype(int), axis=1) <= 0).all()


def test_orders_differ_by_epoch_and_depend_on_seed_and_index_alone():
    order = training_order(np.arange(19), 2, 8, seed=1, index=2)
    np.testing.assert_array_equal(order, training_order(np.arange(19), 2, 8, seed=1, index=2))
    assert not np.array_equal(order[:3], order[3:])
    assert not np.array_equal(order, training_order(np.arange(19), 2, 8, seed=1, index=3))


def test_take_gives_the_rows_of_each_place():
    inputs = torch.arange(12.0).reshape(6, 2)
    order = torch.tensor([[[5, 0], [3, -1]]])
    torch.testing.assert_close(take(inputs, order), inputs[order], rtol=0, atol=0)


def test_weights_average_over_the_real_rows():
    weights = row_weights(torch.tensor([[3, 1, 4], [1, -1, -1]]), torch.float64)
    torch.testing.assert_close(weights, torch.tensor([[1 / 3] * 3, [1, 0, 0]]).double())


def test_threads_are_restored_after_an_error():
    before = torch.get_num_threads()
    with threads(before + 2):
        assert torch.get_num_threads() == before + 2
    with pytest.raises(TypeError, match="abs"), threads(before + 2):
        abs("no number")
    assert torch.get_num_threads() == before


def test_seeded_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    draws = []
    for seed in (3, 3, 4):
        with seeded(seed):
            draws.append(torch.rand(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_dropout_depends_on_seed_and_index_alone():
    def model():
        return nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 2))

    task, rows = blobs(model=model, recipe=RECIPE), np.arange(37)
    alone = train_one(task, rows, SEED, 4, CPU)
    torch.rand(3)
    beside = train_many(task, [rows, rows], SEED, [3, 4], CPU, many=False)
    assert_equal_states([beside[1]], [alone], 0)


def test_own_training_may_draw_from_the_global_generator():
    def train(indices, seed, device):
        return {"weight": torch.rand(1, 4), "bias": torch.rand(1)}

    task = ridge_task(train=train)
    states = [train_one(task, np.arange(3), SEED, index, CPU) for index in (0, 0, 1)]
    assert torch.equal(states[0]["weight"], states[1]["weight"])
    assert not torch.equal(states[0]["weight"], states[2]["weight"])


def test_a_task_without_recipe_cannot_train_many():
    with pytest.raises(ValueError, match="task 'ridge' has no recipe: training needs one"):
        train_many(ridge_task(), [np.arange(9)], 0, [0], CPU)
    with pytest.raises(ValueError, match=r"task 'blobs' has no recipe: .*Task\(train=\.\.\.\)"):
        train_one(blobs(recipe=None), np.arange(9), 0, 0, CPU)


def test_own_training_gets_rows_seed_and_device():
    calls = []

    def train(indices, seed, device):
        calls.append((indices.tolist(), seed, device))
        return {"weight": torch.ones(1, 4, requires_grad=True), "bias": torch.zeros(1)}

    state = train_one(ridge_task(train=train), np.array([3, 7]), SEED, 2, CPU)
    assert calls == [([3, 7], derive_seed(SEED, "train", 2), CPU)]
    assert not state["weight"].requires_grad


@pytest.mark.parametrize("many", [True, False])
def test_frozen_parameters_stay(many):
    def half_frozen():
        model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        model[0].weight.requires_grad_(False)
        return model

    task = blobs(model=half_frozen, recipe=RECIPE)
    state = train_many(task, [np.arange(37)], SEED, [0], CPU, many=many)[0]
    before = task.new_model(SEED, 0).state_dict()
    assert torch.equal(state["0.weight"], before["0.weight"])
    assert not torch.equal(state["0.bias"], before["0.bias"])
    assert not math.isnan(float(state["2.weight"].sum()))


@pytest.mark.parametrize("many", [True, False])
def test_training_tells_its_shares_and_keeps_its_bits(many):
    task = blobs(recipe=RECIPE)
    alone = train_many(task, SUBSETS, SEED, INDICES, CPU, many=many)
    shares = []
    with listening(shares.append):
        watched = train_many(task, SUBSETS, SEED, INDICES, CPU, many=many)
    assert_equal_states(watched, alone, 0)
    assert sum(shares) == pytest.approx(1)
    assert len(shares) == (50 + 30 if many else 4 * 50 + 30)


def test_training_stops_at_the_step_at_which_it_is_cancelled():
    shares = []

    def cancel(share):
        shares.append(share)
        if len(shares) == 7:
            raise BlockCancelled

    with listening(cancel), pytest.raises(BlockCancelled):
        train_many(blobs(recipe=RECIPE), SUBSETS, SEED, INDICES, CPU)
    assert len(shares) == 7


def test_convolutions_trained_many_at_once_equal_those_trained_one_by_one():
    """Their products lie in memory otherwise than torch's, and are viewed as images again."""
    random = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(20, 3, 8, 8, generator=random), torch.arange(20) % 2)

    def small():
        return nn.Sequential(
            *(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(24, 20, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(320, 2)),
        )

    task = Task("images", data, data, small, Recipe(epochs=2, batch_size=6, peak_rate=0.05))
    subsets = [np.arange(3, 17), np.arange(6, 20)]
    together = train_many(task, subsets, 0, [0, 1], CPU)
    alone = train_many(task, subsets, 0, [0, 1], CPU, many=False)
    for one, other in zip(together, alone, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
