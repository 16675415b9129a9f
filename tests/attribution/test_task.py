import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from attribution import BinaryCrossEntropy, CrossEntropy, Recipe, Task
from attribution.task import source_digest
from tests.tasks import RECIPE, binary, blob_data, blobs, line, ridge_task, small_mlp


class Listed:
    """Map-style data that is no TensorDataset."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Noisy(Listed):
    """Data whose inputs or labels differ each time they are read."""

    def __init__(self, items, part):
        super().__init__(items)
        self.part, self.reads = part, 0

    def __getitem__(self, index):
        self.reads += 1
        item = list(self.items[index])
        item[self.part] = item[self.part] + self.reads
        return item


def items_of(data):
    return [(inputs.numpy(), int(label)) for inputs, label in data]


def changed(data, *, label=None, pixel=None):
    inputs, labels = (tensor.clone() for tensor in data.tensors)
    if label is not None:
        labels[label] = 1 - labels[label]
    if pixel is not None:
        inputs[pixel, 0] += 1
    return TensorDataset(inputs, labels)


def test_ids_count_the_rows_where_none_are_given():
    task = blobs(rows=3, test_rows=2)
    assert task.train_ids == ("train-0", "train-1", "train-2")
    assert task.target_ids == (*task.train_ids, "test-0", "test-1")
    assert task.positions["test-1"] == 4


def test_given_ids_are_kept_in_order():
    task = blobs(rows=3, test_rows=1, train_ids=["c", "a", "b"], test_ids=["z"])
    assert task.target_ids == ("c", "a", "b", "z")
    assert [task.positions[row] for row in "acz"] == [1, 0, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_ids": ["a", "b", "a"]}, "train id 'a' stands twice"),
        ({"test_ids": ["a", "a"]}, "test id 'a' stands twice"),
        ({"train_ids": ["a", "b"]}, "2 train ids for 3 rows"),
        ({"test_ids": ["a"]}, "1 test ids for 2 rows"),
        ({"train_ids": ["a", "b", "test-1"]}, "id 'test-1' is a train and a test row"),
        ({"rows": 0}, "task 'blobs' has no training rows"),
        ({"train": lambda *_: {}}, "has a recipe and a train function: give one"),
        ({"objective": "sum"}, "has a recipe, which minimises the mean of the losses, and the"),
        ({"objective": "max"}, "objective must be 'mean' or 'sum', got 'max'"),
    ],
)
def test_unusable_tasks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        blobs(**({"rows": 3, "test_rows": 2} | changes))


def test_ids_must_be_texts():
    with pytest.raises(TypeError, match="expected texts as train ids, got 7"):
        blobs(rows=2, train_ids=["a", 7])


def test_a_task_without_test_rows_has_its_training_rows_as_targets():
    task = Task("alone", blob_data(5, 1), [], model=small_mlp, recipe=RECIPE)
    assert task.target_ids == task.train_ids
    assert len(task.targets()[1]) == 5
    assert set(task.digests) == {"train", "test"}


@pytest.mark.parametrize(
    "positions", [[0, 36, 37, 47], [47, 0, 40, 36, 37], [5], [44], [3, 3, 45, 3], None]
)
def test_targets_come_in_the_order_asked_for(positions):
    task = blobs()
    inputs, labels = task.targets(positions)
    both = [
        torch.cat(pair)
        for pair in zip(task.rows("train", range(37)), task.rows("test", range(11)), strict=True)
    ]
    wanted = slice(None) if positions is None else positions
    torch.testing.assert_close(inputs, both[0][wanted], rtol=0, atol=0)
    torch.testing.assert_close(labels, both[1][wanted], rtol=0, atol=0)


def test_any_map_style_data_reads_like_a_tensor_dataset():
    data = blob_data(37, 1)
    plain, listed = blobs(), blobs()
    object.__setattr__(listed, "train_data", Listed(items_of(data)))
    for a, b in zip(plain.targets([40, 3, 20]), listed.targets([40, 3, 20]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert plain.digests == listed.digests
    listed.check()


class Doubled(TensorDataset):
    """Its rows are not those of its tensors."""

    def __getitem__(self, index):
        inputs, label = super().__getitem__(index)
        return 2 * inputs, label


def test_rows_that_a_subclass_changes_are_read_through_it():
    data = blob_data(37, 1)
    task = Task("doubled", Doubled(*data.tensors), blob_data(3, 2), small_mlp, RECIPE)
    inputs, labels = task.rows("train", [5, 30, 2])
    assert torch.equal(inputs, 2 * data.tensors[0][[5, 30, 2]])
    assert torch.equal(labels, data.tensors[1][[5, 30, 2]])
    assert task.digests["train"] != blobs().digests["train"]


def test_of_data_with_more_than_inputs_and_labels_only_these_are_read():
    inputs, labels = blob_data(37, 1).tensors
    data = TensorDataset(inputs, labels, torch.arange(37))
    task = Task("three", data, blob_data(11, 2), small_mlp, RECIPE)
    task.check()
    for a, b in zip(task.targets([40, 3, 20]), blobs().targets([40, 3, 20]), strict=True):
        assert torch.equal(a, b)
    assert task.digests == blobs().digests


@pytest.mark.parametrize(("part", "what"), [(0, "inputs"), (1, "labels")])
def test_data_that_differ_between_two_reads_are_refused(part, what):
    data = Noisy(items_of(blob_data(37, 1)), part)
    task = Task("noisy", data, blob_data(3, 2), model=small_mlp, recipe=RECIPE)
    message = f"the {what} of row 'train-0' or one of its neighbours differ between two reads"
    with pytest.raises(ValueError, match=message):
        task.check()


def test_models_that_do_not_fit_the_data_are_refused():
    with pytest.raises(ValueError, match=r"task 'blobs': the model does not take .* \(3, 3\)"):
        blobs(model=lambda: nn.Linear(4, 2)).check()
    with pytest.raises(ValueError, match=r"outputs \[row, output\], got shape \(3,\) for 3 rows"):
        blobs(model=lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))).check()


def test_tiny_data_can_be_checked():
    blobs(rows=1).check()
    blobs(rows=2).check()


@pytest.mark.parametrize(
    "change",
    [
        lambda task: {"train_data": changed(task.train_data, label=36)},
        lambda task: {"train_data": changed(task.train_data, pixel=5)},
        lambda task: {"train_ids": (*task.train_ids[:-1], "another")},
    ],
    ids=["label", "pixel", "id"],
)
def test_the_digest_of_a_split_changes_with_its_data(change):
    task = blobs()
    fields = {"train_data": task.train_data, "test_data": task.test_data} | change(task)
    other = Task("other", model=small_mlp, recipe=RECIPE, **fields)
    assert other.digests["train"] != task.digests["train"]
    assert other.digests["test"] == task.digests["test"]


def test_equal_data_have_equal_digests():
    assert blobs().digests == blobs().digests


def test_tasks_survive_pickling():
    task = blobs()
    task.digests, task.positions  # noqa: B018 - cached values stay behind
    copy = cloudpickle.loads(cloudpickle.dumps(task))
    assert "digests" not in vars(copy)
    assert copy.digests == task.digests
    assert copy.settings() == task.settings()
    torch.testing.assert_close(
        copy.new_model(1, 2).state_dict(), task.new_model(1, 2).state_dict(), rtol=0, atol=0
    )


def first_weight(task, seed, index):
    return task.new_model(seed, index)[0].weight.detach()


def test_new_models_depend_on_seed_and_index_alone():
    task = blobs()
    before = torch.get_rng_state()
    weight = first_weight(task, 3, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(first_weight(task, 3, 4), weight)
    for other in [(3, 5), (4, 4), (4, 3)]:
        assert not torch.equal(first_weight(task, *other), weight)


def test_settings_tell_recipes_from_own_training():
    with_recipe, own = blobs().settings(), ridge_task().settings()
    assert with_recipe["recipe"]["epochs"] == 3
    assert with_recipe["recipe"]["augment"] is False
    assert with_recipe["recipe"]["batches"] == "even"
    assert with_recipe["loss"] == CrossEntropy.__name__
    assert own["recipe"] == {"version": "1", "own": True}


def test_sources_are_digests_of_the_functions_text():
    sources = blobs().sources()
    assert sources["model"] == source_digest(small_mlp)
    assert sources["train"] == sources["augment"] == ""
    assert len(sources["model"]) == 64
    assert source_digest(len) == ""


@pytest.mark.parametrize("name", ["epochs", "batch_size", "peak_rate"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_recipes_refuse_what_is_not_positive(name, value):
    fields = {"epochs": 1, "batch_size": 2, "peak_rate": 0.1, name: value}
    with pytest.raises(ValueError, match=rf"recipe\.{name} must be above 0, got {value}"):
        Recipe(**fields)


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.1])
def test_the_peak_lies_inside_the_training(value):
    with pytest.raises(ValueError, match=r"recipe\.peak_at must lie between 0 and 1, got"):
        Recipe(epochs=1, batch_size=2, peak_rate=0.1, peak_at=value)


@pytest.mark.parametrize(
    ("name", "value"), [("momentum", 1.0), ("momentum", -0.1), ("weight_decay", -1)]
)
def test_recipes_refuse_momentum_and_decay_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"recipe\.{name} must .*, got {value}"):
        Recipe(epochs=1, batch_size=2, peak_rate=0.1, **{name: value})


def test_steps_count_the_ragged_batch():
    recipe = Recipe(epochs=3, batch_size=8, peak_rate=0.1)
    assert [recipe.steps(rows) for rows in (1, 8, 9, 37)] == [3, 3, 6, 15]


def test_rates_rise_to_the_peak_and_fall_to_zero():
    recipe = Recipe(epochs=1, batch_size=1, peak_rate=2.0, peak_at=0.4)
    np.testing.assert_allclose(recipe.rates(5), [0.5, 1.5, 5 / 3, 1.0, 1 / 3])
    np.testing.assert_allclose(recipe.rates(1), [1.0])
    assert recipe.rates(1000).max() == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 7]), "train labels run from 0 to 7, the model has 2 outputs"),
        (torch.tensor([0, -1, 1]), "labels run from -1 to 1"),
        (torch.tensor([0.0, 1.0, 1.0]), "takes class numbers as labels"),
    ],
)
def test_labels_that_are_no_class_of_the_model_are_refused(labels, message):
    data = TensorDataset(torch.zeros(3, 4), labels)
    task = Task("labels", data, data, model=lambda: nn.Linear(4, 2), test_ids=["a", "b", "c"])
    with pytest.raises(ValueError, match=message):
        task.check()


@pytest.mark.parametrize("label", [2, -1])
def test_test_labels_that_are_no_class_of_the_model_are_refused(label):
    test = blob_data(11, 2)
    test.tensors[1][4] = label
    task = Task("labels", blob_data(37, 1), test, small_mlp, RECIPE)
    ends = f"{min(label, 0)} to {max(label, 1)}"
    message = f"^task 'labels': test labels run from {ends}, the model has 2 outputs$"
    with pytest.raises(ValueError, match=message):
        task.check()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("make", [blobs, line])
def test_inputs_that_are_not_finite_are_refused_by_row(make, split, value):
    task = make()
    task.data(split).tensors[0][[9, 4], 1] = value
    message = f"^task '{task.name}': the inputs of row '{split}-4' are not finite$"
    with pytest.raises(ValueError, match=message):
        task.check()


def one_logit(label, split="train"):
    """A task of one logit with one label changed."""
    task = binary()
    if label is not None:
        task.data(split).tensors[1][4] = label
    return task


def test_one_logit_takes_labels_of_two_classes():
    one_logit(None).check()


@pytest.mark.parametrize("split", ["train", "test"])
def test_other_labels_of_one_logit_are_refused(split):
    message = f"^task 'binary': {split} labels must be 0 or 1, got 2.0$"
    with pytest.raises(ValueError, match=message):
        one_logit(2, split).check()


def test_one_logit_is_not_two_outputs():
    with pytest.raises(ValueError, match=r"labels are those of one logit, the model has 2 outputs"):
        blobs(loss=BinaryCrossEntropy()).check()


def test_labels_of_a_regression_must_fit_its_outputs():
    with pytest.raises(ValueError, match=r"task 'line': train labels have shape \(37,\), the mod"):
        line(model=lambda: nn.Linear(4, 3)).check()
    task = line()
    task.test_data.tensors[1][3] = torch.nan
    with pytest.raises(ValueError, match="task 'line': test labels must be finite"):
        task.check()
