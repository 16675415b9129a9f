"""A second request starts from the space and the model that the first one left."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from attribution import ForgetSet, Task, compute_moments, draw_subsets, load_model, train_models
from attribution.carried import carried_path
from attribution.descent import unstack
from attribution.moments import input_moments
from tests.unlearning.cases import (
    FORGET,
    MORE,
    HeldMoments,
    assert_same_bits,
    fresh_models,
    largest_difference,
)
from unlearning import (
    DoNothing,
    GradientProjection,
    Matching,
    ProjectedGradient,
    corrected_klom,
    shift,
    unlearn_models,
)

SETTINGS = {"gamma": 0.9, "epochs": 5, "rate": 0.03, "batch_size": 3}


def projecting(ground, kind):
    if kind == "pgu":
        return ProjectedGradient(ground.moments, **SETTINGS)
    backend = GradientProjection(ground.moments, 0.9)
    return Matching(ground.datamodel, backend, passes=3, batch_size=8, rate=0.02)


def retained(model, forget):
    inputs, _ = model.task.rows("train", forget.retained)
    return input_moments(model.task.new_model(0), model.state, inputs)


@pytest.fixture(params=["pgu", "dmm_pgu"])
def method(ground, request):
    return projecting(ground, request.param)


@pytest.fixture
def more(ground):
    return ForgetSet.of(ground.task, MORE)


@pytest.fixture
def first(ground, method):
    return method(ground.full.model(1), ground.task, ground.forget).model


def test_the_space_of_one_layer_is_that_of_one_request_for_both():
    """Its inputs are the data, which no step changes: the second downdate is exact."""
    random = torch.Generator().manual_seed(3)
    inputs = torch.randn(13, 5, generator=random, dtype=torch.float64)
    data = TensorDataset(inputs, torch.arange(13) % 3)
    task = Task("one layer", data, data, lambda: nn.Linear(5, 3, dtype=torch.float64),
                test_ids=list("abcdefghijklm"))  # fmt: skip
    (model,) = fresh_models(task, 1)
    one, two = ForgetSet.at(task, [2, 5, 7]), ForgetSet.at(task, [0, 11])
    method = ProjectedGradient(HeldMoments(task, [model], [0.0]), **SETTINGS)
    before = method(model, task, one).model
    after = method(before, task, two).model
    both = method(model, task, one.union(task, two)).model
    kept = inputs[np.delete(np.arange(13), [2, 5, 7, 0, 11])]
    for found in (after, both):
        torch.testing.assert_close(found.moments[""], kept.T @ kept, rtol=0, atol=1e-12)
    assert not torch.equal(after.state["weight"], before.state["weight"])


@pytest.mark.filterwarnings("ignore:the downdated second moments are indefinite")
def test_the_first_rows_leave_the_space_and_stay_out(ground, method, first, more):
    second = method(first, ground.task, more).model
    before = retained(ground.full.model(1), ground.forget)
    for name, moment in first.moments.items():
        torch.testing.assert_close(moment, before[name], rtol=1e-5, atol=1e-4)
    expected = retained(ground.full.model(1), ground.both)
    all_rows = ground.moments.layers([1])
    for name, moment in second.moments.items():
        far = (all_rows[name][0] - expected[name]).norm()
        assert (moment - expected[name]).norm() < 0.1 * far
    torch.testing.assert_close(second.moments["0"], expected["0"], rtol=1e-5, atol=1e-4)


def test_a_method_that_does_not_project_brings_the_space_forward(ground, first, more):
    assert DoNothing()(ground.full.model(1), ground.task, more).model.moments is None
    after = DoNothing()(first, ground.task, more).model
    assert_same_bits(after.moments, first.moments)


class TestFiles:
    @pytest.mark.filterwarnings("ignore:the downdated second moments are indefinite")
    def test_a_loaded_model_goes_on_where_the_saved_one_would(
        self, ground, method, first, more, tmp_path
    ):
        first.save(tmp_path / "first.safetensors")
        loaded = load_model(ground.task, tmp_path / "first.safetensors")
        assert (list(loaded.moments), len(loaded.moments)) == (["0", "2"], 2)
        assert "7" not in loaded.moments
        assert_same_bits(dict(loaded.moments), first.moments)
        second, expected = (method(each, ground.task, more).model for each in (loaded, first))
        assert largest_difference(second.state, expected.state) == 0
        assert largest_difference(second.moments, expected.moments) == 0
        assert "carries" not in loaded.provenance

    def test_the_models_file_holds_its_state_alone(self, first, tmp_path):
        first.save(tmp_path / "first.safetensors")
        assert set(load_file(tmp_path / "first.safetensors")) == set(first.state)
        assert {p.name for p in tmp_path.iterdir()} == {
            "first.safetensors", "first.moments.safetensors",
        }  # fmt: skip
        assert b"train-" not in carried_path(tmp_path / "first.safetensors").read_bytes()

    def test_a_model_without_moments_leaves_no_file_of_them(self, ground, first, tmp_path):
        for model in (first, ground.full.model(1)):
            model.save(tmp_path / "model.safetensors")
        assert not carried_path(tmp_path / "model.safetensors").exists()
        assert load_model(ground.task, tmp_path / "model.safetensors").moments is None

    def test_names_that_differ_in_their_ending_alone_have_moments_of_their_own(
        self, ground, first, tmp_path
    ):
        first.save(tmp_path / "model.1")
        ground.full.model(1).save(tmp_path / "model.2")
        assert_same_bits(dict(load_model(ground.task, tmp_path / "model.1").moments), first.moments)

    def test_a_model_that_is_one_layer_has_the_empty_name(self, ground, tmp_path):
        moments = {"": torch.eye(2, dtype=torch.float64)}
        replace(ground.full.model(0), moments=moments).save(tmp_path / "model.safetensors")
        loaded = load_model(ground.task, tmp_path / "model.safetensors")
        assert_same_bits(dict(loaded.moments), moments)

    def test_lost_moments_are_missed_only_where_they_are_needed(
        self, ground, method, first, more, tmp_path
    ):
        first.save(tmp_path / "first.safetensors")
        carried_path(tmp_path / "first.safetensors").unlink()
        loaded = load_model(ground.task, tmp_path / "first.safetensors")
        assert DoNothing()(loaded, ground.task, more).status == "unchanged"
        message = r"carries moments in '.*first.moments.safetensors' .* cannot be read: .*; put the"
        with pytest.raises(ValueError, match=message):
            method(loaded, ground.task, more)

    def test_the_moments_of_other_weights_are_refused(self, ground, method, first, more, tmp_path):
        first.save(tmp_path / "first.safetensors")
        other = method(ground.full.model(2), ground.task, ground.forget).model
        other.save(tmp_path / "other.safetensors")
        carried_path(tmp_path / "other.safetensors").replace(tmp_path / "first.moments.safetensors")
        loaded = load_model(ground.task, tmp_path / "first.safetensors")
        with pytest.raises(ValueError, match="cannot be read: they are those of other weights"):
            method(loaded, ground.task, more)


class TestManyAtOnce:
    @pytest.mark.filterwarnings("ignore:the downdated second moments are indefinite")
    def test_each_model_goes_where_it_would_go_alone(self, ground, method, more):
        before = unlearn_models(method, ground.full, ground.task, ground.forget)
        after = unlearn_models(method, before, ground.task, more)
        assert (len(after), after.forgotten.ids) == (3, ground.both.ids)
        for i in range(3):
            alone = method(ground.full.model(i), ground.task, ground.forget).model
            alone = method(alone, ground.task, more).model
            assert largest_difference(unstack(after.states, i), alone.state) < 1e-4
            assert largest_difference(unstack(after.moments, i), alone.moments) < 1e-2

    def test_fewer_models_may_go_on(self, ground, method, more):
        before = unlearn_models(method, ground.full, ground.task, ground.forget)
        some = unlearn_models(DoNothing(), before, ground.task, more, count=2)
        assert (len(some), some.digests) == (2, before.digests[:2])
        assert_same_bits(some.moments, {n: m[:2] for n, m in before.moments.items()})
        with pytest.raises(ValueError, match="count must lie between 1 and 3 models, got 4"):
            unlearn_models(DoNothing(), before, ground.task, more, count=4)

    def test_rows_forgotten_before_are_refused(self, ground, method):
        before = unlearn_models(method, ground.full, ground.task, ground.forget)
        again = ForgetSet.of(ground.task, FORGET[:2], "few")
        with pytest.raises(ValueError, match="has forgotten all 2 rows of 'few' already"):
            unlearn_models(method, before, ground.task, again)


@pytest.fixture(scope="module")
def banks(ground, tmp_path_factory):
    """Two banks of 40 models of the ground's task, and the moments of each."""
    made = []
    for seed in (5, 6):
        folder = tmp_path_factory.mktemp("bank")
        subsets = draw_subsets(ground.task, models=40, design="full", seed=seed)
        bank = train_models(ground.task, subsets, folder / "full", keep="weights", workers=0)
        made.append((bank, compute_moments(bank, folder / "moments")))
    return made


@pytest.mark.filterwarnings("ignore:the downdated second moments are indefinite")
@pytest.mark.parametrize("kind", ["pgu", "dmm_pgu", "dmm"])
def test_two_requests_end_as_one_for_both_within_the_noise_of_an_audit(ground, banks, more, kind):
    """Against other models, two requests are no farther than one request is."""

    def method(moments):
        if kind == "pgu":
            return ProjectedGradient(moments, gamma=0.8, epochs=30, rate=0.05, batch_size=3)
        backend = GradientProjection(moments, 0.5) if kind == "dmm_pgu" else None
        return Matching(ground.datamodel, backend, passes=20, batch_size=8, rate=0.02)

    (bank, held), (others, held_by_others) = banks
    first = unlearn_models(method(held), bank, ground.task, ground.forget)
    two = unlearn_models(method(held), first, ground.task, more)
    one = unlearn_models(method(held), bank, ground.task, ground.both)
    reference = unlearn_models(method(held_by_others), others, ground.task, ground.both)
    moved = shift(bank.margins, reference.margins)[ground.both.rows].mean()
    far, null = (shift(each.margins, reference.margins) for each in (two, one))
    assert far.mean() < 1.5 * null.mean()
    assert far[ground.both.rows].mean() < 0.6 * moved
    assert corrected_klom(two.margins, reference.margins).mean() < 0.1
