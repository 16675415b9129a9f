"""Requests with and without a projection, in turns: no row that is gone counts as retained."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from attribution import ForgetSet, Task, compute_moments, load_model
from attribution.descent import unstack
from attribution.moments import input_moments
from tests.unlearning.cases import MORE, HeldMoments, fresh_models, guarded
from unlearning import DoNothing, GradientAscent, ProjectedGradient, unlearn_models

ONE, TWO, THREE = [2, 5, 7], [0, 11], [4, 9]
SETTINGS = {"gamma": 0.9, "epochs": 2, "rate": 0.03, "batch_size": 3}
TURNS = [
    "unprojected projected",
    "unprojected unprojected projected",
    "projected unprojected projected",
    "unprojected projected projected",
]


@pytest.fixture(scope="module")
def task():
    """One layer, whose inputs are the data: moments are exact, however the weights have moved."""
    random = torch.Generator().manual_seed(3)
    inputs = torch.randn(13, 5, generator=random, dtype=torch.float64)
    data = TensorDataset(inputs, torch.arange(13) % 3)
    return Task("one layer", data, data, lambda: nn.Linear(5, 3, dtype=torch.float64),
                test_ids=list("abcdefghijklm"))  # fmt: skip


@pytest.fixture(scope="module")
def model(task):
    return fresh_models(task, 1)[0]


def method_of(task, model, kind):
    if kind == "unprojected":
        return GradientAscent(epochs=1, rate=0.1)
    return ProjectedGradient(HeldMoments(task, [model], [0.0]), **SETTINGS)


def retained(task, gone):
    kept = task.train_data.tensors[0][np.delete(np.arange(13), gone)]
    return kept.T @ kept


@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "from files"])
@pytest.mark.parametrize("turns", TURNS)
def test_moments_are_those_of_the_rows_that_are_left(task, model, tmp_path, turns, saved):
    now, gone = model, []
    for kind, rows in zip(turns.split(), (ONE, TWO, THREE), strict=False):
        gone += rows
        # Only what is gone may be read.
        closed = guarded(task, ForgetSet.at(task, gone))
        now = method_of(task, model, kind)(now, closed, ForgetSet.at(task, rows)).model
        if saved:
            now.save(tmp_path / "model.safetensors")
            now = load_model(task, tmp_path / "model.safetensors")
    assert now.forgotten.positions == tuple(sorted(gone))
    assert now.since is None
    torch.testing.assert_close(now.moments[""], retained(task, gone), rtol=0, atol=1e-12)


def test_carried_moments_that_count_rows_purged_since_give_way_to_the_stored_ones(
    task, model, tmp_path
):
    path, forgets = tmp_path / "model.safetensors", [ForgetSet.at(task, r) for r in (ONE, TWO)]
    projected = method_of(task, model, "projected")(model, task, forgets[0]).model
    DoNothing()(projected, task, forgets[1]).model.save(path)
    inputs, labels = (tensor[:-2] for tensor in task.train_data.tensors)
    ids = [row for i, row in enumerate(task.train_ids) if i not in TWO]
    left = replace(task, train_data=TensorDataset(inputs, labels), train_ids=ids)
    found = load_model(left, path, purged=2)
    assert (found.moments, found.since) == (None, None)
    assert found.forgotten.ids == forgets[0].ids
    assert load_model(task, path).since.ids == forgets[1].ids


@pytest.mark.parametrize("turns", TURNS[:3])
def test_many_models_at_once_carry_what_each_would_alone(ground, turns):
    given, sets = ground.task, [ForgetSet.at(ground.task, r) for r in (ONE, TWO, THREE)]
    projected = ProjectedGradient(ground.moments, **SETTINGS)
    now, alone = ground.full, ground.full.model(1)
    for kind, forget in zip(turns.split(), sets, strict=False):
        method = projected if kind == "projected" else DoNothing()
        now = unlearn_models(method, now, given, forget)
        alone = method(alone, given, forget).model
    assert now.since is None
    assert alone.since is None
    first = unstack(now.moments, 1)["0"]
    inputs, _ = given.rows("train", now.forgotten.retained)
    kept = inputs.double()
    for found in (first, alone.moments["0"]):
        torch.testing.assert_close(found, kept.T @ kept, rtol=1e-5, atol=1e-4)


def test_rows_that_models_never_saw_are_no_retain_rows(ground, tmp_path):
    bank = ground.banks["forget"]
    method = ProjectedGradient(compute_moments(bank, tmp_path / "moments"), **SETTINGS)
    after = unlearn_models(method, bank, ground.task, ForgetSet.of(ground.task, MORE))
    inputs, _ = ground.task.rows("train", ground.both.retained)
    expected = input_moments(ground.task.new_model(0), bank.model(0).state, inputs)
    torch.testing.assert_close(after.moments["0"][0], expected["0"], rtol=1e-5, atol=1e-4)
