"""What a report says of several predictors."""

import re
from typing import Any

import pytest

from tests.unlearning.evaluations import (
    made_evaluation,
    page_of,
    text_of,
    text_of_page,
    with_newton,
)


@pytest.fixture
def evaluation() -> dict[str, Any]:
    return made_evaluation(["rand10", "rand50"])


def test_predictors_stand_side_by_side(evaluation: dict[str, Any]) -> None:
    page = page_of(with_newton(evaluation))
    text = text_of(page)
    for name, r2, percent in (("rand10", "0.89", "89"), ("rand50", "0.85", "88")):
        numbers = f"0.98 1.25 {percent} % 23.5"
        assert f"{name} datamodel {r2} {numbers} {r2} {numbers} " in text
        assert f"{name} newton 0.97 {numbers} {r2} {numbers} " in text
    assert "2 sets, random newton 0.97 0.98" in text
    assert "Slanted: the rows of several forget sets of one kind together." in text
    assert {f"{name}, predicted by {predictor}" for name in ("rand10", "rand50")
            for predictor in ("datamodel", "newton")} <= set(
        re.findall(r"<figcaption>([^<]*)", page))  # fmt: skip


def test_of_many_predictors_the_used_one_and_two_others_are_drawn(
    evaluation: dict[str, Any],
) -> None:
    many = with_newton(evaluation) | {"predictor": "combined"}
    assert "of other predictors" not in text_of_page(many)
    for block in many["forget_sets"].values():
        for name in ("combined", "linear", "trak"):
            block["predictions"][name] = block["predictions"]["newton"]
            block["rows"][name] = block["rows"]["newton"]
    page = page_of(many)
    captions = re.findall(r"<figcaption>(rand10, predicted[^<]*)", page)
    drawn = ("datamodel", "newton", "combined")
    assert captions == [f"rand10, predicted by {name}" for name in drawn]
    text = text_of(page)
    assert "of other predictors than these the table tells." in text
    assert "rand10 trak 0.97" in text
    assert "R² of the trak predictor" not in text


def test_the_predictor_that_matching_used_is_named_where_there_are_several(
    evaluation: dict[str, Any],
) -> None:
    assert "Matching used its" not in text_of_page(evaluation | {"predictor": "datamodel"})
    text = text_of_page(with_newton(evaluation))
    assert "the newton predictor on the forgotten rows is 0.97. Matching used its pred" in text
    assert text.count("Matching used its predictions.") == 1


def test_error_bars_are_compared_with_bars_of_one_width(evaluation: dict[str, Any]) -> None:
    text = text_of_page(with_newton(evaluation))
    assert "Those of newton hold 88 % to 89 % on the forgotten rows; on 0 of 2 forget" in text
    assert "1.81 1.71 2.47 rand10 newton logits" in text


def test_predictions_are_told_in_retrained_models(evaluation: dict[str, Any]) -> None:
    row = "rand10 datamodel 0.89 0.98 1.25 89 %"
    assert f"{row} 23.5 " in text_of_page(evaluation)
    for block in evaluation["forget_sets"].values():
        block["predictions"]["datamodel"]["margins"]["forget"]["most_models"] = 23.46
    assert f"{row} ≥ 23.5 " in text_of_page(evaluation)
    for block in evaluation["forget_sets"].values():
        del block["predictions"]["datamodel"]["margins"]["forget"]["retrained_models"]
    assert f"{row} – " in text_of_page(evaluation)


def test_evaluations_without_widths_still_tell_coverage(evaluation: dict[str, Any]) -> None:
    for block in evaluation["forget_sets"].values():
        for fit in block["predictions"]["datamodel"]["margins"].values():
            del fit["width"], fit["constant_width"], fit["interval_score"]
    text = text_of_page(evaluation)
    assert "Those of datamodel hold 88 % to 89 % on the forgotten rows." in text
