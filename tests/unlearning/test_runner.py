"""One code path: a model ends at the same place alone, among many, and one after the other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from attribution import ForgetSet, Model, SquaredError, Task, draw_subsets, train_models
from attribution.descent import unstack
from attribution.seeds import generator
from tests.unlearning.cases import (
    FORGET,
    MORE,
    assert_same_bits,
    fresh_models,
    largest_difference,
    request_of,
    three_blobs,
)
from unlearning import (
    DoNothing,
    FineTune,
    GradientAscent,
    Matching,
    ProjectedGradient,
    margins,
    unlearn_models,
)
from unlearning.execution import execute
from unlearning.method import epochs_order, stream_order
from unlearning.methods import METHODS, build_method

GROUNDS = ["ground", "normalised_ground", "branching_ground"]
WORKING = [name for name in METHODS if name != "do_nothing"]
SHORT = {"rate": "0.01", "batch_size": "3"}
FORGET_ROWS_ALONE = {"retain_multiplier": "0", "retain_extra": "0"}


def short_of(name, ground):
    """The method with small steps of few rows, where it takes steps."""
    if name in ("match_reference", "match_untrained"):
        # Retain rows are right already: Adam would follow the rounding errors of their gradients.
        return build_method(name, ground.evidence(), SHORT | FORGET_ROWS_ALONE)
    return build_method(name, ground.evidence(), {} if name == "ssd" else SHORT)


@pytest.fixture(params=GROUNDS)
def any_ground(request):
    return request.getfixturevalue(request.param)


def models_of(ground, count=3):
    return [ground.full.model(i) for i in range(count)]


def ran(method, ground, *, many):
    request = request_of(ground.task, models_of(ground), ground.forget, many=many)
    return execute(method.plan(request), request)


@pytest.mark.parametrize("name", WORKING)
def test_many_at_once_and_one_by_one_agree(ground, name):
    method = short_of(name, ground)
    together, alone = (ran(method, ground, many=many) for many in (True, False))
    assert largest_difference(together.states, alone.states) < 1e-4
    assert (together.status, together.evaluations) == (alone.status, alone.evaluations)
    np.testing.assert_allclose(together.history, alone.history, rtol=1e-4)


@pytest.mark.parametrize("name", WORKING)
def test_the_number_of_models_changes_no_model(any_ground, name):
    method = short_of(name, any_ground)
    given = any_ground.full, any_ground.task, any_ground.forget
    three, one = unlearn_models(method, *given), unlearn_models(method, *given, count=1)
    assert largest_difference(unstack(three.states, 0), unstack(one.states, 0)) < 1e-4
    last = method(any_ground.full.model(2), any_ground.task, any_ground.forget).model
    assert largest_difference(unstack(three.states, 2), last.state) < 1e-4


@pytest.mark.parametrize(
    "method",
    [
        kind(epochs=3, rate=0.01, batch_size=11, batchnorm="update")
        for kind in (FineTune, GradientAscent)
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_moving_batchnorm_statistics_are_each_models_own(normalised_ground, method, count):
    ground = normalised_ground
    unlearned = unlearn_models(method, ground.full, ground.task, ground.forget, count=count)
    for i in range(count):
        alone = method(ground.full.model(i), ground.task, ground.forget).model.state
        assert_same_bits(unstack(unlearned.states, i), alone)
        moved = alone["1.running_mean"] - ground.full.model(i).state["1.running_mean"]
        assert moved.abs().max() > 1e-4


def plain_loop(task, model, rows, *, sign, epochs, rate, batch_size, batchnorm):
    """Gradient steps written out with autograd; the model's number is 0."""
    module = task.new_model(0)
    module.load_state_dict(model.state)
    module.train(batchnorm == "update")
    random = generator(0, "unlearning order", 0)
    for _ in range(epochs):
        order = random.permutation(len(rows))
        for chosen in np.array_split(order, -(-len(rows) // batch_size)):
            inputs, labels = task.rows("train", rows[chosen])
            loss = sign * functional.cross_entropy(module(inputs), labels)
            gradients = torch.autograd.grad(loss, list(module.parameters()))
            with torch.no_grad():
                for weight, gradient in zip(module.parameters(), gradients, strict=True):
                    weight.sub_(rate * gradient)
    return module.state_dict()


@pytest.mark.parametrize(
    ("kind", "sign", "rows"), [(GradientAscent, -1, "rows"), (FineTune, 1, "retained")]
)
@pytest.mark.parametrize("batchnorm", ["frozen", "update"])
def test_plain_passes_equal_a_loop_written_out(normalised_ground, kind, sign, rows, batchnorm):
    ground = normalised_ground
    settings = {"epochs": 3, "rate": 0.03, "batch_size": 11, "batchnorm": batchnorm}
    visited = getattr(ground.forget, rows)
    model = ground.full.model(0)
    expected = plain_loop(ground.task, model, visited, sign=sign, **settings)
    result = kind(**settings)(model, ground.task, ground.forget)
    assert largest_difference(result.model.state, expected) < 1e-5
    assert result.gradient_evaluations == 3 * len(visited)


def test_the_history_is_the_mean_loss_before_and_after(ground):
    result = GradientAscent(epochs=5, rate=0.02)(ground.full.model(0), ground.task, ground.forget)
    inputs, labels = ground.task.rows("train", ground.forget.rows)
    for model, told in zip((ground.full.model(0), result.model), result.history, strict=True):
        outputs = torch.from_numpy(model.outputs(ground.forget.rows))
        assert told == pytest.approx(float(functional.cross_entropy(outputs, labels)), rel=1e-5)
    assert len(inputs) == 5


def test_a_regression_with_several_outputs_can_be_unlearned():
    data = TensorDataset(torch.randn(11, 4), torch.randn(11, 2))
    task = Task(
        "plane",
        data,
        data,
        lambda: nn.Linear(4, 2),
        loss=SquaredError(),
        test_ids=list("abcdefghijk"),
    )
    forget = ForgetSet.at(task, [2, 5, 7])
    model = fresh_models(task, 1)[0]
    result = GradientAscent(epochs=2, rate=0.01, batch_size=2)(model, task, forget)
    gap = model.outputs(forget.rows) - data.tensors[1][forget.rows].numpy()
    assert result.history[0] == pytest.approx((gap**2).sum(1).mean() / 2, rel=1e-5)
    assert result.history[1] > result.history[0]


def test_outputs_and_margins_of_unlearned_models(any_ground):
    ground = any_ground
    unlearned = unlearn_models(GradientAscent(), ground.full, ground.task, ground.forget)
    one_by_one = [Model(ground.task, unstack(unlearned.states, i)) for i in range(3)]
    outputs = np.stack([model.outputs() for model in one_by_one])
    np.testing.assert_allclose(unlearned.outputs, outputs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(unlearned.margins, margins(one_by_one, ground.task), atol=1e-5)
    assert np.array_equal(margins(unlearned, ground.task), unlearned.margins)


def test_margins_are_those_of_the_label(ground):
    labels = torch.cat(
        [ground.task.rows("train", range(41))[1], ground.task.rows("test", range(13))[1]]
    )
    found = margins(ground.full, ground.task)
    assert found.shape == (3, 54)
    for target in (0, 17, 53):
        own = int(labels[target])
        z = ground.full.outputs[:, target].astype(np.float64)
        others = np.log(np.exp(np.delete(z, own, axis=1)).sum(1))
        np.testing.assert_allclose(found[:, target], z[:, own] - others, rtol=0, atol=1e-4)


def test_models_trained_without_rows_have_forgotten_them(ground):
    bank = ground.banks["forget"]
    some = ForgetSet.of(ground.task, [FORGET[0], *MORE])
    assert unlearn_models(DoNothing(), bank, ground.task, some).forgotten.ids == ground.both.ids
    with pytest.raises(ValueError, match="has forgotten all 5 rows of 'forget' already"):
        unlearn_models(DoNothing(), bank, ground.task, ground.forget)


def test_each_status_is_counted(ground):
    done = unlearn_models(DoNothing(), ground.full, ground.task, ground.forget)
    assert (done.status, done.gradient_evaluations) == ({"unchanged": 3}, 0)
    assert_same_bits(done.states, ground.full.states())
    method = GradientAscent(epochs=2, batch_size=3)
    done = unlearn_models(method, ground.full, ground.task, ground.forget, count=2)
    assert (done.status, done.gradient_evaluations) == ({"finished": 2}, 10)


@pytest.mark.parametrize("count", [0, 4, -1])
def test_a_count_that_the_ensemble_does_not_have_is_refused(ground, count):
    with pytest.raises(ValueError, match=f"count must lie between 1 and 3 models, got {count}"):
        unlearn_models(DoNothing(), ground.full, ground.task, ground.forget, count=count)


def test_an_ensemble_without_weights_is_refused(tmp_path):
    task = three_blobs()
    subsets = draw_subsets(task, models=2, design="full")
    outputs_only = train_models(task, subsets, tmp_path / "bank", workers=0)
    with pytest.raises(ValueError, match="kept no weights"):
        unlearn_models(DoNothing(), outputs_only, task, ForgetSet.of(task, FORGET))


@pytest.mark.parametrize("without", [None, MORE])
def test_models_that_saw_different_rows_are_refused(tmp_path, without):
    task = three_blobs()
    gone = ForgetSet.of(task, without) if without else None
    subsets = draw_subsets(task, models=2, design="half", without=gone)
    halves = train_models(task, subsets, tmp_path / "half", keep="weights", workers=0)
    forget = ForgetSet.of(task, FORGET)
    with pytest.raises(ValueError, match=r"half were trained on different rows: unlearn them one"):
        unlearn_models(DoNothing(), halves, task, forget)
    for index in range(2):
        DoNothing()(halves.model(index), task, forget)


def test_a_forget_set_of_other_data_is_refused(ground):
    other = replace(ground.forget, total=40)
    with pytest.raises(ValueError, match="is drawn from 40 rows, task 'three blobs' has 41"):
        unlearn_models(DoNothing(), ground.full, ground.task, other)


def test_steps_that_diverge_are_reported(ground):
    method = GradientAscent(rate=1e30, epochs=9)
    with pytest.raises(
        ValueError, match=r"unlearning diverged: non-finite weights in '.*'; lower the"
    ):
        method(ground.full.model(0), ground.task, ground.forget)


@pytest.mark.parametrize("many", [True, False])
def test_the_moments_of_another_model_are_refused(ground, many):
    stranger = fresh_models(ground.task, 1)
    request = request_of(ground.task, stranger, ground.forget, many=many)
    with pytest.raises(
        ValueError, match="holds no input moments of this model: compute them for its"
    ):
        ProjectedGradient(ground.moments).plan(request)


class TestOrders:
    def request(self, count=2, seed=0):
        task = three_blobs()
        return request_of(task, fresh_models(task, count), ForgetSet.of(task, FORGET), seed=seed)

    def test_every_pass_of_a_stream_visits_each_row_once(self):
        order = stream_order(11, 7, 4, self.request())
        assert order.shape == (2, 7, 4)
        for stream in order.reshape(2, -1):
            for start in (0, 11):
                assert sorted(stream[start : start + 11]) == list(range(11))

    def test_a_stream_of_fewer_rows_than_a_step_repeats_them(self):
        order = stream_order(3, 2, 5, self.request())
        assert sorted(np.bincount(order[0].ravel())) == [3, 3, 4]

    def test_every_epoch_visits_each_row_once_and_pads_its_last_step(self):
        order = epochs_order(11, 3, 4, self.request())
        assert order.shape == (2, 9, 4)
        for epoch in order.reshape(6, 12):
            assert sorted(epoch) == [-1, *range(11)]
            assert epoch[-1] == -1

    @pytest.mark.parametrize("draw", [stream_order, epochs_order])
    def test_an_order_depends_on_the_seed_and_the_models_number_alone(self, draw):
        order = draw(11, 5, 4, self.request())
        assert np.array_equal(draw(11, 5, 4, self.request(count=1)), order[:1])
        assert not np.array_equal(order[0], order[1])
        assert not np.array_equal(draw(11, 5, 4, self.request(seed=1)), order)


def test_matching_leaves_what_it_reads_from_the_store_alone(ground):
    before = ground.full.states()
    unlearn_models(Matching(ground.datamodel), ground.full, ground.task, ground.forget)
    assert_same_bits(ground.full.states(), before)
