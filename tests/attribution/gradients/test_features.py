from dataclasses import replace

import numpy as np
import pytest
import torch

from attribution import draw_subsets, train_models
from attribution.gradients import Features, Projection, feature_store, featurize
from stores import BlocksFailed, Store
from tests.attribution.gradients.stored import (
    ALL,
    SMALL,
    TRAIN,
    bits,
    checkpoint,
    close,
    folder_of,
    gated_task,
)
from tests.gradient_references import gradients_of_rows, projected_gradients
from tests.tasks import RECIPE, blobs, line, ridge_task

ORDERS = {
    "some": [40, 3, 0, 47],
    "duplicates": [5, 5, 36, 37, 5],
    "everything": list(range(ALL)),
    "none": [],
}


@pytest.fixture(scope="module")
def task():
    return gated_task()


@pytest.fixture(scope="module")
def checkpoints(task):
    return [checkpoint(task, 0), checkpoint(task, 1, ["train-3", "train-20"])]


@pytest.fixture(scope="module")
def made(task, checkpoints, tmp_path_factory):
    to = tmp_path_factory.mktemp("features") / "all"
    return featurize(task, checkpoints, to, projection=SMALL, block=10)


@pytest.fixture(scope="module")
def dense(task, checkpoints, made):
    """Features of every target, from gradients in full."""
    inputs, _ = task.targets()
    found = []
    for number, model in enumerate(checkpoints):
        gradients = gradients_of_rows(task.new_model(0), model.state, inputs)
        found.append(projected_gradients(made.projector(number), gradients).numpy())
    return found


@pytest.mark.parametrize("rows", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("number", [0, 1])
def test_rows_are_projected_gradients_of_every_output(made, dense, number, rows):
    wanted = np.array(rows, dtype=np.int64)
    found = made.gather(number, wanted)
    assert found.dtype == np.float32
    if rows:
        close(found, dense[number][wanted])
    assert found.shape == (len(rows), 2, made.width)


def test_outputs_are_those_of_the_checkpoint(made, checkpoints):
    for number, model in enumerate(checkpoints):
        close(made.outputs(number), model.outputs())
        close(made.outputs(number, np.array([47, 3])), model.outputs([47, 3]))


@pytest.mark.parametrize("rows", [*ORDERS.values(), None], ids=[*ORDERS, "all"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_products_are_those_of_the_rows(task, checkpoints, tmp_path, dtype, rows):
    features = featurize(task, checkpoints, tmp_path / "f", projection=SMALL, block=10, dtype=dtype)
    direction = np.random.default_rng(0).normal(size=features.width)
    wanted = np.arange(ALL) if rows is None else np.array(rows, dtype=np.int64)
    expected = features.gather(1, wanted) @ direction
    found = features.product(1, direction, None if rows is None else wanted)
    assert found.shape == (len(wanted), 2)
    assert found.dtype == np.promote_types(dtype, np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_product_is_the_derivative_of_the_outputs_along_the_adjoint(made, checkpoints):
    direction = np.random.default_rng(0).normal(size=made.width).astype(np.float32)
    step = made.projector(0).adjoint(torch.from_numpy(direction).double())
    inputs, _ = made.task.targets()
    module = made.task.new_model(0).double().eval()
    state = {name: tensor.double() for name, tensor in checkpoints[0].state.items()}

    def outputs(size):
        module.load_state_dict(
            {name: tensor + size * step.get(name, 0) for name, tensor in state.items()}
        )
        return module(inputs.double()).detach().numpy()

    slope = (outputs(1e-6) - outputs(-1e-6)) / 2e-6
    close(made.product(0, direction), slope, 1e-4)


def test_blocks_are_those_of_the_training_rows(made):
    pairs = list(made.blocks(1))
    rows = np.concatenate([np.arange(span.start, span.stop) for span, _ in pairs])
    np.testing.assert_array_equal(rows, np.arange(TRAIN))
    found = np.concatenate([j.values for _, j in pairs])
    np.testing.assert_array_equal(found, made.gather(1, np.arange(TRAIN)))


def test_the_first_checkpoints(made):
    assert len(made.first(1)) == 1
    assert made.first(1).stores == made.stores[:1]


def test_checkpoints_are_kept(made, checkpoints):
    assert len(made) == 2
    for number, model in enumerate(checkpoints):
        found = made.model(number)
        assert found.digest() == model.digest()
        assert found.provenance == model.provenance
    assert made.model(0).forgotten is None
    assert made.model(1).forgotten.ids == ("train-3", "train-20")


def test_matrices_of_checkpoints_differ(made):
    first, second = (made.projector(number).plan for number in (0, 1))
    assert first.digest() != second.digest()
    assert made.projector(0).projection == SMALL


def test_finished_features_are_opened(made, checkpoints, monkeypatch):
    monkeypatch.setattr(feature_store.FeatureBlock, "__call__", None)
    again = featurize(made.task, checkpoints, folder_of(made), projection=SMALL, block=10)
    assert bits(again) == bits(made)
    opened = Features.open(folder_of(made), made.task)
    assert bits(opened) == bits(made)
    assert all(store.verify() == [] for store in opened.stores)


def test_the_same_call_gives_the_same_bits(made, checkpoints, tmp_path):
    again = featurize(made.task, checkpoints, tmp_path / "f", projection=SMALL, block=10)
    assert bits(again) == bits(made)


@pytest.mark.parametrize(("block", "at_once"), [(1, 1), (7, 4), (48, 7), (1000, 100), (None, 5)])
def test_blocks_and_pieces_of_any_size_agree(made, tmp_path, monkeypatch, block, at_once):
    monkeypatch.setattr(feature_store, "ROWS_AT_ONCE", at_once)
    other = featurize(made.task, [made.model(0)], tmp_path / "f", projection=SMALL, block=block)
    close(other.gather(0, np.arange(ALL)), made.gather(0, np.arange(ALL)), 1e-6)


def test_workers_and_interruptions_give_the_same_bits(made, checkpoints, tmp_path, monkeypatch):
    work = feature_store.FeatureBlock.__call__

    def failing(self, number):
        if number in (1, 3, 7):
            raise OSError("the disk is full")
        work(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(feature_store.FeatureBlock, "__call__", failing)
        with pytest.raises(BlocksFailed, match=r"features of blobs: blocks 1, 3, 7 failed"):
            featurize(made.task, checkpoints, tmp_path / "f", projection=SMALL, block=10)
    assert [store.pending() for store in stores_at(tmp_path / "f")] == [[1, 3], [2]]
    with pytest.raises(ValueError, match="checkpoint-0 is not finished: 2 blocks of training"):
        Features.open(tmp_path / "f", made.task)
    resumed = featurize(
        made.task, checkpoints, tmp_path / "f", projection=SMALL, block=10, workers=2
    )
    assert bits(resumed) == bits(made)


def stores_at(path):
    return [Store.open(path / f"checkpoint-{number}") for number in (0, 1)]


def test_an_interrupted_call_is_not_taken_for_one_with_fewer_checkpoints(
    made, checkpoints, tmp_path, monkeypatch
):
    def stopped(self, number):
        if number >= 5:
            raise KeyboardInterrupt
        work(self, number)

    work = feature_store.FeatureBlock.__call__
    monkeypatch.setattr(feature_store.FeatureBlock, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        featurize(made.task, checkpoints, tmp_path / "f", projection=SMALL, block=10)
    with pytest.raises(ValueError, match="checkpoint-1 is not finished"):
        Features.open(tmp_path / "f", made.task)


def test_halves_are_close_and_half_the_size(made, checkpoints, tmp_path):
    halves = featurize(
        made.task, checkpoints, tmp_path / "f", projection=SMALL, block=10, dtype="float16"
    )
    assert (
        halves.stores[0].spec.array("features").nbytes * 2
        == made.stores[0].spec.array("features").nbytes
    )
    for number in (0, 1):
        found, full = (f.gather(number, np.arange(ALL)) for f in (halves, made))
        assert found.dtype == np.float32
        # Half a unit in the last of 11 bits, down to 2^-28 of a vector's largest number.
        floor = 2.0**-38 * np.abs(full).max(-1, keepdims=True)
        assert (np.abs(found - full) <= 2.0**-11 * np.abs(full) + floor).all()


def test_other_dtypes_than_float32_are_kept(tmp_path):
    task = ridge_task()
    model = checkpoint(task)
    features = featurize(task, [model], tmp_path / "f", projection=SMALL, dtype="float64")
    found, (inputs, _) = features.gather(0, np.arange(40)), task.targets()
    gradients = gradients_of_rows(task.new_model(0), model.state, inputs)
    expected = projected_gradients(features.projector(0), gradients)
    assert found.dtype == np.float64
    close(found, expected.numpy(), 1e-12)
    assert features.outputs(0).dtype == np.float64


def partial(task, checkpoints, path, **options):
    given = {"projection": SMALL, "block": 10, "targets": "train"} | options
    return featurize(task, checkpoints, path, **given)


def test_blocks_of_test_rows_are_computed_on_demand(made, checkpoints, tmp_path):
    part = partial(made.task, checkpoints, tmp_path / "f")
    assert [store.pending() for store in part.stores] == [[4], [4]]
    opened = Features.open(tmp_path / "f", made.task)
    opened.gather(0, np.array([36, 39]))
    assert opened.stores[0].pending() == [4]
    wanted = np.array([44, 3, 40])
    np.testing.assert_array_equal(opened.gather(0, wanted), made.gather(0, wanted))
    assert [store.pending() for store in opened.stores] == [[], [4]]
    direction = np.random.default_rng(0).normal(size=made.width)
    np.testing.assert_array_equal(opened.product(1, direction), made.product(1, direction))
    assert bits(opened) == bits(made)


@pytest.mark.parametrize("method", ["gather", "outputs"])
def test_a_folder_that_cannot_be_written_is_told(made, checkpoints, tmp_path, monkeypatch, method):
    part = partial(made.task, checkpoints, tmp_path / "f")

    def refuse(*_):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(Store, "write_block", refuse)
    assert getattr(part, method)(0, np.array([3])).any()
    with pytest.raises(ValueError, match=r"checkpoint-0 does not have .*read-only file.*'all'"):
        getattr(part, method)(0, np.array([44]))


def test_features_of_changed_data_are_not_added(made, checkpoints, tmp_path):
    partial(made.task, checkpoints, tmp_path / "f")
    opened = Features.open(tmp_path / "f", gated_task(recipe=replace(RECIPE, version="2")))
    with pytest.raises(ValueError, match=r"recipe\.version: stored '', wanted '2'"):
        opened.gather(0, np.array([44]))


CHANGED = {
    r"projection\.seed: stored 5, wanted 6": {"projection": Projection(3, 2, 4, seed=6)},
    r"projection\.inputs: stored 3, wanted 2": {"projection": Projection(2, 2, 4, seed=5)},
    r"block: stored 10, wanted 9": {"block": 9},
    r"arrays\.features\.dtype: stored 'float32', wanted 'float64'": {"dtype": "float64"},
}


@pytest.mark.parametrize(("text", "changes"), CHANGED.items(), ids=CHANGED.keys())
def test_other_settings_are_refused_by_name(made, checkpoints, text, changes):
    options = {"projection": SMALL, "block": 10} | changes
    with pytest.raises(ValueError, match=text):
        featurize(made.task, checkpoints, folder_of(made), **options)


def test_other_checkpoints_are_refused_by_name(made, checkpoints):
    with pytest.raises(ValueError, match="weights: stored"):
        featurize(made.task, checkpoints[::-1], folder_of(made), projection=SMALL, block=10)
    remembered = [checkpoint(made.task, 0, ["train-1"]), checkpoints[1]]
    with pytest.raises(ValueError, match="forgotten: stored"):
        featurize(made.task, remembered, folder_of(made), projection=SMALL, block=10)


def test_other_data_is_refused_by_name(made, checkpoints):
    other = gated_task(train_ids=[f"row-{i}" for i in range(TRAIN)])
    with pytest.raises(ValueError, match=r"data\.train: stored"):
        featurize(other, checkpoints, folder_of(made), projection=SMALL, block=10)
    with pytest.raises(ValueError, match="its row 0 is 'train-0', the task's is 'row-0'"):
        Features.open(folder_of(made), other)


def test_other_matrices_are_refused(made):
    opened = Features.open(folder_of(made), gated_task(model=renamed))
    with pytest.raises(ValueError, match="made with other projection matrices"):
        opened.projector(0)


def renamed():
    module = gated_task().model()
    module.second = module.first
    del module.first
    return module


def test_bad_settings_are_refused(task, checkpoints, tmp_path):
    with pytest.raises(ValueError, match="at least one checkpoint, got none"):
        featurize(task, [], tmp_path / "f")
    with pytest.raises(ValueError, match="dtype must be one of float16, float32, float64"):
        featurize(task, checkpoints, tmp_path / "f", dtype="bfloat16")
    with pytest.raises(ValueError, match="block must be 1 target or more, got 0"):
        featurize(task, checkpoints, tmp_path / "f", block=0)
    with pytest.raises(ValueError, match="targets must be 'all' or 'train', got 'test'"):
        featurize(task, checkpoints, tmp_path / "f", targets="test")
    with pytest.raises(ValueError, match=r"checkpoint 0 does not fit task 'blobs': key"):
        featurize(blobs(), checkpoints, tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_layer_that_takes_another_axis_for_the_rows_is_refused(tmp_path):
    def model():
        return torch.nn.Sequential(Sideways(), torch.nn.Linear(3, 2))

    task = gated_task(model=model)
    with pytest.raises(ValueError, match=r"layer '0\.layer' was given inputs of shape .* 2 rows"):
        featurize(task, [checkpoint(task)], tmp_path / "f", projection=SMALL)


class Sideways(torch.nn.Module):
    """As many positions as rows in one batch size only."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x):
        return self.layer(x.T[..., None])[..., 0].T


def test_positions_are_checked(made):
    for position in (-1, ALL):
        with pytest.raises(ValueError, match=f"expected positions from 0 to 47, got {position}"):
            made.gather(0, np.array([0, position]))
    with pytest.raises(TypeError, match=r"1-D array of integers, got bool \(48,\); convert"):
        made.product(0, np.ones(made.width), np.ones(ALL, bool))
    with pytest.raises(ValueError, match=rf"expected a direction of {made.width} numbers, got"):
        made.product(0, np.ones(3))


def test_a_folder_without_features_is_told(task, tmp_path):
    with pytest.raises(ValueError, match=r"expected features in .*make them with featurize"):
        Features.open(tmp_path / "f", task)


def test_trained_models_are_checkpoints(tmp_path):
    task = line()
    full = train_models(
        task,
        draw_subsets(task, models=2, design="full"),
        tmp_path / "full",
        keep="weights",
        workers=0,
    )
    features = featurize(task, full.checkpoints(2), tmp_path / "features")
    # A linear model's gradient is its input and a constant 1.
    inputs, _ = task.targets()
    expected = np.column_stack([inputs, np.ones(len(inputs))])[:, None]
    for number in (0, 1):
        close(features.gather(number, np.arange(48)), expected)
        assert features.model(number).provenance["index"] == number
