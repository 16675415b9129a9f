"""How the table of methods is read: names, what each needs, and settings given as text."""

from dataclasses import replace

import numpy as np
import pytest

from tests.unlearning.cases import Fixed
from tests.unlearning.test_methods import ALIKE
from unlearning.method import told_settings
from unlearning.methods import METHODS, Evidence, build_method, settable
from unlearning.projection import Gammas


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
        ("neggrad_plus", set()),
        ("ascent_descent", set()),
        ("scrub", set()),
        ("ssd", set()),
        ("salun", set()),
        ("bad_teacher", set()),
        ("dmm", {"predictor"}),
        ("dmm_datamodel", {"predictor"}),
        ("dmm_linear", {"predictor"}),
        ("dmm_newton", {"predictor"}),
        ("om", {"oracle"}),
        ("match_reference", {"full"}),
        ("match_untrained", {"full"}),
        ("pgu", {"moments"}),
        ("dmm_pgu", {"predictor", "moments"}),
    ],
)
def test_a_method_opens_only_the_evidence_it_needs(name, opened):
    used = set()
    kinds = ("predictor", "oracle", "moments", "full")
    given = {kind: lambda *_, kind=kind: used.add(kind) for kind in kinds}
    build_method(name, Evidence(**given))
    assert used == opened


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("dmm", None),
        ("dmm_pgu", None),
        ("dmm_datamodel", "datamodel"),
        ("dmm_linear", "linear"),
        ("dmm_newton", "newton"),
    ],
)
def test_matching_asks_for_the_predictor_of_its_name(name, asked):
    predictors = {key: replace(ZERO) for key in (None, "datamodel", "linear", "newton")}
    given = Evidence(predictors.__getitem__, nothing_given, lambda: None)
    found = build_method(name, given)
    assert found.counterfactual is predictors[asked]
    if name in ALIKE:
        plain = build_method("dmm", given)
        assert replace(found, counterfactual=plain.counterfactual) == plain


@pytest.mark.parametrize(("name", "absolute"), [("om", False), ("om_absolute", True)])
def test_oracles_are_matched_as_a_change_or_as_they_are(name, absolute, ground):
    assert build_method(name, ground.evidence()).counterfactual.absolute is absolute


def test_settings_are_read_as_the_type_of_their_default():
    method = build_method(
        "fine_tune", NOTHING, {"epochs": "7", "rate": "1e-2", "batchnorm": "update"}
    )
    assert (method.epochs, method.rate, method.batchnorm) == (7, 0.01, "update")
    assert method.batch_size == build_method("fine_tune", NOTHING).batch_size


def test_a_switch_is_read_as_true_or_false():
    for text, value in {"true": True, "false": False}.items():
        assert build_method("scrub", NOTHING, {"rewind": text}).rewind is value
    with pytest.raises(ValueError, match="'rewind' of method 'scrub' takes true or false, got 'no"):
        build_method("scrub", NOTHING, {"rewind": "no"})


def test_gammas_are_read_by_layer():
    method = build_method("pgu", Evidence(nothing_given, nothing_given, lambda: None),
                          {"layer_gammas": "0:0.9,4.conv:0.95"})  # fmt: skip
    assert method.layer_gammas == {"0": 0.9, "4.conv": 0.95}
    assert told_settings(method)["layer_gammas"] == {"0": 0.9, "4.conv": 0.95}


def test_settings_of_the_backend_are_reached_by_its_name():
    given = Evidence(lambda _: ZERO, nothing_given, lambda: None)
    settings = {"backend.gamma": "0.9", "backend.threshold": "squares", "passes": "3"}
    method = build_method("dmm_pgu", given, settings)
    assert (method.backend.gamma, method.backend.threshold, method.passes) == (0.9, "squares", 3)
    assert told_settings(method)["backend"] == {
        "kind": "GradientProjection", "gamma": 0.9, "threshold": "squares", "layer_gammas": {},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"'dmm' has no setting 'backend.gamma'; it has: passes"):
        build_method("dmm", given, {"backend.gamma": "0.9"})


def test_a_reference_is_a_number_or_none():
    given = Evidence(nothing_given, nothing_given, lambda: None)
    found = [build_method("pgu", given, {"reference": t}).reference for t in ("0.25", "none")]
    assert found == [0.25, None]
    with pytest.raises(ValueError, match=r"'reference' of method 'pgu' takes float values or none"):
        build_method("pgu", given, {"reference": "chance"})


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=f"unknown method 'forgetting': choose from {NAMES}"):
        build_method("forgetting", NOTHING)


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
        ("pgu", "entropy_weight", "-1", r"ProjectedGradient.entropy_weight must be finite and not"),
        ("pgu", "entropy", "lower", "entropy must be 'raise' or 'lower_others', got 'lower'"),
        ("pgu", "reference", "1.5", r"reference must lie in \[0, 1\], got 1.5"),
        ("pgu", "threshold", "S", "threshold must be 'values' or 'squares', got 'S'"),
        ("pgu", "layer_gammas", "0:2", r"gamma of layer '0' must lie in \(0, 1\], got 2.0"),
        ("pgu", "layer_gammas", "0.9", "takes LAYER:NUMBER, separated by commas, got '0.9'"),
        ("dmm_pgu", "backend.gamma", "0", r"gamma must lie in \(0, 1\], got 0.0"),
        ("pgu", "gamma", "0", r"gamma must lie in \(0, 1\], got 0.0"),
        ("pgu", "gamma", "1.1", r"gamma must lie in \(0, 1\], got 1.1"),
        ("pgu", "gamma", "nan", r"gamma must lie in \(0, 1\], got nan"),
    ],
)
def test_a_setting_outside_its_range_is_refused(ground, name, field, text, message):
    with pytest.raises(ValueError, match=message):
        build_method(name, ground.evidence(), {field: text})


# What no setting of that annotation may be; a method that takes it has forgotten a check.
NONSENSE = {
    bool: ["maybe", ""],
    int: ["-1", "2.5", "many"],
    float: ["nan", "inf", "-1", "much"],
    str: ["no such word", ""],
    float | None: ["nan", "-1", "much"],
    Gammas: ["0:nan", "0:0", "0=0.5", "0:much"],
}


@pytest.mark.parametrize("name", METHODS)
def test_no_setting_of_any_method_takes_nonsense(ground, name):
    given = ground.evidence()
    for setting, kind in settable(build_method(name, given)).items():
        for text in NONSENSE[kind]:
            with pytest.raises(ValueError, match=r"\w"):
                build_method(name, given, {setting: text})
