"""What every method of the table keeps to beside its contract; a new method inherits all of it."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from attribution import ForgetSet
from tests.unlearning.cases import FORGET, MORE, assert_same_bits, copied
from tests.unlearning.test_methods import DISTINCT, SETTINGS
from unlearning import GradientAscent, unlearn_models
from unlearning.methods import READERS, build_method

OUTSIDE = {bool: ["maybe"], str: ["", "nonsense"]}
"""Texts that no setting of a type takes; for numbers, those that no range holds."""


def settings_of(method, prefix=""):
    """Names and types of all settings that can be given as text."""
    found = {
        prefix + name: kind
        for name, field in method.__dataclass_fields__.items()
        if (kind := field.type) in READERS
    }
    backend = getattr(method, "backend", None)
    return found | (settings_of(backend, "backend.") if backend else {})


@pytest.fixture(params=DISTINCT)
def name(request):
    return request.param


@pytest.fixture
def method(ground, name):
    return build_method(name, ground.evidence(), SETTINGS[name])


def test_every_setting_refuses_what_it_cannot_be_and_names_itself(ground, name, method):
    for setting, kind in settings_of(method).items():
        for text in OUTSIDE.get(kind, ["-1", "nan", "inf", "0:nan", "x"]):
            told = "layer '0'" if text == "0:nan" and "gammas" in setting else setting
            with pytest.raises(ValueError, match=told.rpartition(".")[2]):
                build_method(name, ground.evidence(), {setting: text})


def test_no_random_state_but_its_own_is_read_or_moved(ground, method):
    def states():
        return torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002

    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before, threads = states(), torch.get_num_threads()
        results.append(method(ground.full.model(1), ground.task, ground.forget).model.state)
        after = states()
        assert torch.equal(before[0], after[0])
        np.testing.assert_array_equal(before[1], after[1])
        assert before[2] == after[2]
        assert (torch.is_grad_enabled(), torch.get_num_threads()) == (True, threads)
    assert_same_bits(*results)


def test_the_order_of_ids_does_not_matter(ground, method):
    turned = ForgetSet.of(ground.task, FORGET[::-1])
    model = ground.full.model(1)
    results = [method(model, ground.task, forget) for forget in (ground.forget, turned)]
    assert_same_bits(results[0].model.state, results[1].model.state)


@pytest.mark.filterwarnings("ignore:the downdated second moments are indefinite")
def test_what_came_of_the_first_request_is_not_changed_by_the_second(ground, name, method):
    first = unlearn_models(method, ground.full, ground.task, ground.forget)
    before, moments = copied(first.states), copied(first.moments or {})
    again = build_method(name, ground.evidence(again=True), SETTINGS[name])
    second = unlearn_models(again, first, ground.task, ForgetSet.of(ground.task, MORE))
    assert_same_bits(first.states, before)
    assert_same_bits(first.moments or {}, moments)
    moved = any(not torch.equal(second.states[key], before[key]) for key in before)
    assert moved == (name != "do_nothing")


def test_batchnorm_statistics_move_in_the_new_model_alone_and_only_if_asked(
    normalised_ground, name
):
    ground = normalised_ground
    # Batches of 6 leave no single row over, neither of the forget nor of the retain rows.
    method = build_method(name, ground.evidence(), SETTINGS[name])
    if not hasattr(method, "batchnorm"):
        pytest.skip("the method has no policy: its contract says that they stay")
    sizes = [field for field in method.__dataclass_fields__ if field.endswith("batch_size")]
    method = replace(method, batchnorm="update", **dict.fromkeys(sizes, 6))
    model = ground.full.model(1)
    before = copied(model.state)
    result = method(model, ground.task, ground.forget)
    assert_same_bits(model.state, before)
    for key in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert not torch.equal(result.model.state[key], before[key]), key


def test_a_single_row_that_batchnorm_cannot_take_is_refused_with_the_cure(normalised_ground):
    """Five rows in steps of two leave steps of one."""
    ground = normalised_ground
    method = GradientAscent(batch_size=2, batchnorm="update")
    with pytest.raises(ValueError, match=r"a step has one row only, .* choose a batch size of 3"):
        method(ground.full.model(1), ground.task, ground.forget)
