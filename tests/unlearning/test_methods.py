"""The contract of every method of the table."""

from dataclasses import dataclass, fields, replace
from itertools import product

import numpy as np
import pytest
import torch

from attribution import CrossEntropy, ForgetSet, Model, SquaredError, load_model
from attribution.outputs import evaluate
from attribution.seeds import derive_seed
from tests.unlearning.cases import (
    FORGET,
    MORE,
    Ground,
    assert_same_bits,
    copied,
    largest_difference,
)
from unlearning import Matching, ProjectedGradient, Unlearned, UnlearningMethod, unlearn_models
from unlearning.methods import METHODS, build_method
from unlearning.two_sides import divergence

# They are dmm by other predictors, which test_method_table tells apart.
ALIKE = {"dmm_datamodel", "dmm_linear", "dmm_newton"}
DISTINCT = [name for name in METHODS if name not in ALIKE]

# Chosen so that every method does something on five rows; the defaults are for more data.
MATCHING = {"passes": "8", "rate": "0.01", "batch_size": "16"}
# Retain rows stay as they are: in a step without forget rows Adam would follow rounding errors.
TAUGHT = {"retain_extra": "0"}
SETTINGS = {
    "do_nothing": {},
    "dmm": MATCHING,
    "om": MATCHING,
    "om_absolute": MATCHING,
    "match_reference": MATCHING | TAUGHT,
    "match_untrained": MATCHING | TAUGHT,
    "pgu": {
        "epochs": "90",
        "rate": "0.01",
        "last_rate": "0.01",
        "batch_size": "2",
        "reference": "0.5",
    },
    "dmm_pgu": MATCHING,
    "gradient_ascent": {"epochs": "5", "rate": "0.01", "batch_size": "2"},
    "fine_tune": {"epochs": "4", "rate": "0.01", "batch_size": "8"},
    "neggrad_plus": {"alpha": "0.6", "rate": "0.03", "batch_size": "8", "forget_batch_size": "3"},
    "ascent_descent": {"batch_size": "8", "forget_batch_size": "2"},
    "scrub": {
        "epochs": "6",
        "forget_epochs": "5",
        "rate": "0.006",
        "gamma": "1.0",
        "temperature": "2",
        "forget_batch_size": "1",
    },
    "ssd": {"selection": "1.2"},
    "salun": {"epochs": "2", "rate": "0.03", "batch_size": "8", "forget_batch_size": "3"},
    "bad_teacher": {"epochs": "8", "rate": "0.03", "batch_size": "8"},
}
DRAWS_NOTHING = {"do_nothing", "ssd"}
ENDINGS = {"do_nothing": {"unchanged"}, "pgu": {"crossed"}, "scrub": {"finished", "rewound"}}


@dataclass(frozen=True)
class Case:
    """One method, applied to one model of one ground."""

    name: str
    ground: Ground
    method: UnlearningMethod
    before: dict
    model: Model
    result: Unlearned

    def again(self, **changes):
        return self.method(self.model, self.ground.task, self.ground.forget, **changes)


@pytest.fixture(
    scope="module",
    params=product(DISTINCT, ["ground", "normalised_ground"]),
    ids="-".join,
)
def case(request):
    name, kind = request.param
    ground = request.getfixturevalue(kind)
    method = build_method(name, ground.evidence(), SETTINGS[name])
    model = ground.full.model(1)
    before = copied(model.state)
    return Case(name, ground, method, before, model, method(model, ground.task, ground.forget))


class TestContract:
    def test_the_model_given_is_not_changed(self, case):
        assert_same_bits(case.model.state, case.before)

    def test_only_doing_nothing_leaves_the_weights(self, case):
        moved = largest_difference(case.result.model.state, case.before)
        if case.name == "do_nothing":
            assert_same_bits(case.result.model.state, case.before)
        else:
            assert moved > 1e-3

    def test_batchnorm_statistics_stay_frozen(self, case):
        for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
            if name in case.before:
                assert torch.equal(case.result.model.state[name], case.before[name])

    def test_outputs_move_as_the_method_means_them_to(self, case):
        before, after = (
            DISTANCE[case.name](case, case.model),
            DISTANCE[case.name](case, case.result.model),
        )
        if case.name == "do_nothing":
            assert after == before
        else:
            assert after < before

    def test_it_tells_how_it_went(self, case):
        result, idle = case.result, case.name == "do_nothing"
        assert result.status in ENDINGS.get(case.name, {"finished"})
        assert (result.gradient_evaluations == 0) == idle
        assert len(result.history) == (0 if idle else 2)
        assert result.seconds >= 0
        assert (result.ending.steps == 0) == (case.name in DRAWS_NOTHING)
        assert 0 <= result.ending.kept <= result.ending.steps
        assert result.ending.reason

    def test_only_the_seed_counts_and_nothing_else_is_drawn(self, case):
        torch.manual_seed(1234)
        before = torch.get_rng_state()
        assert_same_bits(case.again(seed=0).model.state, case.result.model.state)
        assert torch.equal(torch.get_rng_state(), before)

    def test_moving_batchnorm_statistics_are_the_new_models_alone(self, case):
        known = {f.name for f in fields(case.method)}
        if "batchnorm" not in known or "1.running_mean" not in case.before:
            return
        # Sizes that leave no batch of one row, of which BatchNorm knows no variance.
        sizes = dict.fromkeys({"batch_size", "forget_batch_size"} & known, 6)
        moving = replace(case.method, batchnorm="update", **sizes)
        result = moving(case.model, case.ground.task, case.ground.forget)
        assert_same_bits(case.model.state, case.before)
        for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
            assert not torch.equal(result.model.state[name], case.before[name])

    def test_another_seed_gives_another_result(self, case):
        other = case.again(seed=1).model.state
        moved = largest_difference(other, case.result.model.state) > 0
        assert moved == (case.name not in DRAWS_NOTHING)

    def test_alone_it_ends_where_it_ends_among_many(self, case):
        many = unlearn_models(case.method, case.ground.full, case.ground.task, case.ground.forget)
        mine = {name: tensor[1] for name, tensor in many.states.items()}
        assert largest_difference(mine, case.result.model.state) < 1e-4
        assert sum(many.status.values()) == 3
        assert many.forgotten.ids == tuple(FORGET)

    def test_the_forgotten_rows_are_saved_and_loaded(self, case, tmp_path):
        saved = tmp_path / "model.safetensors"
        case.result.model.save(saved)
        loaded = load_model(case.ground.task, saved)
        assert case.result.model.forgotten.ids == tuple(FORGET)
        assert loaded.forgotten.positions == case.result.model.forgotten.positions
        assert largest_difference(loaded.state, case.result.model.state) == 0

    def test_a_saved_model_names_no_row(self, case, tmp_path):
        case.result.model.save(tmp_path / "model.safetensors")
        assert b"train-" not in (tmp_path / "model.safetensors").read_bytes()

    def test_the_provenance_tells_method_settings_and_seed(self, case):
        told = case.result.model.provenance
        assert told["method"] == type(case.method).__name__
        assert told["unlearning_seed"] == 0
        for field, text in SETTINGS[case.name].items():
            assert told["settings"][field] == float(text)

    def test_rows_forgotten_already_are_refused(self, case, tmp_path):
        case.result.model.save(tmp_path / "model.safetensors")
        loaded = load_model(case.ground.task, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="has forgotten all 5 rows of 'forget' already"):
            case.method(loaded, case.ground.task, case.ground.forget)
        fewer = ForgetSet.of(case.ground.task, FORGET[1:3], "few")
        with pytest.raises(ValueError, match="has forgotten all 2 rows of 'few' already"):
            case.method(loaded, case.ground.task, fewer)

    @pytest.mark.filterwarnings("ignore:the downdated second moments are indefinite")
    def test_more_rows_join_those_forgotten_before(self, case):
        method = build_method(case.name, case.ground.evidence(again=True), SETTINGS[case.name])
        some = ForgetSet.of(case.ground.task, [*FORGET[:2], *MORE])
        again = method(case.result.model, case.ground.task, some).model
        assert again.forgotten.ids == case.ground.both.ids

    def test_a_model_that_does_not_fit_is_refused(self, case):
        def attempt(state):
            case.method(replace(case.model, state=state), case.ground.task, case.ground.forget)

        state = copied(case.before)
        misshapen = state | {"0.weight": torch.zeros(9, 4)}
        nan = state | {"0.bias": torch.full((9,), torch.nan)}
        with pytest.raises(ValueError, match=r"key '0.weight' has shape \(9, 4\), the model's is"):
            attempt(misshapen)
        with pytest.raises(ValueError, match=r"unexpected key '7.weight'"):
            attempt(state | {"7.weight": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"the model has non-finite weights in key '0.bias'"):
            attempt(nan)
        del state["0.bias"]
        with pytest.raises(ValueError, match=r"key '0.bias' is missing"):
            attempt(state)

    def test_a_forget_set_of_other_data_is_refused(self, case):
        other = replace(case.ground.forget, total=40)
        with pytest.raises(ValueError, match="is drawn from 40 rows, task 'three blobs' has 41"):
            case.method(case.model, case.ground.task, other)


def _labels(case, rows):
    return case.ground.task.rows("train", rows)[1]


def _loss(case, model, rows):
    outputs = torch.from_numpy(model.outputs(rows))
    return float(torch.nn.functional.cross_entropy(outputs, _labels(case, rows)))


def _mismatch(case, model):
    rows = case.ground.forget.rows
    wanted = case.method.counterfactual.predict(case.model, case.ground.forget, rows).mean
    return float(np.square(model.outputs(rows) - wanted).mean())


def _divergence(case, model, rows, taught):
    outputs = torch.from_numpy(model.outputs(rows))
    found = divergence(CrossEntropy()).value(outputs, _labels(case, rows), taught)
    return float(found.mean())


def _distance_to_the_bad_teacher(case, model):
    rows = case.ground.forget.rows
    teacher = case.ground.task.new_model(derive_seed(0, "bad teacher"), 1)
    inputs, _ = case.ground.task.rows("train", rows)
    return _divergence(case, model, rows, evaluate(teacher, teacher.state_dict(), inputs))


def _obedience(case, model):
    forget = case.ground.forget
    retained, gone = (
        _divergence(case, model, rows, torch.from_numpy(case.model.outputs(rows)))
        for rows in (forget.retained, forget.rows)
    )
    return retained - gone


def _confidence(case, model):
    rows = case.ground.forget.rows
    probabilities = torch.from_numpy(model.outputs(rows)).softmax(1)
    return float(probabilities[torch.arange(len(rows)), _labels(case, rows)].mean())


# What each method is to bring down.
DISTANCE = {
    "do_nothing": lambda case, model: _loss(case, model, case.ground.forget.rows),
    "dmm": _mismatch,
    "om": _mismatch,
    "om_absolute": _mismatch,
    "match_reference": _mismatch,
    "match_untrained": _mismatch,
    "pgu": _confidence,
    "dmm_pgu": _mismatch,
    "gradient_ascent": lambda case, model: -_loss(case, model, case.ground.forget.rows),
    "fine_tune": lambda case, model: _loss(case, model, case.ground.forget.retained),
    "neggrad_plus": lambda case, model: -_loss(case, model, case.ground.forget.rows),
    "ascent_descent": lambda case, model: -_loss(case, model, case.ground.forget.rows),
    "scrub": _obedience,
    "ssd": lambda case, model: -_loss(case, model, case.ground.forget.rows),
    "salun": _confidence,
    "bad_teacher": _distance_to_the_bad_teacher,
}


def test_matching_an_average_oracle_moves_every_model_to_one_point(ground):
    method = Matching(ground.evidence(again=True).oracle(), passes=60, rate=0.02, batch_size=16)
    unlearned = unlearn_models(method, ground.full, ground.task, ground.both)
    rows = ground.both.rows
    spreads = [
        outputs[:, rows].std(0).mean() for outputs in (unlearned.outputs, ground.full.outputs)
    ]
    assert spreads[0] < 0.5 * spreads[1]


def test_predicting_starts_from_what_the_model_has_forgotten(ground):
    first, second = ground.forget, ForgetSet.of(ground.task, [*FORGET[:2], *MORE])
    model = replace(ground.full.model(0), forgotten=first)
    added = ground.datamodel.predict(model, second).mean - model.outputs()
    both, before = (ground.datamodel.change(forget).mean for forget in (ground.both, first))
    np.testing.assert_allclose(added, both - before, rtol=0, atol=1e-5)
    assert np.abs(added).max() > 0.1


def test_pgu_needs_class_probabilities(ground):
    task = replace(ground.task, loss=SquaredError())
    with pytest.raises(
        ValueError, match="PGU's loss needs class probabilities; the task's loss is Sq"
    ):
        ProjectedGradient(ground.moments)(ground.full.model(0), task, ground.forget)
