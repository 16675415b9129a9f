"""Features along principal directions, which their stores keep."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from attribution import ForgetSet, GroupNewton, Model, StagedNewton
from attribution.gradients import Features, Projection, featurize, principal, training_stores
from attribution.gradients.jacobian import Dense, Factored
from attribution.gradients.principal import principal_directions
from attribution.gradients.stored_directions import stored_directions
from tests.attribution.gradients.stored import ALL, bits, checkpoint, close, folder_of, gated_task
from tests.gradient_references import gradients_of_rows, projected_gradients
from tests.tasks import blobs

FEW = Projection(features=4, seed=5, principal=7)
EVERYTHING = Projection(1000, 1000, principal=1000)


@pytest.fixture(scope="module")
def task():
    return gated_task()


@pytest.fixture(scope="module")
def checkpoints(task):
    return [checkpoint(task, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def made(task, checkpoints, tmp_path_factory):
    to = tmp_path_factory.mktemp("principal") / "features"
    return featurize(task, checkpoints, to, projection=FEW, block=10)


def six_outputs():
    return nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 6))


def refused(*_):
    raise AssertionError("the directions are in the stores")


def directions(features, number):
    return stored_directions(features.stores[number])


def test_features_are_gradients_along_the_directions(task, checkpoints, made):
    assert made.width == 2 * 7 + 4 + 4  # of the two layers, the normalisation and the gate
    inputs, _ = task.targets()
    reopened = Features.open(folder_of(made), task)
    for number, model in enumerate(checkpoints):
        gradients = gradients_of_rows(task.new_model(0), model.state, inputs)
        expected = projected_gradients(reopened.projector(number), gradients)
        close(made.gather(number, np.arange(ALL)), expected.numpy())


def test_each_checkpoint_has_directions_of_its_own(made):
    first, second = directions(made, 0), directions(made, 1)
    assert list(first) == list(second) == ["first", "last"]
    assert not torch.equal(first["first"].outputs, second["first"].outputs)


def test_directions_are_found_once(task, checkpoints, made, tmp_path, monkeypatch):
    shutil.copytree(folder_of(made), tmp_path / "f")
    monkeypatch.setattr(training_stores, "principal_directions", refused)
    again = featurize(task, checkpoints, tmp_path / "f", projection=FEW, block=10)
    assert bits(again) == bits(made)


def test_a_call_that_is_interrupted_before_any_feature_keeps_the_directions_it_found(
    task, checkpoints, made, tmp_path, monkeypatch
):
    found = []

    def stopped(*asked):
        if len(found) == 2:
            raise KeyboardInterrupt
        found.append(asked)
        return principal_directions(*asked)

    monkeypatch.setattr(training_stores, "principal_directions", stopped)
    with pytest.raises(KeyboardInterrupt):
        featurize(task, checkpoints, tmp_path / "f", projection=FEW, block=10)
    with pytest.raises(ValueError, match=r"is not finished: 4 blocks of training rows are"):
        Features.open(tmp_path / "f", task)
    numbers = []

    def counted(*asked):
        numbers.append(asked[3])
        return principal_directions(*asked)

    monkeypatch.setattr(training_stores, "principal_directions", counted)
    assert bits(featurize(task, checkpoints, tmp_path / "f", projection=FEW, block=10)) == bits(
        made
    )
    assert numbers == [2, 3]


def test_workers_find_the_same_directions(task, checkpoints, made, tmp_path):
    found = featurize(task, checkpoints, tmp_path / "f", projection=FEW, block=10, workers=2)
    assert bits(found) == bits(made)


def test_what_is_there_is_checked_before_more_is_found(task, checkpoints, made, monkeypatch):
    monkeypatch.setattr(training_stores, "principal_directions", refused)
    with pytest.raises(ValueError, match="weights"):
        featurize(task, checkpoints[1:] * 2, folder_of(made), projection=FEW, block=10)


def test_an_interrupted_call_goes_on_with_the_same_bits(task, checkpoints, made, tmp_path):
    to = tmp_path / "f"
    featurize(task, checkpoints, to, projection=FEW, block=10, targets="train")
    whole = featurize(task, checkpoints, to, projection=FEW, block=10, workers=2)
    assert bits(whole) == bits(made)


def test_features_on_demand_are_the_same(task, checkpoints, made, tmp_path):
    to = tmp_path / "f"
    part = featurize(task, checkpoints, to, projection=FEW, block=10, targets="train")
    assert part.stores[2].pending()
    np.testing.assert_array_equal(part.gather(2, np.arange(ALL)), made.gather(2, np.arange(ALL)))


def test_the_segments_of_a_training_share_directions(task, checkpoints, made, tmp_path):
    along = {"projection": FEW, "block": 10, "times": (3.0, 1.0)}
    found = featurize(task, checkpoints, tmp_path / "f", **along)
    parts = [directions(found, number)["first"].outputs for number in range(4)]
    assert torch.equal(parts[0], parts[1])
    assert torch.equal(parts[2], parts[3])
    assert not torch.equal(parts[0], parts[2])
    assert not torch.equal(parts[0], directions(made, 0)["first"].outputs)


def test_a_training_that_was_half_there_takes_the_directions_it_has(
    task, checkpoints, tmp_path, monkeypatch
):
    along = {"projection": FEW, "block": 10, "times": (3.0, 1.0)}
    whole = bits(featurize(task, checkpoints, tmp_path / "f", **along))
    for lost in ("checkpoint-1", "checkpoint-2"):
        shutil.rmtree(tmp_path / "f" / lost)
    monkeypatch.setattr(training_stores, "principal_directions", refused)
    assert bits(featurize(task, checkpoints, tmp_path / "f", **along)) == whole


def test_another_command_may_be_first(task, checkpoints, made, tmp_path, monkeypatch):
    def late(*asked):
        if not (tmp_path / "f/checkpoint-0").exists():
            shutil.copytree(folder_of(made), tmp_path / "f")
        found = principal_directions(*asked)
        return {name: replace(layer, inputs=-layer.inputs) for name, layer in found.items()}

    monkeypatch.setattr(training_stores, "principal_directions", late)
    found = featurize(task, checkpoints, tmp_path / "f", projection=FEW, block=10)
    assert bits(found) == bits(made)


def test_directions_may_be_given(task, checkpoints, made, tmp_path, monkeypatch):
    monkeypatch.setattr(training_stores, "principal_directions", refused)
    known = [directions(made, number) for number in range(4)]
    given = {"projection": FEW, "block": 10, "directions": known}
    assert bits(featurize(task, checkpoints, tmp_path / "f", **given)) == bits(made)
    with pytest.raises(ValueError, match="directions of each of 4 trainings, got 3"):
        featurize(task, checkpoints, tmp_path / "g", **given | {"directions": known[:3]})
    with pytest.raises(ValueError, match="go with a projection that has principal features"):
        featurize(task, checkpoints, tmp_path / "g", **given | {"projection": Projection()})


def test_a_model_that_diverged_is_named(task, checkpoints, tmp_path):
    state = {
        name: value * 1e25 if value.is_floating_point() else value
        for name, value in checkpoints[1].state.items()
    }
    models = [checkpoints[0], Model(task, state)]
    with pytest.raises(ValueError, match=r"^checkpoint 1: outputs are not finite on"):
        featurize(task, models, tmp_path / "f", projection=FEW)
    with pytest.raises(ValueError, match=r"^checkpoint 0 or 1: outputs are not finite"):
        featurize(task, models, tmp_path / "g", projection=FEW, times=(3.0, 1.0))


@pytest.mark.parametrize("other", [Projection(features=4, seed=5), Projection(4, 2, principal=3)])
def test_another_projection_is_refused(task, checkpoints, made, other):
    with pytest.raises(ValueError, match=r"projection"):
        featurize(task, checkpoints, folder_of(made), projection=other, block=10)


def test_random_directions_are_not_taken_for_principal_ones(task, checkpoints, tmp_path):
    featurize(task, checkpoints, tmp_path / "f", projection=Projection(features=4, seed=5))
    with pytest.raises(ValueError, match=r"projection"):
        featurize(task, checkpoints, tmp_path / "f", projection=FEW)


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))

    def forward(self, x):
        return x @ self.weight


def test_models_without_layers_of_two_sides_are_projected_at_random(tmp_path):
    task = blobs(model=Raw)
    models = [checkpoint(task, 0)]
    found, random = (
        featurize(
            task, models, tmp_path / f"{few}", projection=Projection(features=4, principal=few)
        )
        for few in (3, 0)
    )
    rows = np.arange(ALL)
    np.testing.assert_array_equal(found.gather(0, rows), random.gather(0, rows))


def test_a_layer_that_is_too_wide_is_projected_at_random(tmp_path, monkeypatch):
    monkeypatch.setattr(principal, "WIDEST", 6)
    task = blobs(model=six_outputs)  # sides of 12 and 4, then of 6 and 13
    found = featurize(task, [checkpoint(task, 0)], tmp_path / "f", projection=FEW)
    assert directions(found, 0) == {}
    assert found.width == 8


def test_staged_newton_takes_the_directions_of_its_checkpoint(task, made, monkeypatch):
    monkeypatch.setattr(training_stores, "principal_directions", refused)
    staged = StagedNewton(GroupNewton(task, made.first(1), damping=1.0), stages=2)
    found = staged.change(ForgetSet.at(task, np.array([3, 8, 20]))).mean
    assert np.isfinite(found).all()
    assert found.any()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_products_are_those_of_the_features(tmp_path, dtype):
    task = blobs(model=six_outputs)
    models = [checkpoint(task, 0)]
    small = Projection(principal=40)
    found = featurize(task, models, tmp_path / "f", projection=small, block=10, dtype=dtype)
    rows = np.array([40, 3, 3, 0])
    kept = found.jacobian(0, rows)
    assert isinstance(kept, Dense if dtype == "float16" else Factored)
    close(kept.dense().numpy(), found.gather(0, rows), 1e-6)
    direction = np.random.default_rng(0).normal(size=found.width).astype(np.float32)
    close(found.product(0, direction, rows), found.gather(0, rows) @ direction)
    dense = torch.from_numpy(found.gather(0, rows))
    weights = torch.randn(4, 6).to(dense)
    expected = torch.einsum("ro,rok->k", weights, dense)
    close(kept.pulled(weights).numpy(), expected.numpy())


def test_all_directions_predict_what_all_parameters_do(tmp_path):
    task = blobs()
    models, forget = [checkpoint(task, 0)], ForgetSet.at(task, np.array([3, 8, 20]))
    whole = Projection(1000, 1000, 10_000)
    changes = [
        GroupNewton(task, featurize(task, models, tmp_path / name, projection=projection), 0.5)
        .change(forget)
        .mean
        for name, projection in (("turned", EVERYTHING), ("whole", whole))
    ]
    close(*changes, 1e-4)


def test_settings_tell_of_principal_directions_where_there_are_any():
    assert Projection.of(FEW.settings()) == FEW
    random = Projection(seed=3)
    assert "principal" not in random.settings()
    assert Projection.of(random.settings()) == random
    with pytest.raises(ValueError, match=r"projection\.principal must be 0 or more, got -1"):
        Projection(principal=-1)
