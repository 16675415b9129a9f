"""PGU: its loss, what it reads, and when it stops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from attribution import ForgetSet
from attribution.moments import Moments
from tests.references import dense_projector
from tests.unlearning.cases import (
    FORGET,
    MORE,
    HeldMoments,
    assert_same_bits,
    guarded,
    largest_difference,
    request_of,
)
from unlearning import GradientProjection, ProjectedGradient, unlearn_models
from unlearning.execution import execute

SETTINGS = {"gamma": 0.9, "rate": 0.03, "last_rate": 0.03, "batch_size": 3}


def method_with(ground, accuracies, *, models=(0,), **changes):
    held = HeldMoments(ground.task, [ground.full.model(i) for i in models], accuracies)
    return ProjectedGradient(held, **(SETTINGS | changes))


def accuracy(model, rows):
    labels = model.task.rows("train", rows)[1]
    return float((torch.from_numpy(model.outputs(rows)).argmax(1) == labels).double().mean())


@pytest.fixture(scope="module")
def model(ground):
    return ground.full.model(0)


@pytest.fixture(scope="module")
def epochs(ground, model):
    """The model after 0, 1, 2, ... epochs and its accuracy on the forget rows, never stopped."""
    models = [model]
    for count in range(1, 41):
        method = method_with(ground, [-1], epochs=count)
        models.append(method(model, ground.task, ground.forget).model)
    return models, [accuracy(each, ground.forget.rows) for each in models]


@pytest.fixture(scope="module")
def fall(epochs):
    """The first epoch where the accuracy falls, not counting the first one of all."""
    found = epochs[1]
    return next(e for e in range(2, len(found)) if found[e] < min(found[:e]))


def paper_loss(outputs, labels, offset, weight):
    probabilities = outputs.softmax(-1)
    chosen = probabilities[torch.arange(len(labels)), labels]
    entropy = -(probabilities * probabilities.log()).sum(-1)
    return -torch.log(1 - (chosen - offset)) - weight * entropy


class TestLoss:
    @pytest.fixture
    def rows(self):
        random = torch.Generator().manual_seed(8)
        outputs = 3 * torch.randn(17, 4, generator=random, dtype=torch.float64)
        return outputs, torch.arange(17) % 4

    @pytest.mark.parametrize(("offset", "weight"), [(0.05, 0.2), (0.3, 0.0), (0.1, 2.5)])
    def test_value_and_derivative_are_those_of_the_papers_loss(self, ground, rows, offset, weight):
        outputs, labels = rows
        method = ProjectedGradient(ground.moments, offset=offset, entropy_weight=weight)
        plan = method.plan(request_of(ground.task, ground.full.checkpoints(1), ground.forget))
        free = outputs.clone().requires_grad_()
        expected = paper_loss(free, labels, offset, weight)
        expected.sum().backward()
        torch.testing.assert_close(plan.value(outputs, labels, None), expected.detach())
        torch.testing.assert_close(plan.cotangent(outputs, labels, None), free.grad)

    def test_poisoned_labels_are_to_leave_for_one_other_class(self, ground, rows):
        outputs, labels = rows
        method = ProjectedGradient(ground.moments, entropy="lower_others", entropy_weight=0.7)
        plan = method.plan(request_of(ground.task, ground.full.checkpoints(1), ground.forget))
        free = outputs.clone().requires_grad_()
        others = torch.arange(4) != labels[:, None]
        q = free[others].reshape(17, 3).softmax(1)
        chosen = free.softmax(1)[~others]
        expected = -torch.log(1.05 - chosen) - 0.7 * (q * q.log()).sum(1)
        expected.sum().backward()
        torch.testing.assert_close(plan.value(outputs, labels, None), expected.detach())
        torch.testing.assert_close(plan.cotangent(outputs, labels, None), free.grad)

    @pytest.mark.parametrize("entropy", ["raise", "lower_others"])
    def test_a_certain_class_bounds_the_loss_and_gives_no_nan(self, ground, entropy):
        plan = ProjectedGradient(ground.moments, offset=0.05, entropy=entropy).plan(
            request_of(ground.task, ground.full.checkpoints(1), ground.forget)
        )
        outputs, labels = torch.tensor([[200.0, 0.0, 0.0]] * 2), torch.tensor([0, 1])
        values = plan.value(outputs, labels, None)
        others = {"raise": [0, 0], "lower_others": [0.2 * math.log(2), 0]}[entropy]
        expected = torch.tensor([math.log(20) + others[0], -math.log(1.05) + others[1]])
        torch.testing.assert_close(values, expected)
        assert torch.isfinite(plan.cotangent(outputs, labels, None)).all()


@pytest.mark.parametrize("many", [True, False])
def test_it_reads_no_row_but_the_forget_set(ground, many):
    closed = guarded(ground.task, ground.forget)
    method = ProjectedGradient(Moments.open(ground.moments.store.path), epochs=6, **SETTINGS)
    if many:
        blind = unlearn_models(method, ground.full, closed, ground.forget)
        seeing = unlearn_models(method, ground.full, ground.task, ground.forget)
        assert_same_bits(blind.states, seeing.states)
    else:
        blind = method(ground.full.model(2), closed, ground.forget)
        seeing = method(ground.full.model(2), ground.task, ground.forget)
        assert_same_bits(blind.model.state, seeing.model.state)
    with pytest.raises(AssertionError, match="row 0 was read"):
        closed.rows("train", [0])


@pytest.mark.parametrize("many", [True, False])
def test_a_second_request_reads_no_row_but_the_new_ones(ground, many):
    new = ForgetSet.of(ground.task, MORE)
    closed = guarded(ground.task, new)
    method = ProjectedGradient(Moments.open(ground.moments.store.path), epochs=6, **SETTINGS)
    asked = ForgetSet.of(ground.task, FORGET + MORE)
    first = method(ground.full.model(2), ground.task, ground.forget).model
    if many:
        request = request_of(ground.task, [first] * 2, new, already=ground.forget)
        request = replace(request, digests=(ground.full.model(2).digest(),) * 2)
        blind, seeing = (
            execute(method.plan(each), each).states
            for each in (replace(request, task=closed), request)
        )
        assert_same_bits(blind, seeing)
        projection = GradientProjection(ground.moments, 0.9)
        bound = [projection.bind(each) for each in (replace(request, task=closed), request)]
        assert_same_bits(bound[0].projectors, bound[1].projectors)
    else:
        blind, seeing = (method(first, task, asked) for task in (closed, ground.task))
        assert_same_bits(blind.model.state, seeing.model.state)
        assert blind.model.forgotten.ids == ground.both.ids


def test_a_model_below_its_test_accuracy_from_the_start_is_left_alone(ground, model):
    result = method_with(ground, [1.01])(model, ground.task, ground.forget)
    assert result.status == "too fast"
    at_start = accuracy(model, ground.forget.rows)
    assert result.ending.reason == (
        f"accuracy on the forget rows was {at_start:.3f}, below 1.010, before the first step: by"
        " this rule there is nothing to forget, and the weights are as they were"
    )
    assert result.gradient_evaluations == 0
    assert result.history[0] == result.history[1]
    assert_same_bits(result.model.state, model.state)


def test_a_reference_stands_for_the_test_accuracy(ground, epochs, fall):
    models, found = epochs
    method = method_with(ground, [1.01], epochs=40, reference=found[fall] + 0.01)
    result = method(models[0], ground.task, ground.forget)
    assert (result.status, result.ending.reference) == ("crossed", found[fall] + 0.01)
    assert_same_bits(result.model.state, models[fall].state)


def test_accuracy_equal_to_the_reference_is_not_below_it(ground, model, epochs):
    method = method_with(ground, [epochs[1][0]], epochs=1)
    assert method(model, ground.task, ground.forget).status != "too fast"


def test_a_model_that_never_falls_below_keeps_its_last_epoch(ground, model):
    result = method_with(ground, [-0.01], epochs=7)(model, ground.task, ground.forget)
    assert result.status == "never crossed"
    assert (result.ending.steps, result.ending.kept) == (14, 14)
    reached = accuracy(result.model, ground.forget.rows)
    assert result.ending.reached == pytest.approx(reached, rel=1e-6)
    assert result.gradient_evaluations == 7 * len(FORGET)
    assert largest_difference(result.model.state, model.state) > 1e-3


@pytest.mark.parametrize(("share", "kept"), [(0.1, 0), (0.9, -1)])
def test_of_two_epochs_the_one_nearer_to_the_reference_is_kept(ground, epochs, fall, share, kept):
    models, found = epochs
    reference = found[fall] + share * (found[fall - 1] - found[fall])
    result = method_with(ground, [reference], epochs=40)(models[0], ground.task, ground.forget)
    assert result.status == "crossed"
    ending = result.ending
    assert (ending.steps, ending.kept) == (2 * fall, 2 * (fall + kept))
    assert ending.reached == pytest.approx(found[fall + kept], rel=1e-6)
    assert ending.reference == pytest.approx(reference)
    assert f"after {2 * fall} steps; the state after {ending.kept} is nearest" in ending.reason
    assert result.gradient_evaluations == fall * len(FORGET)
    assert_same_bits(result.model.state, models[fall + kept].state)


def test_crossing_in_the_last_epoch_counts(ground, model, epochs, fall):
    models, found = epochs
    method = method_with(ground, [found[fall] + 0.01], epochs=fall)
    result = method(model, ground.task, ground.forget)
    assert result.status == "crossed"
    assert_same_bits(result.model.state, models[fall].state)


@pytest.mark.parametrize("many", [True, False])
def test_every_model_is_held_to_its_own_test_accuracy(ground, epochs, fall, many):
    found = epochs[1]
    references = [found[fall] + 0.01, 1.01, -0.01]
    method = method_with(ground, references, models=(0, 1, 2), epochs=40)
    request = request_of(ground.task, ground.full.checkpoints(3), ground.forget, many=many)
    ended = execute(method.plan(request), request)
    assert ended.status == ("crossed", "too fast", "never crossed")
    assert ended.evaluations == (5 * fall, 0, 5 * 40)
    assert [ending.steps for ending in ended.endings] == [2 * fall, 0, 80]
    for name, tensor in ended.states.items():
        assert torch.equal(tensor[1], request.states[name][1])


def test_the_rate_falls_exponentially_by_epoch(ground):
    method = ProjectedGradient(ground.moments, epochs=4, rate=0.8, last_rate=0.1, batch_size=3)
    plan = method.plan(request_of(ground.task, ground.full.checkpoints(1), ground.forget))
    expected = np.repeat([0.8, 0.4, 0.2, 0.1], 2)
    np.testing.assert_allclose(plan.rates, expected, rtol=1e-12)


def test_its_steps_are_plain_descent_outside_the_core_space(ground, model):
    """One epoch of one batch, written out with autograd and the projector."""
    method = method_with(ground, [-1], epochs=1, rate=0.4, last_rate=0.4, batch_size=64)
    module = ground.task.new_model(0)
    module.load_state_dict(model.state)
    inputs, labels = ground.task.rows("train", ground.forget.rows)
    paper_loss(module(inputs), labels, 0.05, 0.2).mean().backward()
    after = method(model, ground.task, ground.forget).model.state
    retained = ground.task.rows("train", ground.forget.retained)[0]
    hidden = functional.relu(functional.linear(retained, *list(model.state.values())[:2]))
    for name, vectors, layer in (
        ("0.weight", retained, module[0]),
        ("2.weight", hidden, module[2]),
    ):
        inside = torch.from_numpy(dense_projector(vectors.numpy(), 0.9))
        outside = torch.eye(len(inside)) - inside
        expected = model.state[name] - 0.4 * layer.weight.grad @ outside
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-5)


def test_the_order_of_ids_does_not_matter(ground, model):
    method = ProjectedGradient(ground.moments, epochs=3, **SETTINGS)
    turned = ForgetSet.of(ground.task, FORGET[::-1])
    results = [method(model, ground.task, forget) for forget in (ground.forget, turned)]
    assert_same_bits(results[0].model.state, results[1].model.state)
