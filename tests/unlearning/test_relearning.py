"""Relearning against a loop of one model, and of models that know or never knew the rows."""

import numpy as np
import pytest
import torch

from attribution import ForgetSet
from attribution.descent import stack
from tests.audit_references import steps_to_relearn
from tests.unlearning.cases import assert_same_bits, branching, copied, fresh_models, three_blobs
from unlearning import relearning_steps

FORGET = [3, 10, 17, 24, 31]


def states_of(task, count):
    return stack([model.state for model in fresh_models(task, count)])


def goal_of(task, models, rows):
    _, labels = task.targets()
    outputs = torch.from_numpy(models.outputs)
    losses = task.loss.value(outputs, labels.expand(len(outputs), -1))
    return float(losses[:, rows].mean())


@pytest.mark.parametrize("made", ["many at once", "one by one"])
def test_it_counts_the_steps_of_a_plain_loop(made):
    task = three_blobs() if made == "many at once" else three_blobs(branching)
    models, forget = fresh_models(task, 4), ForgetSet.at(task, FORGET)
    states = stack([model.state for model in models])
    before = copied(states)
    # 1.2 is above the loss of some of the models, so that these need no step; 9 are too few.
    for goal, most in ((0.6, 60), (1.2, 60), (0.9, 9)):
        found = relearning_steps(task, states, forget, goal, rate=0.1, most=most)
        expected = [
            steps_to_relearn(task, model.state, forget.rows, goal, rate=0.1, most=most)
            for model in models
        ]
        assert found.tolist() == expected
    assert_same_bits(states, before)


def test_models_that_know_the_rows_are_back_before_models_that_never_saw_them(ground):
    forget, bank = ground.forget, ground.banks["forget"]
    goal = goal_of(ground.task, ground.full, forget.rows)
    options = {"rate": 0.02, "most": 500}
    original, oracles = (
        relearning_steps(ground.task, models.states(), forget, goal, **options)
        for models in (ground.full, bank)
    )
    assert np.median(original) + 5 < np.median(oracles) < np.inf


def test_what_is_never_reached_is_infinite():
    task = three_blobs()
    found = relearning_steps(task, states_of(task, 2), ForgetSet.at(task, FORGET), 0.0, most=3)
    assert found.tolist() == [np.inf, np.inf]


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"rate": np.inf}, {"most": 0}])
def test_a_rate_and_a_number_of_steps_above_zero_are_needed(wrong):
    task = three_blobs()
    with pytest.raises(ValueError, match="expected a rate above 0 and 1 step or more, got "):
        relearning_steps(task, states_of(task, 1), ForgetSet.at(task, FORGET), 0.1, **wrong)
