"""Matching: its objective, what it visits, and where it ends."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from attribution import (
    Change,
    Counterfactual,
    ForgetSet,
    Oracle,
    Recipe,
    SquaredError,
    Task,
    draw_subsets,
    train_models,
)
from attribution.descent import SGD, Batch, Descent
from tests.unlearning.cases import (
    FORGET,
    MORE,
    Fixed,
    assert_same_bits,
    copied,
    fresh_models,
    largest_difference,
    request_of,
    three_blobs,
)
from unlearning import Matching, unlearn_models
from unlearning.execution import execute

TARGETS, OUTPUTS = 54, 3  # of three blobs


@pytest.fixture(scope="module")
def task():
    return three_blobs()


@pytest.fixture(scope="module")
def forget(task):
    return ForgetSet.of(task, FORGET)


@pytest.fixture(scope="module")
def fixed():
    return Fixed(np.random.default_rng(9).normal(size=(TARGETS, OUTPUTS)).astype(np.float32))


def plan_of(method, task, forget, *, count=2, seed=0, already=None):
    return method.plan(
        request_of(task, fresh_models(task, count), forget, seed=seed, already=already)
    )


class TestObjective:
    def test_value_and_derivative_are_those_of_the_mean_square(self, task, forget, fixed):
        plan = plan_of(Matching(fixed), task, forget)
        random = torch.Generator().manual_seed(1)
        outputs, targets = torch.randn(2, 17, 3, generator=random, dtype=torch.float64)
        free = outputs.clone().requires_grad_()
        loss = ((free - targets) ** 2).sum(1) / 3
        loss.sum().backward()
        torch.testing.assert_close(plan.value(outputs, None, targets), loss.detach())
        torch.testing.assert_close(plan.cotangent(outputs, None, targets), free.grad)

    def test_targets_are_the_outputs_before_plus_the_change(self, task, forget, fixed):
        method = Matching(fixed, retain_multiplier=1, retain_extra=2)
        plan, models = plan_of(method, task, forget), fresh_models(task, 2)
        visited = np.concatenate([forget.rows, method.retain_rows(forget, 0)])
        for targets, model in zip(plan.targets, models, strict=True):
            expected = model.outputs(visited) + fixed.mean[visited]
            np.testing.assert_allclose(targets, expected, rtol=0, atol=1e-6)
        inputs, labels = task.rows("train", visited)
        assert torch.equal(plan.inputs, inputs)
        assert torch.equal(plan.labels, labels)

    def test_a_second_request_asks_for_the_change_from_the_first(self, task, forget, fixed):
        asked = []

        class Noting(Counterfactual):
            def check_task(self, task):
                del task

            def change(self, forget, already=None, targets=None):
                asked.append((forget.ids, already.ids))
                return fixed.change(forget, already, targets)

        both = ForgetSet.of(task, FORGET + MORE)
        plan_of(Matching(Noting()), task, ForgetSet.of(task, MORE), already=forget)
        assert asked == [(both.ids, forget.ids)]

    @pytest.mark.parametrize("many", [True, False])
    def test_a_prediction_in_float64_is_taken(self, task, forget, fixed, many):
        request = request_of(task, fresh_models(task, 2), forget, many=many)
        narrow, wide = (Matching(Fixed(fixed.mean.astype(t)), passes=1) for t in ("f4", "f8"))
        ended = [execute(method.plan(request), request).states for method in (narrow, wide)]
        assert largest_difference(*ended) < 1e-5

    def test_an_absolute_prediction_is_the_target_itself(self, task, forget, fixed):
        class Absolute(Counterfactual):
            def check_task(self, task):
                del task

            def change(self, forget, already=None, targets=None):
                nothing = np.zeros_like(fixed.mean[targets])
                return Change(fixed.mean[targets], nothing, nothing, absolute=True)

        plan = plan_of(Matching(Absolute()), task, forget)
        expected = torch.from_numpy(fixed.mean[forget.rows])
        for targets in plan.targets:
            assert torch.equal(targets[: len(forget)], expected)

    def test_the_history_falls_to_the_mismatch_that_is_left(self, task, forget, fixed):
        model = fresh_models(task, 1)[0]
        method = Matching(fixed, passes=30, rate=0.02)
        result = method(model, task, forget)
        visited = np.concatenate([forget.rows, method.retain_rows(forget, 0)])
        wanted = model.outputs(visited) + fixed.mean[visited]
        for told, each in zip(result.history, (model, result.model), strict=True):
            left = np.square(each.outputs(visited) - wanted).mean()
            assert told == pytest.approx(left, rel=1e-4)
        assert result.history[1] < 0.9 * result.history[0]


class TestVisits:
    @pytest.mark.parametrize(
        ("sample", "retained"),
        [((0, 0), 0), ((0, 3), 3), ((1.5, 0), 8), ((2, 1), 11), ((3, 100), 36)],
    )
    def test_so_many_retain_rows_are_visited(self, task, forget, fixed, sample, retained):
        method = Matching(fixed, retain_multiplier=sample[0], retain_extra=sample[1])
        rows = method.retain_rows(forget, seed=0)
        assert len(set(rows)) == len(rows) == retained
        assert not set(rows) & set(forget.rows)
        assert len(plan_of(method, task, forget).inputs) == len(FORGET) + retained

    def test_the_retain_sample_follows_the_seed(self, forget, fixed):
        method = Matching(fixed, retain_multiplier=2, retain_extra=0)
        first, again, other = (list(method.retain_rows(forget, seed)) for seed in (0, 0, 1))
        assert first == again
        assert set(first) != set(other)

    def test_rows_forgotten_before_are_no_retain_rows(self, task, forget, fixed):
        already, now = forget, ForgetSet.of(task, MORE)
        plan = plan_of(Matching(fixed, retain_extra=100), task, now, already=already)
        assert len(plan.inputs) == 41 - len(FORGET)
        gone = task.rows("train", already.rows)[0]
        assert not (plan.inputs[:, None] == gone[None]).all(-1).any()

    @pytest.mark.parametrize("multiplier", [1, 3])
    def test_a_pass_visits_forget_rows_so_often_and_retain_rows_once(
        self, task, forget, fixed, multiplier
    ):
        settings = {"forget_multiplier": multiplier, "retain_multiplier": 2, "retain_extra": 1}
        length = multiplier * 5 + 11
        plan = plan_of(Matching(fixed, passes=2, batch_size=1, **settings), task, forget)
        for order in plan.order:
            counts = np.bincount(order[:length, 0], minlength=16)
            assert list(counts) == [multiplier] * 5 + [1] * 11

    @pytest.mark.parametrize(
        ("settings", "steps"),
        [((1.5, 16), 4), ((2, 41), 2), ((2, 40), 3), ((0.01, 7), 1), ((1, 64), 1)],
    )
    def test_passes_give_so_many_gradient_evaluations(self, task, forget, fixed, settings, steps):
        passes, batch_size = settings
        method = Matching(fixed, passes=passes, batch_size=batch_size)
        result = method(fresh_models(task, 1)[0], task, forget)
        assert result.gradient_evaluations == steps * batch_size
        assert result.gradient_evaluations >= int(passes * 41)

    def test_the_rate_falls_linearly_to_zero(self, task, forget, fixed):
        plan = plan_of(Matching(fixed, passes=2, batch_size=20, rate=0.5), task, forget)
        np.testing.assert_allclose(plan.rates, [0.5, 0.4, 0.3, 0.2, 0.1], rtol=1e-12)


def line_task():
    """Least squares in four dimensions, fitted in closed form: one model for one set of rows."""
    random = torch.Generator().manual_seed(2)
    inputs = torch.randn(31, 4, generator=random)
    labels = inputs @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + torch.randn(31, generator=random)

    def train(rows, seed, device):
        del seed, device
        design = torch.cat([inputs[rows], torch.ones(len(rows), 1)], 1).double()
        found = torch.linalg.lstsq(design, labels[rows, None].double()).solution.float()
        return {"weight": found[:4].T.contiguous(), "bias": found[4]}

    test = TensorDataset(torch.randn(7, 4, generator=random), torch.zeros(7))
    data = TensorDataset(inputs, labels)
    return Task("line", data, test, lambda: nn.Linear(4, 1), train=train, loss=SquaredError())


@pytest.mark.parametrize("absolute", [False, True])
def test_with_the_oracle_of_a_linear_model_it_becomes_the_oracle(tmp_path, absolute):
    task = line_task()
    forget = ForgetSet.at(task, [0, 4, 9, 21, 30])

    def bank(name, without=None):
        subsets = draw_subsets(task, models=2, design="full", without=without)
        return train_models(task, subsets, tmp_path / name, keep="weights", workers=0)

    full, oracles = bank("full"), bank("oracles", forget)
    oracle = Oracle(full, oracles, absolute=absolute)
    method = Matching(oracle, passes=300, rate=0.05, batch_size=16)
    unlearned = unlearn_models(method, full, task, forget)
    away = np.abs(full.outputs - oracles.outputs).max()
    assert away > 0.1
    np.testing.assert_allclose(unlearned.outputs, oracles.outputs, rtol=0, atol=1e-3 * away)


@pytest.mark.parametrize("kind", ["datamodel", "oracle"])
def test_rows_in_another_order_than_the_predictions_are_refused(ground, kind):
    given = ground.evidence()
    method = Matching(given.predictor(None) if kind == "datamodel" else given.oracle())
    ids = list(ground.task.train_ids)
    ids[4], ids[9] = ids[9], ids[4]
    other = three_blobs(train_ids=ids)
    forget, model = ForgetSet.of(other, FORGET), ground.full.model(0)
    message = "its row 4 is 'train-4', the task's is 'train-9'$"
    with pytest.raises(ValueError, match=message):
        method(model, other, forget)
    with pytest.raises(ValueError, match=message):
        unlearn_models(method, ground.full, other, forget)


class TestDistance:
    def test_kl_is_that_of_the_probabilities(self, task, forget, fixed):
        plan = plan_of(Matching(fixed, distance="kl", temperature=2.0), task, forget)
        random = torch.Generator().manual_seed(1)
        outputs, targets = torch.randn(2, 17, 3, generator=random, dtype=torch.float64)
        free = outputs.clone().requires_grad_()
        wanted, found = ((values / 2).log_softmax(-1) for values in (targets, free))
        divergence = 4 * (wanted.exp() * (wanted - found)).sum(-1)
        divergence.sum().backward()
        labels = torch.arange(17) % 3
        torch.testing.assert_close(plan.value(outputs, labels, targets), divergence.detach())
        torch.testing.assert_close(plan.cotangent(outputs, labels, targets), free.grad)

    @pytest.mark.parametrize("distance", ["mse", "kl"])
    def test_either_falls(self, task, forget, fixed, distance):
        method = Matching(fixed, distance=distance, passes=60, rate=0.02, retain_extra=0)
        before, after = method(fresh_models(task, 1)[0], task, forget).history
        assert after < 0.4 * before

    def test_another_one_is_refused(self, fixed):
        with pytest.raises(ValueError, match="distance must be 'mse' or 'kl', got 'l1'"):
            Matching(fixed, distance="l1")


class TestPull:
    @pytest.mark.parametrize("many", [False, True])
    def test_a_strong_one_keeps_models_where_they_are(self, task, forget, fixed, many):
        models = fresh_models(task, 2)
        moved = []
        for pull in (0.0, 1.0, 100.0):
            request = request_of(task, models, forget, many=many)
            states = execute(Matching(fixed, passes=5, pull=pull).plan(request), request).states
            moved.append(largest_difference(states, request.states))
        assert moved[0] > moved[1] > moved[2] > 0

    def test_it_is_the_gradient_of_the_squared_distance(self, task, forget, fixed):
        model = fresh_models(task, 1)[0]
        module = task.new_model(0)
        module.load_state_dict(model.state)
        batch = Batch(*(t[0] for t in (torch.randn(1, 7, 5), torch.zeros(1, 7, dtype=torch.long))),
                      torch.full((7,), 1 / 7), torch.zeros(7, 0))  # fmt: skip
        descent = Descent(module, model.state, lambda z, y, t: 0 * z, SGD(), many=False, pull=0.5)
        with torch.no_grad():
            for parameter in descent.parameters.values():
                parameter.add_(1.0)
        descent.step(batch, 0.1)
        for name, tensor in descent.state.items():
            torch.testing.assert_close(tensor, model.state[name] + 1 - 0.1 * 0.5)

    def test_a_negative_one_is_refused(self, fixed):
        with pytest.raises(ValueError, match=r"Matching\.pull must be finite and not negative"):
            Matching(fixed, pull=-1.0)


class TestTolerance:
    def test_a_model_stops_near_its_tolerance(self, task, forget, fixed):
        model = fresh_models(task, 1)[0]
        settings = {"passes": 60, "rate": 5e-3, "retain_extra": 0}
        whole = Matching(fixed, **settings)(model, task, forget)
        stopped = Matching(fixed, tolerance=0.5, **settings)(model, task, forget)
        assert stopped.status == "crossed"
        assert 0 < stopped.gradient_evaluations < whole.gradient_evaluations
        before, after = stopped.history
        assert 0.4 < after / before < 0.6
        assert whole.history[1] < after

    def test_one_that_is_never_reached_says_so(self, task, forget, fixed):
        model = fresh_models(task, 1)[0]
        result = Matching(fixed, passes=1, rate=1e-6, tolerance=0.5)(model, task, forget)
        assert result.status == "never crossed"

    def test_models_stop_alike_alone_and_together(self, task, forget, fixed):
        models = fresh_models(task, 3)
        method = Matching(fixed, passes=60, rate=5e-3, tolerance=0.5, retain_extra=0)
        ran = [
            execute(method.plan(request), request)
            for request in (request_of(task, models, forget, many=many) for many in (True, False))
        ]
        assert ran[0].status == ran[1].status
        assert "crossed" in ran[0].status
        assert ran[0].evaluations == ran[1].evaluations
        assert largest_difference(ran[0].states, ran[1].states) < 1e-4

    def test_one_outside_its_range_is_refused(self, fixed):
        with pytest.raises(ValueError, match=r"lie in \[0, 1\), got 0\.0 and 1\.0"):
            Matching(fixed, tolerance=1.0)


class TestBatchNorm:
    STATISTICS = ("1.running_mean", "1.running_var", "1.num_batches_tracked")

    @pytest.mark.parametrize(("batchnorm", "moves"), [("frozen", False), ("update", True)])
    def test_statistics_move_only_if_asked(self, normalised_ground, batchnorm, moves):
        ground = normalised_ground
        model = ground.full.model(0)
        before = copied(model.state)
        method = Matching(ground.datamodel, passes=2, batch_size=16, batchnorm=batchnorm)
        after = method(model, ground.task, ground.forget).model.state
        for name in self.STATISTICS:
            assert (not torch.equal(after[name], before[name])) == moves
        assert_same_bits(model.state, before)

    def test_targets_do_not_depend_on_the_policy(self, normalised_ground):
        ground = normalised_ground
        request = request_of(ground.task, ground.full.checkpoints(2), ground.forget)
        plans = [
            Matching(ground.datamodel, batchnorm=b).plan(request) for b in ("frozen", "update")
        ]
        assert torch.equal(plans[0].targets, plans[1].targets)


def test_a_task_with_a_recipe_and_one_without_serve_alike(forget, fixed):
    with_recipe = three_blobs(recipe=Recipe(epochs=1, batch_size=8, peak_rate=0.1))
    without = three_blobs(recipe=None)
    states = [
        Matching(fixed, passes=1)(fresh_models(task, 1)[0], task, forget).model.state
        for task in (with_recipe, without)
    ]
    assert_same_bits(*states)
