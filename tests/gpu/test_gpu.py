"""What runs on a GPU gives what the CPU gives, and a training the same bits twice."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from attribution import (
    ForgetSet,
    GroupNewton,
    Model,
    Recipe,
    Task,
    draw_subsets,
    featurize,
    train_models,
)
from attribution.devices import repeatable
from attribution.gradients import Features, Projection, gradient_projector
from attribution.gradients.feature_store import FeatureBlock
from attribution.gradients.principal import layer_moments
from attribution.in_run.recording import run_values
from attribution.moments import compute_moments
from tests.attribution.gradients.models import CASES as LAYERS
from tests.small_runs import write_task
from tests.tasks import blobs
from tests.unlearning.cases import lay_ground, normalised, three_blobs
from unlearning import unlearn_models
from unlearning.cli import main
from unlearning.methods import METHODS, build_method

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SMALL = Projection(inputs=4, outputs=2)
# The first sums products of a layer's sides, the second leaves its sides as they are.
SPARSE = [Projection(inputs=4, outputs=3, features=5), Projection(64, 64, features=20)]
RECIPE = Recipe(epochs=2, batch_size=8, peak_rate=0.05)


def images(rows, seed):
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    return TensorDataset(torch.randn(rows, 3, 8, 8, generator=random) + labels.view(-1, 1, 1, 1),
                         labels)  # fmt: skip


def convolving():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))  # fmt: skip


def residual():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 3))  # fmt: skip


MODELS = {"convolving": convolving, "residual": residual}


def pictures(model=convolving, **changes):
    fields = {"recipe": RECIPE} | changes
    return Task("pictures", images(37, 1), images(11, 2), model, **fields)


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def task(request):
    return pictures(request.param)


def trained(task, folder, device="cuda", models=3, **more):
    subsets = draw_subsets(task, models=models, design="full", seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BatchNorm is trained one by one
        return train_models(task, subsets, folder, keep="weights", device=device, workers=0, **more)


def near(found, expected, tolerance=1e-4):
    scale = np.abs(np.asarray(expected)).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


@pytest.fixture
def exact_convolutions(monkeypatch):
    """Training and unlearning may round what they convolve, as torch is set."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_a_training_gives_the_same_bits_twice(task, tmp_path):
    first, second = (trained(task, tmp_path / name) for name in "ab")
    assert np.array_equal(first.outputs, second.outputs)
    states = first.states(), second.states()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_training_is_that_of_the_cpu(task, tmp_path, exact_convolutions):
    del exact_convolutions
    task = replace(task, recipe=replace(RECIPE, epochs=1))
    here = trained(task, tmp_path / "here")
    near(here.outputs, trained(task, tmp_path / "there", "cpu").outputs, 1e-3)


def test_a_store_of_another_device_is_refused(tmp_path):
    task = pictures(residual)
    trained(task, tmp_path / "full")
    with pytest.raises(ValueError, match="device: stored 'cuda', wanted 'cpu'"):
        trained(task, tmp_path / "full", "cpu")


def in_float32(case):
    module, inputs = case
    return module.float().eval(), inputs.float() if inputs.is_floating_point() else inputs


@pytest.mark.parametrize("projection", [SMALL, *SPARSE], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_projected_gradients_are_those_of_the_cpu(name, projection):
    module, inputs = in_float32(LAYERS[name])
    state, every = module.state_dict(), None
    found = []
    for device in ("cpu", "cuda"):
        here = gradient_projector(module.to(device), projection)
        outputs = module(inputs.to(device)).shape[1]
        every = torch.eye(outputs, device=device).expand(len(inputs), -1, -1)
        moved = {key: value.to(device) for key, value in state.items()}
        with repeatable(device):
            found.append(here.features(moved, inputs.to(device), every).cpu().numpy())
    module.to("cpu")
    near(found[1], found[0])


def test_features_curvature_and_moments_are_those_of_the_cpu(task, tmp_path):
    full = trained(task, tmp_path / "full", "cpu")
    checkpoints = full.checkpoints(2)
    here, there = (
        featurize(task, checkpoints, tmp_path / device, projection=SMALL, block=10, device=device)
        for device in ("cuda", "cpu")
    )
    rows = np.arange(len(task.target_ids))
    for checkpoint in range(2):
        near(here.gather(checkpoint, rows), there.gather(checkpoint, rows))
        near(here.outputs(checkpoint), there.outputs(checkpoint))
        near(here.curvature(checkpoint), there.curvature(checkpoint))
    forget = ForgetSet.of(task, ["train-3", "train-10"])
    changes = [GroupNewton(task, each, damping=1.0).change(forget).mean for each in (here, there)]
    near(changes[0], changes[1], 1e-3)
    moments = [compute_moments(full, tmp_path / f"moments-{d}", device=d) for d in ("cuda", "cpu")]
    held = [each.layers([0, 1, 2]) for each in moments]
    for name, expected in held[1].items():
        near(held[0][name].numpy(), expected.numpy())


def test_principal_features_are_those_of_the_cpu(task, tmp_path):
    model, inputs = Model(task, task.new_model(3).state_dict()), task.targets()[0]
    here, there = (
        layer_moments(
            task.new_model(0).to(device),
            [model.state],
            inputs.to(device),
            task.loss,
            np.random.default_rng(0),
        )
        for device in ("cuda", "cpu")
    )
    for name, expected in there.items():
        near(here[name].outputs.cpu(), expected.outputs)
        near(here[name].inputs.cpu(), expected.inputs)
    # Eigenvectors of almost equal eigenvalues may mix, all of them together are a rotation.
    projection, rows = Projection(1000, 1000, principal=10_000), np.arange(len(task.target_ids))
    found = [
        featurize(task, [model], tmp_path / device, projection=projection, device=device)
        for device in ("cuda", "cpu")
    ]
    products = [j @ j.T for j in (each.gather(0, rows).reshape(-1, each.width) for each in found)]
    near(*products, 1e-3)


@pytest.mark.parametrize("projection", SPARSE, ids=str)
def test_features_kept_as_factors_are_those_of_the_cpu(tmp_path, projection):
    task = blobs()
    models = [Model(task, task.new_model(seed).state_dict()) for seed in (0, 1)]
    here, there = (
        featurize(task, models, tmp_path / device, projection=projection, device=device)
        for device in ("cuda", "cpu")
    )
    assert {"factors" in each.stores[0].spec.arrays for each in (here, there)} == {
        projection == SPARSE[1]
    }
    rows, direction = np.arange(len(task.target_ids)), np.ones(here.width)
    for checkpoint in range(2):
        near(here.gather(checkpoint, rows), there.gather(checkpoint, rows))
        near(here.product(checkpoint, direction), there.product(checkpoint, direction))
    forget = ForgetSet.of(task, ["train-3", "train-10"])
    changes = [GroupNewton(task, each, damping=1.0).change(forget).mean for each in (here, there)]
    near(changes[0], changes[1], 1e-3)


def test_features_of_pending_rows_are_computed_where_they_are_asked_for(tmp_path, monkeypatch):
    task, computed = pictures(), []
    models = [Model(task, task.new_model(0).state_dict())]
    how = {"projection": SMALL, "block": 5, "targets": "train"}
    featurize(task, models, tmp_path, device="cuda", **how)
    opened = FeatureBlock._opened

    def spied(self, checkpoint, store):
        projector, state = opened(self, checkpoint, store)
        computed.extend(tensor.device.type for tensor in state.values())
        return projector, state

    monkeypatch.setattr(FeatureBlock, "_opened", spied)
    for device, row in (("cpu", 41), ("cuda", 47)):
        computed.clear()
        Features.open(tmp_path, task, device).gather(0, np.array([row]))
        assert set(computed) == {device}


def test_outputs_of_a_model_are_those_of_the_cpu(task):
    model = Model(task, task.new_model(0).state_dict())
    near(model.outputs(device="cuda"), model.outputs())


GROUNDS = {
    "mlp": three_blobs,
    "normalised": lambda: three_blobs(normalised),
    "convolving": lambda: pictures(recipe=replace(RECIPE, epochs=8)),
}


@pytest.fixture(scope="module", params=GROUNDS.values(), ids=GROUNDS.keys())
def ground(request, tmp_path_factory):
    return lay_ground(request.param(), tmp_path_factory.mktemp("ground"))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_unlearns_as_on_the_cpu(name, ground, exact_convolutions):
    del exact_convolutions
    found = []
    for device in ("cuda", "cpu"):
        method = build_method(name, ground.evidence(), {})
        after = unlearn_models(method, ground.full, ground.task, ground.forget, device=device)
        assert all(tensor.device.type == "cpu" for tensor in after.states.values())
        found.append(after)
    assert found[0].status == found[1].status
    near(found[0].outputs, found[1].outputs, 1e-2)


@pytest.mark.parametrize("order", [1, 2])
def test_values_within_a_run_are_those_of_the_cpu(order):
    task, rows, targets = three_blobs(), np.arange(41), np.arange(41, 54)
    found = [
        run_values(task, rows, targets, seed=0, index=0, device=torch.device(device), order=order)
        for device in ("cuda", "cpu")
    ]
    near(found[0].scores, found[1].scores, 1e-3)


def test_the_verbs(tmp_path, capsys):
    spec, run = write_task(tmp_path), str(tmp_path / "run")

    def dmm(*words):
        code = main([*words, "--run", run, "--device", "cuda", "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    dmm("precompute", spec, "--full-models", "4", "--subset-models", "24")
    few = ("--forget", "train-3,train-10,train-17")
    predicted = dmm("predict", *few, "--predictor", "newton")
    assert np.isfinite(predicted["mean"]).all()
    model = str(tmp_path / "new.safetensors")
    dmm("unlearn", *few, "--method", "dmm", "--out", model)
    assert load_file(model)
    two = ("--trials", "2", "--n-models", "2", "--forget", "rows:20:25")
    dmm("tune", "--methods", "fine_tune", *two)
    some = ("--methods", "do_nothing,dmm,pgu", "--n-models", "4", "--relearning")
    told = dmm("evaluate", *few, *some)
    (block,) = told["forget_sets"].values()
    assert all("error" not in method for method in block["methods"].values())
    assert "NVIDIA" in told["hardware"]
    dmm("report")
