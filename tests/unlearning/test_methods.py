"""The contract of every method of the table, and how the table is read."""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch

from attribution import ForgetSet, Model, SquaredError, load_model
from tests.unlearning.cases import (
    FORGET,
    MORE,
    Fixed,
    Ground,
    assert_same_bits,
    copied,
    largest_difference,
)
from unlearning import Matching, ProjectedGradient, Unlearned, UnlearningMethod, unlearn_models
from unlearning.methods import METHODS, Evidence, build_method

# Chosen so that every method does something on five rows; the defaults are for more data.
MATCHING = {"passes": "8", "rate": "0.01", "batch_size": "16"}
SETTINGS = {
    "do_nothing": {},
    "dmm": MATCHING,
    "dmm_datamodel": MATCHING,
    "dmm_newton": MATCHING,
    "om": MATCHING,
    "om_absolute": MATCHING,
    "pgu": {"epochs": "90", "rate": "0.01", "last_rate": "0.01", "batch_size": "2"},
    "dmm_pgu": MATCHING,
    "gradient_ascent": {"epochs": "5", "rate": "0.01", "batch_size": "2"},
    "fine_tune": {"epochs": "4", "rate": "0.01", "batch_size": "8"},
}


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
    params=product(METHODS, ["ground", "normalised_ground"]),
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
        expected = {"do_nothing": "unchanged", "pgu": "crossed"}.get(case.name, "finished")
        assert result.status == expected
        assert (result.gradient_evaluations == 0) == idle
        assert len(result.history) == (0 if idle else 2)
        assert result.seconds >= 0

    def test_the_same_seed_gives_the_same_bits(self, case):
        assert_same_bits(case.again(seed=0).model.state, case.result.model.state)

    def test_another_seed_gives_another_result(self, case):
        other = case.again(seed=1).model.state
        assert (largest_difference(other, case.result.model.state) > 0) == (
            case.name != "do_nothing"
        )

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


def _confidence(case, model):
    rows = case.ground.forget.rows
    probabilities = torch.from_numpy(model.outputs(rows)).softmax(1)
    return float(probabilities[torch.arange(len(rows)), _labels(case, rows)].mean())


# What each method is to bring down.
DISTANCE = {
    "do_nothing": lambda case, model: _loss(case, model, case.ground.forget.rows),
    "dmm": _mismatch,
    "dmm_datamodel": _mismatch,
    "dmm_newton": _mismatch,
    "om": _mismatch,
    "om_absolute": _mismatch,
    "pgu": _confidence,
    "dmm_pgu": _mismatch,
    "gradient_ascent": lambda case, model: -_loss(case, model, case.ground.forget.rows),
    "fine_tune": lambda case, model: _loss(case, model, case.ground.forget.retained),
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


def nothing_given(*_):
    raise AssertionError("this evidence was opened")


NOTHING = Evidence(nothing_given, nothing_given, nothing_given)
ZERO = Fixed(np.zeros((54, 3), dtype=np.float32))
NAMES = ", ".join(METHODS)


@pytest.mark.parametrize(
    ("name", "opened"),
    [
        ("do_nothing", set()),
        ("gradient_ascent", set()),
        ("fine_tune", set()),
        ("dmm", {"predictor"}),
        ("dmm_datamodel", {"predictor"}),
        ("dmm_newton", {"predictor"}),
        ("om", {"oracle"}),
        ("pgu", {"moments"}),
        ("dmm_pgu", {"predictor", "moments"}),
    ],
)
def test_a_method_opens_only_the_evidence_it_needs(name, opened):
    used = set()
    kinds = ("predictor", "oracle", "moments")
    given = {kind: lambda *_, kind=kind: used.add(kind) for kind in kinds}
    build_method(name, Evidence(**given))
    assert used == opened


def test_settings_are_read_as_the_type_of_their_default():
    method = build_method(
        "fine_tune", NOTHING, {"epochs": "7", "rate": "1e-2", "batchnorm": "update"}
    )
    assert (method.epochs, method.rate, method.batchnorm) == (7, 0.01, "update")
    assert method.batch_size == build_method("fine_tune", NOTHING).batch_size


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=f"unknown method 'scrub': choose from {NAMES}"):
        build_method("scrub", NOTHING)


@pytest.mark.parametrize(
    ("name", "field", "listed"),
    [
        ("fine_tune", "epoch", "epochs, rate, batch_size, batchnorm"),
        ("do_nothing", "rate", "none"),
        ("dmm", "counterfactual", "passes, rate, batch_size"),
    ],
)
def test_an_unknown_setting_is_refused(name, field, listed):
    evidence = Evidence(lambda _: ZERO, nothing_given, nothing_given)
    message = f"method '{name}' has no setting '{field}'; it has: {listed}"
    with pytest.raises(ValueError, match=message):
        build_method(name, evidence, {field: "1"})


@pytest.mark.parametrize(
    ("field", "text", "kind"),
    [("epochs", "2.5", "int"), ("rate", "fast", "float"), ("epochs", "", "int")],
)
def test_a_setting_of_another_type_is_refused(field, text, kind):
    message = f"setting '{field}' of method 'gradient_ascent' takes {kind} values, got '{text}'"
    with pytest.raises(ValueError, match=message):
        build_method("gradient_ascent", NOTHING, {field: text})


@pytest.mark.parametrize(
    ("name", "field", "text", "message"),
    [
        ("dmm", "passes", "0", r"Matching.passes must be above 0 and finite, got 0.0"),
        ("dmm", "passes", "inf", r"Matching.passes must be above 0 and finite, got inf"),
        ("dmm", "rate", "-1", r"Matching.rate must be above 0"),
        ("dmm", "batch_size", "0", r"Matching.batch_size must be above 0"),
        (
            "dmm",
            "retain_multiplier",
            "-1",
            "retain_multiplier and retain_extra must be finite and not",
        ),
        (
            "dmm",
            "retain_multiplier",
            "nan",
            "retain_multiplier and retain_extra must be finite and not",
        ),
        ("dmm", "retain_extra", "-1", "retain_multiplier and retain_extra must be finite and not"),
        ("dmm", "batchnorm", "moving", "batchnorm must be 'frozen' or 'update', got 'moving'"),
        ("fine_tune", "epochs", "0", r"FineTune.epochs must be above 0"),
        ("fine_tune", "rate", "nan", r"FineTune.rate must be above 0"),
        ("fine_tune", "batch_size", "-3", r"FineTune.batch_size must be above 0"),
        ("fine_tune", "batchnorm", "", "batchnorm must be 'frozen' or 'update', got ''"),
        ("gradient_ascent", "epochs", "-1", r"GradientAscent.epochs must be above 0"),
        ("gradient_ascent", "rate", "0", r"GradientAscent.rate must be above 0"),
        ("gradient_ascent", "batch_size", "0", r"GradientAscent.batch_size must be above 0"),
        ("gradient_ascent", "batchnorm", "no", "batchnorm must be 'frozen' or 'update', got 'no'"),
        ("pgu", "epochs", "0", r"ProjectedGradient.epochs must be above 0"),
        ("pgu", "rate", "0", r"ProjectedGradient.rate must be above 0"),
        ("pgu", "last_rate", "0", r"ProjectedGradient.last_rate must be above 0"),
        ("pgu", "batch_size", "0", r"ProjectedGradient.batch_size must be above 0"),
        ("pgu", "offset", "0", r"ProjectedGradient.offset must be above 0"),
        ("pgu", "gamma", "0", r"gamma must lie in \(0, 1\], got 0.0"),
        ("pgu", "gamma", "1.1", r"gamma must lie in \(0, 1\], got 1.1"),
        ("pgu", "gamma", "nan", r"gamma must lie in \(0, 1\], got nan"),
    ],
)
def test_a_setting_outside_its_range_is_refused(ground, name, field, text, message):
    with pytest.raises(ValueError, match=message):
        build_method(name, ground.evidence(), {field: text})


def test_pgu_needs_class_probabilities(ground):
    task = replace(ground.task, loss=SquaredError())
    with pytest.raises(
        ValueError, match="PGU's loss needs class probabilities; the task's loss is Sq"
    ):
        ProjectedGradient(ground.moments)(ground.full.model(0), task, ground.forget)
