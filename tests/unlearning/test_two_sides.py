"""Divergences against torch's own, and the orders in which two sides are visited."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from attribution import BinaryCrossEntropy, CrossEntropy, ForgetSet, SquaredError
from tests.unlearning.cases import FORGET, MORE, fresh_models, request_of, three_blobs
from unlearning.two_sides import both_sides, divergence, in_turns, loss_objective, side_by_side

LOSSES = [
    (CrossEntropy(), 4, torch.tensor([0, 3, 1, 1, 2])),
    (BinaryCrossEntropy(), 1, torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])),
    (SquaredError(), 2, torch.arange(10.0).reshape(5, 2)),
]


def outputs_of(width, seed):
    random = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(5, width, generator=random, dtype=torch.float64)


def torch_divergence(loss, student, teacher, temperature):
    """The divergence of densities that are written out."""
    z, t = student / temperature, teacher / temperature
    if isinstance(loss, SquaredError):
        return temperature**2 * (z - t).square().sum(-1) / 2
    if isinstance(loss, BinaryCrossEntropy):
        z, t = (torch.cat([torch.zeros_like(x), x], dim=-1) for x in (z, t))
    each = functional.kl_div(
        z.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="none"
    )
    return temperature**2 * each.sum(-1)


@pytest.mark.parametrize(("loss", "width", "labels"), LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_divergence_is_that_of_the_densities(loss, width, labels, temperature):
    student, teacher = outputs_of(width, 1), outputs_of(width, 2)
    found = divergence(loss, temperature).value(student, labels, teacher)
    expected = torch_divergence(loss, student, teacher, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert found.min() > 0.01


@pytest.mark.parametrize(("loss", "width", "labels"), LOSSES)
def test_a_cotangent_is_the_derivative_of_the_value(loss, width, labels):
    student, teacher = outputs_of(width, 1).requires_grad_(), outputs_of(width, 2)
    apart = divergence(loss, 2.5)
    for objective in (apart, apart.times(-0.3).plus(loss_objective(loss).times(2))):
        (expected,) = torch.autograd.grad(objective.value(student, labels, teacher).sum(), student)
        found = objective.cotangent(student.detach(), labels, teacher)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def request(count=2, seed=0, already=None):
    task = three_blobs()
    models, forget = fresh_models(task, count), ForgetSet.of(task, FORGET)
    return request_of(task, models, forget, seed=seed, already=already)


def test_the_retain_rows_are_those_that_are_left():
    gone = ForgetSet.of(three_blobs(), MORE)
    rows = both_sides(request(already=gone))
    assert rows[:5].tolist() == [3, 10, 17, 24, 31]
    left = set(range(41)) - set(rows[:5]) - {5, 20}
    assert sorted(rows[5:]) == sorted(left)


def test_side_by_side_every_step_has_rows_of_both_sides():
    order, factors = side_by_side(request(), epochs=2, forget_batch=3, retain_batch=8)
    assert order.shape == (2, 9, 11)
    assert factors == pytest.approx((11 / 3, 11 / 8))
    for each in order:
        forget, retain = each[:, :3].ravel(), each[:, 3:].ravel()
        assert sorted(np.bincount(forget)) == [5, 5, 5, 6, 6]
        assert sorted(retain[:36]) == sorted(retain[36:72]) == list(range(5, 41))


def test_in_turns_epochs_of_the_forget_rows_come_first():
    order, ends = in_turns(request(), epochs=3, forget_epochs=2, forget_batch=2, retain_batch=8)
    assert order.shape == (2, 2 * 8 + 5, 8)
    assert ends == (8, 16, 21)
    for each in order:
        for start in (0, 8):
            turn = each[start : start + 3]
            assert sorted(turn[turn >= 0]) == [0, 1, 2, 3, 4]
            assert (turn[:, 2:] == -1).all()
        for start in (3, 11, 16):
            turn = each[start : start + 5]
            assert sorted(turn[turn >= 0]) == list(range(5, 41))


def test_in_turns_the_retain_rows_may_begin():
    given = {"epochs": 3, "forget_epochs": 2, "forget_batch": 8, "retain_batch": 8}
    order, ends = in_turns(request(), before=1, **given)
    assert ends == (5, 11, 17)
    sides = np.where(order < 0, np.nan, order >= 5)
    assert np.nanmax(sides[:, [5, 11]]) == 0
    assert np.nanmin(np.delete(sides, [5, 11], axis=1)) == 1


@pytest.mark.parametrize(
    "draw",
    [
        lambda r: side_by_side(r, epochs=2, forget_batch=3, retain_batch=8)[0],
        lambda r: in_turns(r, epochs=2, forget_epochs=2, forget_batch=3, retain_batch=8)[0],
    ],
)
def test_an_order_depends_on_the_seed_and_the_models_number_alone(draw):
    order = draw(request())
    assert np.array_equal(draw(request(count=1)), order[:1])
    assert not np.array_equal(order[0], order[1])
    assert not np.array_equal(draw(request(seed=1)), order)
