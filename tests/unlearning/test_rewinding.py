"""Rewinding: which state a model goes back to, and how SCRUB chooses it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attribution import ForgetSet
from attribution.descent import unstack
from tests.unlearning.cases import (
    FORGET,
    fresh_models,
    largest_difference,
    request_of,
    three_blobs,
)
from unlearning import NegGradPlus, Scrub
from unlearning.execution import execute
from unlearning.method import Rewinding

METHOD = NegGradPlus(0.8, 2, 0.03, 8, 3)


def ended(ground, choose, *, many, steps=(3, 6, 9)):
    models = [ground.full.model(i) for i in range(3)]
    request = request_of(ground.task, models, ground.forget, many=many)
    plan = METHOD.plan(request)
    assert len(plan.rates) == 9
    rewinding = Rewinding(steps, plan.inputs[:5], choose)
    return execute(replace(plan, stopping=rewinding), request)


def after(ground, steps):
    models = [ground.full.model(i) for i in range(3)]
    request = request_of(ground.task, models, ground.forget)
    plan = METHOD.plan(request)
    return execute(replace(plan, order=plan.order[:, :steps], rates=plan.rates[:steps]), request)


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize(("chosen", "status"), [(0, "rewound"), (1, "rewound"), (2, "finished")])
def test_the_chosen_state_is_that_of_its_step(ground, many, chosen, status):
    found = ended(ground, lambda _: chosen, many=many)
    expected = after(ground, (3, 6, 9)[chosen])
    assert largest_difference(found.states, expected.states) < 1e-5
    assert found.status == (status,) * 3
    assert found.evaluations == (9 * 11,) * 3


@pytest.mark.parametrize("many", [True, False])
def test_each_model_chooses_by_its_own_outputs(ground, many):
    seen = []

    def choose(outputs):
        seen.append(outputs)
        return len(seen) - 1

    found = ended(ground, choose, many=many)
    assert found.status == ("rewound", "rewound", "finished")
    for i, steps in enumerate((3, 6, 9)):
        expected = unstack(after(ground, steps).states, i)
        assert largest_difference(unstack(found.states, i), expected) < 1e-5
        assert seen[i].shape == (3, 5, 3)
        model = replace(ground.full.model(0), state=unstack(found.states, i))
        own = model.outputs(ground.forget.rows)
        np.testing.assert_allclose(seen[i][i], own, rtol=0, atol=1e-4)


class TestScrubsChoice:
    task = three_blobs()

    def plan(self, forget, **settings):
        request = request_of(self.task, fresh_models(self.task, 1), forget)
        return Scrub(**settings).plan(request)

    def outputs(self, forget, wrong, wrong_classes):
        """One state for each number of wrong forget rows; at last, classes of test rows wrong."""
        own = self.task.rows("train", forget.rows)[1]
        labels = torch.cat([own, self.task.rows("test", self.reference_rows(forget))[1]])
        right = torch.eye(3)[labels].repeat(len(wrong), 1, 1)
        for state, count in enumerate(wrong):
            right[state, :count] = -right[state, :count]
        last = right[-1, len(forget) :]
        gone = torch.isin(labels[len(forget) :], torch.tensor(wrong_classes))
        last[gone] = -last[gone]
        return right

    def reference_rows(self, forget):
        _, wanted = self.task.rows("train", forget.rows)
        _, labels = self.task.rows("test", range(13))
        return np.flatnonzero(np.isin(labels, wanted))

    def test_the_reference_weighs_classes_as_the_forget_set_does(self):
        """Class 2 is 1 of 5 forget rows and 4 of 13 test rows: 0.2 is its error, not 0.31."""
        forget = ForgetSet.of(self.task, FORGET)
        choose = self.plan(forget).stopping.choose
        assert choose(self.outputs(forget, [0, 1, 2], [2])) == 1
        assert choose(self.outputs(forget, [0, 1, 2], [0])) == 2
        assert choose(self.outputs(forget, [0, 1, 2], [])) == 0

    def test_only_test_rows_of_the_forgotten_classes_are_read(self):
        forget = ForgetSet.at(self.task, [1, 4])
        plan = self.plan(forget)
        assert self.reference_rows(forget).tolist() == [1, 4, 7, 10]
        expected = self.task.rows("test", [1, 4, 7, 10])[0]
        assert torch.equal(plan.stopping.inputs[2:], expected)
        assert plan.stopping.choose(self.outputs(forget, [2, 1, 0, 2], [1])) == 3

    def test_of_equals_the_last_one_is_chosen(self):
        forget = ForgetSet.of(self.task, FORGET)
        choose = self.plan(forget).stopping.choose
        assert choose(self.outputs(forget, [1, 1, 3], [2])) == 1

    def test_states_are_kept_after_each_epoch_of_the_retain_rows(self):
        forget = ForgetSet.of(self.task, FORGET)
        plan = self.plan(forget, batch_size=8, forget_batch_size=2)
        assert plan.stopping.steps == (5, 13, 21)
        assert plan.order.shape == (1, 21, 8)
        assert self.plan(forget, rewind=False).stopping is None
